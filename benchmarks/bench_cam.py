"""Time of gx.cam alone, on the shapes of real layers; `make bench` writes out/bench/cam.json."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gradcampp_ext as gx
from gradcampp_ext import _native, reference

DEVICES = ["cpu"] if _native.status().cuda_missing else ["cpu", "cuda"]
SHAPES = {
    "resnet50/layer4 x1": (1, 2048, 7, 7),
    "resnet50/layer4 x32": (32, 2048, 7, 7),
    "resnet50/layer3 x8": (8, 1024, 14, 14),
    "vgg16/features x8": (8, 512, 14, 14),
    "resnet50/layer1 x8": (8, 256, 56, 56),
    "resnet50/layer1 x1": (1, 256, 56, 56),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_cam(benchmark: Any, shape: tuple[int, ...], device: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(shape, generator=generator).relu().to(device, dtype)
    gradients = (torch.randn(shape, generator=generator) * 1e-3).to(device, dtype)

    def run() -> torch.Tensor:
        maps = gx.cam(activations, gradients)
        if device == "cuda":
            torch.cuda.synchronize()
        return maps

    # A wrong answer is not timed.
    expected = reference.cam(activations.double(), gradients.double())
    torch.testing.assert_close(run().double(), expected, rtol=1e-4, atol=1e-5)
    benchmark(run)
    bytes_read = 2 * activations.numel() * activations.element_size()
    benchmark.extra_info["gigabytes_per_second"] = bytes_read / benchmark.stats["median"] / 1e9
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.extra_info["torch"] = torch.__version__
    benchmark.extra_info["cpu_capability"] = _native.status().cpu_capability
