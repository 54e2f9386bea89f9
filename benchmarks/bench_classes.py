"""What explanations cost in forward passes, and what they keep: one class, and all thousand.

    python benchmarks/bench_classes.py [--rounds N] [--json FILE]

Networks of torchvision with random weights and a head that is a mean and one linear layer. In each
round, one after the other on the same images:

    forward     the network under torch.no_grad()
    backward    forward with a graph and backward() of the predicted classes' scores, which is what
                hooks on a layer cost where nothing stops the graph
    explain     Explainer(model)(images): maps of the predicted classes
    classes     Explainer(model).all_classes(images): 1000 maps a picture
    autograd    ten classes with head="autograd": ten times backward through the head

Ratios are to forward of the same round; the median and the quartiles are told. `saved` is how many
bytes autograd keeps for the backward pass, each storage once, parameters left out. Maps of all
classes are compared with autograd's before anything is timed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torchvision
from environment import about, quartiles, write

import gradcampp_ext as gx

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

MODELS = ("resnet50", "densenet121", "mobilenet_v3_large", "shufflenet_v2_x1_0")
BATCHES = (1, 8)
CHECKED = (0, 123, 999)


def contenders(model: nn.Module, images: Tensor) -> dict[str, Callable[[], Any]]:
    explainer = gx.Explainer(model)
    autograd = gx.Explainer(model, head="autograd")

    def forward() -> None:
        with torch.no_grad():
            model(images)

    def backward() -> None:
        model(images).amax(1).sum().backward()
        model.zero_grad()

    return {
        "forward": forward,
        "backward": backward,
        "explain": lambda: explainer(images),
        "classes": lambda: explainer.all_classes(images),
        "autograd": lambda: autograd(images, topk=10),
    }


def check(model: nn.Module, images: Tensor) -> None:
    every = gx.Explainer(model).all_classes(images).maps
    some = gx.Explainer(model, head="autograd")(
        images, [list(CHECKED)] * len(images), size="feature"
    ).maps
    torch.testing.assert_close(every[:, list(CHECKED)], some, rtol=1e-3, atol=1e-4)


def saved_bytes(run: Callable[[], Any], model: nn.Module) -> int:
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}  # held, so that no address is given twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def measure(name: str, batch: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    images = torch.randn(batch, 3, 224, 224)
    check(model, images)
    runs = contenders(model, images)
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(rounds):
        for label, run in runs.items():
            begin = time.perf_counter()
            run()
            seconds[label].append(time.perf_counter() - begin)
    result: dict[str, Any] = {"model": name, "batch": batch, "contenders": {}}
    for label, times in seconds.items():
        ratios = [t / f for t, f in zip(times, seconds["forward"], strict=True)]
        low, median, high = quartiles(ratios)
        result["contenders"][label] = {
            "seconds": statistics.median(times),
            "of_forward": {"median": median, "quartiles": [low, high]},
            "saved_bytes": saved_bytes(runs[label], model),
        }
    return result


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| model | batch | forward, ms | backward | explain | all classes | ten by autograd | "
        "saved, MB: backward | explain |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for result in results:
        found = result["contenders"]
        cells = [result["model"], str(result["batch"]), f"{found['forward']['seconds'] * 1e3:.0f}"]
        for label in ("backward", "explain", "classes", "autograd"):
            ratio = found[label]["of_forward"]
            low, high = ratio["quartiles"]
            cells.append(f"{ratio['median']:.2f} ({low:.2f} to {high:.2f})")
        cells += [f"{found[label]['saved_bytes'] / 1e6:.1f}" for label in ("backward", "explain")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Cost of explanations, in forward passes.")
    parser.add_argument("--rounds", type=int, default=15, help="2 or more")
    parser.add_argument("--model", action="append", help="one of torchvision's; may be repeated")
    parser.add_argument("--json", type=Path, help="where the results go")
    options = parser.parse_args()
    results = [
        measure(name, batch, options.rounds)
        for name in options.model or MODELS
        for batch in BATCHES
    ]
    if options.json:
        report = {"about": about(), "rounds": options.rounds, "results": results}
        write(options.json, report)
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
