"""Averaging maps over variations of the input: noise, flips, intensities."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from itertools import chain, combinations, product
from types import NoneType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gradcampp_ext import checks

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from gradcampp_ext.targets import Target

_PLAIN = (bool, int, float, str, NoneType)  # arguments without a batch dimension


class Variations(ABC):
    """Variations of a batch of images, numbered from 0; each does the same to every sample.

    ``together`` of them go through the model at once; one by one where it takes further tensors,
    since nothing tells whether those belong to the samples.
    """

    together: int

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def apply(self, images: Tensor, number: int) -> Tensor:
        """Variation ``number`` of images [N, C, *S], in the same shape."""

    def undo(self, maps: Tensor, number: int) -> Tensor:
        """Maps [..., *S] of variation ``number`` as they lie over the images."""
        return maps

    def batches(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], image: Tensor
    ) -> Iterator[Batch]:
        """A model's arguments for all variations of ``image``, which is among them."""
        others = (value for value in (*args, *kwargs.values()) if value is not image)
        together = self.together if all(isinstance(value, _PLAIN) for value in others) else 1
        for first in range(0, len(self), together):
            numbers = range(first, min(first + together, len(self)))
            yield Batch(self, numbers, args, kwargs, image)


class Batch:
    """Some variations of N images as one batch, variation by variation."""

    def __init__(
        self,
        variations: Variations,
        numbers: range,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        image: Tensor,
    ) -> None:
        self._variations = variations
        self._numbers = numbers
        self._image = image
        varied = torch.cat([variations.apply(image, number) for number in numbers])
        self.args = tuple(varied if value is image else value for value in args)
        self.kwargs = {k: varied if value is image else value for k, value in kwargs.items()}

    def targets(self, targets: Tensor | tuple[Target, ...]) -> Tensor | tuple[Target, ...]:
        """The same targets for every variation: classes [N, K], or callables."""
        if isinstance(targets, torch.Tensor):
            return targets.repeat(len(self._numbers), 1)
        return tuple(partial(self._scores, target) for target in targets)

    def sum(self, maps: Tensor) -> Tensor:
        """The sum of the variations' maps, each as it lies over the images: [N, K, *size]."""
        return torch.stack(self._apart(maps)).sum(0)

    def _scores(self, target: Target, output: Any) -> Tensor:
        """A target's scores, variation by variation; dense outputs lie over the images for it."""
        if not isinstance(output, torch.Tensor):
            raise ValueError(
                "average= and callable targets need a model output that is one tensor, got "
                f"{type(output).__name__}; choose it by output="
            )
        dense = output.dim() == self._image.dim()
        parts = self._apart(output) if dense else output.chunk(len(self._numbers))
        return torch.cat([target(part) for part in parts])

    def _apart(self, maps: Tensor) -> list[Tensor]:
        parts = zip(self._numbers, maps.chunk(len(self._numbers)), strict=True)
        return [self._variations.undo(part, number) for number, part in parts]


@dataclass(frozen=True)
class Smooth(Variations):
    """Gaussian noise: maps averaged as in SmoothGrad (arXiv:1706.03825), or Smooth Grad-CAM++.

    Attributes:
        samples: how many noisy copies of each image are averaged.
        std: of the noise, as a share of each image's range (max - min).
        seed: the same seed gives the same noise, on every device and in every batch.
        together: how many copies go through the model in one batch, if it takes images alone.
        powers: False averages the maps of the copies, of any method. True is Smooth Grad-CAM++
            (arXiv:1908.01224), of "gradcampp" alone: the first three powers of the copies'
            gradients are averaged, and make one map with the activations of the images
            themselves; ``gradcampp_ext.PowerSums`` has the formula.
    """

    samples: int = 16
    std: float = 0.15
    seed: int = 0
    together: int = 4
    powers: bool = False

    def __post_init__(self) -> None:
        checks.integer("samples", self.samples)
        checks.integer("together", self.together)
        if self.samples < 1 or self.together < 1:
            raise ValueError(
                f"samples and together must be at least 1, got {self.samples} and {self.together}"
            )
        if not self.std >= 0:
            raise ValueError(f"std must be a share of the image's range, 0 or more, got {self.std}")

    def __len__(self) -> int:
        return self.samples

    def apply(self, images: Tensor, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(mixed(self.seed, number))
        noise = torch.randn(images.shape[1:], generator=generator).to(images)
        dims = tuple(range(1, images.dim()))
        spread = images.amax(dims, keepdim=True) - images.amin(dims, keepdim=True)
        return images + self.std * spread * noise


def mixed(seed: int, number: int) -> int:
    """A seed of 32 bits, all that torch looks at on a CPU, for each seed and number."""
    return int(np.random.SeedSequence(seed % 2**64, spawn_key=(number,)).generate_state(1)[0])


@dataclass(frozen=True)
class Augment(Variations):
    """Test-time augmentation: flips, and the image at several intensities, in every combination.

    Attributes:
        flips: dimensions to flip, -1 for left and right; the image as it is comes too.
        intensities: factors on the model's input.
        together: how many variations go through the model in one batch, if it takes images alone.
    """

    flips: tuple[int, ...] = (-1,)
    intensities: tuple[float, ...] = (0.9, 1.0, 1.1)
    together: int = 2

    def __post_init__(self) -> None:
        checks.integer("together", self.together)
        if not self.intensities or self.together < 1:
            raise ValueError(
                "intensities must hold at least one factor and together be at least 1, got "
                f"{self.intensities} and {self.together}"
            )
        if any(not -3 <= dim < 0 for dim in checks.integers("flips", self.flips)):
            raise ValueError(f"flips must be spatial dimensions, from -1 to -3, got {self.flips}")

    def __len__(self) -> int:
        return len(self._all())

    def apply(self, images: Tensor, number: int) -> Tensor:
        dims, intensity = self._all()[number]
        if any(dim < 2 - images.dim() for dim in dims):
            raise ValueError(
                f"flips must be spatial dimensions, from -1 to {2 - images.dim()} for images "
                f"{list(images.shape)}, got {self.flips}"
            )
        return images.flip(dims) * intensity

    def undo(self, maps: Tensor, number: int) -> Tensor:
        return maps.flip(self._all()[number][0])

    def _all(self) -> list[tuple[tuple[int, ...], float]]:
        subsets = chain.from_iterable(
            combinations(self.flips, count) for count in range(len(self.flips) + 1)
        )
        return list(product(subsets, self.intensities))
