"""Runs the benchmarks, one after the other, each in a process of its own.

The programs stand in ``benchmarks/`` of a checkout, and in the package of a wheel.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class BenchError(RuntimeError):
    """Benchmarks cannot be run, or failed; the text says which and why."""


@dataclass(frozen=True)
class Benchmark:
    """A program that takes ``--json FILE``.

    Attributes:
        program: its file.
        about: what it measures, in a line.
        minutes: about how long, on two cores.
        cuda: whether it takes ``--device cuda``.
    """

    program: str
    about: str
    minutes: int
    cuda: bool = False


BENCHMARKS = {
    "accuracy": Benchmark("bench_accuracy.py", "errors of maps, by the gradients' scale", 1),
    "op": Benchmark("bench_op.py", "the op beside eager, torch.compile, NumPy", 12, cuda=True),
    "end-to-end": Benchmark("bench_end_to_end.py", "images a second beside the peers", 12),
    "batch-size": Benchmark("bench_batch_size.py", "the same, by the size of the batch", 5),
    "classes": Benchmark("bench_classes.py", "all classes at once, in forward passes", 2),
    "pipeline": Benchmark("bench_pipeline.py", "files to overlays beside a plain loop", 8),
    "training": Benchmark("bench_training.py", "maps inside a loss", 3),
}


def folder() -> Path:
    """Where the programs are."""
    package = Path(__file__).parent
    for place in (package / "benchmarks", package.parent / "benchmarks"):
        if (place / "environment.py").exists():
            return place
    raise BenchError("the benchmarks are not installed; take a checkout of the repository")


def run(names: Sequence[str], out: Path, device: str) -> list[Path]:
    """Runs benchmarks and returns their JSON files, out/NAME-DEVICE.json.

    Raises: BenchError for an unknown name or a folder that cannot be, or at the end if one of them
        failed.
    """
    from rich.console import Console

    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        raise BenchError(f"no benchmark is called {unknown[0]!r}: {', '.join(BENCHMARKS)}")
    console = Console(stderr=True)
    chosen = [name for name in names or BENCHMARKS if device == "cpu" or BENCHMARKS[name].cuda]
    if not chosen:
        raise BenchError(f"none of {', '.join(names)} runs on {device}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchError(f"cannot write in {out}: {error.strerror or error}") from error
    made, failed = [], []
    for number, name in enumerate(chosen, start=1):
        benchmark = BENCHMARKS[name]
        console.rule(
            f"{number} of {len(chosen)}: {name}, {benchmark.about} (about {benchmark.minutes} min)"
        )
        file = out / f"{name}-{device}.json"
        command = [sys.executable, str(folder() / benchmark.program), "--json", str(file)]
        if benchmark.cuda:
            command += ["--device", device]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
        else:
            made.append(file)
    if failed:
        raise BenchError(f"failed: {', '.join(failed)}; what the others gave is in {out}")
    return made
