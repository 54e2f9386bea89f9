"""Faithfulness of explanations: whether maps show what the network goes by.

Functions on tensors, each beside its definition and source:

- `confidence`: the image behind its map; drop, increase, wins (Grad-CAM++);
- `perturbation`: insertion and deletion (RISE), what ROAD removes; `road`: how it fills the gaps;
- `localization`: pointing games, Loc, overlap with boxes and masks;
- `agreement`: coherency, complexity, ADCC, sensitivity to noise, rank correlation;
- `randomization`: networks that lose their weights, for the sanity check;
- `streaming`: the same as torchmetrics, which must be installed for them; they can be had from
  here: `gradcampp_ext.metrics.AverageDrop`.

`gradcampp_ext.evaluation` runs them all over pictures.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradcampp_ext.metrics.streaming import AverageDCC as AverageDCC
    from gradcampp_ext.metrics.streaming import AverageDrop as AverageDrop
    from gradcampp_ext.metrics.streaming import BoxOverlap as BoxOverlap
    from gradcampp_ext.metrics.streaming import Coherency as Coherency
    from gradcampp_ext.metrics.streaming import Complexity as Complexity
    from gradcampp_ext.metrics.streaming import Deletion as Deletion
    from gradcampp_ext.metrics.streaming import EnergyPointingGame as EnergyPointingGame
    from gradcampp_ext.metrics.streaming import IncreaseInConfidence as IncreaseInConfidence
    from gradcampp_ext.metrics.streaming import Insertion as Insertion
    from gradcampp_ext.metrics.streaming import MaxSensitivity as MaxSensitivity
    from gradcampp_ext.metrics.streaming import Overlap as Overlap
    from gradcampp_ext.metrics.streaming import PointingGame as PointingGame
    from gradcampp_ext.metrics.streaming import RandomizationCheck as RandomizationCheck
    from gradcampp_ext.metrics.streaming import Road as Road
    from gradcampp_ext.metrics.streaming import WinRate as WinRate

__all__ = [
    "AverageDCC",
    "AverageDrop",
    "BoxOverlap",
    "Coherency",
    "Complexity",
    "Deletion",
    "EnergyPointingGame",
    "IncreaseInConfidence",
    "Insertion",
    "MaxSensitivity",
    "Overlap",
    "PointingGame",
    "RandomizationCheck",
    "Road",
    "WinRate",
]

_MODULES = (
    "agreement",
    "confidence",
    "localization",
    "perturbation",
    "randomization",
    "road",
    "streaming",
)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.streaming"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
