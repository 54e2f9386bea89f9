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
import math
import os
import re
import statistics
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # the benchmarks make tables of their own results
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
        f"| layer | contender | {' | '.join(exponents.values())} |",
        f"| --- | --- |{' ---: |' * len(exponents)}",
    ]
    for title, layer in result("accuracy-cpu")["layers"].items():
        by_exponent = {row["exponent"]: row["errors"] for row in layer["rows"]}
        for name, shown in names[title].items():
            cells = " | ".join(f"{by_exponent[e][name]:.0e}" for e in exponents)
            lines.append(f"| {title} | {shown} | {cells} |")
    return "\n".join(lines)


def accuracy_summary() -> str:
    """Errors with the gradients as the network gives them."""
    layers = result("accuracy-cpu")["layers"]
    ours = {"behind a ReLU": "gradcampp_ext", "signed": "gradcampp_ext, rectify=False"}
    lines = [
        "| relative error of the map | gradcampp_ext | pytorch-grad-cam | torchcam |",
        "| --- | ---: | ---: | ---: |",
    ]
    for title, layer in layers.items():
        errors = next(row["errors"] for row in layer["rows"] if row["exponent"] == 0)
        names = (ours[title], "pytorch-grad-cam", "torchcam")
        lines.append(f"| layer {title} | {' | '.join(f'{errors[name]:.0e}' for name in names)} |")
    photographs = len(result("accuracy-cpu")["photographs"])
    note = f"Medians over {photographs} photographs; `rectify=False` on the signed layer."
    return "\n".join([*lines, "", note])


def evaluation_demo() -> str:
    """What `gradcampp evaluate` gave for the demo network, layer by layer, and how."""
    from gradcampp_ext.evaluation import markdown

    report = result("evaluation-demo")
    settings = report["settings"]
    road = ",".join(f"{100 * share:g}" for share in settings["road_shares"])
    options = [
        f"--metrics {','.join(settings['metrics'])}",
        f"--methods {','.join(settings['methods'])}",
        f"--layers {','.join(settings['layers'])}",
        f"--steps {settings['steps']} --road {road} --samples {settings['samples']}",
        f"--stages {settings['stages']}",
    ]
    made = " ".join(f"`{option}`" for option in options)
    right = f"{report['right']} of {report['labelled']} photographs are classified right."
    return f"{markdown(report)}\n\n{right} Made with {made}."


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


def op_medians() -> dict[str, dict[str, float]]:
    """Seconds by case and contender."""
    found: dict[str, dict[str, float]] = {}
    for entry in result("op-cpu")["benchmarks"]:
        contenders = found.setdefault(entry["group"], {})
        contenders[entry["extra_info"]["contender"]] = entry["stats"]["median"]
    return found


def op_ratios(other: str) -> list[float]:
    """Their time over ours, case by case."""
    cases = op_medians().values()
    return [case[other] / case["gradcampp_ext"] for case in cases if other in case]


def op_summary() -> str:
    lines = [
        "| the op, beside | median of the cases | from | to |",
        "| --- | ---: | ---: | ---: |",
    ]
    names = {
        "floor": "reading both tensors and writing the output: our time over its",
        "compile": "`torch.compile` of the formula: its time over ours",
        "eager": "the formula in PyTorch: its time over ours",
        "numpy": "NumPy and OpenCV, as pytorch-grad-cam does it: its time over ours",
    }
    for other, shown in names.items():
        ratios = [1 / r if other == "floor" else r for r in op_ratios(other)]
        figures = (statistics.median(ratios), min(ratios), max(ratios))
        lines.append(f"| {shown} | {' | '.join(f'{figure:.2f}' for figure in figures)} |")
    return "\n".join([*lines, "", measured_on("op-cpu", len(op_medians()))])


def op_cpu() -> str:
    """Every case."""
    import bench_op

    return bench_op.table(result("op-cpu"))


def measured_on(name: str, cases: int | None = None) -> str:
    about = result(name)["about"]
    counted = "" if cases is None else f"{cases} cases. "
    return (
        f"{counted}Measured on {about['cores']} cores of {about['cpu']} "
        f"({about['instruction_set']}), torch {about['packages']['torch']}, commit "
        f"{about['commit']}."
    )


HEADLINE = (
    "On {cores} cores, from {batch} images to maps of ResNet-50's last layer: {share:.0f} % of the "
    "speed of plain inference, {pgc:.1f} times that of pytorch-grad-cam and {torchcam:.1f} times "
    "that of torchcam, and {mb:.0f} MB at the peak where they take {pgc_mb:,.0f} and "
    "{torchcam_mb:,.0f}. The error of such a map, on the same tensors and against the paper's "
    "formula in float64: {error:.0e}, where theirs is {pgc_error:.0e} and {torchcam_error:.0e}."
)


def headline() -> str:
    """What a reader should know first: the last layer at the largest batch, and the error."""
    results = result("end-to-end-cpu")["results"]
    found = max(
        (found for found in results if usual(found["case"])),
        key=lambda found: (found["case"]["layer"], found["case"]["batch"]),
    )
    rows, layer = found["contenders"], result("accuracy-cpu")["layers"]["behind a ReLU"]
    errors = next(row["errors"] for row in layer["rows"] if row["exponent"] == 0)
    beside = rows["Explainer"]["speed_beside"]
    return HEADLINE.format(
        cores=result("end-to-end-cpu")["about"]["cores"],
        batch=found["case"]["batch"],
        share=100 * beside["inference"][1],
        pgc=beside["pytorch-grad-cam"][1],
        torchcam=beside["torchcam"][1],
        mb=rows["Explainer"]["peak_mb"],
        pgc_mb=rows["pytorch-grad-cam"]["peak_mb"],
        torchcam_mb=rows["torchcam"]["peak_mb"],
        error=errors["gradcampp_ext"],
        pgc_error=errors["pytorch-grad-cam"],
        torchcam_error=errors["torchcam"],
    )


def usual(case: dict[str, Any]) -> bool:
    """Whether a case of bench_end_to_end.py is in the setting that most people use."""
    return (case["dtype"], case["layout"], case["compiled"]) == ("float32", "contiguous", False)


END_TO_END = {
    "inference": "plain inference",
    "Explainer": "`gx.Explainer`",
    "ours as pgc": "`gradcampp_ext.compat.pytorch_grad_cam`",
    "pytorch-grad-cam": "pytorch-grad-cam",
    "ours as torchcam": "`gradcampp_ext.compat.torchcam`",
    "torchcam": "torchcam",
}


def end_to_end() -> str:
    """The usual setting: float32, contiguous."""
    lines = [
        "| ResNet-50, 224 x 224, float32 | batch | layer | images/s | of inference | "
        "x pytorch-grad-cam | x torchcam | peak MB |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for found in result("end-to-end-cpu")["results"]:
        case = found["case"]
        if not usual(case):
            continue
        for name, row in found["contenders"].items():
            cells = [END_TO_END[name], str(case["batch"]), case["layer"]]
            cells.append(f"{row['images_per_second']:.1f}")
            for other in ("inference", "pytorch-grad-cam", "torchcam"):
                ratio = row["speed_beside"].get(other)
                cells.append("" if ratio is None or name == other else f"{ratio[1]:.2f}")
            cells.append("" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", measured_on("end-to-end-cpu")])


def end_to_end_all() -> str:
    import bench_end_to_end

    return bench_end_to_end.table(result("end-to-end-cpu"))


def batch_size() -> str:
    """The figure, once there is something to draw."""
    measured = measured_on("batch-size-cpu")
    return f"![Images a second against the batch size](images/batch-size.svg)\n\n{measured}"


def pipeline() -> str:
    """Images a second, and the ratios that are taken round by round."""
    report = result("pipeline-cpu")
    names = {
        "pipeline": "`gradcampp explain`, read to saved overlay",
        "pipeline_malloc": "the same without its setting of the allocator",
        "decode": "its stages alone: decode",
        "explain": "explain",
        "write": "encode and write",
        "loop": "a loop with pytorch-grad-cam, picture by picture",
        "loop_batched": f"the same, {report['batch']} pictures at a time",
    }
    lines = ["| | images/s, median | least | most |", "| --- | ---: | ---: | ---: |"]
    for name, shown in names.items():
        rates = [found[name]["images_per_second"] for found in report["rounds"]]
        figures = (statistics.median(rates), min(rates), max(rates))
        lines.append(f"| {shown} | {' | '.join(f'{figure:.1f}' for figure in figures)} |")
    lines += ["", "| the pipeline's rate | median | least | most |", "| --- | ---: | ---: | ---: |"]
    for name, ratio in report["ratios"].items():
        lines.append(f"| {name} | {' | '.join(f'{value:.2f}' for value in ratio.values())} |")
    return "\n".join([*lines, "", measured_on("pipeline-cpu")])


def memory() -> str:
    """Of a long run, every few thousand pictures."""
    sizes = result("memory-cpu")["bytes"]
    counts = list(sizes)[::3]
    return "\n".join(
        [
            f"| after so many pictures | {' | '.join(f'{int(count):,}' for count in counts)} |",
            f"| --- | {' | '.join('---:' for _ in counts)} |",
            f"| MiB | {' | '.join(f'{sizes[count] / 2**20:.0f}' for count in counts)} |",
            "",
            measured_on("memory-cpu"),
        ]
    )


def scale() -> str:
    """What 14.2 million pictures cost, by the processor time that each stage takes for one."""
    if not (RESULTS / "pipeline-cpu.json").exists():
        return "Not measured yet; `benchmarks/bench_pipeline.py` measures it."
    report, pictures = result("pipeline-cpu"), 14.2e6
    decode, explain, write, driver = (
        statistics.median(found[name]["processor_seconds"] for found in report["rounds"])
        for name in ("decode", "explain", "write", "driver")
    )
    spent = {
        "read, decode, prepare": decode,
        "demo network, map, overlay": explain,
        "encode the overlay": write - driver,
        "write, record": driver,
    }
    spent["all"] = sum(spent.values())
    lines = [
        "| stage | core-ms a picture, t | core-hours for 14.2 million | at 0.04 a core-hour |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, seconds in spent.items():
        hours = pictures * seconds / 3600
        lines.append(f"| {name} | {1000 * seconds:.1f} | {hours:,.0f} | {0.04 * hours:,.0f} |")
    days = pictures * spent["all"] / 64 / 86400
    most, beside = 4 / driver, 1000 * (decode + write - driver)
    lines += [
        "",
        f"On 64 such cores that is {days:.1f} days. A driver, which writes in four threads, keeps "
        f"up with {most:,.0f} pictures a second at most, and a GPU that explains 1,000 a second "
        f"wants {beside:.0f} cores that decode and encode.",
        "",
        measured_on("pipeline-cpu"),
    ]
    return "\n".join(lines)


TEXTS: dict[str, Callable[[], str]] = {
    "accuracy": accuracy,
    "accuracy-summary": accuracy_summary,
    "batch-size": batch_size,
    "end-to-end": end_to_end,
    "end-to-end-all": end_to_end_all,
    "evaluation-demo": evaluation_demo,
    "headline": headline,
    "memory": memory,
    "op-cpu": op_cpu,
    "op-summary": op_summary,
    "pipeline": pipeline,
    "scale": scale,
    "training": training,
}


def chinese(text: str) -> str:
    """A generated part by the phrases of chinese.json, whose {names} stand for what is between."""
    phrases = json.loads((ROOT / "benchmarks" / "chinese.json").read_text(encoding="utf-8"))
    for phrase, translation in phrases.items():
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+?)", re.escape(phrase))
        text = re.sub(pattern, lambda match, to=translation: to.format(**match.groupdict()), text)
    return text


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


def op_figure() -> Figure:
    """Ratios of every case, a dot each, and their median."""
    figure = _axes(1, 1, (8, 2.6))[0]
    axis = figure.axes[0]
    names = {"floor": "floor", "compile": "torch.compile", "eager": "eager", "numpy": "NumPy"}
    for place, other in enumerate(reversed(names)):
        ratios = sorted(op_ratios(other))
        spread = [place + 0.24 * math.sin(7 * index) for index in range(len(ratios))]
        axis.scatter(ratios, spread, s=9, color=PEERS[0], alpha=0.5, linewidths=0)
        median = statistics.median(ratios)
        axis.plot([median, median], [place - 0.35, place + 0.35], color=OURS, linewidth=2.5)
        axis.annotate(f"{median:.1f}", (median, place + 0.38), ha="center", color=OURS, fontsize=8)
    axis.axvline(1, color=GREY, linewidth=0.8, linestyle=":")
    axis.set(xscale="log", xlabel="their time over ours", ylim=(-0.6, 3.75))
    axis.set_yticks(range(len(names)), [names[other] for other in reversed(names)])
    axis.grid(alpha=0.25, axis="x")
    return figure


def roofline_figure() -> Figure:
    """Bytes a second against bytes, beside what reading alone reaches."""
    figure = _axes(1, 1, (8, 3.2))[0]
    axis = figure.axes[0]
    for contender, colour, label in (
        ("floor", GREY, "reading both tensors, writing the output"),
        ("gradcampp_ext", OURS, "gradcampp_ext"),
        ("compile", PEERS[1], "torch.compile"),
    ):
        entries = [
            entry
            for entry in result("op-cpu")["benchmarks"]
            if entry["extra_info"]["contender"] == contender
        ]
        axis.scatter(
            [entry["extra_info"]["input_bytes"] / 1e6 for entry in entries],
            [entry["extra_info"]["bytes"] / entry["stats"]["median"] / 1e9 for entry in entries],
            s=14,
            color=colour,
            label=label,
            linewidths=0,
            alpha=0.8,
        )
    axis.set(xscale="log", yscale="log", xlabel="MB read", ylabel="GB/s")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8)
    return figure


def end_to_end_figure() -> Figure:
    """Images a second, of plain inference, at both layers."""
    results = [found for found in result("end-to-end-cpu")["results"] if usual(found["case"])]
    figure, axes = _axes(1, len(results), (9, 2.8), sharey=True, squeeze=False)
    names = [name for name in END_TO_END if name != "inference"]
    for axis, found in zip(axes[0], results, strict=True):
        for place, name in enumerate(reversed(names)):
            low, median, high = found["contenders"][name]["speed_beside"]["inference"]
            ours = "pytorch-grad-cam" != name != "torchcam"
            axis.barh(place, median, color=OURS if ours else PEERS[0], height=0.65)
            axis.plot([low, high], [place, place], color="black", linewidth=1)
        axis.set_title(f"{found['case']['layer']}, batch {found['case']['batch']}", fontsize=8)
        axis.axvline(1, color=GREY, linewidth=0.8, linestyle=":")
        axis.set_yticks(range(len(names)), [END_TO_END[n].strip("`") for n in reversed(names)])
    axes[0][0].set_xlabel("images a second, of plain inference")
    return figure


def evaluation_figure() -> Figure:
    """Means with intervals of four measures, and the randomisation stage by stage."""
    report = result("evaluation-demo")
    layers, methods = report["settings"]["layers"], report["settings"]["methods"]
    figure, axes = _axes(2, 3, (10, 6.2))
    shown = ("drop", "insertion", "deletion", "road")
    for axis, measure in zip(axes.flat, shown, strict=False):
        for number, layer in enumerate(layers):
            for place, method in enumerate(methods):
                (entry,) = (
                    entry
                    for entry in report["summary"]
                    if (entry["layer"], entry["method"], entry["measure"])
                    == (layer, method, measure)
                )
                y = place + 0.4 * (number - 0.5)
                colour = (OURS, PEERS[0])[number]
                label = None if place else f"layer {layer}"
                axis.barh(y, entry["mean"], color=colour, height=0.38, label=label)
                axis.plot([entry["low"], entry["high"]], [y, y], color="black", linewidth=1)
        definition = report["definitions"][measure]
        axis.set_title(f"{definition['title']}, {definition['better']} is better", fontsize=9)
        axis.set_yticks(range(len(methods)), methods if axis in axes[:, 0] else [])
        axis.invert_yaxis()
    bars = axes[0][0].get_legend_handles_labels()
    figure.legend(*bars, frameon=False, ncols=2, loc="outside lower left")
    for axis, layer in zip(axes.flat[len(shown) :], layers, strict=True):
        for curve in report["curves"]:
            wanted = (curve["layer"], curve["curve"]) == (layer, "randomization")
            if wanted and curve["method"] not in ("random", "center"):
                stages = range(1, len(curve["mean"]) + 1)
                axis.plot(stages, curve["mean"], marker=".", label=curve["method"], linewidth=1.2)
        axis.set_title(f"rank correlation, {layer}", fontsize=9)
        axis.axhline(0, color=GREY, linewidth=0.8)
        axis.set(ylim=(-0.3, 1), xlabel="stage in which weights are lost")
        axis.grid(alpha=0.25)
    lines = axes.flat[-1].get_legend_handles_labels()
    figure.legend(*lines, frameon=False, ncols=4, loc="outside lower right")
    return figure


def batch_size_figure() -> Figure:
    """Medians of images a second, and their quartiles."""
    from environment import quartiles

    figure = _axes(1, 1, (8, 3.4))[0]
    axis = figure.axes[0]
    styles = {
        "inference": (GREY, ":"),
        "Explainer": (OURS, "-"),
        "ours as pgc": (OURS, "--"),
        "pytorch-grad-cam": (PEERS[0], "-"),
        "ours as torchcam": (OURS, "-."),
        "torchcam": (PEERS[1], "-"),
    }
    results = result("batch-size-cpu")["results"]
    sizes = [found["case"]["batch"] for found in results]
    for name, (colour, line) in styles.items():
        rates = [
            [found["case"]["batch"] / seconds for seconds in found["contenders"][name]["seconds"]]
            for found in results
        ]
        low, middle, high = zip(*map(quartiles, rates), strict=True)
        axis.plot(sizes, middle, color=colour, linestyle=line, label=END_TO_END[name].strip("`"))
        axis.vlines(sizes, low, high, color=colour, linewidth=1)
    axis.set(xscale="log", xlabel="batch size", ylabel="images a second", ylim=(0, None))
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def targets_figure() -> Figure:
    """What ten targets cost, in times of one."""
    medians = op_medians()
    tenfold = [name for name in medians if name.endswith("-K10")]
    figure = _axes(1, 1, (8, 2.6))[0]
    axis = figure.axes[0]
    for place, name in enumerate(reversed(tenfold)):
        one, ten = medians[name.removesuffix("-K10")], medians[name]
        axis.barh(place, ten["gradcampp_ext"] / one["gradcampp_ext"], color=OURS, height=0.6)
    axis.axvline(10, color=GREY, linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(tenfold)), [n.removesuffix("-K10") for n in reversed(tenfold)])
    axis.set_xlabel("time of ten targets over that of one")
    return figure


FIGURES: dict[str, tuple[str, Callable[[], Figure]]] = {
    "accuracy": ("accuracy-cpu", accuracy_figure),
    "batch-size": ("batch-size-cpu", batch_size_figure),
    "end-to-end": ("end-to-end-cpu", end_to_end_figure),
    "evaluation": ("evaluation-demo", evaluation_figure),
    "op": ("op-cpu", op_figure),
    "roofline": ("op-cpu", roofline_figure),
    "targets": ("op-cpu", targets_figure),
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


def rewritten(text: str, images: str = "images", translate: bool = False) -> str:
    """A page with its generated parts made anew, in Chinese if ``translate``.

    ``images`` is the way from the page to the figures.
    """

    def made(match: re.Match[str]) -> str:
        begin, name, old, end = match.groups()
        try:
            new = TEXTS[name]()
        except FileNotFoundError:
            new = "(not measured yet)"
        new = new.replace("](images/", f"]({images}/")
        new = chinese(new) if translate else new
        around = "\n" if old.startswith("\n") else ""
        return f"{begin}{around}{new}{around}{end}"

    pattern = r"(<!-- begin: ([\w-]+) -->)(.*?)(<!-- end: \2 -->)"
    return re.sub(pattern, made, text, flags=re.DOTALL)


def checksum(name: str) -> str:
    digest = hashlib.sha256((RESULTS / f"{name}.json").read_bytes()).hexdigest()
    return f"benchmarks/results/{name}.json, sha256 {digest}"


def pages() -> dict[Path, tuple[str, str]]:
    """Each page with its text, as it is and made anew."""
    found = {}
    for page in sorted(page for pattern in PAGES for page in ROOT.glob(pattern)):
        text = page.read_text(encoding="utf-8")
        images = os.path.relpath(IMAGES, page.parent)
        found[page] = text, rewritten(text, images, translate=".zh" in page.suffixes)
    return found


def differences() -> list[str]:
    """What is not as the committed JSON makes it."""
    found = [str(page.relative_to(ROOT)) for page, (old, new) in pages().items() if old != new]
    for name, (source, _) in FIGURES.items():
        if not (RESULTS / f"{source}.json").exists():
            continue
        file = IMAGES / f"{name}.svg"
        if not file.exists() or checksum(source) not in file.read_text(encoding="utf-8"):
            found.append(str(file.relative_to(ROOT)))
    return found


def write() -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    for page, (old, new) in pages().items():
        if old != new:
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
