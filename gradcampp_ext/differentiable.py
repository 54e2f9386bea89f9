"""The backward pass of the op: maps inside a loss.

Derivatives by activations and gradients are made natively, in one pass over both
(``torch.ops.gradcampp_ext.cam_backward``); what happens to the small maps behind them (ReLU,
normalisation, resizing) is undone here.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor


class Options(NamedTuple):
    """Of one call of the op, in the order of its schema."""

    method: str
    size: list[int] | None
    normalize: str
    interpolation: str
    relu: bool
    rectify: bool
    eps: float
    temperature: float


class Cam(torch.autograd.Function):
    """``torch.ops.gradcampp_ext.cam`` with derivatives by activations and gradients."""

    @staticmethod
    def forward(ctx: Any, activations: Tensor, gradients: Tensor, options: Options) -> Tensor:
        ctx.save_for_backward(activations, gradients)
        ctx.options = options
        maps: Tensor = torch.ops.gradcampp_ext.cam(activations, gradients, *options)
        return maps

    @staticmethod
    def backward(ctx: Any, by_maps: Tensor) -> Any:
        activations, gradients = ctx.saved_tensors
        found = backward(by_maps, activations, gradients, ctx.options, ctx.needs_input_grad[:2])
        once = _Once.apply(*found, by_maps, activations, gradients)
        return *(
            value if needed else None
            for value, needed in zip(once, ctx.needs_input_grad[:2], strict=True)
        ), None


class _Once(torch.autograd.Function):
    """The derivatives as they are; says so when they are to be differentiated again."""

    @staticmethod
    def forward(_: Any, by_activations: Tensor, by_gradients: Tensor, *__: Tensor) -> Any:
        return by_activations.view_as(by_activations), by_gradients.view_as(by_gradients)

    @staticmethod
    def backward(_: Any, *__: Any) -> Any:
        raise NotImplementedError(
            "gradcampp_ext.cam can be differentiated once, not twice; for second derivatives "
            "of a map write its formula in PyTorch, as gradcampp_ext.reference does"
        )


def backward(
    by_maps: Tensor,
    activations: Tensor,
    gradients: Tensor,
    options: Options,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """Derivatives of a loss by activations [N, C, *S] and gradients [N, K, C, *S].

    Args:
        by_maps: those by the maps, [N, K, *size].
        wanted: which of the two; the other one is an empty tensor.
    """
    raw = _cells(activations, gradients, options.method, options)
    by_cells = _unresized(by_maps, raw, options)
    cells = raw.relu() if options.relu else raw
    by_cells = _unnormalized(by_cells, cells, options.normalize)
    if options.relu:
        by_cells = by_cells * (raw > 0)
    if options.method == "attention":
        return _attention(by_cells, activations, gradients, options, wanted)
    return _native(by_cells, activations, gradients, options.method, options, wanted)


def _cells(activations: Tensor, gradients: Tensor, method: str, options: Options) -> Tensor:
    """The raw map, [N, K, *S]."""
    raw = options._replace(method=method, size=None, normalize="none", relu=False)
    cells: Tensor = torch.ops.gradcampp_ext.cam(activations, gradients, *raw)
    return cells


def _native(
    by_cells: Tensor,
    activations: Tensor,
    gradients: Tensor,
    method: str,
    options: Options,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = torch.ops.gradcampp_ext.cam_backward(
        by_cells.contiguous(), activations, gradients, method, options.rectify, options.eps, *wanted
    )
    return found


def _unresized(by_maps: Tensor, raw: Tensor, options: Options) -> Tensor:
    size, space = options.size, list(raw.shape[2:])
    if size is None or size == space:
        return by_maps
    dims = len(space)
    aten: Any = torch.ops.aten
    arguments: list[bool] = []
    if options.interpolation == "nearest":
        name = f"upsample_nearest{dims}d_backward"
    else:
        name = f"upsample_{('linear', 'bilinear', 'trilinear')[dims - 1]}{dims}d_backward"
        arguments.append(False)  # align_corners
    by_cells: Tensor = getattr(aten, name)(by_maps.contiguous(), size, list(raw.shape), *arguments)
    return by_cells


def _unnormalized(by_maps: Tensor, cells: Tensor, normalize: str) -> Tensor:
    """Where several cells share an extreme, they share its derivative, as in torch.amax."""
    if normalize == "none":
        return by_maps
    space = tuple(range(2, cells.dim()))
    high = cells.amax(space, keepdim=True)
    low = cells.amin(space, keepdim=True) if normalize == "minmax" else torch.zeros_like(high)
    spread = high - low
    flat = spread == 0 if normalize == "minmax" else high <= 0
    by_maps = torch.where(flat, 0, by_maps / torch.where(flat, 1, spread))
    maps = (cells - low) / torch.where(flat, 1, spread)

    def shared(extreme: Tensor, by_extreme: Tensor) -> Tensor:
        at = cells == extreme
        return at * (by_extreme.sum(space, keepdim=True) / at.sum(space, keepdim=True))

    by_cells = by_maps - shared(high, by_maps * maps)
    if normalize == "minmax":
        by_cells = by_cells - shared(low, by_maps * (1 - maps))
    return by_cells


def _attention(
    by_cells: Tensor,
    activations: Tensor,
    gradients: Tensor,
    options: Options,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """L = sum_c w_c A_c, where w_c is the mean of A_c under the attention a, which is a softmax
    of Grad-CAM's map."""
    response = _cells(activations, gradients, "gradcam", options._replace(eps=0.0))
    positions = math.prod(activations.shape[2:])
    a = activations.to(response.dtype).flatten(2)
    if options.rectify:
        a = a.relu()
    e = by_cells.flatten(2)
    attention = (response.flatten(2) / options.temperature).softmax(-1)
    shares = (attention + options.eps) / positions
    weights, by_weights = shares @ a.mT, e @ a.mT  # [N, K, C]
    by_attention = by_weights @ a / positions
    by_response = attention * (by_attention - (attention * by_attention).sum(-1, keepdim=True))
    by_response = (by_response / options.temperature).reshape(response.shape)
    by_a, by_g = _native(
        by_response, activations, gradients, "gradcam", options._replace(eps=0.0), wanted
    )
    if wanted[0]:
        direct = weights.mT @ e + by_weights.mT @ shares
        if options.rectify:
            direct = direct * (a > 0)
        by_a = by_a + direct.reshape(activations.shape).to(by_a.dtype)
    return by_a, by_g
