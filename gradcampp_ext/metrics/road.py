"""Taking pixels away without a trace: ROAD's noisy linear imputation, arXiv:2202.00449.

A removed pixel becomes the weighted mean of its eight neighbours, 1/6 for those that share an edge
and 1/12 for those that share a corner, whether they are removed themselves or not; the weights of
neighbours outside the image go to the others. That is one sparse symmetric positive definite
system an image. It is solved for a whole batch at once, on its device, by conjugate gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import interpolate, pad

if TYPE_CHECKING:
    from torch import Tensor

_EDGE, _CORNER = 1 / 6, 1 / 12
_HALF_OF_THE_NEIGHBOURS = ((0, 1, _EDGE), (1, 0, _EDGE), (1, 1, _CORNER), (1, -1, _CORNER))
_LIMIT = 1000  # iterations; a hole of 224 x 224 pixels takes some 60


def impute(
    images: Tensor,
    removed: Tensor,
    *,
    noise: float = 0.01,
    seed: int = 0,
    tolerance: float = 1e-4,
) -> Tensor:
    """Images with pixels replaced by what their surroundings suggest, and noise.

    Args:
        images: [N, C, H, W], floating point.
        removed: [N, H, W], boolean; at least one pixel of each image must stay.
        noise: standard deviation of the noise on imputed pixels, in the images' units; without it
            a network could tell them by their smoothness.
        seed: the same seed gives the same noise, to every image of every batch.
        tolerance: of the solution, relative to the first guess (the mean of what is kept).

    Returns: [N, C, H, W]; pixels that are not removed are as they were.

    Raises: ValueError if shapes do not fit or an image keeps no pixel.
    """
    if removed.shape != (len(images), *images.shape[2:]) or removed.dtype != torch.bool:
        raise ValueError(
            f"removed must be boolean [N, H, W] for images {list(images.shape)}, got "
            f"{removed.dtype} {list(removed.shape)}"
        )
    if removed.flatten(1).all(1).any():
        raise ValueError("removed must leave at least one pixel of each image")
    images = images.contiguous()  # planes: three channels side by side are too few to add fast
    hole = removed.unsqueeze(1).to(images.dtype)
    filled = _solve(images * (1 - hole), hole, tolerance)
    if noise:
        generator = torch.Generator().manual_seed(seed)
        grain = torch.randn(images.shape[1:], generator=generator).to(images)
        filled = filled + noise * grain
    return torch.where(removed.unsqueeze(1), filled, images)


def _solve(known: Tensor, hole: Tensor, tolerance: float) -> Tensor:
    """x in the hole with (sum of weights) x = weighted sum of x and known around it."""
    weights = _around(torch.ones_like(hole[:1]))
    precondition = _preconditioner(hole, weights)

    def apply(x: Tensor) -> Tensor:
        return weights * x - hole * _around(x)

    mean = known.sum((2, 3), keepdim=True) / (1 - hole).sum((2, 3), keepdim=True)
    x = hole * mean
    residual = hole * _around(known) - apply(x)
    direction = z = precondition(residual)
    size = first = _dot(residual, z)
    for _ in range(_LIMIT):
        unsolved = size > tolerance**2 * first
        if not unsolved.any():
            break
        moved = apply(direction)
        step = unsolved * _ratio(size, _dot(direction, moved))
        x = x + step * direction
        residual = residual - step * moved
        z = precondition(residual)
        size, before = _dot(residual, z), size
        direction = z + _ratio(size, before) * direction
    return x


def _preconditioner(hole: Tensor, weights: Tensor) -> Callable[[Tensor], Tensor]:
    """Sum over cells of 1, 2, 4, ... pixels of the best constant correction in each cell."""
    height, width = hole.shape[2:]
    levels = max(height, width).bit_length() - 1
    multiple = 2**levels
    margin = (0, -width % multiple, 0, -height % multiple)
    inverses = [_inverse(energy) for energy in _energies(pad(hole, margin), levels)]
    diagonal = 1 / weights

    def apply(residual: Tensor) -> Tensor:
        cells = [pad(residual, margin)]
        for _ in inverses:
            cells.append(_sums(cells[-1]))
        z = torch.zeros_like(cells[-1])
        for inverse, sums in zip(reversed(inverses), reversed(cells), strict=False):
            z = interpolate(z + inverse * sums, scale_factor=2)
        return hole * (z[..., :height, :width] + diagonal * residual)

    return apply


def _energies(hole: Tensor, levels: int) -> Iterator[Tensor]:
    """For cells of 2, 4, ... pixels a side, p'Ap with p the indicator of the hole in a cell."""
    height, width = hole.shape[2:]
    rows = torch.arange(height, device=hole.device)[:, None]
    columns = torch.arange(width, device=hole.device)
    pairs = [
        (down, right, 2 * weight * hole * _shifted(hole, down, right))
        for down, right, weight in _HALF_OF_THE_NEIGHBOURS
    ]
    total = hole * _around(torch.ones_like(hole[:1]))
    for level in range(1, levels + 1):
        energy = total
        for down, right, pair in pairs:
            together = (rows >> level == rows + down >> level) & (
                columns >> level == columns + right >> level
            )
            energy = energy - pair * together
        for _ in range(level):
            energy = _sums(energy)
        yield energy


def _around(x: Tensor) -> Tensor:
    """The weighted sum of the eight neighbours; nothing lies outside.

    Sums of slices: pooling with a stride of 1 takes many times as long on a CPU.
    """
    framed = pad(x, (1, 1, 1, 1))
    rows = framed[..., :-2, :] + framed[..., 2:, :] + 2 * framed[..., 1:-1, :]
    nine = rows[..., :-2] + rows[..., 2:] + 2 * rows[..., 1:-1]  # (1 2 1) x (1 2 1)
    return nine / 12 - x / 3


def _sums(x: Tensor) -> Tensor:
    """Of each cell of 2 x 2."""
    rows = x[..., ::2, :] + x[..., 1::2, :]
    return rows[..., ::2] + rows[..., 1::2]


def _shifted(x: Tensor, down: int, right: int) -> Tensor:
    """x[i + down, j + right] at i, j; 0 outside."""
    height, width = x.shape[2:]
    return pad(x, (1, 1, 1, 1))[..., 1 + down : 1 + down + height, 1 + right : 1 + right + width]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((2, 3), keepdim=True)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b, 0.0)


def _inverse(x: Tensor) -> Tensor:
    return torch.where(x > 1e-6, 1 / x, 0.0)
