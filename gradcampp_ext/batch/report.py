"""The report: a static site in OUT/report, to look through the results in a browser.

Two sinks write its pictures while a run goes on: a thumbnail a picture, and each map in grey, which
the browser colours. `build` reads the results once, writes
them as scripts of a few hundred pictures each, which pages opened from a disk may load, and
renders the summary.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import jinja2
import numpy as np
import numpy.typing as npt
from PIL import Image

from gradcampp_ext import imaging
from gradcampp_ext.batch.engine import variant
from gradcampp_ext.batch.progress import printable
from gradcampp_ext.batch.record import (
    ERRORS,
    REPORT,
    RESULTS,
    RecordError,
    inside,
    read_settings,
    whole_rows,
)

if TYPE_CHECKING:
    import torch

    from gradcampp_ext.batch.engine import Row
    from gradcampp_ext.batch.sinks import FileSink, Rendered

_THUMBNAIL, _MAP = 384, 224  # pixels of the longer side, at most
_PER_PAGE = 250  # pictures in one script of data
_BINS = 20  # of confidence
_GRID = 16  # cells a side, in which maps are averaged and compared
_COMPARED = 12  # maps of a picture, at most, that are compared with each other
_SHOWN = 48  # classes with a mean map, and rows of a table
_COLORMAPS = ("turbo", "viridis", "inferno", "gray")
_ASSETS = ("report.css", "report.js")

# Of a picture, what all views need.
_INDEXED = ("path", "predicted", "confidence", "label", "right")
# Numbers in a row that are not figures of its map.
_IDENTITY = frozenset(
    {"predicted", "predicted_probability", "label", "rank", "target", "probability", "score",
     "width", "height"}
)  # fmt: skip

# What rows that no run has written lead to.
DAMAGE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    jinja2.TemplateError,
)

Grid: TypeAlias = npt.NDArray[np.float32]
_Kind: TypeAlias = tuple[int, str, str]  # rank, layer and method: which map of a picture


@dataclass(frozen=True)
class Thumbnails:
    """What the network saw, in report/images/NAME.jpg, of at most 384 pixels a side."""

    column, per_picture = "thumbnail", True

    def settings(self) -> dict[str, Any]:
        return {"report": True}

    def render(self, batch: Rendered) -> torch.Tensor:
        return batch.pictures.cpu()

    def path(self, name: str) -> str:
        return f"{REPORT}/images/{name}.jpg"

    def encode(self, value: npt.NDArray[Any], row: Row, about: Mapping[str, Any]) -> bytes:
        return _jpeg(value, _THUMBNAIL, quality=85)


@dataclass(frozen=True)
class GreyMaps:
    """Maps in grey, in report/maps/NAME.jpg, of at most 224 pixels a side; off by 2 in 255."""

    column, per_picture = "grey", False

    def settings(self) -> dict[str, Any]:
        return {"report": True}

    def render(self, batch: Rendered) -> torch.Tensor:
        return (batch.maps.clamp(0, 1) * 255).round().byte().cpu()

    def path(self, name: str) -> str:
        return f"{REPORT}/maps/{name}.jpg"

    def encode(self, value: npt.NDArray[Any], row: Row, about: Mapping[str, Any]) -> bytes:
        return _jpeg(value, _MAP, quality=92)


def sinks() -> list[FileSink]:
    """What a run needs among its sinks, so that `build` can show its results."""
    return [Thumbnails(), GreyMaps()]


def build(
    folder: Path, *, title: str | None = None, sections: Mapping[str, str] | None = None
) -> Path:
    """Write the report of the results in a folder; or write it again, in place of the old one.

    All results of one picture are neighbours in results.jsonl. They differ in "rank" (class), and
    perhaps in "layer" and "method"; each of the three becomes a switch. Every number in a row that
    `gradcampp explain` does not give is shown and can be sorted by, under its own name.

    Args:
        folder: of a run with `sinks()` among its sinks.
        title: default: model and method.
        sections: more of the summary, by heading; text, or HTML as `markupsafe.Markup`.

    Returns: the page to open, FOLDER/report/index.html.

    Raises:
        ValueError: there are no results, or they were made without the report's sinks.
        RecordError: a picture of the report is gone, or the folder cannot be written.
    """
    if not (folder / RESULTS).is_file():
        raise ValueError(f"{folder} holds no {RESULTS}; is it the folder of a run?")
    site = folder / REPORT
    staging = inside(folder, site / ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        (staging / "data").mkdir(parents=True)
        (staging / "assets").mkdir()
        summary = _write_data(folder, staging / "data")
        for name in _ASSETS:
            (staging / "assets" / name).write_text(_asset(name), encoding="utf-8")
        page = _render(folder, summary, title, sections or {})
        (staging / "index.html").write_text(page, encoding="utf-8")
        (site / "index.html").unlink(missing_ok=True)  # it stands for a complete report
        for name in ("data", "assets"):
            shutil.rmtree(site / name, ignore_errors=True)
            (staging / name).replace(site / name)
        return (staging / "index.html").replace(site / "index.html")
    except OSError as error:
        raise RecordError(f"cannot make the report in {site}: {error}") from error
    except DAMAGE as error:
        raise ValueError(
            f"{folder / RESULTS} has a line that no run has written "
            f"({type(error).__name__}: {error})"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _jpeg(pixels: npt.NDArray[np.uint8], side: int, *, quality: int) -> bytes:
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def _asset(name: str) -> str:
    return resources.files("gradcampp_ext").joinpath(f"data/report/{name}").read_text("utf-8")


# From results.jsonl to data/*.js


def _write_data(folder: Path, data: Path) -> _Summary:
    """Writes index.js, which all views need, and the details of each page; memory stays flat."""
    summary = _Summary(folder)
    figures: dict[str, int] = {}
    pictures = _pictures(folder)
    with (data / "index.js").open("w", encoding="ascii") as index:
        index.write("gradcampp.index([\n")
        for number in itertools.count():
            page = []
            for rows in itertools.islice(pictures, _PER_PAGE):
                for row in rows:
                    _learn(row, figures)
                picture = _picture(rows, figures, summary.kinds)
                summary.add(rows, picture["maps"])
                page.append(_script(picture))
                shared = [picture[key] for key in _INDEXED]
                by_kind = {each["kind"]: each["figures"] for each in picture["maps"]}
                of_maps = [by_kind.get(kind) for kind in range(max(by_kind) + 1)]
                index.write(_script([*shared, of_maps]) + ",\n")
            if not page:
                break
            text = f"gradcampp.page({number}, [\n{f',{chr(10)}'.join(page)}\n]);\n"
            (data / f"{number}.js").write_text(text, encoding="ascii")
        meta = {
            "classes": summary.names,
            "figures": list(figures),
            "kinds": summary.places(),
            "ranks": summary.ranks,
            "layers": summary.layers,
            "methods": summary.methods,
            "ratio": summary.ratio,
            "perPage": _PER_PAGE,
        }
        index.write(f"]);\ngradcampp.start({_script(meta)});\n")
    return summary


def _pictures(folder: Path) -> Iterator[list[Row]]:
    """The rows of one picture after the other."""
    for _, rows in itertools.groupby(whole_rows(folder / RESULTS), key=lambda row: row["path"]):
        yield list(rows)


def _learn(row: Row, figures: dict[str, int]) -> None:
    """Numbers that can be shown and sorted by, in the order in which rows come to have them."""
    numbers = [name for name, value in row.items() if type(value) in (int, float)]
    known = [name for name in ("central_mass", "entropy") if name in row]  # perhaps None
    for name in known + [name for name in numbers if name not in _IDENTITY]:
        figures.setdefault(name, len(figures))


def _picture(
    rows: list[Row], figures: Mapping[str, int], kinds: dict[_Kind, int]
) -> dict[str, Any]:
    first = rows[0]
    maps = []
    for row in rows:
        files = row.get("files", {})
        if "thumbnail" not in files or "grey" not in files:
            raise ValueError(
                "these results lack the report's pictures; explain with --report "
                "(batch.report.sinks()), or evaluate again, to have them written"
            )
        layer, method = (printable(name or "") for name in variant(row))
        maps.append(
            {
                "grey": _inside(files["grey"]),
                "kind": kinds.setdefault((row["rank"], layer, method), len(kinds)),
                "target": row["target"],
                "probability": row["probability"],
                "score": row["score"],
                "peak": _relative_peak(row),
                "figures": [row.get(name) for name in figures],
            }
        )
    return {
        "path": printable(first["path"]),
        "image": _inside(first["files"]["thumbnail"]),
        "width": first["width"],
        "height": first["height"],
        "predicted": first["predicted"],
        "confidence": first["predicted_probability"],
        "label": first["label"],
        "right": first["right"],
        "maps": maps,
    }


def _inside(name: str) -> str:
    return name.removeprefix(f"{REPORT}/")


def _relative_peak(row: Row) -> list[float] | None:
    """From pixels of the picture to shares of the view."""
    if row.get("peak") is None:
        return None
    left, top, right, bottom = row["view"]
    x, y = row["peak"]
    return [round((x - left) / (right - left), 4), round((y - top) / (bottom - top), 4)]


def _script(value: Any) -> str:
    """JSON in ASCII that could even stand within an HTML page."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


# The summary


class _Summary:
    """Counts and means over all pictures; as large as the classes are many."""

    def __init__(self, folder: Path) -> None:
        self.pictures = self.ranks = 0
        self.ratio = 1.0
        self.names: dict[int, str] = {}
        self.kinds: dict[_Kind, int] = {}
        self.known: Counter[bool | None] = Counter()
        self.bins: list[Counter[bool | None]] = [Counter() for _ in range(_BINS)]
        self.confidence = np.zeros(_BINS)  # sums, of labelled pictures
        self.predicted: Counter[int] = Counter()
        self.right: Counter[int] = Counter()
        self.confused: Counter[tuple[int, int]] = Counter()
        self.found: Counter[int] = Counter()  # the rank of the true class, among those explained
        # of the first class, by that class (None: any) and kind
        self.means: dict[tuple[int | None, int], _Mean] = {}
        self.agreement: dict[tuple[int, int], _Mean] = {}
        self._folder = folder

    def add(self, rows: list[Row], maps: list[dict[str, Any]]) -> None:
        first = rows[0]
        if not self.pictures:
            with Image.open(self._folder / first["files"]["thumbnail"]) as image:
                self.ratio = round(image.width / image.height, 4)
        self.pictures += 1
        predicted, right = first["predicted"], first["right"]
        confidence = first["predicted_probability"]
        index = min(_BINS - 1, int(confidence * _BINS))
        self.known[right] += 1
        self.bins[index][right] += 1
        self.predicted[predicted] += 1
        if right is not None:
            self.right[predicted] += right
            self.confidence[index] += confidence
            if not right:
                self.confused[first["label"], predicted] += 1
            ranks = [row["rank"] for row in rows if row["target"] == first["label"]]
            self.found.update(ranks[:1])
        grids: dict[int, Grid] = {}
        for row, shown in zip(rows, maps, strict=True):
            self.ranks = max(self.ranks, row["rank"])
            for which in ("predicted", "label", "target"):
                if row[which] is not None and row[which] not in self.names:
                    self.names[row[which]] = printable(row.get(f"{which}_name") or str(row[which]))
            grid = _grid(self._folder / row["files"]["grey"])
            grids[shown["kind"]] = grid
            if row["rank"] == 1:
                for target in (None, row["target"]):
                    self.means.setdefault((target, shown["kind"]), _Mean()).add(grid)
        self._compare(grids)

    @property
    def layers(self) -> list[str]:
        return list(dict.fromkeys(layer for _, layer, _ in self.kinds))

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(method for _, _, method in self.kinds))

    def places(self) -> list[list[int]]:
        """Rank, number of the layer and number of the method of each kind."""
        layers, methods = self.layers, self.methods
        return [
            [rank, layers.index(layer), methods.index(method)] for rank, layer, method in self.kinds
        ]

    def titles(self, *, ranked: bool = True) -> list[str]:
        """What tells each kind from the others, the class too if `ranked`."""
        several = (ranked and self.ranks > 1, len(self.layers) > 1, len(self.methods) > 1)
        return [
            " · ".join(itertools.compress((f"class {rank}", layer, method), several))
            for rank, layer, method in self.kinds
        ]

    @property
    def labelled(self) -> int:
        return self.known[True] + self.known[False]

    @property
    def calibration_error(self) -> float:
        """Mean distance of accuracy and confidence over bins (ECE, arXiv:1706.04599)."""
        right = np.array([counts[True] for counts in self.bins])
        return float(np.abs(right - self.confidence).sum() / self.labelled)

    def among_first(self, rank: int) -> float:
        """Share of labelled pictures whose true class is among the first explained ones."""
        return sum(count for at, count in self.found.items() if at <= rank) / self.labelled

    def _compare(self, grids: Mapping[int, Grid]) -> None:
        """Correlations of a picture's maps with each other; a constant map has none."""
        if len(grids) < 2:
            return
        keys = [key for key in sorted(grids)[:_COMPARED] if grids[key].std() > 0]
        matrix = np.atleast_2d(np.corrcoef([grids[key].ravel() for key in keys]))
        for i, j in itertools.combinations(range(len(keys)), 2):
            self.agreement.setdefault((keys[i], keys[j]), _Mean()).add(matrix[i, j])


class _Mean:
    """Of what was added."""

    def __init__(self) -> None:
        self.total: Any = 0.0
        self.count = 0

    def add(self, value: Any) -> None:
        self.total = self.total + value
        self.count += 1

    @property
    def value(self) -> Any:
        return self.total / self.count


def _grid(file: Path) -> Grid:
    with Image.open(file) as image:
        image.draft("L", (_GRID, _GRID))  # decodes to a fraction of the size where it can
        small = image.resize((_GRID, _GRID), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32)


def _render(folder: Path, summary: _Summary, title: str | None, sections: Mapping[str, str]) -> str:
    settings, made = _made(folder)
    if title is None:
        named = ("model", "method", "command")
        title = " · ".join(str(settings[key]) for key in named if key in settings)
    colormaps = dict.fromkeys([settings.get("colormap", _COLORMAPS[0]), *_COLORMAPS])
    failures, failed = _failures(folder / ERRORS)
    return template("index.html.j2").render(
        title=printable(title or "Explanations"),
        made={printable(key): printable(_plain(value)) for key, value in made.items()},
        summary=summary,
        sections={printable(heading): text for heading, text in sections.items()},
        colormaps={name: _tables(name) for name in colormaps},
        bins=_histogram(summary),
        means=_means(summary),
        confused=summary.confused.most_common(_SHOWN),
        agreement=_agreement(summary),
        failures=failures,
        failed=failed,
    )


def template(name: str) -> jinja2.Template:
    """One of the report's, which show text as text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gradcampp_ext", "data/report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _made(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a run, and all that made its outputs; nothing where nothing is known."""
    try:
        found = read_settings(folder)
    except FileNotFoundError:
        return {}, {}
    made_by = found["runs"][-1].get("environment") or {}
    return found["settings"], {"record": found["record"], **made_by, **found["settings"]}


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _failures(file: Path) -> tuple[list[tuple[str, str]], int]:
    """Path and reason of the first skipped pictures, and the number of all."""
    lines = whole_rows(file)
    shown = [
        (printable(line["path"]), printable(line["reason"]))
        for line in itertools.islice(lines, _SHOWN)
    ]
    return shown, len(shown) + sum(1 for _ in lines)


def _tables(colormap: str) -> list[str]:
    """A colour map as the tables of an SVG filter: red, green, blue."""
    colours = imaging.colormap(colormap) / 255
    return [" ".join(f"{value:.4g}" for value in channel) for channel in colours.T]


def _histogram(summary: _Summary) -> list[dict[str, Any]]:
    """Bins of confidence: how many pictures, how many of them right, and the calibration there."""
    bins = []
    for index, counts in enumerate(summary.bins):
        labelled = counts[True] + counts[False]
        bins.append(
            {
                "low": index / _BINS,
                "high": (index + 1) / _BINS,
                "count": counts.total(),
                "parts": [counts[True], counts[False], counts[None]],
                "labelled": labelled,
                "accuracy": counts[True] / labelled if labelled else None,
                "confidence": summary.confidence[index] / labelled if labelled else None,
            }
        )
    return bins


def _means(summary: _Summary) -> list[dict[str, Any]]:
    """Mean maps: of all pictures, then of the classes that were explained most often."""
    names = summary.titles(ranked=False)
    counts = Counter({target: mean.count for (target, _), mean in summary.means.items()})
    return [
        {
            "target": target,
            "count": count,
            # where a class was asked for, it is not what was predicted
            "predicted": target is None or count == summary.predicted[target],
            "maps": [
                (name, _data_url(summary.means[target, kind].value))
                for kind, name in enumerate(names)
                if (target, kind) in summary.means
            ],
        }
        for target, count in counts.most_common(1 + _SHOWN)
    ]


def _data_url(grid: Grid) -> str:
    file = io.BytesIO()
    Image.fromarray(grid.round().astype(np.uint8)).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _agreement(summary: _Summary) -> tuple[list[str], list[list[float | None]]]:
    """Names of a picture's maps, and their mean correlations."""
    keys = sorted({key for pair in summary.agreement for key in pair})
    names = summary.titles()
    matrix: list[list[float | None]] = []
    for one in keys:
        means = [summary.agreement.get((min(one, other), max(one, other))) for other in keys]
        matrix.append([None if mean is None else float(mean.value) for mean in means])
    return [names[key] for key in keys], matrix
