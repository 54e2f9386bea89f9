"""The table of measures: what is reported, which way it is good, how it is defined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Measure:
    """One number for each map.

    Attributes:
        name: its key in rows and results.
        title: for tables and plots.
        better: which way it is good; None where that depends.
        definition: exactly what the mean is taken of.
        source: where it was proposed.
        percent: whether the mean is told in percent.
    """

    name: str
    title: str
    better: Literal["lower", "higher"] | None
    definition: str
    source: str
    percent: bool = False


METRICS = (
    "drop",  # confidence behind the map; one forward pass a map
    "coherency",  # the map of what is behind the map, and ADCC; shares its pass with drop
    "insertion",  # a forward pass a step and map
    "deletion",  # the same
    "road",  # two forward passes a share and map
    "localization",  # against boxes; no pass
    "sensitivity",  # change under noise; a capture a sample
    "randomization",  # maps of networks that lose their weights; a capture a stage
)

MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure(
            "drop",
            "Average Drop %",
            "lower",
            "max(0, Y - O) / Y; Y, O: softmax probability of the explained class for the image and "
            "for the image behind the map (settings.space)",
            "arXiv:1710.11063, section 4.1",
            percent=True,
        ),
        Measure(
            "increase",
            "Increase %",
            "higher",
            "1 if Y < O, else 0",
            "arXiv:1710.11063, section 4.1",
            percent=True,
        ),
        Measure(
            "insertion",
            "Insertion AUC",
            "higher",
            "area under the probability over the share of pixels, highest ranked first, that were "
            "brought into settings.insertion_from",
            "arXiv:1806.07421",
        ),
        Measure(
            "deletion",
            "Deletion AUC",
            "lower",
            "area under the probability over the share of pixels, highest ranked first, that were "
            "replaced by settings.deletion_to",
            "arXiv:1806.07421",
        ),
        Measure(
            "road",
            "ROAD",
            "higher",
            "(probability with the least relevant pixels imputed - with the most relevant) / 2, "
            "averaged over settings.road_shares",
            "arXiv:2202.00449",
        ),
        Measure(
            "pointing",
            "Pointing %",
            "higher",
            "1 if the maximum lies within settings.tolerance pixels of a box, else 0",
            "arXiv:1608.00507",
            percent=True,
        ),
        Measure(
            "energy",
            "Energy in box",
            "higher",
            "share of the map's sum inside the boxes",
            "arXiv:1910.01279",
        ),
        Measure(
            "loc_0",
            "Loc(0)",
            "higher",
            "pixels > 0 inside the boxes / (area of the boxes + pixels > 0 outside)",
            "arXiv:1710.11063, eq. 26",
        ),
        Measure(
            "loc_0.25",
            "Loc(0.25)",
            "higher",
            "the same with pixels > 0.25",
            "arXiv:1710.11063, eq. 26",
        ),
        Measure(
            "loc_0.5",
            "Loc(0.5)",
            "higher",
            "the same with pixels > 0.5",
            "arXiv:1710.11063, eq. 26",
        ),
        Measure(
            "box_overlap",
            "Box IoU",
            "higher",
            "IoU of the box around the largest part above 20 % of the maximum with the best box",
            "arXiv:1512.04150",
        ),
        Measure(
            "coherency",
            "Coherency",
            "higher",
            "(1 + Pearson's correlation) / 2 of the map with that of the image behind it",
            "arXiv:2104.10252",
        ),
        Measure(
            "complexity",
            "Complexity",
            "lower",
            "mean of the map; a map that shows less hides more, so read it beside drop",
            "arXiv:2104.10252",
        ),
        Measure(
            "adcc",
            "ADCC",
            "higher",
            "harmonic mean of coherency, 1 - complexity and 1 - drop, image by image",
            "arXiv:2104.10252",
        ),
        Measure(
            "sensitivity",
            "Max-sensitivity",
            "lower",
            "largest |map(x + noise) - map(x)| / |map(x)| over settings.samples uniform samples "
            "within settings.radius of the normalised input",
            "arXiv:1901.09392",
        ),
        Measure(
            "randomization",
            "Rank correlation, randomised",
            "lower",
            "Spearman's correlation, at the layer's size, with the map of the network after all "
            "its weights were randomised; by stage under curves",
            "arXiv:1810.03292",
        ),
    )
}

WINS = (
    "share of images for which O is larger, by more than 0.00001, with the method of the row than "
    "with that of the column; what is missing to 100 with the two exchanged are ties"
)
