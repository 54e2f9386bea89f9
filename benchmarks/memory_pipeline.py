"""Resident memory of a long run: after 10,000 pictures it should be what it was after 1,000.

    python benchmarks/memory_pipeline.py [--pictures 10000] [--json FILE]

A tiny network on tiny pictures, so that what grows with their number would show; with all sinks
at once: overlays, maps, both data sets and the table, from tar shards. Memory is that of the main
process and its workers together, as the kernel counts it (proportional set size).
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import about, write
from PIL import Image
from rich.console import Console
from torch import nn

from gradcampp_ext import batch
from gradcampp_ext.imaging import Recipe
from gradcampp_ext.models import Classes, LoadedModel

SIZE, SHARD = 32, 1000


def network() -> LoadedModel:
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4, padding=2), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    recipe = Recipe((SIZE, SIZE), "stretch", (SIZE, SIZE))
    return LoadedModel(nn.Sequential(features, head).eval(), recipe, Classes(tuple("abcde")))


def write_shard(file: Path, index: int) -> None:
    generator = np.random.default_rng(index)
    with tarfile.open(file, "w") as tar:
        for number in range(SHARD):
            pixels = generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            content = io.BytesIO()
            Image.fromarray(pixels).save(content, "PNG", compress_level=0)
            info = tarfile.TarInfo(f"{number:04}.png")
            info.size = content.tell()
            content.seek(0)
            tar.addfile(info, content)


def resident() -> int:
    """Bytes of this process and its children, shared pages counted in part."""
    total = 0
    for process in (Path("/proc/self"), *children()):
        try:
            lines = (process / "smaps_rollup").read_text().splitlines()
        except OSError:  # ended meanwhile
            continue
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total


def children() -> list[Path]:
    found = []
    for tasks in Path("/proc/self/task").iterdir():
        found += [Path("/proc", child) for child in (tasks / "children").read_text().split()]
    return found


class Watch(batch.Progress):
    """Memory after every thousand pictures."""

    def __init__(self) -> None:
        self.seen = 0
        self.bytes: dict[int, int] = {}

    def explained(self, rows: Any) -> None:
        before, self.seen = self.seen, self.seen + len(rows)
        if before // 1000 < self.seen // 1000:
            self.bytes[self.seen] = resident()


def main() -> None:
    parser = argparse.ArgumentParser(description="Watch the memory of a long run.")
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--json", type=Path, help="where the report goes")
    options = parser.parse_args()
    watch = Watch()
    with tempfile.TemporaryDirectory() as root:
        # some more, so that the workers are still there when it is looked at
        for index in range(-(-options.pictures // SHARD) + 1):
            write_shard(Path(root, f"{index:03}.tar"), index)
        sinks = [
            batch.Overlays("png"),
            batch.Maps("feature"),
            batch.MapSet("parquet", "feature"),
            batch.MapSet("zarr", "feature", "float16"),
            batch.ResultsTable(),
        ]
        batch.run(
            batch.Files([f"{root}/*.tar"]),
            network(),
            Path(root, "out"),
            sinks,
            batch.Options(workers=1),
            progress=watch,
        )
    seen = {count: size for count, size in watch.bytes.items() if count < options.pictures + SHARD}
    sizes = list(seen.values())
    ratio = sizes[-1] / sizes[0]
    report = {"about": about(), "bytes": seen, "last over first": ratio}
    for count, size in seen.items():
        Console().print(f"after {count:6} pictures {size / 2**20:8.1f} MiB")
    Console().print(f"last over first: {ratio:.3f}")
    if options.json:
        write(options.json, report)


if __name__ == "__main__":
    main()
