"""The metrics as torchmetrics: update with batches, compute, merge across processes.

All of them keep sums and a count, so that parts merge into exactly what the whole gives. They take
probabilities and maps, not models: whoever runs the model decides what shares a batch. What they
compute is defined beside the functions that they call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torchmetrics import Metric

from gradcampp_ext.metrics import agreement, confidence, localization, perturbation

if TYPE_CHECKING:
    from torch import Tensor


class _Mean(Metric):
    """The mean of something of each sample; subclasses say what in their `update`.

    Args:
        shape: of the something, () for one number a sample.
        scale: 100 for percentages.
        kwargs: of torchmetrics.Metric: how processes synchronise.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better: bool | None = True
    total: Tensor
    count: Tensor

    def __init__(self, *, shape: tuple[int, ...] = (), scale: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scale = scale
        self.add_state("total", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def _add(self, values: Tensor) -> None:
        """Values [N, *shape]."""
        values = values.detach()
        if values.shape[1:] != self.total.shape:
            raise ValueError(
                f"{type(self).__name__} takes one value of shape {list(self.total.shape)} a "
                f"sample, got {list(values.shape)}"
            )
        self.total += values.double().sum(0).to(self.total.device)
        self.count += len(values)

    def compute(self) -> Tensor:
        """The mean, [*shape]; NaN before the first update."""
        return (self.scale * self.total / self.count).to(torch.get_default_dtype())


class AverageDrop(_Mean):
    """Average Drop %, arXiv:1710.11063, section 4.1; smaller is better."""

    higher_is_better = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(scale=100, **kwargs)

    def update(self, full: Tensor, behind: Tensor) -> None:
        """Probabilities of the explained classes for the images, and behind the maps, [N]."""
        self._add(confidence.drop(full, behind))


class IncreaseInConfidence(_Mean):
    """% Increase in Confidence, arXiv:1710.11063, section 4.1."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(scale=100, **kwargs)

    def update(self, full: Tensor, behind: Tensor) -> None:
        """As `AverageDrop.update`."""
        self._add(confidence.increase(full, behind))


class WinRate(_Mean):
    """Win %, arXiv:1710.11063, section 4.1, of every pair: [M, M], row over column.

    Args:
        methods: M.
    """

    def __init__(self, methods: int, **kwargs: Any) -> None:
        super().__init__(shape=(methods, methods), scale=100, **kwargs)

    def update(self, behind: Tensor) -> None:
        """Probabilities behind the maps of each method, [N, M]."""
        self._add(confidence.wins(behind))


class _Curve(_Mean):
    def __init__(self, points: Sequence[int], **kwargs: Any) -> None:
        super().__init__(shape=(len(points),), **kwargs)
        self.points = list(points)

    def update(self, probabilities: Tensor) -> None:
        """Probabilities of the explained classes at each of the points, [N, points]."""
        self._add(probabilities)

    def compute(self) -> Tensor:
        """The area under the mean curve, which is the mean area."""
        return perturbation.area(super().compute(), self.points)

    def curve(self) -> Tensor:
        """The mean curve, at each of the points."""
        return super().compute()


class Insertion(_Curve):
    """Area under the insertion curve, arXiv:1806.07421.

    Args:
        points: of `perturbation.schedule`.
    """


class Deletion(_Curve):
    """Area under the deletion curve, arXiv:1806.07421; smaller is better. As `Insertion`."""

    higher_is_better = False


class Road(_Mean):
    """ROAD, arXiv:2202.00449: (least relevant first - most relevant first) / 2, over shares."""

    def update(self, morf: Tensor, lerf: Tensor) -> None:
        """Probabilities after removing each of the shares in either order, [N, shares]."""
        self._add((lerf - morf).mean(1) / 2)


class PointingGame(_Mean):
    """Share of maxima on the object, arXiv:1608.00507; over all images, whatever their class.

    Args:
        tolerance: in pixels of the maps.
    """

    def __init__(self, tolerance: float = 15.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tolerance = tolerance

    def update(self, maps: Tensor, masks: Tensor) -> None:
        """Maps [N, H, W] and the objects, boolean [N, H, W]."""
        self._add(localization.pointing(maps, masks, tolerance=self.tolerance))


class EnergyPointingGame(_Mean):
    """Mean share of the map inside the object, arXiv:1910.01279."""

    def update(self, maps: Tensor, masks: Tensor) -> None:
        """As `PointingGame.update`."""
        self._add(localization.energy(maps, masks))


class Overlap(_Mean):
    """mLoc of arXiv:1710.11063, section 4.3: a number a threshold.

    Args:
        thresholds: see `localization.overlap`.
    """

    def __init__(
        self, thresholds: Sequence[float] = localization.THRESHOLDS, **kwargs: Any
    ) -> None:
        super().__init__(shape=(len(thresholds),), **kwargs)
        self.thresholds = tuple(thresholds)

    def update(self, maps: Tensor, masks: Tensor) -> None:
        """As `PointingGame.update`; maps in [0, 1]."""
        self._add(localization.overlap(maps, masks, thresholds=self.thresholds))


class BoxOverlap(_Mean):
    """Mean overlap of the map's box with the best true box; see `localization.box_overlap`."""

    def update(self, maps: Tensor, boxes: Sequence[Sequence[localization.Box]]) -> None:
        """Maps [N, H, W] and the boxes of each image."""
        self._add(localization.box_overlap(maps, boxes))


class Complexity(_Mean):
    """Mean complexity, arXiv:2104.10252; smaller is better."""

    higher_is_better = False

    def update(self, maps: Tensor) -> None:
        """Maps [N, *S] in [0, 1]."""
        self._add(agreement.complexity(maps))


class Coherency(_Mean):
    """Mean coherency, arXiv:2104.10252."""

    def update(self, maps: Tensor, again: Tensor) -> None:
        """Maps of the images, and of the images behind these maps, [N, *S]."""
        self._add(agreement.coherency(maps, again))


class AverageDCC(_Mean):
    """Mean of coherency, complexity and drop, image by image harmonically: arXiv:2104.10252."""

    def update(self, maps: Tensor, again: Tensor, full: Tensor, behind: Tensor) -> None:
        """As `Coherency.update` and `AverageDrop.update` together."""
        self._add(
            agreement.adcc(
                agreement.coherency(maps, again),
                agreement.complexity(maps),
                confidence.drop(full, behind),
            )
        )


class MaxSensitivity(_Mean):
    """Mean of max-sensitivity, arXiv:1901.09392; smaller is better."""

    higher_is_better = False

    def update(self, maps: Tensor, noisy: Tensor) -> None:
        """Maps [N, *S] of the images and [K, N, *S] of K noisy copies of each."""
        self._add(agreement.sensitivity(maps, noisy))


class RandomizationCheck(_Mean):
    """Rank correlation with the maps of a network that loses its weights, stage by stage.

    arXiv:1810.03292; near 0 from the first stages on is what one wants to see.

    Args:
        stages: how many of `randomization.cascade`.
    """

    higher_is_better = False

    def __init__(self, stages: int, **kwargs: Any) -> None:
        super().__init__(shape=(stages,), **kwargs)

    def update(self, maps: Tensor, randomised: Tensor) -> None:
        """Maps [N, H, W], and the same after each stage, [stages, N, H, W]."""
        each = [agreement.rank_correlation(maps, stage) for stage in randomised]
        self._add(torch.stack(each, 1))
