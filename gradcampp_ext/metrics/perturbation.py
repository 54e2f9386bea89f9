"""Insertion and deletion: the curves of RISE, arXiv:1806.07421.

Pixels are ranked by the map, ties in the order in which they are read. Deletion takes them from
the image, insertion brings them into a blurred one, and the probability of the class is drawn over
the share of pixels that were changed. The area under the curve should be small, or large.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import torch
from torch.nn.functional import conv2d, pad

if TYPE_CHECKING:
    from torch import Tensor

Baseline: TypeAlias = Literal["zero", "black", "mean", "blur"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)


def baseline(images: Tensor, kind: Baseline, black: Tensor | None = None) -> Tensor:
    """What stands where an image was taken away, shaped so that it expands to the images.

    Args:
        images: [N, C, H, W], normalised.
        kind: "zero", the zero of the normalised input, the mean colour of the training pictures;
            "black"; "mean", the mean colour of each image; "blur", the image blurred.
        black: for "black", a black pixel as it is normalised, [C].
    """
    if kind == "zero":
        return images.new_zeros(1, 1, 1, 1)
    if kind == "mean":
        return images.mean((2, 3), keepdim=True)
    if kind == "blur":
        return blurred(images)
    if kind != "black":
        raise ValueError(f"baseline must be one of {', '.join(BASELINES)}; got {kind!r}")
    if black is None:
        raise ValueError("black must be given for the baseline 'black': a black pixel, normalised")
    return black.to(images).reshape(1, -1, 1, 1)


def blurred(images: Tensor, *, size: int = 11, sigma: float = 5.0) -> Tensor:
    """Images [N, C, H, W] under a Gaussian of `size` x `size` pixels; RISE's is 11 with sigma 5.

    The kernel sums to 1 and the image is mirrored at its edges, so that nothing darkens.
    """
    x = torch.arange(size, dtype=images.dtype, device=images.device) - (size - 1) / 2
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    before, after = (size - 1) // 2, size // 2
    flat = images.reshape(-1, 1, *images.shape[2:])
    padded = pad(flat, (before, after, before, after), mode="reflect")
    rows = conv2d(padded, kernel.reshape(1, 1, 1, size))
    return conv2d(rows, kernel.reshape(1, 1, size, 1)).reshape(images.shape)


def ranks(maps: Tensor) -> Tensor:
    """Place of each pixel by its value, 0 for the largest: int64 [N, *S]."""
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=maps.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places).reshape(maps.shape)


def schedule(pixels: int, steps: int) -> list[int]:
    """How many pixels are changed at each point of a curve: 0 to all, steps + 1 numbers.

    RISE's own curves have 224 steps of 224 pixels.
    """
    if not 1 <= steps <= pixels:
        raise ValueError(f"steps must be from 1 to the {pixels} pixels, got {steps}")
    return [round(step * pixels / steps) for step in range(steps + 1)]


def changed(images: Tensor, others: Tensor, places: Tensor, counts: Tensor) -> Tensor:
    """Images whose highest ranked pixels are those of others.

    Deletion is ``changed(images, baseline, ...)``, insertion ``changed(baseline, images, ...)``.

    Args:
        images, others: [N, C, *S] or what expands to it.
        places: [N, *S], of `ranks`.
        counts: how many pixels are others', [N].
    """
    counts = counts.reshape(-1, *[1] * (places.dim() - 1))
    return torch.where((places < counts).unsqueeze(1), others, images)


def area(curve: Tensor, counts: list[int]) -> Tensor:
    """Area under curves [..., points] by the trapezoidal rule, over the share of pixels.

    Args:
        curve: probabilities at each point of the schedule.
        counts: of `schedule`.
    """
    if curve.shape[-1] != len(counts):
        raise ValueError(
            f"curve must have a value for each of the {len(counts)} points of the schedule, got "
            f"{list(curve.shape)}"
        )
    shares = torch.tensor(counts, dtype=curve.dtype, device=curve.device) / counts[-1]
    return torch.trapezoid(curve, shares, dim=-1)


def removal(maps: Tensor, share: float, order: Literal["morf", "lerf"]) -> Tensor:
    """The pixels that ROAD removes, boolean [N, H, W]: a share of the most or least relevant.

    The number is exact, ``round(share * pixels)``; equal values are taken as they are read.

    Args:
        maps: [N, H, W].
        share: above 0 and below 1.
        order: "morf" for the most relevant first, "lerf" for the least.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be above 0 and below 1, got {share}")
    if order not in ("morf", "lerf"):
        raise ValueError(f"order must be 'morf' or 'lerf', got {order!r}")
    count = round(share * maps[0].numel())
    return ranks(maps if order == "morf" else -maps) < count
