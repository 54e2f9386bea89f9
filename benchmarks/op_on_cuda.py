"""The timing of bench_op.py on a GPU: device time with a cold L2 cache, and time per call.

Device time is taken between two events on the stream. Before each call a buffer several times as
large as the L2 cache is read, which evicts the tensors and leaves nothing to be written back; while
the device is busy with that the host queues the call, so that launches do not wait for the host.
"per call" is the time of a call in a row of calls: what the host or the device, whichever is
slower, needs.

Bandwidth is the bytes of A, G and the output over the device time. It is compared with that of a
plain copy of 1 GiB, which reads and writes, measured in the same run, and the shortest times with
that of a kernel that writes 4 bytes.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from environment import quartiles
from torch import Tensor

ROUNDS = 40
CALLS = 100  # in a row
COPY_BYTES = 1 << 30


@dataclass(frozen=True)
class Times:
    """Seconds."""

    device: list[float]  # one a round
    call: float

    def stats(self) -> dict[str, float]:
        quarter, median, three_quarters = quartiles(self.device)
        return {
            "median": median,
            "iqr": three_quarters - quarter,
            "min": min(self.device),
            "rounds": len(self.device),
        }


class Stopwatch:
    """Times calls on the current device."""

    def __init__(self) -> None:
        free, _ = torch.cuda.mem_get_info()
        cache = torch.cuda.get_device_properties().L2_cache_size
        floats = min(max(4 * cache, 256 << 20), free // 8) // 4
        self._evict = torch.zeros(floats, device="cuda")
        self._sum = torch.zeros((), device="cuda")

    def device_times(self, run: Callable[[], object], rounds: int = ROUNDS) -> list[float]:
        for _ in range(3):
            run()
        events = []
        for _ in range(rounds):
            torch.sum(self._evict, 0, out=self._sum)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    def times(self, run: Callable[[], object]) -> Times:
        device = self.device_times(run)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(CALLS):
            run()
        torch.cuda.synchronize()
        return Times(device, (time.perf_counter() - begin) / CALLS)


def card() -> dict[str, Any]:
    """The measured limits of this device, and what it is driven by."""
    stopwatch = Stopwatch()
    size = min(COPY_BYTES, torch.cuda.mem_get_info()[0] // 4) // 4
    source = torch.zeros(size, device="cuda")
    target = torch.empty_like(source)
    copying = statistics.median(stopwatch.device_times(lambda: target.copy_(source), 20))
    small = torch.zeros(1, device="cuda")
    smallest = statistics.median(stopwatch.device_times(small.zero_, 20))
    return {
        "driver": _driver(),
        "copy_bytes_per_second": 8 * size / copying,
        "smallest_kernel_seconds": smallest,
    }


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        out = subprocess.run(query, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return out.splitlines()[0].strip()


def measure(
    cases: list[Any],
    contenders: dict[str, Callable[[], Callable[[Tensor, Tensor], Tensor]]],
    oracle: Callable[[Tensor, Tensor], Tensor],
    budget: float,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Entries like pytest-benchmark's, one for a case and contender, and what was left out and why.

    Stops before the case that would begin after `budget` seconds. A contender that fails or gives
    a wrong answer is left out and named.
    """
    stopwatch = Stopwatch()
    begin = time.monotonic()
    entries: list[dict[str, Any]] = []
    left_out: list[str] = []
    for case in cases:
        if time.monotonic() - begin > budget:
            left_out.append(f"{case.name}: the time was up")
            continue
        torch.manual_seed(0)
        try:
            a, g = case.tensors("cuda")
            expected = oracle(a, g)
        except torch.OutOfMemoryError as error:
            left_out.append(f"{case.name}: {_first_line(error)}")
            continue
        for name, make in contenders.items():
            try:
                run = make()
                error = (run(a, g).double() - expected).norm() / expected.norm()
                if not error <= 1e-4:
                    raise ArithmeticError(f"relative error {error:.1e}: not timed")
                times = stopwatch.times(partial(run, a, g))
            except Exception as error:
                left_out.append(f"{case.name}, {name}: {_first_line(error)}")
                continue
            entries.append(
                {
                    "group": case.name,
                    "name": name,
                    "stats": times.stats(),
                    "extra_info": {
                        "case": case.name,
                        "contender": name,
                        "bytes": case.input_bytes + expected.numel() * 4,
                        "input_bytes": case.input_bytes,
                        "call_seconds": times.call,
                        "relative_error": error.item(),
                    },
                }
            )
        print(f"{case.name}: {time.monotonic() - begin:.0f} s", file=sys.stderr)
    return entries, left_out


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def table(report: dict[str, Any]) -> str:
    """The results as Markdown; ratios are the other's median over ours."""
    copy = report["card"]["copy_bytes_per_second"]
    others = ("compile", "triton", "eager")
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in report["benchmarks"]:
        groups.setdefault(entry["group"], {})[entry["name"]] = entry
    lines = [
        f"{report['about']['cuda']['card']}: copies at {copy / 1e9:.0f} GB/s, smallest kernel "
        f"{report['card']['smallest_kernel_seconds'] * 1e6:.1f} us",
        "",
        "| case | MB in | ours, us (IQR) | GB/s | of copy | per call, us | "
        + " | ".join(f"{other} / ours" for other in others)
        + " |",
        "| --- |" + " ---: |" * (5 + len(others)),
    ]
    ratios: dict[str, list[float]] = {other: [] for other in others}
    for name, group in groups.items():
        mine = group.get("gradcampp_ext")
        if mine is None:
            lines.append(f"| {name} | |" + " |" * (4 + len(others)))
            continue
        info, median = mine["extra_info"], mine["stats"]["median"]
        rate = info["bytes"] / median
        cells = [
            name,
            f"{info['input_bytes'] / 1e6:.1f}",
            f"{median * 1e6:.1f} ({mine['stats']['iqr'] * 1e6:.1f})",
            f"{rate / 1e9:.0f}",
            f"{rate / copy:.0%}",
            f"{info['call_seconds'] * 1e6:.1f}",
        ]
        for other in others:
            if other in group:
                ratios[other].append(group[other]["stats"]["median"] / median)
            cells.append(f"{ratios[other][-1]:.2f}" if other in group else "")
        lines.append(f"| {' | '.join(cells)} |")
    medians = [f"{statistics.median(r):.2f}" if r else "" for r in ratios.values()]
    lines.append(f"| median | | | | | | {' | '.join(medians)} |")
    if report["left_out"]:
        lines += ["", "Left out:", *(f"- {line}" for line in report["left_out"])]
    return "\n".join(lines)
