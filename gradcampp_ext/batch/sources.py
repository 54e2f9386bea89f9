"""Where pictures come from: what a command line names, torch data sets and other iterables."""

from __future__ import annotations

import csv
import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradcampp_ext import imaging
from gradcampp_ext.batch import parquet, shards
from gradcampp_ext.batch.items import (
    LABEL_COLUMNS,
    PATH_COLUMNS,
    SUFFIXES,
    Item,
    SourceError,
    label_of,
    path_of,
)
from gradcampp_ext.imaging import ImageError

if TYPE_CHECKING:
    from PIL import Image

    from gradcampp_ext.models import Classes

MANIFESTS = frozenset({".csv", ".jsonl", ".ndjson", ".parquet"})


class Files:
    """Files, folders (with all below them), globs, manifests, Parquet files and tar shards.

    In folders, files with the suffix of a picture are taken, in the order of their names; hidden
    ones are not. A file that is named is taken whatever it is called. A manifest is a .csv,
    .jsonl or .parquet file with a column "path", relative to the manifest's folder, and perhaps
    one of "class_index", "label", "class_name" and "wordnet_id". A .parquet file may also hold
    the pictures themselves, in a column of bytes or of {bytes, path}. A .tar file is a WebDataset
    shard, with labels in .cls or .json; several are named by a glob or by {000..127}.

    Args:
        arguments: as on the command line.
        leave_out: a folder to stay out of: that of the outputs.
        labels: true classes by `label_key` of the path.
        folder_label: whether a folder's name is a class; pictures found in a folder argument then
            have the name of the folder they lie in as their label.
        classes: the model's, which tell what the class labels of a Parquet file written by
            Hugging Face's library mean.
    """

    def __init__(
        self,
        arguments: Sequence[str | os.PathLike[str]],
        *,
        leave_out: Path | None = None,
        labels: Mapping[str, str] | None = None,
        folder_label: Callable[[str], bool] | None = None,
        classes: Classes | None = None,
    ) -> None:
        self._arguments = [os.fspath(argument) for argument in arguments]
        self._leave_out = None if leave_out is None else label_key(os.fspath(leave_out))
        self._labels = labels or {}
        self._folder_label = folder_label
        self._classes = classes
        self._length: int | None = None

    def __iter__(self) -> Iterator[Item]:
        for argument in self._arguments:
            for item in self._expanded(argument):
                if self._labels:
                    label = self._labels.get(label_key(item.path), item.label)
                    item = replace(item, label=label)
                yield item

    def __len__(self) -> int:
        if any(shards.is_shard(each) and shards.is_stream(each) for each in self._arguments):
            raise TypeError("the number of pictures in a stream is not known")
        if self._length is None:
            self._length = sum(1 for _ in self)
        return self._length

    @staticmethod
    def read(item: Item) -> Image.Image:
        return imaging.read(item.image() if callable(item.image) else item.image)

    def _expanded(self, argument: str) -> Iterator[Item]:
        if os.path.exists(argument):  # noqa: PTH110 - Path.exists raises where names are too long
            yield from self._named(argument)
        elif not glob.has_magic(argument):
            for named in shards.expand(argument) if shards.is_shard(argument) else [argument]:
                yield from self._named(named)
        else:
            found = sorted(glob.glob(argument, recursive=True))  # noqa: PTH207 - absolute too
            if not found:
                raise SourceError(f"nothing matches {argument!r}")
            for match in found:
                yield from self._named(match)

    def _named(self, argument: str) -> Iterator[Item]:
        path = Path(argument)
        if os.path.isdir(argument):  # noqa: PTH112 - Path.is_dir raises where names are too long
            yield from self._folder(argument)
        elif shards.is_shard(argument):
            yield from shards.items(argument)
        elif path.suffix.lower() in MANIFESTS:
            column = parquet.image_column(path) if path.suffix.lower() == ".parquet" else None
            if column is None:
                yield from _manifest(path)
            else:
                yield from parquet.items(path, column, self._classes)
        else:
            yield _file(argument)

    def _folder(self, folder: str) -> Iterator[Item]:
        for parent, folders, files in os.walk(folder):
            here = Path(parent)
            folders[:] = sorted(
                name
                for name in folders
                if not name.startswith(".") and label_key(str(here / name)) != self._leave_out
            )
            lies_in = Path(label_key(parent)).name
            known = self._folder_label is not None and self._folder_label(lies_in)
            for name in sorted(files):
                path = here / name
                if not name.startswith(".") and path.suffix.lower() in SUFFIXES:
                    inside = path.relative_to(folder).with_suffix("")
                    yield Item(str(path), str(inside), str(path), lies_in if known else None)


class Dataset:
    """A torch map-style data set, or any sequence, of pictures or (picture, label) pairs.

    A picture is what `imaging.read` takes, or a tensor [3, H, W]: uint8, or floats in [0, 1].
    Normalised tensors are refused, since the model's recipe normalises. A label is a class index or
    name; anything else that a data set pairs with its pictures is no label.

    Args:
        dataset: with `__len__` and `__getitem__`; its items are read in the worker processes.
        name: the pictures are called NAME/0, NAME/1, ... in the results.
    """

    def __init__(self, dataset: Any, *, name: str = "dataset") -> None:
        self._dataset = dataset
        self._name = name

    def __iter__(self) -> Iterator[Item]:
        for index in range(len(self)):
            called = f"{self._name}/{index}"
            yield Item(called, called, index)

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, item: Item) -> tuple[Image.Image, str | int | None]:
        try:
            row = self._dataset[item.image]
        except Exception as error:  # one bad row of somebody's data set does not end the run
            raise ImageError(f"the data set fails ({type(error).__name__}: {error})") from error
        picture, label = _pair(row)
        return _picture(picture), label


class Stream:
    """Any iterable of pictures or (picture, label) pairs, read once, in the main process.

    Args:
        pictures: what `imaging.read` takes, or tensors; labels too are as in `Dataset`.
        name: the pictures are called NAME/0, NAME/1, ... in the results.
    """

    def __init__(self, pictures: Iterable[Any], *, name: str = "stream") -> None:
        self._pictures = pictures
        self._name = name

    def __iter__(self) -> Iterator[Item]:
        for index, row in enumerate(self._pictures):
            called = f"{self._name}/{index}"
            picture, label = _pair(row)
            yield Item(called, called, picture, label)

    @staticmethod
    def read(item: Item) -> Image.Image:
        return _picture(item.image)


def read_labels(file: Path) -> dict[str, str]:
    """True classes from a CSV, JSONL or Parquet file, as `Files` takes them.

    Raises:
        SourceError: the file cannot be read, or has no column of paths or of classes.
    """
    labels = {label_key(item.path): str(item.label) for item in _manifest(file, labelled=True)}
    if not labels:
        raise SourceError(f"{file} has no rows")
    return labels


def label_key(path: str) -> str:
    """The same for every way to write the path of one file."""
    try:
        return os.path.realpath(path)  # Path.resolve raises where links go round in circles
    except ValueError:  # no file can have this name
        return path


def _file(path: str) -> Item:
    return Item(path, Path(path).stem, path)


def _manifest(file: Path, *, labelled: bool = False) -> Iterator[Item]:
    for number, row in read_rows(file):
        where = f"{file}, line {number}"
        path, label = path_of(row, where), label_of(row)
        if path is None or (labelled and label is None):
            wanted = PATH_COLUMNS if path is None else LABEL_COLUMNS
            raise SourceError(
                f"{where}: one of the columns {', '.join(wanted)} is needed, "
                f"got {', '.join(map(str, row)) or 'none'}"
            )
        found = str(file.parent / path)
        yield Item(found, os.path.splitext(path)[0], found, label)  # noqa: PTH122 - of any text


def read_rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Number and columns of each row of a CSV, JSONL or Parquet file, or SourceError."""
    if file.suffix.lower() == ".parquet":
        yield from enumerate(parquet.rows(file), 1)
        return
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            if file.suffix.lower() == ".csv":
                reader = csv.DictReader(lines)
                for row in reader:
                    yield reader.line_num, row
                return
            for number, line in enumerate(lines, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise SourceError(f"{file}, line {number}: not a JSON object")
                    yield number, row
    except SourceError:
        raise
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise SourceError(f"{file} cannot be read: {error}") from error


def _pair(row: Any) -> tuple[Any, str | int | None]:
    """Picture and label of a row that is a picture, or begins with both."""
    if not isinstance(row, tuple | list):
        return row, None
    picture, label = (*row, None)[:2]
    if getattr(label, "ndim", None) == 0:  # of NumPy or torch
        label = label.item()
    return picture, label if isinstance(label, str | int) else None


def _picture(value: Any) -> Image.Image:
    import torch

    if not isinstance(value, torch.Tensor):
        return imaging.read(value)
    if value.dim() != 3 or value.shape[0] != 3:
        raise ImageError(f"a tensor of pixels must be [3, H, W], got {list(value.shape)}")
    pixels = value.detach().cpu().permute(1, 2, 0)
    if pixels.is_floating_point():
        low, high = float(pixels.min()), float(pixels.max())
        if not 0 <= low <= high <= 1:
            raise ImageError(
                f"floating-point pixels from {low:g} to {high:g}; only 0 to 1 is taken, "
                "without normalisation: the model's recipe does that"
            )
        pixels = (pixels * 255).round().to(torch.uint8)
    return imaging.read(np.ascontiguousarray(pixels.numpy()))
