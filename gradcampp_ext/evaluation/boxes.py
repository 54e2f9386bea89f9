"""Where the objects are: boxes from a file, as the network sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from gradcampp_ext.batch.items import PATH_COLUMNS, SourceError, label_of, path_of
from gradcampp_ext.batch.sources import label_key, read_rows
from gradcampp_ext.imaging import Box
from gradcampp_ext.models import Classes

SIDES = (("left", "top", "right", "bottom"), ("xmin", "ymin", "xmax", "ymax"))


class Annotation(NamedTuple):
    """One object: its box in pixels of the upright picture, and its class where that is known."""

    box: Box
    label: int | None


Annotations: TypeAlias = Mapping[str, Sequence[Annotation]]  # by `label_key` of the path


def read_boxes(file: Path, classes: Classes) -> dict[str, list[Annotation]]:
    """Boxes from a CSV or JSONL file with a row a box.

    Columns: path (relative to the file), left, top, right, bottom (or xmin, ymin, xmax, ymax) in
    pixels, the corner of the picture being 0, 0; perhaps one of class_index, label, class_name and
    wordnet_id: then the box counts only where that class is explained.

    Raises: SourceError: the file cannot be read, a row lacks a path or a box, or has an unknown
        class.
    """
    found: dict[str, list[Annotation]] = {}
    for number, row in read_rows(file):
        where = f"{file}, line {number}"
        path = path_of(row, where)
        if path is None:
            raise SourceError(f"{where}: one of the columns {', '.join(PATH_COLUMNS)} is needed")
        annotation = Annotation(_box(row, where), _label(row, classes, where))
        found.setdefault(label_key(str(file.parent / path)), []).append(annotation)
    if not found:
        raise SourceError(f"{file} has no rows")
    return found


def seen(
    annotations: Sequence[Annotation], target: int, view: Box, size: tuple[int, int]
) -> list[Box]:
    """The boxes of a class in pixels of the network's input; what lies outside is cut off.

    Args:
        target: the explained class; boxes without a class count for any.
        view: the part of the picture that the network sees, as `Recipe.view` gives it.
        size: height and width of the input.
    """
    left, top, right, bottom = view
    x, y = size[1] / (right - left), size[0] / (bottom - top)
    boxes = []
    for box, label in annotations:
        if label not in (None, target):
            continue
        cut = (
            max(0.0, (box[0] - left) * x),
            max(0.0, (box[1] - top) * y),
            min(float(size[1]), (box[2] - left) * x),
            min(float(size[0]), (box[3] - top) * y),
        )
        if cut[0] < cut[2] and cut[1] < cut[3]:
            boxes.append(cut)
    return boxes


def _box(row: Mapping[str, Any], where: str) -> Box:
    for names in SIDES:
        if all(row.get(name) not in (None, "") for name in names):
            try:
                left, top, right, bottom = (float(row[name]) for name in names)
            except (TypeError, ValueError, OverflowError):
                break
            if left < right and top < bottom:
                return left, top, right, bottom
            raise SourceError(
                f"{where}: a box needs {names[0]} < {names[2]} and {names[1]} < {names[3]}, got "
                f"{left:g}, {top:g}, {right:g}, {bottom:g}; are these width and height?"
            )
    raise SourceError(
        f"{where}: columns {', '.join(SIDES[0])} (or {', '.join(SIDES[1])}) with numbers are "
        f"needed, got {', '.join(map(str, row))}"
    )


def _label(row: Mapping[str, Any], classes: Classes, where: str) -> int | None:
    label = label_of(row)
    if label is None:
        return None
    try:
        return classes.index(str(label))
    except ValueError as error:
        raise SourceError(f"{where}: {error}") from error
