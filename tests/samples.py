"""Activations and gradients for the tests of the op, in every layout."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gradcampp_ext import reference

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Relative L2 error of a map before normalisation (the accuracy that the package promises).
TOLERANCE = {dtype: 1e-12 if dtype == torch.float64 else 2e-6 for dtype in DTYPES}
# Of derivatives, which are rounded to the dtype of what they are derivatives by.
GRADIENT_TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
LAYOUTS = ("contiguous", "channels_last", "sliced", "tokens", "transposed", "offset")


def arrange(x: Tensor, layout: str, channel: int) -> Tensor:
    """x with the same values in another memory layout; `channel` is the channels' dimension."""
    space = tuple(x.shape[channel + 1 :])
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return x.movedim(channel, -1).contiguous().movedim(-1, channel)
    if layout == "sliced":  # out of a larger tensor whose other elements would be noticed
        big = torch.full([s + 3 for s in x.shape], math.nan, dtype=x.dtype, device=x.device)
        view = big[tuple(slice(1, 1 + s) for s in x.shape)]
        return view.copy_(x)
    if layout == "tokens":  # [..., 2 + positions, C], two prefix tokens, viewed as maps
        flat = x.flatten(channel + 1).transpose(-1, -2)
        prefix = torch.full((*flat.shape[:-2], 2, flat.shape[-1]), math.nan).to(flat)
        tokens = torch.cat([prefix, flat], dim=-2)
        return tokens[..., 2:, :].transpose(-1, -2).unflatten(-1, space)
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "offset":  # an odd address
        flat = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
        return flat[1:].view(x.shape).copy_(x)
    raise ValueError(layout)


def make_pair(
    shape: tuple[int, ...],
    *,
    targets: int | None = None,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    gradient_layout: str | None = None,
    device: str = "cpu",
    signed: bool = False,
    scale: float = 1e-3,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Activations [N, C, *S] and gradients [N, C, *S] or [N, K, C, *S].

    Half of the gradients are positive, an eighth of them exactly zero; activations are
    non-negative unless `signed`.
    """
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(shape, generator=generator, dtype=torch.float64)
    g_shape = shape if targets is None else (shape[0], targets, *shape[1:])
    g = torch.randn(g_shape, generator=generator, dtype=torch.float64) * scale
    g = torch.where(torch.rand(g_shape, generator=generator) < 0.125, 0.0, g)
    a, g = (a if signed else a.relu()).to(device, dtype), g.to(device, dtype)
    return (
        arrange(a, layout, 1),
        arrange(g, gradient_layout or layout, 1 if targets is None else 2),
    )


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 error; the absolute one where everything expected is zero."""
    norm = expected.norm().item()
    return (actual.double().cpu() - expected.cpu()).norm().item() / (norm or 1.0)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of maps."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def derivatives(by_maps: Tensor, a: Tensor, g: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """By activations and gradients, from those by the maps: autograd through the oracle."""
    leaves = [x.detach().double().requires_grad_() for x in (a, g)]
    maps = reference.cam(*leaves, **options)
    by_a, by_g = torch.autograd.grad(maps, leaves, by_maps.double(), allow_unused=True)
    return by_a, by_g
