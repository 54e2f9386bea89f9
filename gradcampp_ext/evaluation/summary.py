"""From rows to results: means with confidence intervals, wins, curves; JSON, CSV, tables."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

from gradcampp_ext.batch.record import EVALUATION, MEANS
from gradcampp_ext.evaluation.measures import MEASURES, WINS
from gradcampp_ext.metrics import confidence

if TYPE_CHECKING:
    from gradcampp_ext.batch.engine import Row

Floats: TypeAlias = npt.NDArray[np.float64]
Result: TypeAlias = dict[str, Any]

RESAMPLES, CONFIDENCE = 2000, 0.95
_CELLS = 2**22  # of resampled weights held at a time


def summarize(
    pictures: Sequence[Sequence[Row]], settings: dict[str, Any], stages: Sequence[str] = ()
) -> Result:
    """What evaluation.json says.

    Args:
        pictures: rows of results.jsonl, picture by picture; at least one.
        settings: of the run.
        stages: names of what was randomised, if that was evaluated.
    """
    names = [(row["layer"], row["method"]) for row in pictures[0]]
    values = {
        measure: _column(pictures, measure)
        for measure in MEASURES
        if any(measure in row for rows in pictures for row in rows)
    }
    labelled = [first["right"] for first, *_ in pictures if first["right"] is not None]
    result: Result = {
        "images": len(pictures),
        "labelled": len(labelled),
        "right": sum(labelled),
        "settings": settings,
        "interval": {
            "method": "percentile bootstrap over images",
            "confidence": CONFIDENCE,
            "resamples": RESAMPLES,
        },
        "definitions": {
            name: {
                "title": MEASURES[name].title,
                "better": MEASURES[name].better,
                "definition": MEASURES[name].definition,
                "source": MEASURES[name].source,
                "unit": "%" if MEASURES[name].percent else "",
            }
            for name in values
        },
        "summary": [],
    }
    for measure, column in values.items():
        scale = 100 if MEASURES[measure].percent else 1
        low, high = bootstrap(column)
        for m, (layer, method) in enumerate(names):
            known = column[:, m][~np.isnan(column[:, m])]
            result["summary"].append(
                {
                    "layer": layer,
                    "method": method,
                    "measure": measure,
                    "mean": _digits(scale * known.mean()),
                    "low": _digits(scale * low[m]),
                    "high": _digits(scale * high[m]),
                    "images": len(known),
                }
            )
    if "drop" in values:
        result["definitions"]["wins"] = {
            "title": "Win %",
            "better": "higher",
            "definition": WINS,
            "source": "arXiv:1710.11063, section 4.1",
            "unit": "%",
        }
        result["wins"] = [
            _wins(_column(pictures, "behind"), names, layer)
            for layer in dict.fromkeys(layer for layer, _ in names)
        ]
    result["curves"] = list(_curves(pictures, names))
    if stages:
        result["stages"] = list(stages)
    return result


def bootstrap(
    values: Floats, *, resamples: int = RESAMPLES, confidence: float = CONFIDENCE, seed: int = 0
) -> tuple[Floats, Floats]:
    """Percentile intervals of the mean of each column of values [n, V]: low and high, [V].

    Images are drawn with replacement, the same ones for all columns. NaN is left out.
    """
    known = ~np.isnan(values)
    filled = np.where(known, values, 0.0)
    generator = np.random.default_rng(seed)
    n = len(values)
    means = []
    for start in range(0, resamples, step := max(1, _CELLS // n)):
        count = min(step, resamples - start)
        weights = generator.multinomial(n, np.full(n, 1 / n), size=count).astype(np.float64)
        with np.errstate(invalid="ignore"):
            means.append(weights @ filled / (weights @ known))
    tail = 100 * (1 - confidence) / 2
    low, high = np.nanpercentile(np.concatenate(means), [tail, 100 - tail], axis=0)
    return low, high


def files(result: Result) -> dict[str, bytes]:
    """evaluation.json, and its summary as evaluation.csv."""
    table = io.StringIO()
    writer = csv.DictWriter(table, list(result["summary"][0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(result["summary"])
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    return {EVALUATION: text.encode(), MEANS: table.getvalue().encode()}


def layers_of(result: Result) -> list[str]:
    """Names of the layers, in order."""
    return list(dict.fromkeys(entry["layer"] for entry in result["summary"]))


def table(result: Result, layer: str) -> tuple[list[str], list[list[str]]]:
    """Titles of columns, and a row of text a measure: its title, and each method's mean [interval].

    An arrow says which way a measure is good.
    """
    entries = [entry for entry in result["summary"] if entry["layer"] == layer]
    methods = list(dict.fromkeys(entry["method"] for entry in entries))
    arrows = {"lower": " ↓", "higher": " ↑", None: ""}
    rows: dict[str, list[str]] = {}
    for entry in entries:
        definition = result["definitions"][entry["measure"]]
        digits = 1 if definition["unit"] else 3
        cell = "{mean:.{d}f} [{low:.{d}f}, {high:.{d}f}]".format(**entry, d=digits)
        title = definition["title"] + arrows[definition["better"]]
        rows.setdefault(title, []).append(cell)
    return ["", *methods], [[title, *cells] for title, cells in rows.items()]


def wins_table(result: Result, layer: str) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of Win %: the method of the row over that of the column."""
    wins = next(each for each in result.get("wins", ()) if each["layer"] == layer)
    rows = [
        [method, *("" if value is None else f"{value:.1f}" for value in row)]
        for method, row in zip(wins["methods"], wins["percent"], strict=True)
    ]
    return ["Win % ↑ over", *wins["methods"]], rows


def show(result: Result) -> None:
    """Print the tables."""
    terminal = sys.stdout.isatty()
    console = Console(
        file=sys.stdout, width=None if terminal else 40 * (1 + len(result["settings"]["methods"]))
    )
    for layer in layers_of(result):
        tables = [table(result, layer)]
        if "wins" in result and len(result["settings"]["methods"]) > 1:
            tables.append(wins_table(result, layer))
        for titles, rows in tables:
            drawn = Table(title=f"{layer}, {result['images']} pictures", title_justify="left")
            for number, title in enumerate(titles):
                drawn.add_column(title, justify="right" if number else "left")
            for row in rows:
                drawn.add_row(*row)
            console.print(drawn)


def markdown(result: Result) -> str:
    """The tables of a result, layer by layer, for documentation."""
    parts = []
    for layer in layers_of(result):
        parts.append(f"Layer `{layer}`, {result['images']} photographs:")
        parts.append(_markdown(*table(result, layer)))
        if "wins" in result:
            parts.append(_markdown(*wins_table(result, layer)))
    return "\n\n".join(parts)


def _markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1)]
    lines += rows
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _column(pictures: Sequence[Sequence[Row]], name: str) -> Floats:
    """[images, contenders], NaN where a map has no such number."""
    return np.array([[row.get(name, np.nan) for row in rows] for rows in pictures], float)


def _wins(behind: Floats, names: Sequence[tuple[str, str]], layer: str) -> Result:
    own = [m for m, (of_layer, _) in enumerate(names) if of_layer == layer]
    each = confidence.wins(torch.from_numpy(behind[:, own])).double().numpy()
    percent = 100 * each.mean(0)
    low, high = bootstrap(each.reshape(len(each), -1))
    shape = (len(own), len(own))
    return {
        "layer": layer,
        "methods": [names[m][1] for m in own],
        "percent": _off_diagonal(percent),
        "low": _off_diagonal(100 * low.reshape(shape)),
        "high": _off_diagonal(100 * high.reshape(shape)),
    }


def _off_diagonal(square: Floats) -> list[list[float | None]]:
    return [
        [None if a == b else _digits(value) for b, value in enumerate(row)]
        for a, row in enumerate(square)
    ]


def _curves(
    pictures: Sequence[Sequence[Row]], names: Sequence[tuple[str, str]]
) -> Iterator[Result]:
    for curve in pictures[0][0].get("curves", {}):
        for m, (layer, method) in enumerate(names):
            values = np.array([rows[m]["curves"][curve] for rows in pictures], float)
            yield {
                "layer": layer,
                "method": method,
                "curve": curve,
                "mean": [_digits(value) for value in values.mean(0)],
            }


def _digits(value: float) -> float:
    return float(f"{value:.6g}")
