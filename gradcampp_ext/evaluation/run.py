"""Evaluating many pictures: source, decode, evaluate, record; then the summary.

As in `gradcampp_ext.batch`, a picture is done when its rows are in results.jsonl, and the same call
goes on where an earlier one was stopped or killed.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gradcampp_ext.batch import provenance
from gradcampp_ext.batch import report as batch_report
from gradcampp_ext.batch.decode import Decoder, Decoding, default_workers
from gradcampp_ext.batch.engine import by_picture
from gradcampp_ext.batch.items import length
from gradcampp_ext.batch.pipeline import Clock, Summary, Tally, chunks_of, tell_conditions
from gradcampp_ext.batch.progress import Progress
from gradcampp_ext.batch.record import Record
from gradcampp_ext.batch.sinks import draw
from gradcampp_ext.batch.writer import Writer
from gradcampp_ext.evaluation import plots, report
from gradcampp_ext.evaluation.evaluator import Evaluator, Options
from gradcampp_ext.evaluation.summary import files, summarize

if TYPE_CHECKING:
    from gradcampp_ext.batch.items import Source
    from gradcampp_ext.batch.sinks import FileSink
    from gradcampp_ext.evaluation.boxes import Annotations
    from gradcampp_ext.models import LoadedModel


@dataclass(frozen=True)
class Evaluation:
    """What a run has done.

    Attributes:
        run: how many pictures, how fast.
        result: as evaluation.json has it; None if the run was interrupted or had no pictures.
        report: the page to open; None where there is no result, or nothing was to be drawn.
    """

    run: Summary
    result: dict[str, Any] | None
    report: Path | None


def run(
    source: Source,
    model: LoadedModel,
    out: Path,
    options: Options | None = None,
    boxes: Annotations | None = None,
    *,
    pictures: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> Evaluation:
    """Evaluate maps of every picture of a source into a folder.

    Args:
        source: see `gradcampp_ext.batch.sources`.
        model: is moved to the device, dtype and memory layout that it runs in.
        out: gets results.jsonl, a line a map, errors.jsonl if pictures failed, run.json, and at the
            end evaluation.json, evaluation.csv, plots and the report.
        options: what to evaluate and how; default `Options()`.
        boxes: for localisation, see `gradcampp_ext.evaluation.boxes.read_boxes`.
        pictures: draw the results, and maps of the pictures on which methods differ most, which
            are explained once more for that (see `gradcampp_ext.evaluation.plots`); and write the
            report (see `gradcampp_ext.evaluation.report`).
        overwrite: remove an earlier run's outputs first.
        progress: is told what happens.
        stop: when set, the batch in flight is finished and the run ends.

    Raises:
        RecordError: the folder cannot be used, or not be written any longer.
        EngineError, CaptureError, ValueError: model, layers, methods and pictures do not fit.
        DecodeError: a decoding process died.
    """
    options = options or Options()
    stop = stop or threading.Event()
    progress = progress or Progress()
    tally = Tally(progress)
    summary = tally.summary
    evaluator = Evaluator(model, options, boxes)
    total = length(source)
    workers = options.workers
    if workers is None:
        batches = None if total is None else -(-total // options.batch_size)
        workers = default_workers(options.device, batches)
    decided = settings(model, options, boxes)
    sinks: list[FileSink] = batch_report.sinks() if pictures else []
    recorded = decided | {"report": pictures}
    conditions = provenance.conditions(options.device, torch.get_num_threads(), options.batch_size)
    record = Record(out, recorded, conditions, rows=options.maps, overwrite=overwrite)
    result = index = None
    with record, progress:
        tell_conditions(record, progress)
        decoder = Decoder(source, model, model.recipe.size, needs_label=evaluator.by_label)
        chunks = chunks_of(source, record, options.batch_size, summary)
        pin = options.device.type == "cuda"
        with Decoding(decoder, chunks, workers=workers, pin=pin) as decoding:
            progress.started(total, record.done.total())
            clock = Clock()
            with Writer(record, sinks, tally) as writer:
                while not stop.is_set():
                    batch = decoding.next()
                    clock.lap("decode")
                    if batch is None:
                        break
                    rows, rendered = evaluator(batch)
                    drawn = None if rendered is None else draw(sinks, rendered)
                    clock.lap("explain")
                    writer.put(rows, drawn, batch.failures)
                    clock.lap("write")
                else:
                    summary.interrupted = True
            clock.lap("write")
        summary.layer = ", ".join(evaluator.layers) or None
        summary.seconds, summary.shares = clock.shares()
        if not summary.interrupted and summary.resumed + summary.explained:
            taken = by_picture(record.rows())
            result = {
                "record": record.about["record"],
                "environment": conditions["environment"],
                **summarize(taken, decided, evaluator.stages),
            }
            made = files(result)
            if pictures:
                made |= plots.draw(result, record.about)
                made |= plots.disagreements(taken, source, model, evaluator, record.about)
            for name, content in made.items():
                record.write(name, content)
            if pictures:
                index = report.build(out)
    progress.finished(summary)
    return Evaluation(summary, result, index)


def settings(model: LoadedModel, options: Options, boxes: Annotations | None) -> dict[str, Any]:
    """Everything that decides the numbers; a folder is continued with the same only."""
    wanted = set(options.metrics)
    decided: dict[str, Any] = {
        "command": "evaluate",
        "model": model.spec,
        "weights_sha256": model.weights_sha256,
        "recipe": str(model.recipe),
        "classes": model.classes.sha256,
        "methods": list(options.methods),
        "layers": list(options.layers) or model.target_layer,
        "target": options.target,
        "metrics": list(options.metrics),
        "maps": "min-max at the layer's size, then bilinear to the input's, half-pixel centres",
        "dtype": str(options.dtype).removeprefix("torch."),
        "seed": options.seed,
    }
    if wanted & {"drop", "coherency"}:
        decided["space"] = options.space
    if wanted & {"insertion", "deletion"}:
        decided["steps"] = options.steps
    if "insertion" in wanted:
        decided["insertion_from"] = options.insertion_from
    if "deletion" in wanted:
        decided["deletion_to"] = options.deletion_to
    if "road" in wanted:
        decided["road_shares"] = list(options.road_shares)
    if "localization" in wanted:
        decided["tolerance"] = options.tolerance
        decided["boxes"] = _digest(boxes)
    if "sensitivity" in wanted:
        decided |= {"samples": options.samples, "radius": options.radius}
    if "randomization" in wanted:
        decided["stages"] = options.stages
    return decided


def _digest(boxes: Annotations | None) -> str:
    """Of the boxes without their paths, so that it is the same in another folder."""
    ordered = sorted(json.dumps(each) for each in (boxes or {}).values())
    return hashlib.sha256("\n".join(ordered).encode()).hexdigest()
