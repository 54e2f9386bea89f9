"""Images a second against the batch size: ResNet-50, last layer, float32.

    python benchmarks/bench_batch_size.py [--minutes 5] [--json FILE] [--quick]

Contenders, checks, rounds and ratios are those of bench_end_to_end.py. Every batch size gets the
same time and at least three rounds, so that the largest one may take longer.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from bench_end_to_end import Case, measured, table

SIZES = (1, 2, 4, 8, 16, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure images a second by batch size.")
    parser.add_argument("--minutes", type=float, default=5, help="for the whole run, about")
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--quick", action="store_true", help="batches of one and two")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    chosen = [Case(size, "layer4") for size in (SIZES[:2] if options.quick else SIZES)]
    # The check before each size costs about what a round does, and a tenth of the time is set-up.
    seconds = [options.minutes * 60 * 0.7 / len(chosen)] * len(chosen)
    print(table(measured(chosen, seconds, options.json)))


if __name__ == "__main__":
    main()
