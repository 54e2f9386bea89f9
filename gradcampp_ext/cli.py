"""gradcampp on the command line: explain, evaluate, report, layers, bench, info. Only calls."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import sys
import threading
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from enum import Enum
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gradcampp_ext.bench import BENCHMARKS

if TYPE_CHECKING:
    import torch

    from gradcampp_ext.batch import Progress, Sink, Source, Summary
    from gradcampp_ext.batch.ray import Cluster
    from gradcampp_ext.batch.reproduce import Recorded
    from gradcampp_ext.models import LoadedModel

# parameters of explain that decide no output
_UNRECORDED = frozenset(
    {"out", "reproduce", "engine", "ray_address", "workers", "overwrite", "quiet", "json_progress"}
)
FAILED, UNUSABLE = 1, 2  # exit codes: pictures were skipped; an error stopped the command

# panels of the help
_PICTURES, _OUTPUTS, _RUN, _METRICS = "Pictures and classes", "Outputs", "Run", "Metrics"


class MapFormat(str, Enum):
    """typer takes no list of literals."""

    NPY = "npy"
    PARQUET = "parquet"
    ZARR = "zarr"


app = typer.Typer(
    help="Grad-CAM++ and its family: what in a picture speaks for a class.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="SPEC",
        help="demo (EfficientNet-Lite0, ImageNet), torchvision:NAME, timm:NAME, hf:NAME, or "
        "package.module:factory.",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="A state dict (.safetensors, .pth), or none for random weights. Default: the "
        "published ones, which torchvision, timm and hf download once.",
    ),
]
_PATHS = typer.Argument(
    metavar="PATH...",
    help="Pictures, folders (with all below), globs; .csv, .jsonl and .parquet lists with "
    "a column path; .parquet files of pictures; WebDataset shards, a-{000..127}.tar; "
    "hf:NAME@SPLIT or hf-stream:NAME@SPLIT, a Hugging Face data set.",
    show_default=False,
)
Paths = Annotated[list[str], _PATHS]
MaybePaths = Annotated[list[str] | None, _PATHS]
Out = Annotated[
    Path,
    typer.Option(
        "--out",
        "-o",
        metavar="DIR",
        help="Where the outputs go.",
        show_default=False,
        rich_help_panel=_OUTPUTS,
    ),
]
RecipeName = Annotated[
    Literal["model", "article", "article-fit"],
    typer.Option(
        help="How pictures are prepared: as the model was trained; or shorter side to 224 "
        "(article) or longer side (article-fit), LANCZOS, ImageNet mean and std.",
        rich_help_panel=_PICTURES,
    ),
]
Labels = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="CSV, JSONL or Parquet of true classes: path (relative to the file) and "
        "class_index, label, class_name or wordnet_id. Without it a folder called like a class "
        "is a label.",
        rich_help_panel=_PICTURES,
    ),
]
ClassNames = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="One class name a line, or JSON. Default: the model's.",
        rich_help_panel=_PICTURES,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...", rich_help_panel=_RUN)]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"],
    typer.Option(help="Of the network.", rich_help_panel=_RUN),
]
BatchSize = Annotated[int, typer.Option(min=1, rich_help_panel=_RUN)]
Workers = Annotated[
    int | None,
    typer.Option(min=0, help="Decoding processes. Default: as needed.", rich_help_panel=_RUN),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Remove an earlier run's outputs from DIR first.",
        rich_help_panel=_OUTPUTS,
    ),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", help="Only say what was skipped, and the end.", rich_help_panel=_RUN
    ),
]
JsonProgress = Annotated[
    bool,
    typer.Option(
        "--json-progress",
        help="Progress as JSON lines on standard output.",
        rich_help_panel=_RUN,
    ),
]


@app.command(
    epilog="Exit code: 0 all explained, 1 some skipped (or outputs that --reproduce finds to "
    "differ), 2 stopped by an error, 130 by Ctrl-C, 143 by SIGTERM."
)
def explain(
    context: typer.Context,
    out: Out,
    paths: MaybePaths = None,
    reproduce: Annotated[
        Path | None,
        typer.Option(
            metavar="RESULTS",
            help="Explain once more what results.jsonl, or the folder around it, was made of, and "
            "compare all outputs bit by bit. PATHs and options are the record's.",
            show_default=False,
            rich_help_panel=_RUN,
        ),
    ] = None,
    model: Model = "demo",
    weights: Weights = None,
    method: Annotated[
        str, typer.Option(metavar="NAME", help="gradcampp, gradcam, layercam, ...")
    ] = "gradcampp",
    target_layer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="See gradcampp layers; repeat it for a map a layer. Default: before the pooling.",
        ),
    ] = None,
    fuse: Annotated[
        Literal["mean", "max"] | None,
        typer.Option(help="One map for all layers: the mean or the largest of theirs."),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            metavar="CLASS", help="predicted, label (the true class), or a class: index or name."
        ),
    ] = "predicted",
    top_k: Annotated[int, typer.Option(min=1, help="Explain the K most probable classes.")] = 1,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="N|HxW",
            help="Of overlays and maps. Default: the network's input.",
            rich_help_panel=_OUTPUTS,
        ),
    ] = None,
    recipe: RecipeName = "model",
    labels: Labels = None,
    class_names: ClassNames = None,
    overlays: Annotated[
        Literal["jpg", "png", "webp", "none"],
        typer.Option(help="Format of the overlays.", rich_help_panel=_OUTPUTS),
    ] = "jpg",
    image_weight: Annotated[
        float, typer.Option(min=0, help="Of the picture in overlays.", rich_help_panel=_OUTPUTS)
    ] = 0.5,
    heatmap_weight: Annotated[
        float, typer.Option(min=0, help="Of the colours in overlays.", rich_help_panel=_OUTPUTS)
    ] = 0.5,
    colormap: Annotated[
        str, typer.Option(help="turbo, jet, viridis, ...", rich_help_panel=_OUTPUTS)
    ] = "turbo",
    maps: Annotated[
        Literal["image", "feature", "none"],
        typer.Option(
            help="Raw maps as large as the overlays, or as the layer's.", rich_help_panel=_OUTPUTS
        ),
    ] = "image",
    maps_as: Annotated[
        list[MapFormat] | None,
        typer.Option(
            help="A file a map (npy, the default), or one data set, maps.parquet or maps.zarr. "
            "Repeat it for several.",
            show_default=False,
            rich_help_panel=_OUTPUTS,
        ),
    ] = None,
    maps_dtype: Annotated[
        Literal["float32", "float16"],
        typer.Option(help="Of raw maps.", rich_help_panel=_OUTPUTS),
    ] = "float32",
    table: Annotated[
        bool,
        typer.Option(
            "--table", help="Also results.parquet, from results.jsonl.", rich_help_panel=_OUTPUTS
        ),
    ] = False,
    report: Annotated[
        bool,
        typer.Option(
            "--report",
            help="A site to look through the results: DIR/report/index.html, without a server.",
            rich_help_panel=_OUTPUTS,
        ),
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    compile_: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile the network before and after the target layers (torch.compile).",
            rich_help_panel=_RUN,
        ),
    ] = False,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(
            help="ray: on all devices of this machine or of a cluster, by Ray Data; --workers are "
            "then all processes that decode.",
            rich_help_panel=_RUN,
        ),
    ] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Of a running cluster, or auto. Default: RAY_ADDRESS, or a new one, here.",
            show_default=False,
            rich_help_panel=_RUN,
        ),
    ] = None,
    batch_size: BatchSize = 32,
    workers: Workers = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    json_progress: JsonProgress = False,
) -> None:
    """Explain pictures: overlays, raw maps and results in DIR.

    They show what the network saw, the part that its preprocessing keeps;
    results.jsonl says where that is: view, in pixels of the picture.

    The same command again goes on where an earlier run was stopped.
    """
    with _told():
        import torch

        from gradcampp_ext import batch
        from gradcampp_ext.batch.memory import keep_freed_memory
        from gradcampp_ext.batch.pipeline import settings
        from gradcampp_ext.batch.provenance import environment
        from gradcampp_ext.batch.reproduce import Pictures, Watch

        keep_freed_memory()
        record = None if reproduce is None else _record(reproduce, out)
        asked = _asked(context, record)
        if not asked.paths:
            raise typer.BadParameter("name PATHs of pictures, or a record by --reproduce")
        loaded = _load(asked.model, asked.weights, asked.class_names, asked.recipe)
        source = _source(asked.paths, out, asked.labels, loaded)
        sinks: list[Sink] = []
        if asked.overlays != "none":
            look = asked.colormap, asked.image_weight, asked.heatmap_weight
            sinks.append(batch.Overlays(asked.overlays, *look))
        if asked.maps != "none":
            for form in dict.fromkeys(asked.maps_as or [MapFormat.NPY]):
                if form is MapFormat.NPY:
                    sinks.append(batch.Maps(asked.maps, asked.maps_dtype))
                else:
                    sinks.append(batch.MapSet(form.value, asked.maps, asked.maps_dtype))
        if asked.table:
            sinks.append(batch.ResultsTable())
        if asked.report:
            sinks += batch.report.sinks()
        progress: Progress = batch.JsonLines() if json_progress else batch.Lines(quiet=quiet)
        with _cluster(engine, ray_address) as cluster:
            options = batch.Options(
                method=asked.method,
                target_layer=asked.target_layer or None,
                fuse=asked.fuse,
                target=_target(asked.target, loaded),
                topk=asked.top_k,
                size=_size(asked.size),
                device=_device(asked.device, cluster),
                dtype=getattr(torch, asked.dtype),
                compile=asked.compile_,
                batch_size=asked.batch_size,
                workers=workers,
            )
            with _stop_on_signal(out) as (stop, signals):
                watch = threads = None
                if record is not None:
                    threads = int(record.environment["threads"])
                    record.check(settings(loaded, options, sinks))
                    here = environment(options.device, 1 if cluster else threads)
                    for doubt in record.doubts(here):
                        _say(f"bits may differ: {doubt}")
                    source = Pictures(source, record, options.batch_size)
                    progress = watch = Watch(progress, record, stop)
                asked.device = str(options.device)
                summary = batch.run(
                    source,
                    loaded,
                    out,
                    sinks,
                    options,
                    engine=cluster or partial(batch.Local, threads=threads),
                    command=_recorded(asked),
                    overwrite=overwrite,
                    progress=progress,
                    stop=stop,
                )
        if watch is not None:
            watch.check()
        if asked.report and not summary.interrupted:
            _say(f"look at {batch.report.build(out)}")
    if record is not None and not summary.interrupted:
        _compare(record, out)
    else:
        _end(summary, out, signals)


@app.command(
    epilog="Exit code: 0 all evaluated, 1 some skipped, 2 stopped by an error, 130 by Ctrl-C, 143 "
    "by SIGTERM."
)
def evaluate(
    paths: Paths,
    out: Out,
    model: Model = "demo",
    weights: Weights = None,
    methods: Annotated[
        str,
        typer.Option(
            metavar="A,B,...",
            help="Methods, perhaps with options (gradcampp:rectify=false), and the controls "
            "random and center, which know nothing.",
        ),
    ] = "gradcampp,gradcam,layercam",
    layers: Annotated[
        str | None,
        typer.Option(metavar="X,Y,...", help="See gradcampp layers. Default: before the pooling."),
    ] = None,
    target: Annotated[
        Literal["predicted", "label"],
        typer.Option(help="Which class is explained: the predicted or the true one."),
    ] = "predicted",
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="drop, coherency, insertion, deletion, road, localization, sensitivity, "
            "randomization; or all. Default: drop, which takes one forward pass a map, and "
            "localization if there are boxes.",
            show_default=False,
        ),
    ] = None,
    space: Annotated[
        Literal["input", "pixels"],
        typer.Option(
            help="What the map multiplies: the normalised input, which fades to the mean colour, "
            "or the pixels, which fade to black.",
            rich_help_panel=_METRICS,
        ),
    ] = "input",
    steps: Annotated[
        int, typer.Option(min=1, help="Of insertion and deletion.", rich_help_panel=_METRICS)
    ] = 32,
    insertion_from: Annotated[
        Literal["zero", "black", "mean", "blur"],
        typer.Option(
            help="Where insertion begins: the zero of the normalised input, black, the image's "
            "mean colour, or the image blurred.",
            rich_help_panel=_METRICS,
        ),
    ] = "blur",
    deletion_to: Annotated[
        Literal["zero", "black", "mean", "blur"],
        typer.Option(help="What deletion puts in place.", rich_help_panel=_METRICS),
    ] = "zero",
    road: Annotated[
        str,
        typer.Option(
            metavar="P,Q,...",
            help="Percentages of pixels that ROAD removes.",
            rich_help_panel=_METRICS,
        ),
    ] = "10,20,30,40,50,60,70,80,90",
    tolerance: Annotated[
        float,
        typer.Option(
            min=0,
            help="Of the pointing game, in pixels of the network's input.",
            rich_help_panel=_METRICS,
        ),
    ] = 15,
    samples: Annotated[
        int, typer.Option(min=1, help="Of noise, for sensitivity.", rich_help_panel=_METRICS)
    ] = 10,
    radius: Annotated[
        float,
        typer.Option(
            help="Of the noise, in units of the normalised input.", rich_help_panel=_METRICS
        ),
    ] = 0.02,
    stages: Annotated[
        int,
        typer.Option(
            min=1, help="In which randomization takes the weights.", rich_help_panel=_METRICS
        ),
    ] = 10,
    recipe: RecipeName = "model",
    labels: Labels = None,
    boxes: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="CSV or JSONL of objects, a row a box: path (relative to the file), left, top, "
            "right, bottom in pixels, and perhaps the class.",
            rich_help_panel=_PICTURES,
        ),
    ] = None,
    class_names: ClassNames = None,
    numbers_only: Annotated[
        bool,
        typer.Option(
            "--numbers-only",
            help="Neither plots nor the report with its pictures.",
            rich_help_panel=_OUTPUTS,
        ),
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    batch_size: BatchSize = 32,
    workers: Workers = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    json_progress: JsonProgress = False,
) -> None:
    """Evaluate methods and layers on pictures: do their maps show what the network goes by?

    Prints a table of means with 95 % intervals and of wins between every two methods;
    in DIR: evaluation.json, with all definitions, evaluation.csv, plots, results.jsonl with a line
    a map, and report/index.html, a site to look through pictures, maps and scores.

    The same command again goes on where an earlier run was stopped.
    """
    with _told():
        import torch

        from gradcampp_ext import batch, evaluation
        from gradcampp_ext.batch.memory import keep_freed_memory

        keep_freed_memory()
        loaded = _load(model, weights, class_names, recipe)
        source = _source(paths, out, labels, loaded)
        annotations = None
        if boxes is not None:
            annotations = evaluation.read_boxes(boxes, loaded.classes)
            if isinstance(source, batch.Files):
                _check_concerns(boxes, annotations, source)
        progress: Progress = (
            batch.JsonLines() if json_progress else batch.Lines(sys.stderr, quiet=quiet)
        )
        options = evaluation.Options(
            methods=_listed(methods),
            layers=_listed(layers or ""),
            target=target,
            metrics=_metrics(metrics, localized=annotations is not None),
            space=space,
            steps=steps,
            insertion_from=insertion_from,
            deletion_to=deletion_to,
            road_shares=_shares(road),
            tolerance=tolerance,
            samples=samples,
            radius=radius,
            stages=stages,
            device=_device(device),
            dtype=getattr(torch, dtype),
            batch_size=batch_size,
            workers=workers,
        )
        with _stop_on_signal(out) as (stop, signals):
            found = evaluation.run(
                source,
                loaded,
                out,
                options,
                annotations,
                pictures=not numbers_only,
                overwrite=overwrite,
                progress=progress,
                stop=stop,
            )
        if found.result is not None and not json_progress:
            evaluation.show(found.result)
        if found.report is not None:
            _say(f"look at {found.report}")
    _end(found.run, out, signals)


@app.command("report")
def write_report(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Outputs of explain --report or of evaluate, finished or not."
        ),
    ],
    title: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Default: model and method.")
    ] = None,
) -> None:
    """Write the report of the results in DIR, or write it again.

    explain --report and evaluate do so at their end; this shows what a run has so far, or one that
    was stopped. What evaluate has summed up stands in the summary.
    """
    with _told():
        from gradcampp_ext.batch.progress import printable
        from gradcampp_ext.evaluation import report

        print(printable(str(report.build(folder, title=title))))


@app.command()
def layers(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As explain --model takes it.")],
    weights: Weights = None,
) -> None:
    """List the layers of MODEL that have maps, from the first to the last.

    The shapes are those for one picture. The layer that explain takes by itself is marked.
    """
    with _told():
        import torch

        from gradcampp_ext import Explainer
        from gradcampp_ext.batch.engine import trying
        from gradcampp_ext.layers import candidates

        loaded = _load(model, weights, None)
        height, width = loaded.recipe.size
        picture = torch.zeros(1, 3, height, width)
        with trying(picture):
            found = candidates(loaded.model, picture)
            chosen = Explainer(loaded.model, loaded.target_layer)(picture).layer
    rows = [("", "layer", "type", "shape")]
    rows += [
        ("*" if one.name == chosen else "", one.name, one.type, " x ".join(map(str, one.shape)))
        for one in found
    ]
    _table(rows)


@app.command()
def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...",
            help=f"{', '.join(BENCHMARKS)}. Default: all.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Where the JSON files go.")
    ] = Path("out/bench"),
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="cuda: the op alone.")] = "cpu",
) -> None:
    """Measure this machine: the op, explanations and the pipeline beside the installed peers.

    Each benchmark writes one JSON file with machine, versions and commit. Close other programs.
    """
    with _told():
        from gradcampp_ext.bench import run

        for file in run(names or [], out, device):
            print(file)


@app.command()
def info() -> None:
    """Versions, the native libraries, the instruction set in use, and CUDA or why not."""
    with _told():
        from gradcampp_ext import _native

        status = _native.status()
    build = status.build
    compiled = f"CUDA {build.cuda} ({', '.join(build.cuda_architectures)})" if build.cuda else "no"
    rows = [
        ("gradcampp_ext", f"{status.version}, commit {status.commit or 'not known'}"),
        ("python", f"{platform.python_version()}, {platform.platform()}"),
        ("torch", f"{status.torch}, CUDA {status.torch_cuda or 'no'}"),
        *((name, _version(name)) for name in ("numpy", "pillow", *_OPTIONAL)),
        ("libraries", ", ".join(status.libraries)),
        ("built with", f"{build.compiler}, torch {build.torch}, CUDA: {compiled}"),
        ("instruction set", f"{status.cpu_capability} of {', '.join(status.cpu_capabilities)}"),
        ("CUDA", status.cuda_missing or _device_names()),
    ]
    _table(rows)


def _print_version(asked: bool) -> None:
    if asked:
        print("gradcampp_ext", _version("gradcampp_ext"))
        raise typer.Exit


@app.callback()
def _everywhere(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="The version alone.", callback=_print_version, is_eager=True
        ),
    ] = False,
    accelerate: Annotated[
        str | None,
        typer.Option(
            metavar="SCRIPT ARGUMENT...",
            help="Run a Python script written for pytorch-grad-cam or torchcam, as python SCRIPT "
            "ARGUMENT... would, with the classes of this package in their place. Comes first.",
            show_default=False,
        ),
    ] = None,
) -> None:
    if accelerate is not None:
        raise typer.BadParameter("--accelerate must come first, then the script and its arguments")


def main() -> None:
    """The console entry point."""
    option, _, script = "".join(sys.argv[1:2]).partition("=")
    words = [script, *sys.argv[2:]] if script else sys.argv[2:]
    if option == "--accelerate" and words:  # everything after it is the script's, options too
        from gradcampp_ext.accelerate import run

        run(words[0], words[1:])
    else:
        app()


_OPTIONAL = ("torchvision", "timm", "transformers", "safetensors", "scikit-image")


def _load(
    model: str, weights: str | None, class_names: Path | None, recipe: str = "model"
) -> LoadedModel:
    from gradcampp_ext import models
    from gradcampp_ext.imaging import ARTICLE, ARTICLE_FIT

    # A factory may lie here; nothing else is imported from a folder that may hold anything.
    if models.names_factory(model) and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    loaded = models.load(model, weights=weights)
    if class_names is not None:
        loaded = replace(loaded, classes=models.read_classes(class_names))
    if recipe != "model":
        loaded = replace(loaded, recipe=ARTICLE if recipe == "article" else ARTICLE_FIT)
    return loaded


def _source(paths: list[str], out: Path, labels: Path | None, loaded: LoadedModel) -> Source:
    from gradcampp_ext.batch import Files, SourceError, hub
    from gradcampp_ext.batch.items import length
    from gradcampp_ext.batch.sources import read_labels

    if any(path.startswith(hub.SCHEMES) and not os.path.exists(path) for path in paths):  # noqa: PTH110
        if len(paths) > 1 or labels is not None:
            raise SourceError("a Hugging Face data set stands alone, and has its own labels")
        return hub.load(paths[0], loaded.classes)
    true = None if labels is None else read_labels(labels)
    source = Files(
        paths,
        leave_out=out,
        labels=true,
        folder_label=loaded.classes.known if labels is None else None,
        classes=loaded.classes,
    )
    if length(source) == 0:
        raise SourceError(f"no pictures in {', '.join(paths)}")
    if labels is not None and true is not None:
        _check_concerns(labels, true, source)
    return source


def _check_concerns(file: Path, known: Container[str], source: Source) -> None:
    """A file of labels or boxes has to speak of the pictures."""
    from gradcampp_ext.batch import SourceError
    from gradcampp_ext.batch.sources import label_key

    if not any(label_key(item.path) in known for item in source):
        raise SourceError(
            f"{file} speaks of none of these pictures; its paths are relative to its own folder"
        )


def _target(target: str, loaded: LoadedModel) -> int | Literal["label"] | None:
    if target == "predicted":
        return None
    return "label" if target == "label" else loaded.classes.index(target)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _metrics(text: str | None, *, localized: bool) -> list[str]:
    from gradcampp_ext.evaluation import METRICS

    if text is None:
        return ["drop", "localization"] if localized else ["drop"]
    if text == "all":
        return [name for name in METRICS if localized or name != "localization"]
    return _listed(text)


def _shares(text: str) -> list[float]:
    try:
        return [float(part) / 100 for part in _listed(text)]
    except ValueError:
        raise typer.BadParameter(f"--road must be percentages, got {text!r}") from None


def _size(size: str | None) -> tuple[int, int] | None:
    if size is None:
        return None
    height, _, width = size.lower().partition("x")
    if not (height.isdecimal() and (width or height).isdecimal()):
        raise typer.BadParameter(f"--size must be N or HxW in pixels, got {size!r}")
    return int(height), int(width or height)


def _device(name: str, cluster: Cluster | None = None) -> torch.device:
    import torch

    from gradcampp_ext import _native

    if cluster is not None:  # its machines have other devices than this one
        return cluster.device if name == "auto" else torch.device(name)
    if name == "auto":
        return torch.device("cuda" if _native.status().cuda_missing is None else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"--device {name} cannot be used: {error}") from None
    missing = _native.status().cuda_missing
    if device.type == "cuda" and missing is not None:
        raise typer.BadParameter(f"--device {name} cannot be used: {missing}")
    return device


@contextlib.contextmanager
def _cluster(engine: str, address: str | None) -> Iterator[Cluster | None]:
    """None to run without one."""
    if engine == "local":
        if address is not None:
            raise typer.BadParameter("--ray-address needs --engine ray")
        yield None
        return
    from gradcampp_ext.batch.ray import Cluster

    # where Ray tells of workers that died, among other things
    with Cluster(address) as cluster, contextlib.redirect_stdout(sys.stderr):
        yield cluster


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Errors that tell the user what to do are printed without a traceback."""
    from gradcampp_ext.batch import DecodeError, EngineError, RecordError
    from gradcampp_ext.bench import BenchError
    from gradcampp_ext.capture import CaptureError

    expected = (
        *(ValueError, ImportError),
        *(CaptureError, EngineError, DecodeError, RecordError, BenchError),
    )
    try:
        yield
    except expected as error:
        _say(f"error: {error}")
        raise typer.Exit(UNUSABLE) from error
    except BrokenPipeError:  # the reader of standard output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(FAILED) from None


@contextlib.contextmanager
def _stop_on_signal(out: Path) -> Iterator[tuple[threading.Event, list[int]]]:
    """The first Ctrl-C or SIGTERM ends the run after the batch in flight, a second one at once."""
    stop, signals = threading.Event(), []

    def ask(number: int, _: object) -> None:
        signals.append(number)
        stop.set()
        for each, handler in previous.items():
            signal.signal(each, handler)
        _say(f"finishing the batch in flight; the same command goes on from there ({out})")

    wanted = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, ask) for number in wanted}
    try:
        yield stop, signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _end(summary: Summary, out: Path, signals: Sequence[int]) -> None:
    """The exit code of a run over pictures."""
    if summary.interrupted:
        raise typer.Exit(128 + signals[0])
    if summary.failed:
        _say(f"{summary.failed} skipped, the reasons are in {out / 'errors.jsonl'}")
        raise typer.Exit(FAILED)


def _record(named: Path, out: Path) -> Recorded:
    from gradcampp_ext.batch.reproduce import read

    record = read(named)
    if out.resolve() == record.folder.resolve():
        raise typer.BadParameter(f"--out must be another folder than the record's, {out}")
    return record


def _asked(context: typer.Context, record: Recorded | None) -> SimpleNamespace:
    """The options that decide the outputs, by name: as given, or those of a record."""
    given = {name: value for name, value in context.params.items() if name not in _UNRECORDED}
    if record is None:
        return SimpleNamespace(**given)
    if record.asked.keys() != given.keys():
        differ = ", ".join(sorted(record.asked.keys() ^ given.keys()))
        raise typer.BadParameter(
            f"{record.folder} was filled by a version of this program with other options: {differ}"
        )
    asked = {}
    for parameter in context.command.params:
        name = str(parameter.name)
        if name in given:
            asked[name] = parameter.process_value(context, record.asked[name])
            source = context.get_parameter_source(name)
            told = source is not None and source.name == "COMMANDLINE"
            if told and _plain(given[name]) != _plain(asked[name]):
                raise typer.BadParameter(
                    f"{parameter.opts[0]} {given[name]} contradicts the record, which has "
                    f"{record.asked[name]}; leave it out"
                )
    return SimpleNamespace(**asked)


def _recorded(asked: SimpleNamespace) -> dict[str, Any]:
    """For run.json, which has the size of the batches among the conditions of the run."""
    given = sorted(vars(asked).items())
    return {name: _plain(value) for name, value in given if name != "batch_size"}


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Path):
        return str(value)
    return value.value if isinstance(value, Enum) else value


def _compare(record: Recorded, out: Path) -> None:
    """Says whether the outputs are the record's, and exits with 1 if they are not."""
    from gradcampp_ext.batch.reproduce import compare

    found = compare(record, out)
    for text in found.differ:
        _say(f"differs: {text}")
    if found.different:
        count = found.same + found.different
        _say(f"not reproduced: {found.different} of {count} rows and files of {record.folder}")
        raise typer.Exit(FAILED)
    absent = f"; {found.absent} of its files are not there any more" if found.absent else ""
    _say(f"reproduced: {found.same} rows and files of {record.folder}, bit by bit{absent}")


def _table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def _say(text: str) -> None:
    from gradcampp_ext.batch.progress import printable

    lines = map(printable, text.split("\n"))
    print("gradcampp:", "\n".join(lines), file=sys.stderr)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _device_names() -> str:
    import torch

    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
