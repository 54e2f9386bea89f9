"""Parquet files as sources: lists of paths, or pictures themselves as Hugging Face stores them."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradcampp_ext.batch.items import LABEL_COLUMNS, PATH_COLUMNS, Item, SourceError
from gradcampp_ext.imaging import ImageError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from gradcampp_ext.models import Classes


def rows(file: Path) -> Iterator[Mapping[str, Any]]:
    """The columns of a list of paths that sources understand."""
    import pyarrow as pa

    with _reading(file) as table:
        wanted = [
            field.name
            for field in table.schema_arrow
            if field.name in LABEL_COLUMNS
            or (field.name in PATH_COLUMNS and not pa.types.is_nested(field.type))
        ]
        for batch in table.iter_batches(columns=wanted):
            yield from batch.to_pylist()


def image_column(file: Path) -> str | None:
    """The first column of encoded pictures: of bytes, or of {bytes, path}; None if there is none.

    Raises:
        SourceError: the file cannot be read as Parquet.
    """
    import pyarrow as pa

    def binary(kind: pa.DataType) -> bool:
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    with _reading(file) as table:
        for field in table.schema_arrow:
            if pa.types.is_struct(field.type):
                if any(part.name == "bytes" and binary(part.type) for part in field.type):
                    return str(field.name)
            elif binary(field.type):
                return str(field.name)
    return None


def items(file: Path, column: str, classes: Classes | None) -> Iterator[Item]:
    """The pictures in a column, called FILE/0, FILE/1, ...; they are read later, a row group
    at a time.

    Labels are those of the first of the columns class_index, label, class_name and wordnet_id.
    """
    with _reading(file) as table:
        label = next((name for name in LABEL_COLUMNS if name in table.schema_arrow.names), None)
        names = None if label is None else _class_names(table.schema_arrow, label)
        known = None if names is None else class_labels(names, classes)
        index = 0
        for group in range(table.num_row_groups):
            count = table.metadata.row_group(group).num_rows
            labels: Iterable[Any] = itertools.repeat(None, count)
            if label is not None:
                labels = table.read_row_group(group, columns=[label]).column(label).to_pylist()
            for row, value in enumerate(labels):
                if known is not None and isinstance(value, int):
                    value = known[value] if 0 <= value < len(known) else None
                place = _Cell(str(file), column, group, row)
                yield Item(f"{file}/{index}", f"{file.stem}/{index}", place, value)
                index += 1


def class_labels(names: Sequence[str], classes: Classes | None) -> Sequence[int | str | None]:
    """What the labels 0, 1, ... of a data set mean to a model.

    The same number of classes, or a model without class names: the same index. Otherwise the
    data set's name of the class, where it is one of the model's; no label where it is not.
    """
    if classes is None or not classes.names or len(names) == len(classes.names):
        return range(len(names))
    return [name if classes.known(name) else None for name in names]


@dataclass(frozen=True)
class _Cell:
    """A picture in a Parquet file, read when it is called; gives bytes, or a path."""

    file: str
    column: str
    group: int
    row: int

    def __call__(self) -> bytes | Path:
        import pyarrow as pa

        try:
            stamp = Path(self.file).stat().st_mtime_ns
            value = _row_group(self.file, stamp, self.column, self.group)[self.row].as_py()
        except (OSError, ValueError, IndexError, pa.ArrowException) as error:
            raise ImageError(f"row group {self.group} cannot be read: {error}") from error
        return cell_image(value, Path(self.file).parent)


def cell_image(value: Any, folder: Path) -> bytes | Path:
    """The picture in bytes or in {bytes, path}, the path being relative to a folder."""
    if isinstance(value, dict):
        content, path = value.get("bytes"), value.get("path")
        value = folder / path if content is None and isinstance(path, str) and path else content
    if value is None:
        raise ImageError("the row has no picture")
    picture: bytes | Path = value
    return picture


@functools.lru_cache(maxsize=2)
def _row_group(file: str, stamp: int, column: str, group: int) -> pa.ChunkedArray:
    """Kept for the rows that follow, which are read in order, while the file stays as it is."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as table:
        return table.read_row_group(group, columns=[column]).column(column)


def _class_names(schema: pa.Schema, column: str) -> list[str] | None:
    """Of a column of Hugging Face's class labels; None of another."""
    try:
        about = json.loads((schema.metadata or {})[b"huggingface"])
        names: list[str] = about["info"]["features"][column]["names"]
        return names
    except (KeyError, ValueError, TypeError):
        return None


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[pq.ParquetFile]:
    """The open file; whatever pyarrow raises on damaged ones is told as SourceError."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise SourceError(
            f"{file} needs {error.name}: pip install 'gradcampp_ext[datasets]'"
        ) from error
    try:
        with pq.ParquetFile(file) as table:
            yield table
    except (OSError, ValueError, pa.ArrowException) as error:
        raise SourceError(f"{file} cannot be read: {error}") from error
