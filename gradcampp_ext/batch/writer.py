"""Writing in the background: encoding in a pool, recording in the order of the source."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from gradcampp_ext.batch.record import safe_name
from gradcampp_ext.batch.sinks import FileSink, SeriesSink

if TYPE_CHECKING:
    import numpy.typing as npt

    from gradcampp_ext.batch.engine import Row
    from gradcampp_ext.batch.progress import Progress
    from gradcampp_ext.batch.record import Record
    from gradcampp_ext.batch.sinks import Drawn, Sink

_THREADS = 4
_AHEAD = 4  # batches that may wait; more would only cost memory


class Writer:
    """Takes batches of arrays, encodes and writes them by the sinks, and records them.

    Leaving the context waits until all is written.

    Args:
        record: the output folder.
        sinks: in the order of the arrays that `put` gets.
        progress: is told of each picture once it is recorded, from the writer's thread.
    """

    def __init__(self, record: Record, sinks: Sequence[Sink], progress: Progress) -> None:
        self._record, self._progress = record, progress
        self._files = [sink for sink in sinks if isinstance(sink, FileSink)]
        self._series = [sink.store(record) for sink in sinks if isinstance(sink, SeriesSink)]
        self._queue: queue.Queue[_Job | None] = queue.Queue(_AHEAD)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="gradcampp-encode")
        self._thread = threading.Thread(target=self._work, name="gradcampp-record")
        self._error: BaseException | None = None

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._queue.put(None)
        self._thread.join()
        self._pool.shutdown()
        try:
            if error is None:
                if self._error is not None:
                    raise self._error
                for store in self._series:
                    store.finish()
        finally:
            for store in self._series:
                store.close()

    def put(
        self,
        rows: Sequence[Sequence[Row]],
        drawn: Drawn | None,
        failures: Sequence[tuple[str, str]],
    ) -> None:
        """One batch; waits while too many are pending.

        Args:
            rows: a row a map, or none for a picture that failed.
            drawn: by the sinks; None if all pictures failed.
            failures: paths and reasons.
        Raises: what a sink or the record raised for an earlier batch.
        """
        if self._error is not None:
            raise self._error
        written: list[_Written] = []
        values: list[npt.NDArray[Any]] = []
        if drawn is not None:
            explained = [n for n, own in enumerate(rows) if own]
            written = [pair for n in explained for pair in self._submit(rows[n], n, drawn.files)]
            if explained:
                values = [np.concatenate(array[explained]) for array in drawn.series]
        self._queue.put((written, values, list(failures)))

    def _submit(
        self, rows: Sequence[Row], n: int, files: Sequence[npt.NDArray[Any]]
    ) -> list[_Written]:
        """Files of a picture, on their way; those per picture belong to all its rows."""
        written: list[_Written] = [(row, {}) for row in rows]
        for sink, values in zip(self._files, files, strict=True):
            if sink.per_picture:
                first = rows[0]
                future = self._pool.submit(self._write, sink, first["name"], values[n], first)
                for _, futures in written:
                    futures[sink.column] = future
                continue
            for k, (name, (row, futures)) in enumerate(zip(_names(rows), written, strict=True)):
                futures[sink.column] = self._pool.submit(self._write, sink, name, values[n, k], row)
        return written

    def _write(self, sink: FileSink, name: str, value: npt.NDArray[Any] | bytes, row: Row) -> str:
        if not isinstance(value, bytes):
            value = sink.encode(value, row, self._record.about)
        path = sink.path(name)
        self._record.write(path, value)
        return path

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._finish(*job)
                except BaseException as error:  # handed to the main thread
                    self._error = error

    def _finish(
        self,
        written: Sequence[_Written],
        values: Sequence[npt.NDArray[Any]],
        failures: Sequence[tuple[str, str]],
    ) -> None:
        rows = []
        for row, futures in written:
            row["files"] = {column: future.result() for column, future in futures.items()}
            rows.append(row)
        if rows:
            for store, value in zip(self._series, values, strict=True):
                store.append(value)
        self._record.finish(rows)
        self._progress.explained(rows)
        for path, reason in failures:
            self._record.fail(path, reason)
            self._progress.failed(path, reason)


def _names(rows: Sequence[Row]) -> list[str]:
    """What a picture's files are called: by rank, layer and method where there are several."""
    several_ranks = len({row["rank"] for row in rows}) > 1
    layers = _called("layer", [row["layer"] for row in rows])
    methods = _called("method", [row.get("method", "") for row in rows])
    return [
        row["name"] + (f".top{row['rank']}" if several_ranks else "") + layer + method
        for row, layer, method in zip(rows, layers, methods, strict=True)
    ]


def _called(what: str, names: Sequence[str]) -> list[str]:
    """Suffixes by name, or by number where a file could not be called so; none if all are one."""
    different = list(dict.fromkeys(names))
    if len(different) == 1:
        return [""] * len(names)
    called = [safe_name(name) for name in different]
    if len({name.casefold() for name in called}) < len(called) or len(max(called, key=len)) > 40:
        called = [f"{what}{number}" for number in range(1, len(called) + 1)]
    suffixes = dict(zip(different, called, strict=True))
    return [f".{suffixes[name]}" for name in names]


_Written: TypeAlias = "tuple[Row, dict[str, Future[str]]]"
_Job: TypeAlias = "tuple[list[_Written], list[npt.NDArray[Any]], list[tuple[str, str]]]"
