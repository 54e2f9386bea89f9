"""One data set of many arrays, in the order of results.jsonl; safe against kills.

Arrays are appended to a tail file before their rows are recorded, and move into a part, which is
written once and read by others, when enough of them are recorded. Whatever moment the process
dies at, the next run cuts tail and parts down to the rows that are recorded.
"""

from __future__ import annotations

import itertools
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from io import FileIO
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gradcampp_ext.batch.record import RecordError, inside, write_all

if TYPE_CHECKING:
    from gradcampp_ext.batch.engine import Row
    from gradcampp_ext.batch.record import Record

_TAIL = ".tail"
_BYTES = 16 * 2**20  # of a part, unless a subclass knows better


class Parts(ABC):
    """Equal arrays, one a line of results.jsonl, kept in parts of a fixed number of rows.

    Args:
        record: the output folder; the arrays of its recorded rows are taken up.
        folder: inside it, for the parts.

    Raises:
        RecordError: arrays of rows that are recorded are missing.
    """

    def __init__(self, record: Record, folder: str) -> None:
        self.record, self.folder = record, inside(record.folder, record.folder / folder)
        self.index = 0  # of the part that the tail begins
        self._count = 0  # rows in the tail
        self._shape: tuple[int, ...] = ()
        self._dtype = np.dtype(np.float32)
        self._tail: FileIO | None = None
        self._recorded: Iterator[Row] | None = None  # rows from the tail's first one on
        with record.writing():
            if record.lines:
                self._take_up(record.lines)
            elif self.folder.exists():  # by a run that was killed before anything was recorded
                (self.folder / _TAIL).unlink(missing_ok=True)
                self.drop(0)

    @abstractmethod
    def save(self, index: int, rows: Sequence[Row], values: npt.NDArray[Any]) -> None:
        """Writes a part, complete or not at all; perhaps once more, with rows added."""

    @abstractmethod
    def load(self, index: int) -> npt.NDArray[Any]:
        """The arrays of a part that was saved. FileNotFoundError if there is none."""

    @abstractmethod
    def drop(self, index: int) -> None:
        """Removes the parts from this one on."""

    def length(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
        """Rows of a part, by shape and type of one array."""
        return max(1, _BYTES // max(1, math.prod(shape) * dtype.itemsize))

    def append(self, values: npt.NDArray[Any]) -> None:
        """Arrays [M, ...] of the next M rows, which are recorded before the next call."""
        if not len(values):
            return
        with self.record.writing():
            if self._tail is None:
                self._shape, self._dtype = values.shape[1:], values.dtype
                self._start(values[:0])
            elif self._count >= self.length(self._shape, self._dtype):
                self._settle(final=False)
            if values.shape[1:] != self._shape:
                raise ValueError(
                    f"all maps of a data set must have one shape, {self._shape} so far, "
                    f"got {values.shape[1:]}; choose maps of the size of the image"
                )
            assert self._tail is not None
            write_all(self._tail, np.ascontiguousarray(values, self._dtype).data)
            self._count += len(values)

    def finish(self) -> None:
        """All rows are recorded: whatever is left becomes the last part."""
        if self._tail is not None:
            with self.record.writing():
                self._settle(final=True)
                self._tail.close()
                (self.folder / _TAIL).unlink()

    def close(self) -> None:
        if self._tail is not None:
            self._tail.close()

    def _settle(self, *, final: bool) -> None:
        values = self._read_tail()
        length = self.length(self._shape, self._dtype)
        if self._recorded is None:
            self._recorded = self.record.rows(self.index * length)
        while len(values) >= length or (final and len(values)):
            rows = list(itertools.islice(self._recorded, length))
            self.save(self.index, rows, values[: len(rows)])
            self.index, values = self.index + 1, values[len(rows) :]
        if not final:
            self._start(values)

    def _start(self, values: npt.NDArray[Any]) -> None:
        """A new tail file in the place of the old one."""
        self.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.record.partial()
        header = {"part": self.index, "shape": self._shape, "dtype": self._dtype.str}
        with partial.open("wb") as file:
            file.write(json.dumps(header).encode() + b"\n")
            file.write(np.ascontiguousarray(values).data)
        self._tail = partial.replace(self.folder / _TAIL).open("ab", buffering=0)
        self._count = len(values)

    def _read_tail(self) -> npt.NDArray[Any]:
        """Arrays of the tail file, which also sets shape, type and part."""
        with (self.folder / _TAIL).open("rb") as file:
            header = json.loads(file.readline())
            self.index, self._shape = header["part"], tuple(header["shape"])
            self._dtype = np.dtype(header["dtype"])
            content = file.read()
        size = math.prod(self._shape) * self._dtype.itemsize
        whole = len(content) // size
        return np.frombuffer(content[: whole * size], self._dtype).reshape(whole, *self._shape)

    def _take_up(self, done: int) -> None:
        values = self._known(done)
        if values is None:
            raise RecordError(
                f"{self.folder} lacks maps of pictures that are recorded as done; choose another "
                "folder, or overwrite these results (--overwrite)"
            )
        self._start(values)
        self.drop(self.index)

    def _known(self, done: int) -> npt.NDArray[Any] | None:
        """What belongs into the tail, from the old tail or else from a part."""
        try:
            values = self._read_tail()
            start = self.index * self.length(self._shape, self._dtype)
            if start <= done <= start + len(values):
                return values[: done - start]
        except FileNotFoundError:
            pass
        try:
            first = self.load(0)
            self._shape, self._dtype = first.shape[1:], first.dtype
            self.index, left = divmod(done, self.length(self._shape, self._dtype))
            if not left:
                return first[:0]
            values = self.load(self.index)
        except FileNotFoundError:
            return None
        return values[:left] if len(values) >= left else None
