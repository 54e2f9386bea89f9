"""Writing in the background: encoding in a pool, recording in the order of the source."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    from gradcampp_ext.batch.engine import Row
    from gradcampp_ext.batch.progress import Progress
    from gradcampp_ext.batch.record import Record
    from gradcampp_ext.batch.sinks import Sink

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
        self._record, self._sinks, self._progress = record, sinks, progress
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
        if self._error is not None and error is None:
            raise self._error

    def put(
        self,
        rows: Sequence[Sequence[Row]],
        arrays: Sequence[Tensor],
        failures: Sequence[tuple[str, str]],
    ) -> None:
        """One batch; waits while too many are pending.

        Args:
            rows: K rows a picture, or none for a picture that failed.
            arrays: one a sink, [N, K, ...].
            failures: paths and reasons.
        Raises: what a sink or the record raised for an earlier batch.
        """
        if self._error is not None:
            raise self._error
        written = [
            (row, self._submit(row, len(own), [array[n, k].numpy() for array in arrays]))
            for n, own in enumerate(rows)
            for k, row in enumerate(own)
        ]
        self._queue.put((written, list(failures)))

    def _submit(
        self, row: Row, count: int, values: Sequence[npt.NDArray[Any]]
    ) -> dict[str, Future[str]]:
        name = row["name"] if count == 1 else f"{row['name']}.top{row['rank']}"
        return {
            sink.column: self._pool.submit(sink.write, self._record, name, value)
            for sink, value in zip(self._sinks, values, strict=True)
        }

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._finish(*job)
                except BaseException as error:  # handed to the main thread
                    self._error = error

    def _finish(
        self, written: Sequence[tuple[Row, dict[str, Future[str]]]], failures: Sequence[Any]
    ) -> None:
        rows = []
        for row, futures in written:
            row["files"] = {column: future.result() for column, future in futures.items()}
            rows.append(row)
        self._record.finish(rows)
        self._progress.explained(rows)
        for path, reason in failures:
            self._record.fail(path, reason)
            self._progress.failed(path, reason)


_Job = tuple[list[tuple["Row", dict[str, Future[str]]]], list[tuple[str, str]]]
