"""From JPEG files to overlays: the pipeline beside its own stages and beside a plain loop.

    python benchmarks/bench_pipeline.py [--files 1024] [--minutes 8] [--json FILE]

The demo network (EfficientNet-Lite0, ImageNet weights) at 224 x 224 on the CPU; each picture is
read, its predicted class explained by Grad-CAM++, and a JPEG of the overlay saved. In one run,
each in a process of its own, round after round until the minutes are over:

    pipeline         batch.run, as gradcampp explain runs it
    pipeline_malloc  the same with glibc's allocator as it is: freed memory goes back to the kernel
    decode           the pipeline's first stage alone, a process a core
    explain          its second alone: maps, rows of results and overlays from decoded pictures
    write            its third alone: encoding and writing files, recording
    driver           what a cluster leaves of that to its driver: files come encoded
    loop             pytorch-grad-cam picture by picture: read, explain, overlay, save
    loop_batched     the same 32 pictures at a time

All have every core. A pass over the files is timed after a warm-up of one batch; the loops take a
quarter of the files. Before anything is timed, maps are compared with the float64 oracle, and
after it the loop's predictions with ours.

Two bounds stand beside the pipeline. "slowest stage" is the least of the three stages' rates. Each
of them was measured with all cores to itself, which they share in the pipeline, so no overlap can
give more than "cores" allow: the number of cores over the sum of the processor time that the
stages take for a picture.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
from environment import about, write
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

from gradcampp_ext import batch, models, reference
from gradcampp_ext._environment import cores
from gradcampp_ext.batch.decode import Decoder, Decoding
from gradcampp_ext.batch.engine import Engine
from gradcampp_ext.batch.memory import keep_freed_memory
from gradcampp_ext.batch.pipeline import chunks_of
from gradcampp_ext.batch.record import Record
from gradcampp_ext.batch.sinks import draw, encode
from gradcampp_ext.batch.writer import Writer
from gradcampp_ext.explainer import Explainer

BATCH, SIZE = 32, 224
SINKS = [batch.Overlays("jpg")]
PHOTOGRAPHS = ("chelsea", "coffee", "rocket", "astronaut")
LAYER = "_avg_pooling.0"  # what is pooled, as a module, which pytorch-grad-cam needs
LOOPS = ("loop", "loop_batched")


def write_files(folder: Path, count: int) -> None:
    """JPEG files from 320 to 640 pixels a side: parts of photographs, with some noise."""
    generator = np.random.default_rng(0)
    for index in range(count):
        photograph = getattr(skimage.data, PHOTOGRAPHS[index % len(PHOTOGRAPHS)])()
        height, width = photograph.shape[:2]
        side = int(generator.integers(150, min(height, width)))
        top = int(generator.integers(0, height - side + 1))
        left = int(generator.integers(0, width - side + 1))
        part = Image.fromarray(photograph[top : top + side, left : left + side])
        size = tuple(int(each) for each in generator.integers(320, 641, 2))
        pixels = np.asarray(part.resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
        pixels += generator.integers(-6, 7, pixels.shape, dtype=np.int16)
        pixels = np.clip(pixels, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:04}.jpg", quality=90)


def load() -> models.LoadedModel:
    demo = models.load("demo")
    demo.model._avg_pooling = nn.Sequential(nn.Identity(), demo.model._avg_pooling)
    return replace(demo, target_layer=LAYER)


class Clock:
    """Seconds, and processor seconds of this process and of those that it waited for."""

    def __enter__(self) -> Clock:
        self._processor, self._start = self._used(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self.processor = self._used() - self._processor

    @staticmethod
    def _used() -> float:
        usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)


class Stages:
    """The pipeline's parts, apart. Each method is one pass over files, timed by the clock."""

    def __init__(self, files: list[Path], out: Path) -> None:
        self.files, self.out = files, out
        self.model = load()
        self.source = batch.Files(files)
        self.options = batch.Options(batch_size=BATCH)
        self.record = Record(out / "record", {})

    def batches(self, workers: int) -> Iterator[Any]:
        decoder = Decoder(self.source, self.model, self.model.recipe.size, needs_label=False)
        chunks = chunks_of(self.source, self.record, BATCH, batch.Summary())
        with Decoding(decoder, chunks, workers=workers, pin=False) as decoding:
            while (decoded := decoding.next()) is not None:
                yield decoded

    def decode(self, clock: Clock) -> None:
        with clock:
            for _ in self.batches(cores()):
                pass

    def explain(self, clock: Clock) -> None:
        engine, decoded = Engine(self.model, self.options), list(self.batches(0))
        with clock:
            self.explained(engine, decoded)

    def write(self, clock: Clock) -> None:
        done = self.explained(Engine(self.model, self.options), list(self.batches(0)))
        self.written(clock, done)

    def driver(self, clock: Clock) -> None:
        done = self.explained(Engine(self.model, self.options), list(self.batches(0)))
        about = self.record.about
        encoded = [(rows, encode(SINKS, rows, drawn, about)) for rows, drawn in done]
        self.written(clock, encoded)

    def written(self, clock: Clock, done: list[Any]) -> None:
        with clock, Writer(self.record, SINKS, batch.Progress()) as writer:
            for rows, drawn in done:
                writer.put(rows, drawn, [])

    def pipeline(self, clock: Clock) -> batch.Summary:
        with clock:
            return batch.run(self.source, self.model, self.out / "run", SINKS, self.options)

    @staticmethod
    def explained(engine: Engine, decoded: list[Any]) -> list[Any]:
        done = []
        for each in decoded:
            rows, (drawn,) = engine(each, partial(draw, SINKS))
            done.append((rows, drawn))
        return done


def loop(files: list[Path], out: Path, clock: Clock, *, size: int) -> list[int]:
    """What users of pytorch-grad-cam write; gives the predictions."""
    from pytorch_grad_cam import GradCAMPlusPlus
    from pytorch_grad_cam.utils.image import show_cam_on_image

    demo = load()
    recipe = demo.recipe
    cam = GradCAMPlusPlus(model=demo.model, target_layers=[demo.model._avg_pooling[0]])
    cam.batch_size = size
    predicted: list[int] = []
    mean, std = np.float32(recipe.mean), np.float32(recipe.std)
    with clock:
        for start in range(0, len(files), size):
            chunk = files[start : start + size]
            pictures = [recipe.picture(Image.open(file).convert("RGB")) for file in chunk]
            scaled = [np.float32(picture) / 255 for picture in pictures]
            tensors = [torch.from_numpy((one - mean) / std).permute(2, 0, 1) for one in scaled]
            maps = cam(input_tensor=torch.stack(tensors), targets=None)
            predicted += cam.outputs.argmax(1).tolist()
            for file, picture, one in zip(chunk, scaled, maps, strict=True):
                drawn = show_cam_on_image(picture, one, use_rgb=True)
                Image.fromarray(drawn).save(out / file.name, quality=92, subsampling=0)
    return predicted


def contender(name: str, folder: Path, out: Path) -> dict[str, Any]:
    """One timed pass, in this process."""
    if name != "pipeline_malloc":
        keep_freed_memory()
    files, clock, found = sorted(folder.iterdir()), Clock(), {}
    if name in LOOPS:
        size = BATCH if name == "loop_batched" else 1
        files = files[: max(BATCH, len(files) // 4)]
        loop(files[:BATCH], out, Clock(), size=size)
        found["predicted"] = loop(files, out, clock, size=size)
    else:
        stage = name.removesuffix("_malloc")
        (out / "warm").mkdir()
        getattr(Stages(files[:BATCH], out / "warm"), stage)(Clock())
        summary = getattr(Stages(files, out), stage)(clock)
        if summary is not None:
            found |= {"shares": summary.shares, "predicted": predictions(out / "run")}
    return {
        **found,
        "images": len(files),
        "images_per_second": len(files) / clock.seconds,
        "processor_seconds": clock.processor / len(files),
    }


def predictions(out: Path) -> list[int]:
    lines = (out / "results.jsonl").read_text().splitlines()
    return [json.loads(line)["predicted"] for line in lines]


def check(folder: Path, out: Path) -> None:
    """Maps of a few files against the oracle: a wrong answer is not timed."""
    model, files = load(), sorted(folder.iterdir())[:4]
    options = batch.Options(batch_size=4, workers=0)
    batch.run(batch.Files(files), model, out, [batch.Maps("feature")], options)
    pictures = np.stack([model.recipe.picture(Image.open(file)) for file in files])
    inputs = model.recipe.normalize(torch.from_numpy(pictures))
    found = Explainer(model.model, LAYER).capture(inputs)
    a, g = (x.double() for x in (found.activations[0], found.gradients[0][:, 0]))
    for file, expected in zip(files, reference.cam(a, g, size=None), strict=True):
        actual = torch.from_numpy(np.load(out / "maps" / f"{file.stem}.npy"))
        assert (actual - expected).norm() <= 1e-3 * expected.norm(), "a wrong answer is not timed"


CONTENDERS = (
    "pipeline", "explain", "loop", "pipeline_malloc", "decode", "loop_batched", "write", "driver",
)  # fmt: skip


def measure(name: str, folder: Path) -> dict[str, Any]:
    """A pass in a new process: allocators, threads and caches are nobody else's."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, __file__, "--contender", name, str(folder), out]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def summarize(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Ratios within a round, since rounds differ by what else the machine does."""

    def ratios(of: Callable[[dict[str, Any]], float]) -> dict[str, float]:
        values = sorted(map(of, rounds))
        return {"median": statistics.median(values), "least": values[0], "most": values[-1]}

    def rate(found: dict[str, Any], name: str) -> float:
        return float(found[name]["images_per_second"])

    def by_cores(found: dict[str, Any]) -> float:
        spent = sum(found[name]["processor_seconds"] for name in ("decode", "explain", "write"))
        return rate(found, "pipeline") * spent / cores()

    def slowest(found: dict[str, Any]) -> float:
        return min(rate(found, name) for name in ("decode", "explain", "write"))

    return {
        "of the slowest stage alone": ratios(lambda r: rate(r, "pipeline") / slowest(r)),
        "of what the cores allow": ratios(by_cores),
        "over the loop": ratios(lambda r: rate(r, "pipeline") / rate(r, "loop")),
        "over the loop in batches": ratios(lambda r: rate(r, "pipeline") / rate(r, "loop_batched")),
        "over itself without the allocator": ratios(
            lambda r: rate(r, "pipeline") / rate(r, "pipeline_malloc")
        ),
    }


def table(report: dict[str, Any]) -> Table:
    shown = Table("", "median", "least", "most", title="images a second, and ratios")
    for name in CONTENDERS:
        rates = [found[name]["images_per_second"] for found in report["rounds"]]
        figures = (statistics.median(rates), min(rates), max(rates))
        shown.add_row(name, *(f"{figure:.1f}" for figure in figures))
    shown.add_section()
    for name, ratio in report["ratios"].items():
        shown.add_row(f"pipeline, {name}", *(f"{value:.2f}" for value in ratio.values()))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the pipeline beside stages and a loop.")
    parser.add_argument("--files", type=int, default=1024)
    parser.add_argument("--minutes", type=float, default=8, help="no round begins after them")
    parser.add_argument("--json", type=Path, help="where the report goes")
    parser.add_argument("--contender", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        name, folder, out = options.contender
        print(json.dumps(contender(name, Path(folder), Path(out))))
        return
    with tempfile.TemporaryDirectory() as root, Progress(console=Console(stderr=True)) as bar:
        folder, begin = Path(root, "files"), time.monotonic()
        folder.mkdir()
        write_files(folder, options.files)
        check(folder, Path(root, "check"))
        rounds: list[dict[str, dict[str, Any]]] = []
        task = bar.add_task("", total=options.minutes * 60)
        longest = 0.0
        while not rounds or time.monotonic() - begin + longest < options.minutes * 60:
            started, found = time.monotonic(), {}
            for name in CONTENDERS:
                bar.update(task, description=f"round {len(rounds) + 1}: {name}")
                found[name] = measure(name, folder)
                bar.update(task, completed=time.monotonic() - begin)
            ours = found["pipeline"].pop("predicted")
            found["pipeline_malloc"].pop("predicted")
            for name in LOOPS:
                theirs = found[name].pop("predicted")
                same = np.mean([a == b for a, b in zip(ours, theirs, strict=False)])
                assert same >= 0.98, f"{name} predicts something else: {same:.0%} equal"
            rounds.append(found)
            longest = max(longest, time.monotonic() - started)
    report = {
        "about": about(),
        "files": options.files,
        "batch": BATCH,
        "size": SIZE,
        "ratios": summarize(rounds),
        "rounds": rounds,
    }
    Console().print(table(report))
    if options.json:
        write(options.json, report)


if __name__ == "__main__":
    main()
