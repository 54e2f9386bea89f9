"""Images a second from pictures to maps, with ResNet-50, beside the peers and plain inference.

    python benchmarks/bench_end_to_end.py [--minutes 12] [--json FILE] [--quick]

In one run, on the same model (random weights) and the same images (224 x 224):

    inference          model(images) under no_grad; what every other row has to pay first
    Explainer          gradcampp_ext.Explainer, maps of the images' size
    ours as pgc        gradcampp_ext.compat.pytorch_grad_cam.GradCAMPlusPlus
    pytorch-grad-cam   its GradCAMPlusPlus
    ours as torchcam   gradcampp_ext.compat.torchcam.GradCAMpp, maps of the layer's size
    torchcam           its GradCAMpp, maps of the layer's size

and for torch.compile: the compiled model, and the compiled gradcampp_ext.export_explainer, which
returns logits and maps.

Every contender runs once a round, in an order that rotates, so that drift of the machine falls on
all of them; ratios are taken round by round, and the table has their median and quartiles. Before
anything is timed, maps are compared: with the float64 oracle on activations and gradients from
plain autograd, as each contender defines its maps. torchcam's have no such definition to be
compared with (see docs), so they are only checked to be finite.

Memory is how much the process grows at most (VmHWM) during two calls, after the model and one
inference at batch 1 are in memory, each contender in a fresh process; Linux only.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from environment import about, quartiles, write
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torchvision.models import resnet50

import gradcampp_ext as gx
from gradcampp_ext import reference

SIZE = (224, 224)
CLASS = 281
Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    batch: int
    layer: str
    dtype: str = "float32"
    layout: str = "contiguous"
    compiled: bool = False

    @property
    def name(self) -> str:
        return f"{self.layer}, {self.batch}, {self.dtype}, {self.layout}" + (
            ", compiled" if self.compiled else ""
        )


def cases(quick: bool) -> list[Case]:
    """The usual setting at both layers and batches; other dtypes and layouts at batch 8."""
    if quick:
        return [Case(2, "layer4"), Case(2, "layer1"), Case(2, "layer4", "bfloat16")]
    chosen = [Case(batch, layer) for layer in ("layer4", "layer1") for batch in (8, 32)]
    chosen += [
        Case(8, layer, dtype, layout)
        for layer in ("layer4", "layer1")
        for dtype, layout in itertools.product(
            ("float32", "bfloat16"), ("contiguous", "channels_last")
        )
        if (dtype, layout) != ("float32", "contiguous")
    ]
    return [*chosen, Case(8, "layer4", compiled=True)]


def setting(case: Case) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    order = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
    model = resnet50(weights=None).to(dtype=dtype, memory_format=order).eval()
    for block in model.modules():  # as after training: every block adds a part of its own
        if isinstance(block, nn.BatchNorm2d):
            nn.init.uniform_(block.weight, 0.2, 0.6)
    images = torch.randn(case.batch, 3, *SIZE).to(dtype=dtype, memory_format=order)
    return model, images


def contenders(case: Case, images: Tensor) -> dict[str, Callable[[nn.Module], Run]]:
    """What makes each contender from a model of its own, since the peers leave hooks on it."""
    classes = [CLASS] * case.batch

    def inference(model: nn.Module) -> Run:
        def run() -> Any:
            with torch.no_grad():
                return model(images)

        return run

    def explainer(model: nn.Module) -> Run:
        explain = gx.Explainer(model, case.layer)
        return lambda: explain(images, CLASS).maps[:, 0]

    def as_pytorch_grad_cam(module: str) -> Callable[[nn.Module], Run]:
        def make(model: nn.Module) -> Run:
            methods = importlib.import_module(module)
            cam = methods.GradCAMPlusPlus(model, [model.get_submodule(case.layer)])
            targets = [lambda output, k=k: output[k] for k in classes]
            return lambda: torch.from_numpy(cam(images, targets))

        return make

    def as_torchcam(module: str) -> Callable[[nn.Module], Run]:
        def make(model: nn.Module) -> Run:
            extractor = importlib.import_module(module).GradCAMpp(model, case.layer)
            return lambda: extractor(classes, model(images))[0]

        return make

    if case.compiled:
        return {
            "inference": lambda model: inference(torch.compile(model)),
            "export_explainer": lambda model: inference(
                torch.compile(gx.export_explainer(model, case.layer, example=images[:1], size=SIZE))
            ),
        }
    found = {
        "inference": inference,
        "Explainer": explainer,
        "ours as pgc": as_pytorch_grad_cam("gradcampp_ext.compat.pytorch_grad_cam"),
        "pytorch-grad-cam": as_pytorch_grad_cam("pytorch_grad_cam"),
        "ours as torchcam": as_torchcam("gradcampp_ext.compat.torchcam"),
        "torchcam": as_torchcam("torchcam.methods"),
    }
    if case.dtype == "bfloat16":
        del found["pytorch-grad-cam"]  # needs NumPy, which has no bfloat16
    return found


def check(case: Case, model: nn.Module, images: Tensor, runs: dict[str, Run]) -> None:
    """A wrong answer is not timed."""
    if case.compiled:
        logits, maps = runs["export_explainer"]()
        expected = gx.Explainer(model, case.layer)(images).maps
        close(logits, runs["inference"](), "compiled logits", 1e-3)
        close(maps, expected, "compiled maps", 2e-2)
        return
    kept: list[Tensor] = []
    handle = model.get_submodule(case.layer).register_forward_hook(
        lambda *call: kept.append(call[-1])
    )
    score = model(images)[:, CLASS].sum()
    handle.remove()
    (gradients,) = torch.autograd.grad(score, kept)
    pair = kept[0].detach().double(), gradients.double()
    tolerance = 1e-3 if case.dtype == "float32" else 5e-2
    exact = reference.cam(*pair, size=SIZE)
    peers = reference.cam(*pair, rectify=False, eps=1e-6, normalize=None)
    peers = rescaled(peers)
    peers = nn.functional.interpolate(peers[:, None], SIZE, mode="bilinear")[:, 0]
    peers = rescaled(peers)
    paper = reference.cam(*pair, rectify=False)
    for name, expected in {
        "Explainer": exact,
        "ours as pgc": peers,
        "pytorch-grad-cam": peers,
        "ours as torchcam": paper,
    }.items():
        if name in runs:
            close(runs[name](), expected, name, tolerance)
    if not runs["torchcam"]().isfinite().all():
        raise SystemExit(f"torchcam's maps are not finite in {case.name}")


def rescaled(maps: Tensor) -> Tensor:
    maps = maps - maps.amin((1, 2), keepdim=True)
    return maps / (maps.amax((1, 2), keepdim=True) + 1e-7)


def close(actual: Tensor, expected: Tensor, name: str, tolerance: float) -> None:
    error = ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
    if not error <= tolerance:
        raise SystemExit(f"{name} is wrong by {error:.1e} (relative L2) and is not timed")


def timed(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(case: Case, seconds: float, tick: Callable[[str], None]) -> dict[str, list[float]]:
    """Seconds a call, a list a contender, one entry a round."""
    model, images = setting(case)
    made = contenders(case, images)
    runs = {name: make(deepcopy(model)) for name, make in made.items()}
    tick(f"{case.name}: checking")
    check(case, model, images, runs)
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    start = time.perf_counter()
    for number in itertools.count():
        tick(f"{case.name}: round {number + 1}")
        for name in names[number % len(names) :] + names[: number % len(names)]:
            times[name].append(timed(runs[name]))
        spent = time.perf_counter() - start
        if number >= 2 and spent + spent / (number + 1) > seconds:
            return times
    raise AssertionError


def memory_of(case: Case, name: str) -> float:
    """MB by which a fresh process grows during two calls."""
    words = [sys.executable, __file__, "--memory-of", name, json.dumps(asdict(case))]
    ran = subprocess.run(words, capture_output=True, text=True, check=True)
    return float(ran.stdout.split()[-1])


def grow(case: Case, name: str) -> None:
    model, images = setting(case)
    run = contenders(case, images)[name](model)
    with torch.no_grad():
        model(images[:1])
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = peak_mb()
    run()
    run()
    print(peak_mb() - before)


def peak_mb() -> float:
    """Of this process; its ru_maxrss would begin with the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def summary(case: Case, times: dict[str, list[float]], memory: dict[str, float]) -> dict[str, Any]:
    rows = {}
    for name, seconds in times.items():
        others = {}
        for other in ("inference", "pytorch-grad-cam", "torchcam"):
            if other in times and other != name:
                ratios = [b / a for a, b in zip(seconds, times[other], strict=True)]
                others[other] = quartiles(ratios)
        rows[name] = {
            "images_per_second": case.batch / statistics.median(seconds),
            "speed_beside": others,
            "peak_mb": memory.get(name),
            "seconds": seconds,
        }
    return {"case": asdict(case), "contenders": rows}


def table(report: dict[str, Any]) -> str:
    lines = [
        "| case | | images/s | of inference | / pytorch-grad-cam | / torchcam | peak MB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for result in report["results"]:
        name = Case(**result["case"]).name
        for contender, row in result["contenders"].items():
            cells = [name, contender, f"{row['images_per_second']:.1f}"]
            for other in ("inference", "pytorch-grad-cam", "torchcam"):
                ratio = row["speed_beside"].get(other)
                cells.append(
                    "" if ratio is None else f"{ratio[1]:.2f} ({ratio[0]:.2f} to {ratio[2]:.2f})"
                )
            cells.append("" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}")
            lines.append(f"| {' | '.join(cells)} |")
            name = ""
    return "\n".join(lines)


def measured(
    chosen: list[Case], seconds: list[float], file: Path | None, memory: bool = False
) -> dict[str, Any]:
    """The report of cases, each with about so many seconds of rounds; kept in the file so far.

    With ``memory``, what the usual setting at the largest batch adds to a fresh process.
    """
    report: dict[str, Any] = {"about": about(), "results": []}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("starting", total=len(chosen))

        def tick(text: str) -> None:
            progress.update(task, description=text)

        for case, limit in zip(chosen, seconds, strict=True):
            times = measure(case, limit, tick)
            grown = {}
            usual = (case.dtype, case.layout, case.compiled) == ("float32", "contiguous", False)
            if memory and usual and case.batch == max(c.batch for c in chosen):
                for name in times:
                    tick(f"{case.name}: memory of {name}")
                    grown[name] = memory_of(case, name)
            report["results"].append(summary(case, times, grown))
            if file:
                write(file, report)
            progress.advance(task)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure explanations beside their peers.")
    parser.add_argument("--minutes", type=float, default=12, help="for the whole run, about")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--quick", action="store_true", help="three cases of two images")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.memory_of:
        name, case = options.memory_of
        grow(Case(**json.loads(case)), name)
        return
    chosen = cases(options.quick)
    # Rounds take half of the time, each case as much as its images are; the rest goes to checking
    # and to memory in fresh processes.
    weights = [case.batch * (2 if case.layer == "layer1" else 1) for case in chosen]
    seconds = [options.minutes * 60 / 2 * weight / sum(weights) for weight in weights]
    print(table(measured(chosen, seconds, options.json, memory=True)))


if __name__ == "__main__":
    main()
