"""From the committed JSON of benchmarks/results to the tables and figures of README and docs.

    python benchmarks/plot.py           # rewrite what stands between markers, redraw figures
    python benchmarks/plot.py --check   # say what differs, change nothing

In a Markdown file everything between `<!-- begin: NAME -->` and `<!-- end: NAME -->` is made by the
function of that name in TEXTS; a figure docs/images/NAME.svg by that in FIGURES, and it carries the
checksum of the JSON it was drawn from. So no number there is typed by hand.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
PAGES = ("README*.md", "docs/*.md")

OURS, PEERS, GREY = "#d1495b", ("#2e5e8c", "#edae49", "#66a182"), "#8d96a3"

Report = dict[str, Any]


@cache
def result(name: str) -> Report:
    """A committed result by the name of its file."""
    report: Report = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return report


# ---- tables and numbers ----


def accuracy() -> str:
    """Errors at the gradients' own scale and at others."""
    exponents = {-4: "x 10⁻⁴", -2: "x 10⁻²", 0: "as they are", 2: "x 10²", 4: "x 10⁴"}
    names = {
        "behind a ReLU": {
            "gradcampp_ext": "gradcampp_ext",
            "pytorch-grad-cam": "pytorch-grad-cam",
            "torchcam": "torchcam",
        },
        "signed": {
            "gradcampp_ext, rectify=False": "gradcampp_ext, `rectify=False`",
            "pytorch-grad-cam": "pytorch-grad-cam",
            "torchcam": "torchcam",
            "gradcampp_ext, against the rectified formula": "gradcampp_ext, rectified, "
            "against the rectified formula",
        },
    }
    lines = [
        f"| layer | gradients | {' | '.join(exponents.values())} |",
        f"| --- | --- |{' ---: |' * len(exponents)}",
    ]
    for title, layer in result("accuracy-cpu")["layers"].items():
        by_exponent = {row["exponent"]: row["errors"] for row in layer["rows"]}
        for name, shown in names[title].items():
            cells = " | ".join(f"{by_exponent[e][name]:.0e}" for e in exponents)
            lines.append(f"| {title} | {shown} | {cells} |")
    return "\n".join(lines)


def evaluation_demo() -> str:
    """What `gradcampp evaluate` gave for the demo network, layer by layer."""
    from gradcampp_ext.evaluation import markdown

    return markdown(result("evaluation-demo"))


def training() -> str:
    """Accuracy on pictures whose mark lies, and the cost of derivatives."""
    report = result("training-cpu")
    accuracy = {name: sum(v) / len(v) for name, v in report["accuracy"].items()}
    seeds = len(report["accuracy"]["guided"])
    lines = [
        f"| accuracy where the mark lies, mean of {seeds} seeds | |",
        "| --- | ---: |",
        f"| without guidance | {100 * accuracy['without']:.1f} % |",
        f"| guided | {100 * accuracy['guided']:.1f} % |",
        "",
        "| map and derivatives by both | gradcampp_ext, ms | autograd, ms | ratio (quartiles) |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, row in report["cost"].items():
        low, median, high = row["ratio"]
        lines.append(
            f"| {name}, {' x '.join(map(str, row['shape']))} | {row['gradcampp_ext_ms']:.1f} | "
            f"{row['autograd_ms']:.1f} | {median:.1f} ({low:.1f} to {high:.1f}) |"
        )
    return "\n".join(lines)


TEXTS: dict[str, Callable[[], str]] = {
    "accuracy": accuracy,
    "evaluation-demo": evaluation_demo,
    "training": training,
}


# ---- figures ----


def accuracy_figure() -> Figure:
    report = result("accuracy-cpu")
    figure, axes = _axes(1, len(report["layers"]), (9, 3.6), sharey=True)
    for axis, (title, layer) in zip(axes, report["layers"].items(), strict=True):
        scales = [10.0 ** row["exponent"] for row in layer["rows"]]
        behind_relu = title != "signed"
        curves = {
            "gradcampp_ext": (
                "gradcampp_ext" if behind_relu else "gradcampp_ext, rectify=False",
                OURS,
            ),
            "pytorch-grad-cam": ("pytorch-grad-cam", PEERS[0]),
            "torchcam": ("torchcam", PEERS[1]),
        }
        for label, (key, colour) in curves.items():
            errors = [row["errors"][key] for row in layer["rows"]]
            axis.plot(scales, errors, color=colour, label=label, linewidth=2)
        axis.axvline(1, color=GREY, linewidth=0.8, linestyle=":")
        axis.set(xscale="log", yscale="log", title=f"layer {title}", ylim=(3e-8, 3))
        axis.set_xlabel("gradients multiplied by")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("relative error of the map")
    axes[0].legend(frameon=False, loc="center left", fontsize=8)
    return figure


FIGURES: dict[str, tuple[str, Callable[[], Figure]]] = {
    "accuracy": ("accuracy-cpu", accuracy_figure),
}


def _axes(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "gradcampp_ext",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=size, layout="constrained", **options)


# ---- into the files ----


def rewritten(text: str) -> str:
    """A page with its generated parts made anew."""

    def made(match: re.Match[str]) -> str:
        begin, name, old, end = match.groups()
        try:
            new = TEXTS[name]()
        except FileNotFoundError:
            new = "(not measured yet)"
        around = "\n" if old.startswith("\n") else ""
        return f"{begin}{around}{new}{around}{end}"

    pattern = r"(<!-- begin: ([\w-]+) -->)(.*?)(<!-- end: \2 -->)"
    return re.sub(pattern, made, text, flags=re.DOTALL)


def checksum(name: str) -> str:
    digest = hashlib.sha256((RESULTS / f"{name}.json").read_bytes()).hexdigest()
    return f"benchmarks/results/{name}.json, sha256 {digest}"


def pages() -> list[Path]:
    return sorted(page for pattern in PAGES for page in ROOT.glob(pattern))


def differences() -> list[str]:
    """What is not as the committed JSON makes it."""
    found = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if rewritten(text) != text:
            found.append(str(page.relative_to(ROOT)))
    for name, (source, _) in FIGURES.items():
        if not (RESULTS / f"{source}.json").exists():
            continue
        file = IMAGES / f"{name}.svg"
        if not file.exists() or checksum(source) not in file.read_text(encoding="utf-8"):
            found.append(str(file.relative_to(ROOT)))
    return found


def write() -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (new := rewritten(text)) != text:
            page.write_text(new, encoding="utf-8")
    for name, (source, draw) in FIGURES.items():
        if not (RESULTS / f"{source}.json").exists():
            continue
        metadata = {"Date": None, "Description": checksum(source)}
        draw().savefig(IMAGES / f"{name}.svg", metadata=metadata)


def main() -> int:
    parser = argparse.ArgumentParser(description="Tables and figures from benchmarks/results.")
    parser.add_argument("--check", action="store_true", help="change nothing, say what differs")
    if parser.parse_args().check:
        stale = differences()
        print("\n".join(f"{name} is not as benchmarks/plot.py makes it" for name in stale))
        return 1 if stale else 0
    write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
