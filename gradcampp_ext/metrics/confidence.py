"""What the network still says about an image behind its map: arXiv:1710.11063, section 4.1.

The explanation map is E = L * I, with the map L in [0, 1] at the size of the image I. Y is the
probability of the explained class for I, O that for E.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def masked(images: Tensor, maps: Tensor, baseline: Tensor | float = 0.0) -> Tensor:
    """Images that fade into a baseline where the map is low: L I + (1 - L) baseline.

    Args:
        images: [N, C, *S], as the network takes them.
        maps: [N, *S], in [0, 1].
        baseline: what L = 0 shows, broadcast to the images. 0 makes the product of map and
            normalised input; the normalised values of black make that of map and pixels.
    """
    if maps.shape != (len(images), *images.shape[2:]):
        raise ValueError(
            f"maps must be [N, *S] for images {list(images.shape)}, got {list(maps.shape)}; was "
            "size given to the op?"
        )
    bottom = torch.as_tensor(baseline, dtype=images.dtype, device=images.device)
    return torch.lerp(bottom.expand_as(images), images, maps.unsqueeze(1).to(images.dtype))


def drop(full: Tensor, behind: Tensor) -> Tensor:
    """max(0, Y - O) / Y, in [0, 1]; 0 where Y is 0. Average Drop % is 100 times its mean.

    Args:
        full: Y, probabilities [...].
        behind: O, broadcast against it.
    """
    lost = (full - behind).relu()
    return torch.where(full > 0, lost / full, 0.0)


def increase(full: Tensor, behind: Tensor) -> Tensor:
    """Whether Y < O, boolean. % Increase in Confidence is 100 times its mean."""
    return full < behind


def wins(behind: Tensor, *, tie: float = 1e-5) -> Tensor:
    """Whether method a keeps more of the confidence than method b, boolean [..., M, M].

    Y is the same for both, so a wins where its O is larger. Where they are equal neither wins,
    so that Win % of a over b and of b over a add up to 100 less the ties.

    Args:
        behind: O of M methods, [..., M].
        tie: differences up to this are the rounding of two equal maps, and count as equal.
    """
    return behind.unsqueeze(-1) - behind.unsqueeze(-2) > tie
