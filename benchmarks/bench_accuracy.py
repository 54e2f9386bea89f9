"""Whose Grad-CAM++ is the paper's: error of the maps against the scale of the gradients.

    python benchmarks/bench_accuracy.py [--json FILE]

Activations and gradients are those of the demo network (EfficientNet-Lite0, ImageNet weights) on
photographs that scikit-image bundles, at a layer behind a ReLU and at a signed one. The gradients
are scaled by powers of ten, as a scaled loss, a confident network or a longer head would. Each
contender gets the same float32 tensors; its weights come from its own code:

    gradcampp_ext      gx.cam
    pytorch-grad-cam   GradCAMPlusPlus.get_cam_weights
    torchcam           GradCAMpp._get_weights

and the map, normalised to [0, 1], is compared with eq. 19 of arXiv:1710.11063 as printed, in exact
float64 arithmetic: relative L2 error, the median over the photographs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import skimage.data
import torch
from environment import about, write
from PIL import Image
from pytorch_grad_cam import GradCAMPlusPlus
from torchcam.methods import GradCAMpp

import gradcampp_ext as gx
from gradcampp_ext import models, reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

LAYERS = {"behind a ReLU": "_blocks.10._depthwise_conv:input", "signed": "_blocks.10"}
EXPONENTS = range(-12, 7)
PHOTOGRAPHS = ("chelsea", "coffee", "rocket", "astronaut")


def ours(a: Tensor, g: Tensor) -> Tensor:
    return gx.cam(a, g)


def ours_literal(a: Tensor, g: Tensor) -> Tensor:
    return gx.cam(a, g, rectify=False)


def pytorch_grad_cam(a: Tensor, g: Tensor) -> Tensor:
    # its weights need nothing of the object
    weights = GradCAMPlusPlus.get_cam_weights(None, None, None, None, a.numpy(), g.numpy())
    return _map(torch.from_numpy(weights), a)


def torchcam(a: Tensor, g: Tensor) -> Tensor:
    extractor = SimpleNamespace(hook_a=[a], hook_g=[g], _backprop=lambda *_, **__: None)
    return _map(GradCAMpp._get_weights(extractor, 0, None)[0], a)


CONTENDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gradcampp_ext": ours,
    "gradcampp_ext, rectify=False": ours_literal,
    "pytorch-grad-cam": pytorch_grad_cam,
    "torchcam": torchcam,
}


def _map(weights: Tensor, a: Tensor) -> Tensor:
    return normalised((weights[..., None, None] * a).sum(1).relu())


def normalised(maps: Tensor) -> Tensor:
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return torch.where(high == low, 0, (maps - low) / (high - low))


def paper(a: Tensor, g: Tensor, *, rectify: bool) -> Tensor:
    """Eq. 19 as printed, in float64: its powers stay in range for the scales shown."""
    return reference.cam(a, g, alpha=reference.alpha_literal, rectify=rectify)


def captured(layer: str) -> tuple[Tensor, Tensor]:
    """Activations and gradients [N, C, h, w] of the predicted classes."""
    demo = models.load("demo")
    pictures = [
        demo.recipe.picture(Image.fromarray(getattr(skimage.data, name)())) for name in PHOTOGRAPHS
    ]
    images = demo.recipe.normalize(torch.from_numpy(np.stack(pictures)))
    found = gx.Explainer(demo.model, layer, head="autograd").capture(images)
    return found.activations[0].contiguous(), found.gradients[0][:, 0].contiguous()


def relative_errors(actual: Tensor, expected: Tensor) -> list[float]:
    difference = (actual.double() - expected).flatten(1).norm(dim=1)
    return (difference / expected.flatten(1).norm(dim=1)).tolist()


def measure() -> dict[str, Any]:
    layers = {}
    for title, layer in LAYERS.items():
        a, g = captured(layer)
        rows = []
        for exponent in EXPONENTS:
            scaled = g * 10.0**exponent
            literal, rectified = (paper(a, scaled, rectify=rectify) for rectify in (False, True))
            errors = {
                name: statistics.median(relative_errors(run(a, scaled), literal))
                for name, run in CONTENDERS.items()
            }
            mine = relative_errors(ours(a, scaled), rectified)
            errors["gradcampp_ext, against the rectified formula"] = statistics.median(mine)
            rows.append({"exponent": exponent, "errors": errors})
        layers[title] = {
            "layer": layer,
            "shape": list(a.shape),
            "median_absolute_gradient": g.abs().median().item(),
            "largest_absolute_gradient": g.abs().max().item(),
            "rows": rows,
        }
    return {"about": about(), "model": "demo", "photographs": list(PHOTOGRAPHS), "layers": layers}


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the accuracy of Grad-CAM++ maps.")
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    report = measure()
    for title, layer in report["layers"].items():
        print(f"{title}: {layer['layer']}, |g| {layer['median_absolute_gradient']:.1e}")
        for row in layer["rows"]:
            errors = "  ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())
            print(f"  1e{row['exponent']:+03d}  {errors}")
    if options.json:
        write(options.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
