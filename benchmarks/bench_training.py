"""Maps inside a loss: what guidance gives on a planted shortcut, and what the backward pass costs.

    python benchmarks/bench_training.py [--json FILE] [--seeds N] [--rounds N]

The data set: noisy pictures with a patch of upright or lying stripes somewhere; a mark in the upper
left corner is bright for one class and dark for the other in training, and the other way round in
the test. The guided network's loss has a tenth of the share of the heat that lies outside the patch
added to it; everything else is the same. The map's score is the right logit less the wrong one.

The cost: forward and backward of the map alone, from activations and gradients to the derivatives
by both, beside autograd through the plain formula in PyTorch. Derivatives are compared before they
are timed; calls alternate, and ratios are those of neighbours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from bench_op import formula
from environment import about, quartiles, write
from rich.progress import track
from torch import Tensor, nn

import gradcampp_ext as gx

if TYPE_CHECKING:
    from collections.abc import Callable

SIDE, SHAPE = 32, 10
SHAPES = {
    "resnet50.layer3": (8, 1024, 14, 14),
    "resnet50.layer4": (8, 2048, 7, 7),
    "vgg16.features": (8, 512, 14, 14),
}


def pictures(count: int, *, mark_is_right: bool, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images [N, 1, 32, 32], classes [N], masks of the patches [N, 32, 32]."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.randn(count, 1, SIDE, SIDE, generator=generator)
    classes = torch.randint(2, (count,), generator=generator)
    corners = torch.randint(6, SIDE - SHAPE, (count, 2), generator=generator)
    masks = torch.zeros(count, SIDE, SIDE)
    stripes = (torch.arange(SHAPE) // 2 % 2).float().expand(SHAPE, SHAPE)
    for n, (y, x) in enumerate(corners.tolist()):
        patch = stripes if classes[n] else stripes.T
        images[n, 0, y : y + SHAPE, x : x + SHAPE] += patch
        masks[n, y : y + SHAPE, x : x + SHAPE] = 1
    bright = classes if mark_is_right else 1 - classes
    images[:, 0, 1:5, 1:5] += (2.0 * bright - 1.0)[:, None, None] * 1.5
    return images, classes, masks


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2))


def train(*, guidance: float, seed: int) -> float:
    """Accuracy on pictures whose mark lies."""
    torch.manual_seed(seed)
    network = Network()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    images, classes, masks = pictures(1024, mark_is_right=True, seed=seed)
    for _ in range(12):
        for batch in torch.randperm(len(images)).split(64):
            activations = network.backbone(images[batch])
            logits = network.head(activations)
            loss = nn.functional.cross_entropy(logits, classes[batch])
            if guidance:
                sign = 2 * classes[batch] - 1
                score = (sign * (logits[:, 1] - logits[:, 0])).sum()
                (gradients,) = torch.autograd.grad(score, activations, create_graph=True)
                maps = gx.cam(activations, gradients, size=(SIDE, SIDE), normalize=None)
                inside = (maps * masks[batch]).sum((1, 2)) / (maps.sum((1, 2)) + 1e-12)
                loss = loss + guidance * (1 - inside).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    images, classes, _ = pictures(1024, mark_is_right=False, seed=1000 + seed)
    with torch.no_grad():
        right = network.head(network.backbone(images)).argmax(1) == classes
    return right.float().mean().item()


def derivatives(cam: Callable[[Tensor, Tensor], Tensor], a: Tensor, g: Tensor, by: Tensor) -> Any:
    return torch.autograd.grad(cam(a, g), (a, g), by)


def ours(a: Tensor, g: Tensor) -> Tensor:
    return gx.cam(a, g, size=(224, 224))


def cost(shape: tuple[int, ...], rounds: int) -> dict[str, Any]:
    a, g = (torch.randn(shape).requires_grad_() for _ in range(2))
    by = torch.randn(shape[0], 224, 224)
    for one, other in zip(derivatives(ours, a, g, by), derivatives(formula, a, g, by), strict=True):
        assert (one - other).norm() <= 1e-3 * other.norm(), "a wrong answer is not timed"
    seconds: dict[str, list[float]] = {"gradcampp_ext": [], "autograd": []}
    for _ in range(rounds):
        for name, cam in (("gradcampp_ext", ours), ("autograd", formula)):
            start = time.perf_counter()
            derivatives(cam, a, g, by)
            seconds[name].append(time.perf_counter() - start)
    ratios = [
        slow / fast
        for fast, slow in zip(seconds["gradcampp_ext"], seconds["autograd"], strict=True)
    ]
    return {
        "shape": list(shape),
        **{f"{name}_ms": 1e3 * statistics.median(values) for name, values in seconds.items()},
        "ratio": quartiles(ratios),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure guided training and its cost.")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    accuracy: dict[str, list[float]] = {"without": [], "guided": []}
    for seed in track(range(options.seeds), "training"):
        accuracy["without"].append(train(guidance=0.0, seed=seed))
        accuracy["guided"].append(train(guidance=0.1, seed=seed))
    report = {
        "about": about(),
        "accuracy": accuracy,
        "cost": {
            name: cost(shape, options.rounds)
            for name, shape in track(SHAPES.items(), "backward pass")
        },
    }
    print(json.dumps(report, indent=1))
    if options.json:
        write(options.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
