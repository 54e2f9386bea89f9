"""The op alone: raw map, ReLU, min-max and 224 x 224 pixels, from activations and gradients.

    python benchmarks/bench_op.py [--json FILE] [-k EXPRESSION]
    python benchmarks/bench_op.py --device cuda [--json FILE] [-k TEXT] [--seconds N]

Cases are layers of real networks. In one run, on the same tensors:

    gradcampp_ext   gx.cam
    eager           the formula in PyTorch, operator by operator
    compile         the same function through torch.compile, warmed up
    numpy           the same formula in NumPy, image by image, resized by OpenCV, as
                    pytorch-grad-cam does it
    floor           reading both tensors and writing the output: a.sum(), g.sum(), fill

On the CPU each call finds its tensors outside the last-level cache: calls go round a set of tensors
that is three times as large. (Inside a network the layer has just been written, and caches are
warmer.)
A result is checked against the float64 oracle before it is timed. Times are taken by
pytest-benchmark; the JSON is its format. Ratios are of medians over the same case.

On a GPU (op_on_cuda.py) NumPy's place is taken by a Triton kernel (triton_cam.py) and the floor's
by the card's measured copy bandwidth, and the cases are larger.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import environment
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import gradcampp_ext as gx
from gradcampp_ext import _native, reference

LAYERS = {
    "resnet50.layer1": (256, 56, 56),
    "resnet50.layer2": (512, 28, 28),
    "resnet50.layer3": (1024, 14, 14),
    "resnet50.layer4": (2048, 7, 7),
    "vgg16.features": (512, 14, 14),
    "efficientnet_lite0.head": (1280, 7, 7),
    "efficientnet_lite0.block": (112, 14, 14),
    "convnext_tiny.stage2": (192, 28, 28),
    "convnext_tiny.stage4": (768, 7, 7),
    "vit_b_16.tokens": (768, 14, 14),
}
SIZE = (224, 224)
ROUNDS = 40


@dataclass(frozen=True)
class Case:
    layer: str
    batch: int
    dtype: torch.dtype
    layout: str

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.layer}-{self.batch}-{dtype}-{self.layout}"

    @property
    def input_bytes(self) -> int:
        return 2 * self.batch * int(np.prod(LAYERS[self.layer])) * self.dtype.itemsize

    def tensors(self, device: str) -> tuple[Tensor, Tensor]:
        channels, height, width = LAYERS[self.layer]
        shape = (self.batch, channels, height, width)
        if self.layout == "tokens":  # [N, 1 + h w, C], the class token first
            a, g = (
                torch.randn(self.batch, 1 + height * width, channels, device=device)
                .to(self.dtype)[:, 1:]
                .unflatten(1, (height, width))
                .permute(0, 3, 1, 2)
                for _ in range(2)
            )
            return a, g
        order = torch.channels_last if self.layout == "channels_last" else torch.contiguous_format
        a, g = (
            torch.randn(shape, device=device).to(self.dtype).to(memory_format=order)
            for _ in range(2)
        )
        return a, g


def cuda_cases() -> list[Case]:
    """What matters most comes first: a run may be short of time."""
    f32, bf16 = torch.float32, torch.bfloat16
    contiguous, channels_last, tokens = "contiguous", "channels_last", "tokens"
    return [
        Case("resnet50.layer4", 1, f32, contiguous),
        Case("resnet50.layer4", 32, f32, contiguous),
        Case("resnet50.layer4", 256, f32, contiguous),
        Case("resnet50.layer1", 32, f32, contiguous),
        Case("resnet50.layer4", 256, bf16, channels_last),
        Case("resnet50.layer1", 32, bf16, channels_last),
        Case("vit_b_16.tokens", 256, bf16, tokens),
        Case("resnet50.layer2", 32, f32, contiguous),
        Case("resnet50.layer3", 64, f32, contiguous),
        Case("efficientnet_lite0.head", 1, f32, contiguous),
        Case("resnet50.layer1", 1, f32, contiguous),
        Case("vit_b_16.tokens", 1, f32, tokens),
        Case("vgg16.features", 128, f32, contiguous),
        Case("resnet50.layer3", 64, bf16, contiguous),
        Case("convnext_tiny.stage2", 32, f32, channels_last),
        Case("convnext_tiny.stage4", 32, bf16, channels_last),
        Case("resnet50.layer4", 8, f32, contiguous),
        Case("resnet50.layer1", 8, f32, channels_last),
        Case("efficientnet_lite0.block", 32, bf16, contiguous),
        Case("resnet50.layer2", 128, bf16, contiguous),
    ]


def cases() -> list[Case]:
    chosen = []
    for layer, batch, dtype in itertools.product(
        LAYERS, (1, 8, 32), (torch.float32, torch.bfloat16)
    ):
        layouts = ("tokens",) if "tokens" in layer else ("contiguous", "channels_last")
        # Every layout and dtype at batch 8, the usual one at the others.
        if batch != 8:
            layouts = layouts[:1] if dtype == torch.float32 else ()
        chosen += [Case(layer, batch, dtype, layout) for layout in layouts]
    return chosen


def ours(a: Tensor, g: Tensor) -> Tensor:
    return gx.cam(a, g, size=SIZE)


def formula(a: Tensor, g: Tensor) -> Tensor:
    a, g = a.float().relu(), g.float()
    total = a.sum((2, 3), keepdim=True)
    weights = torch.where(g > 0, g / (2 + total * g), 0).sum((2, 3), keepdim=True)
    maps = (weights * a).sum(1, keepdim=True).relu()
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    maps = torch.where(high == low, 0, (maps - low) / (high - low))
    return functional.interpolate(maps, SIZE, mode="bilinear")[:, 0]


def by_numpy(a: Tensor, g: Tensor) -> Tensor:
    import cv2

    activations, gradients = (x.float().cpu().numpy() for x in (a, g))
    activations = np.maximum(activations, 0)
    total = activations.sum(axis=(2, 3), keepdims=True)
    denominator = 2 + total * gradients
    weights = np.where(gradients > 0, gradients / denominator, 0).sum(axis=(2, 3), keepdims=True)
    maps = np.maximum((weights * activations).sum(axis=1), 0)
    resized = []
    for one in maps:
        spread = one.max() - one.min()
        resized.append(cv2.resize((one - one.min()) / (spread or 1), SIZE[::-1]))
    return torch.from_numpy(np.stack(resized))


def floor(a: Tensor, g: Tensor) -> Tensor:
    a.sum()
    g.sum()
    return torch.full((a.shape[0], *SIZE), 0.0, device=a.device)


def compiled() -> Any:
    torch._dynamo.reset()
    return torch.compile(formula, dynamic=False)


def contender(name: str) -> Any:
    if name == "compile":
        return compiled()
    return {"gradcampp_ext": ours, "eager": formula, "numpy": by_numpy, "floor": floor}[name]


def cache_bytes() -> int:
    levels = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max(
        (int(f.read_text().strip().removesuffix("K")) << 10 for f in levels), default=32 << 20
    )


@pytest.fixture(params=cases(), ids=lambda case: case.name, scope="module")
def tensors(request) -> tuple[Case, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    case: Case = request.param
    copies = max(2, -(-3 * cache_bytes() // case.input_bytes))
    return case, [case.tensors("cpu") for _ in range(min(copies, 400))]


@pytest.mark.parametrize("name", ["floor", "gradcampp_ext", "compile", "eager", "numpy"])
def test_op(benchmark, tensors, name):
    case, pairs = tensors
    run = contender(name)
    if name != "floor":
        expected = reference.cam(*pairs[0], size=SIZE)
        actual = run(*pairs[0]).double()
        assert (actual - expected).norm() <= 1e-4 * expected.norm(), "a wrong answer is not timed"
    run(*pairs[0])
    rotation = itertools.cycle(pairs)
    rounds = ROUNDS if name in ("floor", "gradcampp_ext", "compile") else 5
    benchmark.group = case.name
    benchmark.extra_info.update(
        case=case.name,
        contender=name,
        bytes=case.input_bytes + 4 * case.batch * SIZE[0] * SIZE[1],
        input_bytes=case.input_bytes,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )

    benchmark.pedantic(run, setup=lambda: (next(rotation), {}), rounds=rounds, warmup_rounds=2)


def table(report: dict[str, Any]) -> str:
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in report["benchmarks"]:
        groups.setdefault(entry["group"], {})[entry["extra_info"]["contender"]] = entry
    lines = [
        "| case | MB in | ours, us (IQR) | GB/s | of floor | compile / ours | eager / ours | "
        "numpy / ours |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    ratios: dict[str, list[float]] = {}
    for name, group in groups.items():
        mine = group["gradcampp_ext"]
        median = mine["stats"]["median"]
        cells = [
            name,
            f"{mine['extra_info']['input_bytes'] / 1e6:.1f}",
            f"{median * 1e6:.0f} ({mine['stats']['iqr'] * 1e6:.0f})",
            f"{mine['extra_info']['bytes'] / median / 1e9:.1f}",
        ]
        for other in ("floor", "compile", "eager", "numpy"):
            if other not in group:
                cells.append("")
                continue
            ratio = group[other]["stats"]["median"] / median
            ratio = 1 / ratio if other == "floor" else ratio
            ratios.setdefault(other, []).append(ratio)
            cells.append(f"{ratio:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    medians = [
        f"{statistics.median(ratios[o]):.2f}" if o in ratios else ""
        for o in ("floor", "compile", "eager", "numpy")
    ]
    lines.append(f"| median | | | | {' | '.join(medians)} |")
    return "\n".join(lines)


def on_cuda(file: Path | None, text: str, seconds: float) -> int:
    """0, or 1 where something was left out."""
    missing = _native.status().cuda_missing
    if missing:
        print(f"bench_op.py: CUDA cannot be used: {missing}", file=sys.stderr)
        return 1
    import op_on_cuda
    import triton_cam

    processors = torch.cuda.get_device_properties().multi_processor_count
    entries, left_out = op_on_cuda.measure(
        [case for case in cuda_cases() if text in case.name],
        {
            "gradcampp_ext": lambda: ours,
            "compile": compiled,
            "triton": lambda: lambda a, g: triton_cam.cam(a, g, SIZE, processors),
            "eager": lambda: formula,
        },
        lambda a, g: reference.cam(a, g, size=SIZE),
        seconds,
    )
    report = {
        "about": environment.about("cuda"),
        "card": op_on_cuda.card(),
        "benchmarks": entries,
        "left_out": left_out,
    }
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(op_on_cuda.table(report))
    return 1 if left_out or not entries else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the op beside its peers.")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="where the JSON goes")
    parser.add_argument("-k", default="", help="which cases: CPU as in pytest, CUDA a part")
    parser.add_argument("--seconds", type=float, default=600, help="on CUDA, about how long")
    options = parser.parse_args()
    if options.device == "cuda":
        return on_cuda(options.json, options.k, options.seconds)
    with tempfile.TemporaryDirectory() as folder:
        file = options.json or Path(folder, "op.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        code = pytest.main(
            [
                __file__,
                "-q",
                "--benchmark-enable",
                "-p",
                "no:cacheprovider",
                "--benchmark-columns=median,iqr",
                f"--benchmark-json={file}",
                "-k",
                options.k,
            ]
        )
        if file.exists():
            print(table(json.loads(file.read_text())))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
