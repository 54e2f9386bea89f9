"""Pictures of a result: bars with intervals, wins, curves, the largest disagreements."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gradcampp_ext import imaging
from gradcampp_ext.batch import provenance, record
from gradcampp_ext.batch.decode import Decoder
from gradcampp_ext.evaluation.summary import layers_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gradcampp_ext.batch.engine import Row
    from gradcampp_ext.batch.items import Source
    from gradcampp_ext.evaluation.evaluator import Evaluator
    from gradcampp_ext.models import LoadedModel

_TILE, _CAPTION, _GAP = 168, 34, 6  # pixels, of disagreements.jpg


def draw(result: dict[str, Any], told: Mapping[str, Any]) -> dict[str, bytes]:
    """PNG files by name, of all that the result has: bars, wins, curves, randomization.

    `told` is what they say of themselves, see `gradcampp_ext.batch.provenance.about`.
    """
    figures = {record.BARS: _bars(result)}
    if len(result["settings"]["methods"]) > 1 and "wins" in result:
        figures[record.WINS] = _wins(result)
    kinds = {curve["curve"] for curve in result["curves"]}
    if kinds - {"randomization"}:
        figures[record.CURVES] = _curves(result)
    if "randomization" in kinds:
        figures[record.RANDOMIZATION] = _randomization(result)
    return {name: _png(figure, told) for name, figure in figures.items()}


def disagreements(
    pictures: Sequence[Sequence[Row]],
    source: Source,
    model: LoadedModel,
    evaluator: Evaluator,
    told: Mapping[str, Any],
    *,
    count: int = 6,
) -> dict[str, bytes]:
    """disagreements.jpg: the pictures on which the methods differ most in O, with all their maps.

    The pictures are read and explained once more. Nothing if there is no O, or only one method.
    """
    if len(pictures[0]) < 2 or "behind" not in pictures[0][0]:
        return {}

    def spread(rows: Sequence[Row]) -> float:
        behind: list[float] = [row["behind"] for row in rows]
        return max(behind) - min(behind)

    furthest = sorted(pictures, key=spread, reverse=True)[:count]
    chosen = {rows[0]["path"]: rows for rows in furthest}
    order = {path: place for place, path in enumerate(chosen)}
    items = sorted(
        (item for item in source if item.path in chosen), key=lambda item: order[item.path]
    )
    decoder = Decoder(source, model, model.recipe.size, needs_label=evaluator.by_label)
    batch = decoder[[(item, chosen[item.path][0]["name"]) for item in items]]
    if not batch.items:
        return {}
    maps = evaluator.maps(batch)
    drawn = [imaging.overlay(batch.pictures, own.cpu()).numpy() for own in maps]
    titles = ["picture", *(f"{method}\n{layer}" for layer, method in evaluator.names)]
    step = _TILE + _GAP
    height = _CAPTION + len(batch.items) * (step + _CAPTION)
    sheet = Image.new("RGB", (_GAP + len(titles) * step, height), imaging.WHITE)
    ink, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for column, title in enumerate(titles):
        ink.text((_GAP + column * step, 4), _short(title), fill="black", font=font)
    for line, item in enumerate(batch.items):
        rows, top = chosen[item.path], _CAPTION + line * (step + _CAPTION)
        tiles = [batch.pictures[line].numpy(), *(each[line] for each in drawn)]
        name = rows[0]["target_name"] or str(rows[0]["target"])
        captions = [f"{name}\nY = {rows[0]['probability']:.2f}"]
        captions += [f"O = {row['behind']:.2f}" for row in rows]
        for column, (pixels, caption) in enumerate(zip(tiles, captions, strict=True)):
            left = _GAP + column * step
            tile = Image.fromarray(np.ascontiguousarray(pixels)).resize((_TILE, _TILE))
            sheet.paste(tile, (left, top))
            ink.text((left, top + _TILE + 2), _short(caption), fill="black", font=font)
    file = io.BytesIO()
    sheet.save(file, "JPEG", quality=90, exif=provenance.exif(told))
    return {record.DISAGREEMENTS: file.getvalue()}


def _short(text: str) -> str:
    return "\n".join(line if len(line) <= 30 else f"{line[:29]}…" for line in text.split("\n"))


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    """A figure of its own, without pyplot and its global state; drawn by Agg when it is saved."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _bars(result: dict[str, Any]) -> Figure:
    layers = layers_of(result)
    methods = list(dict.fromkeys(entry["method"] for entry in result["summary"]))
    measures = list(dict.fromkeys(entry["measure"] for entry in result["summary"]))
    columns = min(3, len(measures))
    lines = -(-len(measures) // columns)
    high = 0.6 + 0.22 * len(methods) * len(layers)
    figure, axes = _figure(lines, columns, (4.6 * columns, max(1.6, high) * lines + 0.4))
    width = 0.8 / len(layers)
    for axis, measure in zip(axes.flat, measures, strict=False):
        for number, layer in enumerate(layers):
            entries = {
                entry["method"]: entry
                for entry in result["summary"]
                if (entry["layer"], entry["measure"]) == (layer, measure)
            }
            means = [entries[method]["mean"] for method in methods]
            reach = [
                [max(0.0, entries[m]["mean"] - entries[m]["low"]) for m in methods],
                [max(0.0, entries[m]["high"] - entries[m]["mean"]) for m in methods],
            ]
            places = np.arange(len(methods)) + (number - (len(layers) - 1) / 2) * width
            axis.barh(places, means, width, xerr=reach, label=f"layer {layer}", color=f"C{number}",
                      error_kw={"elinewidth": 1, "capsize": 2})  # fmt: skip
        definition = result["definitions"][measure]
        better = {"lower": ", lower is better", "higher": ", higher is better", None: ""}
        axis.set_title(definition["title"] + better[definition["better"]], fontsize=9)
        _methods(axis, methods)
    for axis in list(axes.flat)[len(measures) :]:
        axis.axis("off")
    if len(layers) > 1:
        axes[0, 0].legend(fontsize=7)
    return figure


def _methods(axis: Axes, methods: Sequence[str]) -> None:
    axis.set_yticks(range(len(methods)), methods, fontsize=8)
    axis.invert_yaxis()
    axis.tick_params(axis="x", labelsize=8)


def _wins(result: dict[str, Any]) -> Figure:
    wins = result["wins"]
    side = 1.6 + 0.6 * len(wins[0]["methods"])
    figure, axes = _figure(1, len(wins), ((side + 0.6) * len(wins), side))
    for axis, each in zip(axes.flat, wins, strict=True):
        values = np.array(each["percent"], float)
        axis.imshow(values, vmin=0, vmax=100, cmap="RdBu")
        for row, column in np.argwhere(~np.isnan(values)):
            value = values[row, column]
            pale = 25 < value < 75
            axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8,
                      color="black" if pale else "white")  # fmt: skip
        axis.set_xticks(range(len(values)), each["methods"], fontsize=8, rotation=90)
        axis.set_yticks(range(len(values)), each["methods"], fontsize=8)
        axis.set_title(f"Win % of row over column\n{each['layer']}", fontsize=9)
    return figure


def _curves(result: dict[str, Any]) -> Figure:
    """Insertion and deletion over the share of pixels, ROAD over the share removed."""
    shares = {
        kind: np.linspace(0, 1, len(curve["mean"]))
        for curve in result["curves"]
        if (kind := curve["curve"]) in ("insertion", "deletion")
    }
    for order in ("road_morf", "road_lerf"):
        if any(curve["curve"] == order for curve in result["curves"]):
            shares[order] = np.array(result["settings"]["road_shares"])
    titles = {
        "insertion": "insertion: probability over pixels brought in",
        "deletion": "deletion: probability over pixels taken",
        "road_morf": "ROAD, most relevant first",
        "road_lerf": "ROAD, least relevant first",
    }
    layers = layers_of(result)
    figure, axes = _figure(len(layers), len(shares), (4 * len(shares), 3 * len(layers)))
    for (line, layer), (column, kind) in product(enumerate(layers), enumerate(shares)):
        axis = axes[line, column]
        for method, mean in _of(result, layer, kind):
            axis.plot(shares[kind], mean, label=method, linewidth=1.2)
        axis.set(xlim=(0, 1), ylim=(0, 1))
        axis.set_title(f"{titles[kind]}\n{layer}", fontsize=9)
        axis.grid(alpha=0.25)
    axes[0, 0].legend(fontsize=7)
    return figure


def _randomization(result: dict[str, Any]) -> Figure:
    layers = layers_of(result)
    figure, axes = _figure(1, len(layers), (max(4.5, 0.5 * len(result["stages"])) * len(layers), 5))
    for axis, layer in zip(axes.flat, layers, strict=True):
        for method, mean in _of(result, layer, "randomization"):
            axis.plot(range(len(mean)), mean, marker=".", label=method, linewidth=1.2)
        axis.set_xticks(range(len(result["stages"])), result["stages"], rotation=90, fontsize=6)
        axis.set_title(
            f"maps of layer {layer}: rank correlation with\n"
            "those of the network randomised from the output to the stage",
            fontsize=9,
        )
        axis.set_ylim(top=1.05)
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.grid(alpha=0.25)
    axes[0, 0].legend(fontsize=7)
    return figure


def _of(result: dict[str, Any], layer: str, kind: str) -> Iterator[tuple[str, list[float]]]:
    for curve in result["curves"]:
        if (curve["layer"], curve["curve"]) == (layer, kind):
            yield curve["method"], curve["mean"]


def _png(figure: Figure, told: Mapping[str, Any]) -> bytes:
    file = io.BytesIO()
    exif = provenance.exif(told)
    figure.savefig(file, format="png", dpi=110, pil_kwargs={"exif": exif})
    return file.getvalue()
