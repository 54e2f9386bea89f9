"""Source to sinks: decode in workers, explain and render on the device, write in threads.

The main thread gets explained batches, from this process or from others, and hands their arrays to
the writer through a bounded queue. Batches are recorded in the order of the source, so that
results.jsonl is the same whatever the number of workers, and memory stays flat.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradcampp_ext.batch import provenance
from gradcampp_ext.batch.decode import Chunk
from gradcampp_ext.batch.engine import Options, by_picture
from gradcampp_ext.batch.explaining import Explaining, Job, Local
from gradcampp_ext.batch.items import length
from gradcampp_ext.batch.progress import Progress
from gradcampp_ext.batch.record import SETTINGS, Record
from gradcampp_ext.batch.sinks import FileSink, SeriesSink
from gradcampp_ext.batch.writer import Writer

if TYPE_CHECKING:
    from gradcampp_ext.batch.engine import Row
    from gradcampp_ext.batch.items import Source
    from gradcampp_ext.batch.sinks import Sink
    from gradcampp_ext.models import LoadedModel


@dataclass
class Summary:
    """What a run has done.

    Attributes:
        explained: pictures explained.
        failed: pictures skipped; errors.jsonl has the reasons.
        resumed: pictures that an earlier run had explained.
        labelled: of the explained ones, those with a label.
        right: of the labelled ones, those predicted right.
        layer: the layer that was explained, or the names of several; None if nothing was.
        interrupted: whether it was told to stop before the end.
        seconds: from the first to the last picture.
        shares: of that time, what was spent waiting for pictures ("decode"), explaining and
            rendering ("explain"), and waiting for the writers ("write").
    """

    explained: int = 0
    failed: int = 0
    resumed: int = 0
    labelled: int = 0
    right: int = 0
    layer: str | None = None
    interrupted: bool = False
    seconds: float = 0.0
    shares: dict[str, float] = field(default_factory=dict)

    @property
    def bound(self) -> tuple[str, float]:
        """The stage that took most of the time, and its share."""
        return max(self.shares.items(), key=lambda pair: pair[1], default=("explain", 0.0))


def run(
    source: Source,
    model: LoadedModel,
    out: Path,
    sinks: Sequence[Sink],
    options: Options | None = None,
    *,
    engine: Callable[[Job], Explaining] = Local,
    command: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> Summary:
    """Explain every picture of a source into a folder.

    A run that was stopped or killed is taken up by calling it again with the same arguments: what
    is recorded as done is not explained again.

    Args:
        source: see `gradcampp_ext.batch.sources`.
        model: is moved to the device, dtype and memory layout that it runs in.
        out: gets results.jsonl, errors.jsonl if pictures failed, run.json, and the sinks' files.
        sinks: see `gradcampp_ext.batch.sinks`.
        options: what to explain and how; default `Options()`.
        engine: what explains: this process, or a `gradcampp_ext.batch.ray.Cluster`.
        command: what the caller was asked for, to be kept in run.json.
        overwrite: remove an earlier run's outputs first.
        progress: is told what happens.
        stop: when set, the batch in flight is finished and the run ends.

    Raises:
        TypeError: something among the sinks is none.
        RecordError: the folder cannot be used, or not be written any longer.
        EngineError, CaptureError, ValueError: model, layer, method and pictures do not fit.
        DecodeError: a decoding process died.
    """
    options = options or Options()
    for sink in sinks:
        if not isinstance(sink, FileSink | SeriesSink):
            raise TypeError(
                f"sinks must be of the kinds FileSink or SeriesSink, got {type(sink).__name__}, "
                "which has not all of their methods and attributes"
            )
    stop = stop or threading.Event()
    progress = progress or Progress()
    tally = Tally(progress)
    summary = tally.summary
    total = length(source)
    decided = settings(model, options, sinks)
    about = provenance.about(decided, provenance.software(options.device))
    explaining = engine(Job(source.read, model, sinks, options, total, about))
    conditions = provenance.conditions(
        options.device, explaining.threads, options.batch_size, command
    )
    record = Record(out, decided, conditions, rows=options.maps, overwrite=overwrite)
    with record, progress:
        tell_conditions(record, progress)
        chunks = chunks_of(source, record, options.batch_size, summary)
        with explaining.start(chunks) as explained:
            progress.started(total, record.done.total())
            clock = Clock()
            with Writer(record, sinks, tally) as writer:
                while not stop.is_set():
                    done = next(explained, None)
                    if done is None:
                        clock.lap("decode")
                        break
                    clock.split(done.seconds)
                    writer.put(done.rows, done.drawn, done.failures)
                    clock.lap("write")
                    summary.layer = done.layer or summary.layer
                else:
                    summary.interrupted = True
            clock.lap("write")
        summary.seconds, summary.shares = clock.shares()
    progress.finished(summary)
    return summary


def settings(model: LoadedModel, options: Options, sinks: Sequence[Sink]) -> dict[str, Any]:
    """Everything that decides the outputs; a folder is continued with the same only."""
    decided: dict[str, Any] = {
        "model": model.spec,
        "weights_sha256": model.weights_sha256,
        "recipe": str(model.recipe),
        "classes": model.classes.sha256,
        "method": options.method,
        "target_layer": options.layers or model.target_layer,
        "fuse": options.fuse,
        "target": options.target,
        "topk": options.topk,
        "size": list(options.size or model.recipe.size),
        "dtype": str(options.dtype).removeprefix("torch."),
        "compile": options.compile,
    }
    for sink in sinks:
        decided |= sink.settings()
    return decided


def tell_conditions(record: Record, progress: Progress) -> None:
    """That a folder is continued under others than it was begun under."""
    if record.conditions:
        progress.noted(
            f"going on under other conditions, so bits may differ; {SETTINGS} says from which row "
            f"on: {'; '.join(record.conditions)}"
        )


def chunks_of(source: Source, record: Record, size: int, summary: Summary) -> Iterator[Chunk]:
    """What is not done yet, in the batches of an uninterrupted run: rounding depends on them."""
    items, done = iter(source), record.done.copy()
    while taken := list(itertools.islice(items, size)):
        chunk = []
        for item in taken:
            if done[item.path]:
                done[item.path] -= 1
                summary.resumed += 1
            else:
                chunk.append((item, record.name(item.path, item.name)))
        if chunk:
            yield chunk


class Tally(Progress):
    """Counts what goes by."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.summary = Summary()

    def explained(self, rows: Sequence[Row]) -> None:
        for row, *_ in by_picture(rows):
            self.summary.explained += 1
            self.summary.labelled += row["right"] is not None
            self.summary.right += row["right"] is True
        self._progress.explained(rows)

    def failed(self, path: str, reason: str) -> None:
        self.summary.failed += 1
        self._progress.failed(path, reason)


class Clock:
    """Time by stage."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._spent = {"decode": 0.0, "explain": 0.0, "write": 0.0}

    def lap(self, stage: str) -> None:
        """The time since the last call went to this stage."""
        self.split({stage: 1})

    def split(self, parts: Mapping[str, float]) -> None:
        """The time since the last call went to these stages, in these proportions."""
        now, whole = time.perf_counter(), sum(parts.values())
        for stage, part in parts.items():
            self._spent[stage] += (now - self._last) * part / whole
        self._last = now

    def shares(self) -> tuple[float, dict[str, float]]:
        total = sum(self._spent.values())
        return total, {stage: spent / total for stage, spent in self._spent.items()}
