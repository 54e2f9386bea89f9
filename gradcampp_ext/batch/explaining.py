"""From chunks of items to what the writer takes: in this process, or elsewhere (`batch.ray`)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from gradcampp_ext.batch.decode import Decoder, Decoding, default_workers
from gradcampp_ext.batch.engine import Engine
from gradcampp_ext.batch.sinks import draw

if TYPE_CHECKING:
    from PIL import Image

    from gradcampp_ext.batch.decode import Batch, Chunk
    from gradcampp_ext.batch.engine import Options, Row
    from gradcampp_ext.batch.items import Item
    from gradcampp_ext.batch.sinks import Drawn, Sink
    from gradcampp_ext.models import LoadedModel


@dataclass(frozen=True)
class Job:
    """All that explaining has to know; it can be sent to another process.

    Attributes:
        read: the source's.
        model, sinks, options: the run's.
        total: pictures in the source; None if it is not known.
    """

    read: Callable[[Item], Image.Image]
    model: LoadedModel
    sinks: Sequence[Sink]
    options: Options
    total: int | None

    @property
    def batches(self) -> int | None:
        """Most batches that there can be; None if it is not known."""
        return None if self.total is None else -(-self.total // self.options.batch_size)

    def decoder(self) -> Decoder:
        size = self.options.size or self.model.recipe.size
        return Decoder(self, self.model, size, needs_label=self.options.target == "label")


class Done(NamedTuple):
    """An explained batch.

    Attributes:
        rows, drawn, failures: as `Writer.put` takes them.
        layer: as `Engine.layer`.
        seconds: by stage: "decode", waiting for pictures, and "explain".
    """

    rows: list[list[Row]]
    drawn: Drawn | None
    failures: list[tuple[str, str]]
    layer: str | None
    seconds: dict[str, float]


class Explaining(Protocol):
    """Explains the chunks of a run wherever it likes to."""

    def start(self, chunks: Iterator[Chunk]) -> AbstractContextManager[Iterator[Done]]:
        """Explained batches in the order of the chunks, of which few are taken ahead of time."""


class Explain:
    """Explains decoded batches in this process, and draws what the sinks want."""

    def __init__(self, job: Job) -> None:
        self._engine, self._sinks = Engine(job.model, job.options), job.sinks

    def __call__(self, batch: Batch, waited: float) -> Done:
        """`waited`: seconds for the batch."""
        begin = time.perf_counter()
        rows, rendered = self._engine(batch)
        drawn = None if rendered is None else draw(self._sinks, rendered)
        seconds = {"decode": waited, "explain": time.perf_counter() - begin}
        return Done(rows, drawn, batch.failures, self._engine.layer, seconds)


class Local:
    """Explains in this process what worker processes decode."""

    def __init__(self, job: Job) -> None:
        self._job, self._explain = job, Explain(job)

    @contextlib.contextmanager
    def start(self, chunks: Iterator[Chunk]) -> Iterator[Iterator[Done]]:
        options = self._job.options
        workers = options.workers
        if workers is None:
            workers = default_workers(options.device, self._job.batches)
        pin = options.device.type == "cuda"
        with Decoding(self._job.decoder(), chunks, workers=workers, pin=pin) as decoding:
            yield self._done(decoding)

    def _done(self, decoding: Decoding) -> Iterator[Done]:
        while True:
            begin = time.perf_counter()
            batch = decoding.next()
            if batch is None:
                return
            yield self._explain(batch, time.perf_counter() - begin)
