"""The op alone: raw map, ReLU, min-max and 224 x 224 pixels, from activations and gradients.

    python benchmarks/bench_op.py [--json FILE] [--quick] [-k EXPRESSION]
    python benchmarks/bench_op.py --table FILE
    python benchmarks/bench_op.py --device cuda [--json FILE] [-k TEXT] [--seconds N]

Cases are layers of real networks. In one run, on the same tensors:

    gradcampp_ext   gx.cam
    eager           the formula in PyTorch, operator by operator
    compile         the same function through torch.compile, warmed up
    numpy           the same formula in NumPy, image by image, resized by OpenCV, as
                    pytorch-grad-cam does it (maps of pictures only)
    floor           reading both tensors and writing the output: a.sum(), g.sum(), fill

On the CPU each call finds its tensors outside the last-level cache: calls go round a set of tensors
that is three times as large. (Inside a network the layer has just been written, and caches are
warmer.)
A result is checked against the float64 oracle before it is timed. The contenders of a case take
turns, several times over, so that a machine that slows down slows all of them. Times are taken by
pytest-benchmark; the JSON is its format, with all turns of a contender in one entry. Ratios are of
medians over the same case. A full run takes a quarter of an hour on two cores.

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
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import environment
import numpy as np
import pytest
import torch
from pytest_benchmark.stats import Stats
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
    "convnext_tiny.stage1": (96, 56, 56),
    "convnext_tiny.stage2": (192, 28, 28),
    "convnext_tiny.stage3": (384, 14, 14),
    "convnext_tiny.stage4": (768, 7, 7),
    "vit_b_16.tokens": (768, 14, 14),
    "unet3d.level3": (128, 16, 16, 16),
}
TENFOLD = ("resnet50.layer3", "resnet50.layer4")  # with ten targets too
SIZES = {2: (224, 224), 3: (64, 64, 64)}  # of the maps, by the number of spatial dimensions
CONTENDERS = ("floor", "gradcampp_ext", "compile", "eager", "numpy")
TURNS = 3
TURN_SECONDS, TURN_ROUNDS = 0.15, (2, 15)  # how long a contender's turn is, within these bounds
QUICK = "resnet50 and -8-"


@dataclass(frozen=True)
class Case:
    layer: str
    batch: int
    dtype: torch.dtype
    layout: str
    targets: int = 1

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        targets = "" if self.targets == 1 else f"-K{self.targets}"
        return f"{self.layer}-{self.batch}-{dtype}-{self.layout}{targets}"

    @property
    def size(self) -> tuple[int, ...]:
        return SIZES[len(LAYERS[self.layer]) - 1]

    @property
    def input_bytes(self) -> int:
        elements = self.batch * int(np.prod(LAYERS[self.layer]))
        return (1 + self.targets) * elements * self.dtype.itemsize

    @property
    def output_bytes(self) -> int:
        return 4 * self.batch * self.targets * int(np.prod(self.size))

    def tensors(self, device: str) -> tuple[Tensor, Tensor]:
        """Activations [N, C, *S] and gradients [N, C, *S], or [N, K, C, *S] for K targets."""
        a, g = self._tensor(self.batch, device), self._tensor(self.batch * self.targets, device)
        return a, g if self.targets == 1 else g.unflatten(0, (self.batch, self.targets))

    def _tensor(self, samples: int, device: str) -> Tensor:
        channels, *space = LAYERS[self.layer]
        if self.layout == "contiguous":
            return torch.randn(samples, channels, *space, device=device).to(self.dtype)
        # The class token stands first.
        prefix = 1 if self.layout == "tokens" else 0
        positions = prefix + int(np.prod(space))
        rows = torch.randn(samples, positions, channels, device=device).to(self.dtype)
        return rows[:, prefix:].unflatten(1, tuple(space)).movedim(-1, 1)


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
        Case("resnet50.layer4", 32, f32, contiguous, targets=10),
        Case("resnet50.layer3", 64, bf16, contiguous, targets=10),
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
        if batch == 8 and layer in TENFOLD:
            chosen += [Case(layer, batch, dtype, layout, targets=10) for layout in layouts]
    return chosen


def map_size(a: Tensor) -> tuple[int, ...]:
    return SIZES[a.dim() - 2]


def ours(a: Tensor, g: Tensor) -> Tensor:
    return gx.cam(a, g, size=map_size(a))


def formula(a: Tensor, g: Tensor) -> Tensor:
    single, size = g.dim() == a.dim(), map_size(a)
    space = tuple(range(2, a.dim()))
    a, g = a.float().relu(), g.float()
    total = a.sum(space, keepdim=True)
    if not single:
        a, total, space = a.unsqueeze(1), total.unsqueeze(1), tuple(range(3, g.dim()))
    weights = torch.where(g > 0, g / (2 + total * g), 0).sum(space, keepdim=True)
    maps = (weights * a).sum(1 if single else 2).relu()
    maps = maps.unsqueeze(1) if single else maps
    space = tuple(range(2, maps.dim()))
    low, high = maps.amin(space, keepdim=True), maps.amax(space, keepdim=True)
    maps = torch.where(high == low, 0, (maps - low) / (high - low))
    mode = "bilinear" if len(size) == 2 else "trilinear"
    resized = functional.interpolate(maps, size, mode=mode)
    return resized[:, 0] if single else resized


def by_numpy(a: Tensor, g: Tensor) -> Tensor:
    import cv2

    activations, gradients = (x.float().cpu().numpy() for x in (a, g))
    activations = np.maximum(activations, 0)
    total = activations.sum(axis=(2, 3), keepdims=True)
    if g.dim() > a.dim():
        activations, total = activations[:, None], total[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):  # where gradients are negative
        terms = np.where(gradients > 0, gradients / (2 + total * gradients), 0)
    maps = np.maximum((terms.sum(axis=(-2, -1), keepdims=True) * activations).sum(axis=-3), 0)
    resized = []
    for one in maps.reshape(-1, *maps.shape[-2:]):
        spread = one.max() - one.min()
        one = cv2.resize((one - one.min()) / (spread or 1), map_size(a)[::-1])
        resized.append(one)
    return torch.from_numpy(np.stack(resized).reshape(*maps.shape[:-2], *map_size(a)))


def floor(a: Tensor, g: Tensor) -> Tensor:
    a.sum()
    g.sum()
    shape = (*g.shape[: g.dim() - a.dim() + 1], *map_size(a))
    return torch.full(shape, 0.0, device=a.device)


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


class Bench:
    """One case: its tensors, what is expected, and the contenders, each checked once."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case = case
        copies = max(2, -(-3 * cache_bytes() // case.input_bytes))
        self.pairs = [case.tensors("cpu") for _ in range(min(copies, 400))]
        self._next = itertools.cycle(self.pairs)
        self._expected = reference.cam(*self.pairs[0], size=case.size)
        self._ready: dict[str, tuple[Any, int]] = {}

    def arguments(self) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
        return next(self._next), {}

    def ready(self, name: str) -> tuple[Any, int]:
        """The call that is timed, and how often in a turn."""
        if name not in self._ready:
            self._ready[name] = self._prepare(name)
        return self._ready[name]

    def _prepare(self, name: str) -> tuple[Any, int]:
        call = contender(name)
        maps = call(*self.pairs[0]).double()
        if name != "floor":
            wrong = (maps - self._expected).norm() / self._expected.norm()
            assert wrong <= 1e-4, f"a wrong answer is not timed: {wrong:.1e} from the oracle"
        start = time.perf_counter()
        call(*self.pairs[1])
        seconds = time.perf_counter() - start
        least, most = TURN_ROUNDS
        return call, max(least, min(most, int(TURN_SECONDS / seconds)))


@pytest.fixture(params=cases(), ids=lambda case: case.name, scope="module")
def bench(request) -> Bench:
    return Bench(request.param)


@pytest.mark.parametrize(
    ("turn", "name"), list(itertools.product(range(TURNS), CONTENDERS)), ids=str
)
def test_op(benchmark, bench, turn, name):
    case = bench.case
    if name == "numpy" and len(case.size) != 2:
        pytest.skip("OpenCV resizes pictures")
    call, rounds = bench.ready(name)
    benchmark.group = case.name
    benchmark.extra_info.update(
        case=case.name,
        contender=name,
        bytes=case.input_bytes + case.output_bytes,
        input_bytes=case.input_bytes,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )
    benchmark.pedantic(call, setup=bench.arguments, rounds=rounds, warmup_rounds=1)


def merged(report: dict[str, Any]) -> dict[str, Any]:
    """pytest-benchmark's report with the turns of a contender made into one entry."""
    entries: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in report["benchmarks"]:
        contender = entry["extra_info"]["contender"]
        kept = entries.setdefault((entry["group"], contender), entry)
        if kept is not entry:
            kept["stats"]["data"] += entry["stats"]["data"]
    for (group, contender), entry in entries.items():
        stats = Stats()
        for seconds in entry["stats"]["data"]:
            stats.update(seconds)
        name = f"test_op[{group}-{contender}]"
        entry.update(
            name=name,
            fullname=f"benchmarks/bench_op.py::{name}",
            param=f"{group}-{contender}",
            params=None,
            stats={**stats.as_dict(), "iterations": 1},
        )
    return {**report, "benchmarks": list(entries.values())}


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
    of_floor: dict[str, list[float]] = {}
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
        if "floor" in group:
            size = "of 6 MB and more" if mine["extra_info"]["input_bytes"] >= 6e6 else "below 6 MB"
            of_floor.setdefault(size, []).append(median / group["floor"]["stats"]["median"])
    medians = [
        f"{statistics.median(ratios[o]):.2f}" if o in ratios else ""
        for o in ("floor", "compile", "eager", "numpy")
    ]
    lines.append(f"| median | | | | {' | '.join(medians)} |")
    for size, found in of_floor.items():
        lines.append(
            f"| inputs {size}: median, largest | | | | "
            f"{statistics.median(found):.2f}, {max(found):.2f} | | | |"
        )
    if "compile" in ratios:
        lines.append(f"| smallest | | | | | {min(ratios['compile']):.2f} | | |")
    return "\n".join([*lines, *_targets(groups)])


def _targets(groups: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Ten targets beside one, where a case was measured with both."""
    rows = []
    for name, group in groups.items():
        one = groups.get(name.removesuffix("-K10"))
        if name.endswith("-K10") and one is not None:
            single, tenfold = (g["gradcampp_ext"]["stats"]["median"] for g in (one, group))
            name = name.removesuffix("-K10")
            rows.append(
                f"| {name} | {single * 1e6:.0f} | {tenfold * 1e6:.0f} | {tenfold / single:.1f} |"
            )
    if not rows:
        return []
    return ["", "| case | K=1, us | K=10, us | ratio |", "| --- | ---: | ---: | ---: |", *rows]


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
            "triton": lambda: lambda a, g: triton_cam.cam(a, g, SIZES[2], processors),
            "eager": lambda: formula,
        },
        lambda a, g: reference.cam(a, g, size=SIZES[2]),
        seconds,
    )
    report = {
        "about": environment.about("cuda"),
        "card": op_on_cuda.card(),
        "benchmarks": entries,
        "left_out": left_out,
    }
    if file:
        environment.write(file, report)
    print(op_on_cuda.table(report))
    return 1 if left_out or not entries else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the op beside its peers.")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="where the JSON goes")
    parser.add_argument("--table", type=Path, help="measure nothing, show such JSON of the CPU")
    parser.add_argument("--quick", action="store_true", help="CPU: ResNet-50 at batch 8 alone")
    parser.add_argument("-k", default="", help="which cases: CPU as in pytest, CUDA a part")
    parser.add_argument("--seconds", type=float, default=600, help="on CUDA, about how long")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text(encoding="utf-8"))))
        return 0
    if options.device == "cuda":
        return on_cuda(options.json, options.k, options.seconds)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "op.json")
        code = pytest.main(
            [
                __file__,
                "-q",
                "--benchmark-enable",
                "--benchmark-quiet",
                "--benchmark-save-data",
                "-p",
                "no:cacheprovider",
                f"--benchmark-json={file}",
                "-k",
                options.k or (QUICK if options.quick else ""),
            ]
        )
        if not file.exists():
            return int(code)
        report = merged(json.loads(file.read_text(encoding="utf-8")))
    report["about"] = environment.about()
    if options.json:
        environment.write(options.json, report)
    print(table(report))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
