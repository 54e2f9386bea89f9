"""Whether maps are where the object is: pointing games, overlap with boxes and masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch

if TYPE_CHECKING:
    from torch import Tensor

Box: TypeAlias = Sequence[float]

THRESHOLDS = (0.0, 0.25, 0.5)  # of Loc in arXiv:1710.11063


def box_mask(boxes: Sequence[Box], size: tuple[int, int]) -> Tensor:
    """The union of boxes, boolean [H, W]: pixels whose centres lie inside.

    Args:
        boxes: left, top, right, bottom in pixels, the corner of the image being 0, 0.
        size: height and width.
    """
    y = torch.arange(size[0], dtype=torch.float64)[:, None] + 0.5
    x = torch.arange(size[1], dtype=torch.float64)[None] + 0.5
    mask = torch.zeros(size, dtype=torch.bool)
    for left, top, right, bottom in boxes:
        mask |= (x >= left) & (x < right) & (y >= top) & (y < bottom)
    return mask


def pointing(maps: Tensor, masks: Tensor, *, tolerance: float = 15.0) -> Tensor:
    """The pointing game, arXiv:1608.00507: whether the maximum hits the object, boolean [N].

    Args:
        maps: [N, H, W]; of several maxima the first as it is read counts.
        masks: boolean [N, H, W], the object.
        tolerance: how far from the nearest pixel of the object the maximum may be, in pixels.
    """
    _check(maps, masks)
    height, width = maps.shape[1:]
    peak = maps.flatten(1).argmax(1)
    down = torch.arange(height, device=maps.device)[None, :, None] - (peak // width)[:, None, None]
    across = torch.arange(width, device=maps.device)[None, None] - (peak % width)[:, None, None]
    near = down**2 + across**2 <= tolerance**2
    return (near & masks).flatten(1).any(1)


def energy(maps: Tensor, masks: Tensor) -> Tensor:
    """The energy-based pointing game, arXiv:1910.01279: share of the map in the object, [N].

    0 for a map that is zero everywhere.

    Args:
        maps: [N, H, W], >= 0.
        masks: boolean [N, H, W].
    """
    _check(maps, masks)
    total = maps.sum((1, 2))
    return torch.where(total > 0, (maps * masks).sum((1, 2)) / total, 0.0)


def overlap(maps: Tensor, masks: Tensor, *, thresholds: Sequence[float] = THRESHOLDS) -> Tensor:
    """Loc of arXiv:1710.11063, eq. 26: pixels above the threshold against the object, [N, T].

    Internal pixels over the area of the object and the external pixels, which is the intersection
    over union of the thresholded map with the object's boxes or mask.

    Args:
        maps: [N, H, W], in [0, 1].
        masks: boolean [N, H, W], for example of `box_mask`.
        thresholds: a pixel counts if its value is larger.
    """
    _check(maps, masks)
    levels = torch.tensor(thresholds, dtype=maps.dtype, device=maps.device)
    above = maps.unsqueeze(1) > levels[:, None, None]
    inside = masks.unsqueeze(1)
    internal = (above & inside).sum((2, 3))
    union = (above | inside).sum((2, 3))
    return torch.where(union > 0, internal / union, 0.0)


def box_overlap(maps: Tensor, boxes: Sequence[Sequence[Box]], *, threshold: float = 0.2) -> Tensor:
    """Intersection over union of the map's own box with the best of the true boxes, [N].

    The map's box encloses the largest connected part of the pixels above a share of the map's
    maximum, as in weakly supervised localisation (CAM, arXiv:1512.04150, takes 20 %). 0 for a map
    that is zero everywhere.

    Args:
        maps: [N, H, W], >= 0.
        boxes: of each image, as `box_mask` takes them.
        threshold: the share.
    """
    if len(boxes) != len(maps):
        raise ValueError(f"boxes must be given for each of the {len(maps)} maps, got {len(boxes)}")
    found = [_box_of(each, threshold) for each in maps]
    return torch.tensor(
        [
            max((_overlap_of_boxes(own, true) for true in of_image), default=0.0) if own else 0.0
            for own, of_image in zip(found, boxes, strict=True)
        ],
        device=maps.device,
    )


def _box_of(one: Tensor, threshold: float) -> Box | None:
    from scipy import ndimage

    above = (one > threshold * one.max()).cpu().numpy()
    parts, count = ndimage.label(above, structure=[[1, 1, 1]] * 3)
    if count == 0:
        return None
    sizes = ndimage.sum_labels(above, parts, range(1, count + 1))
    rows, columns = ndimage.find_objects(parts)[int(sizes.argmax())]
    return columns.start, rows.start, columns.stop, rows.stop


def _overlap_of_boxes(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    common = max(0.0, width) * max(0.0, height)
    return common / (_area(a) + _area(b) - common)


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _check(maps: Tensor, masks: Tensor) -> None:
    if masks.shape != maps.shape or masks.dtype != torch.bool:
        raise ValueError(
            f"masks must be boolean {list(maps.shape)}, as maps are, got {masks.dtype} "
            f"{list(masks.shape)}"
        )
