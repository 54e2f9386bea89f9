"""From chunks of items to what the writer takes: in this process, or elsewhere (`batch.ray`)."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from gradcampp_ext.batch.decode import Decoder, Decoding, default_workers
from gradcampp_ext.batch.engine import Engine, blank
from gradcampp_ext.batch.sinks import draw, together
from gradcampp_ext.explainer import Explainer

if TYPE_CHECKING:
    from gradcampp_ext.batch.decode import Batch, Chunk
    from gradcampp_ext.batch.engine import Options, Row
    from gradcampp_ext.batch.items import Read
    from gradcampp_ext.batch.sinks import Drawn, Sink
    from gradcampp_ext.models import LoadedModel

_MOST_LANES = 4  # batches in memory at once


@dataclass(frozen=True)
class Job:
    """All that explaining has to know; it can be sent to another process.

    Attributes:
        read: the source's.
        model, sinks, options: the run's.
        total: pictures in the source; None if it is not known.
        about: what outputs say of themselves.
    """

    read: Read
    model: LoadedModel
    sinks: Sequence[Sink]
    options: Options
    total: int | None
    about: Mapping[str, Any]

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
        seconds: by stage: "decode", waiting for pictures, and "explain"; known to who waited.
    """

    rows: list[list[Row]]
    drawn: Drawn | None
    failures: list[tuple[str, str]]
    layer: str | None
    seconds: dict[str, float]


class Explaining(Protocol):
    """Explains the chunks of a run wherever it likes to."""

    @property
    def threads(self) -> int:
        """That explain, where that is done on CPUs: the order of sums depends on it."""

    def start(self, chunks: Iterator[Chunk]) -> AbstractContextManager[Iterator[Done]]:
        """Explained batches in the order of the chunks, of which few are taken ahead of time."""


class Explain:
    """Explains decoded batches in this process, and draws what the sinks want."""

    def __init__(self, job: Job) -> None:
        self._engine, self._sinks = Engine(job.model, job.options), job.sinks

    def __call__(self, batch: Batch) -> Done:
        rows, parts = self._engine(batch, partial(draw, self._sinks))
        return Done(rows, together(parts), batch.failures, self._engine.layer, {})


class Local:
    """Explains in this process what worker processes decode.

    On a CPU several batches are explained side by side, each by its share of the cores: the threads
    of one batch would all have to wait, at the end of every operation, for the one whose core has
    other things to do, such as decoding.

    Args:
        threads: that explain one batch; None for all, shared among the batches side by side.
    """

    def __init__(self, job: Job, threads: int | None = None) -> None:
        self._job = job
        everything = torch.get_num_threads()
        lanes = min(everything // (threads or 1), _MOST_LANES, job.batches or everything)
        self._lanes = [Explain(job), *self._beside(lanes - 1)]
        self.threads = threads or everything // len(self._lanes)

    @contextlib.contextmanager
    def start(self, chunks: Iterator[Chunk]) -> Iterator[Iterator[Done]]:
        options = self._job.options
        workers = options.workers
        if workers is None:
            workers = default_workers(options.device, self._job.batches)
        pin = options.device.type == "cuda"
        before = torch.get_num_threads()
        pool = ThreadPoolExecutor(
            len(self._lanes), "gradcampp-explain", torch.set_num_threads, (self.threads,)
        )
        with Decoding(self._job.decoder(), chunks, workers=workers, pin=pin) as decoding:
            try:
                yield self._done(decoding, pool, self._lanes)
            finally:
                pool.shutdown(cancel_futures=True)
                torch.set_num_threads(before)  # the pool's number is that of all new threads

    def _beside(self, count: int) -> list[Explain]:
        """The lanes beside the first; none where a batch needs all of the device."""
        job = self._job
        if job.options.device.type != "cpu" or job.options.compile:
            return []
        return [
            Explain(replace(job, model=model)) for model in twins(job.model, job.options, count)
        ]

    @staticmethod
    def _done(
        decoding: Decoding, pool: ThreadPoolExecutor, lanes: Sequence[Explain]
    ) -> Iterator[Done]:
        """In order. One batch more than lanes is on its way, so that none waits for its next."""
        idle: SimpleQueue[Explain] = SimpleQueue()
        for lane in lanes:
            idle.put(lane)

        def explain(batch: Batch) -> Done:
            lane = idle.get()
            try:
                return lane(batch)
            finally:
                idle.put(lane)

        pending: deque[Future[Done]] = deque()
        more = True
        while True:
            begin = time.perf_counter()
            while more and len(pending) <= len(lanes):
                batch = decoding.next()
                if batch is None:
                    more = False
                else:
                    pending.append(pool.submit(explain, batch))
            decoded = time.perf_counter()
            if not pending:
                return
            done = pending.popleft().result()
            seconds = {"decode": decoded - begin, "explain": time.perf_counter() - decoded}
            yield done._replace(seconds=seconds)


def twins(model: LoadedModel, options: Options, count: int) -> list[LoadedModel]:
    """The same weights in modules of their own, as a forward pass may leave things on modules.

    None at all if the model cannot be copied, or a copy runs modules of the original (held by a
    function, say), which then shows in a layer that gives nothing.
    """
    network = model.model
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    try:
        copies = [deepcopy(network, dict(shared)) for _ in range(count)]
        for copied in copies[:1]:
            explainer = Explainer(copied, options.layers or model.target_layer)
            explainer.capture(blank(model, options))
    except Exception:
        return []
    return [replace(model, model=copied) for copied in copies]
