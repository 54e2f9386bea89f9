"""The oracle: every method in float64 PyTorch, straight from the formulas.

It shares no code with the kernels and is written to be checked against the papers by eye, not to
be fast. Shapes: activations A are [N, C, *S], gradients G are [N, C, *S] or [N, K, C, *S].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from gradcampp_ext import methods

if TYPE_CHECKING:
    from torch import Tensor


def alpha(g: Tensor, activation_sum: Tensor, eps: float = 0.0) -> Tensor:
    """Eq. 19 of arXiv:1710.11063 times g, with g^2 cancelled: g / (2 + S g + eps / g^2)."""
    denominator = 2 + activation_sum * g
    if eps:
        denominator = denominator + eps / g / g
    return torch.where((denominator == 0) | (g == 0), 0.0, g / denominator)


def alpha_literal(g: Tensor, activation_sum: Tensor, eps: float = 0.0) -> Tensor:
    """Eq. 19 of arXiv:1710.11063 times g, as printed: g^2 / (2 g^2 + S g^3 + eps) * g."""
    denominator = 2 * g**2 + activation_sum * g**3 + eps
    return torch.where(denominator == 0, 0.0, g**2 / denominator * g)


Alpha = Callable[["Tensor", "Tensor", float], "Tensor"]


def channel_weights(
    activations: Tensor,
    gradients: Tensor,
    *,
    method: str = "gradcampp",
    rectify: bool | None = None,
    eps: float | None = None,
    alpha: Alpha = alpha,
) -> Tensor:
    """Channel weights w in float64: [N, C] or [N, K, C].

    ``alpha`` chooses the cancelled (default) or the literal form of eq. 19.
    """
    a, g, eps, single = _prepare(activations, gradients, method, rectify, eps)
    space = tuple(range(3, g.dim()))
    total = a.sum(space, keepdim=True)
    if method == "gradcampp":
        w = torch.where(g > 0, alpha(g, total, eps), 0.0).sum(space)
    elif method == "gradcampp_normalized":
        alphas = torch.where(g > 0, alpha(g, total, eps) / torch.where(g > 0, g, 1.0), 0.0)
        norm = alphas.sum(space, keepdim=True)
        alphas = alphas / torch.where(norm == 0, 1.0, norm)
        w = (alphas * g.relu()).sum(space)
    elif method in ("gradcam", "attention"):
        w = g.mean(space)
    elif method == "xgradcam":
        denominator = total.sum(space) + eps
        w = torch.where(denominator == 0, 0.0, (g * a).sum(space) / denominator)
    else:
        raise ValueError(f"method {method!r} has no channel weights")
    return w[:, 0] if single else w


def cam(
    activations: Tensor,
    gradients: Tensor,
    *,
    method: str = "gradcampp",
    size: Sequence[int] | None = None,
    normalize: str | None = "minmax",
    interpolation: str = "linear",
    relu: bool = True,
    rectify: bool | None = None,
    eps: float | None = None,
    temperature: float = 1.0,
    shift: float = 0.0,
    alpha: Alpha = alpha,
) -> Tensor:
    """Maps in float64: [N, *size] or [N, K, *size]; arguments as ``gradcampp_ext.cam``.

    ``shift`` is the lambda of the attention method, added inside its softmax.
    """
    row = methods.get(method)
    a, g, eps_, single = _prepare(activations, gradients, method, rectify, eps)
    space = tuple(range(3, g.dim()))
    if row.channelwise:
        w = channel_weights(
            activations, gradients, method=method, rectify=rectify, eps=eps, alpha=alpha
        )
        w = w.reshape(*g.shape[:3], *[1] * len(space))
        if method == "attention":
            response = (w * a).sum(2, keepdim=True)
            logits = response / temperature + shift
            attention = logits.flatten(3).softmax(-1).reshape(logits.shape)
            w = ((attention + eps_) * a).mean(space, keepdim=True)
        maps = (w * a).sum(2)
    elif method == "layercam":
        maps = (g.relu() * a).sum(2)
    elif method == "hirescam":
        maps = (g * a).sum(2)
    else:
        maps = (g * a).relu().sum(2)

    finite = activations.isfinite().flatten(1).all(1)[:, None] & g.isfinite().flatten(2).all(2)
    maps = torch.where(finite.reshape(*finite.shape, *[1] * len(space)), maps, float("nan"))
    if relu:
        maps = maps.relu()
    maps = _normalized(maps, normalize)
    if size is not None:
        linear = ("linear", "bilinear", "trilinear")[len(space) - 1]
        maps = (
            functional.interpolate(maps, tuple(size), mode="nearest")
            if interpolation == "nearest"
            else functional.interpolate(maps, tuple(size), mode=linear, align_corners=False)
        )
    return maps[:, 0] if single else maps


def smooth_weights(
    activations: Tensor, gradients: Tensor, *, rectify: bool = True, eps: float = 0.0
) -> Tensor:
    """Channel weights of Smooth Grad-CAM++ (arXiv:1908.01224) in float64, [N, C] or [N, K, C].

    Gradients are those of M noisy copies, [M, N, C, *S] or [M, N, K, C, *S]; activations are the
    images' own. Eq. 19 of Grad-CAM++ with means over the copies in place of derivatives.
    """
    a, g, _, single = _prepare(activations, gradients[0], "gradcampp", rectify, eps)
    space = tuple(range(3, g.dim()))
    copies = gradients.double().reshape(len(gradients), *g.shape)
    first, second, third = (copies.pow(power).mean(0) for power in (1, 2, 3))
    if rectify:
        third = third.relu()
    denominator = 2 * second + a.sum(space, keepdim=True) * third + eps
    alphas = torch.where(denominator == 0, 0.0, second / denominator)
    w = (alphas * first.relu()).sum(space)
    return w[:, 0] if single else w


def _normalized(maps: Tensor, how: str | None) -> Tensor:
    if how is None:
        return maps
    space = tuple(range(2, maps.dim()))
    low, high = maps.amin(space, keepdim=True), maps.amax(space, keepdim=True)
    if how == "minmax":
        return torch.where(high == low, 0.0, (maps - low) / (high - low))
    return torch.where(high <= 0, 0.0, maps / high)


def _prepare(
    activations: Tensor, gradients: Tensor, method: str, rectify: bool | None, eps: float | None
) -> tuple[Tensor, Tensor, float, bool]:
    """A as [N, 1, C, *S] and G as [N, K, C, *S] in float64, epsilon, and whether K was absent."""
    row = methods.get(method)
    single = gradients.dim() == activations.dim()
    a = activations.double().unsqueeze(1)
    g = gradients.double().unsqueeze(1) if single else gradients.double()
    if row.rectify if rectify is None else rectify:
        a = a.relu()
    return a, g, (row.eps or 0.0) if eps is None else eps, single
