"""Maps beside maps: coherency, complexity, ADCC, sensitivity to noise, rank correlation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def complexity(maps: Tensor) -> Tensor:
    """Mean of each map, [N]: the L1 norm over the number of pixels (arXiv:2104.10252, eq. 5).

    Args:
        maps: [N, *S], in [0, 1].
    """
    return maps.flatten(1).abs().mean(1)


def coherency(maps: Tensor, again: Tensor) -> Tensor:
    """Whether what is behind the map explains itself alike, [N] in [0, 1] (arXiv:2104.10252).

    (1 + Pearson's correlation) / 2 of the map with the map of the masked image for the same class;
    0 where one of them is constant, which has no correlation.

    Args:
        maps: [N, *S], of the images.
        again: the same, of the images behind these maps.
    """
    correlation = _pearson(maps.flatten(1), again.flatten(1))
    return torch.where(correlation.isnan(), 0.0, (1 + correlation) / 2)


def adcc(coherency: Tensor, complexity: Tensor, drop: Tensor) -> Tensor:
    """Average DCC, the harmonic mean of coherency, 1 - complexity and 1 - drop, [N].

    arXiv:2104.10252, eq. 6, image by image. 0 where one of the three is 0.
    """
    parts = torch.stack([coherency, 1 - complexity, 1 - drop]).clamp(min=0)
    mean: Tensor = 3 / (1 / parts).sum(0)
    return mean


def sensitivity(maps: Tensor, noisy: Tensor) -> Tensor:
    """Max-sensitivity, arXiv:1901.09392: the largest relative change of the map, [N].

    max over samples of |map(x + noise) - map(x)| / |map(x)|, in the L2 norm; relative as in
    Captum, whose radius (0.02 around the normalised input, uniform) is the runner's default.
    A map that is zero everywhere counts as of norm 1.

    Args:
        maps: [N, *S].
        noisy: [K, N, *S], of K samples within the radius.
    """
    change = (noisy - maps).flatten(2).norm(dim=2).amax(0)
    norm = maps.flatten(1).norm(dim=1)
    relative: Tensor = change / torch.where(norm > 0, norm, 1.0)
    return relative


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's correlation of maps [..., *S] of two spatial sizes, sample by sample.

    Equal values share their mean rank; 0 where one of the maps is constant.
    """
    if a.shape != b.shape:
        raise ValueError(f"maps must have one shape, got {list(a.shape)} and {list(b.shape)}")
    correlation = _pearson(_mean_ranks(a.flatten(-2)), _mean_ranks(b.flatten(-2)))
    return correlation.nan_to_num(0.0)


def _mean_ranks(values: Tensor) -> Tensor:
    ordered = values.sort(-1).values.contiguous()
    values = values.contiguous()
    below = torch.searchsorted(ordered, values)
    not_above = torch.searchsorted(ordered, values, right=True)
    return (below + not_above).double()


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """Along the last dimension; NaN where one side is constant."""
    a, b = a.double(), b.double()
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    scale = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(scale > 0, (a * b).sum(-1) / scale, torch.nan).clamp(-1, 1)
