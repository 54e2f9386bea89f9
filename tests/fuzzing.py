"""From inputs that nobody would think of to calls of the package, for hypothesis and atheris alike.

A subject returns how the call ended: "ok", or the message of one of the package's own errors. An
error that a library raised, which reached the caller though it was not made for users, is a find,
as are crashes, and files, processes and imports that nobody asked for.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import gradcampp_ext as gx
from gradcampp_ext import arrays, batch, models, reference
from gradcampp_ext.batch import reproduce
from gradcampp_ext.batch.record import Record, RecordError
from gradcampp_ext.batch.sources import read_labels
from gradcampp_ext.evaluation import report as evaluation_report
from gradcampp_ext.evaluation.boxes import read_boxes
from gradcampp_ext.imaging import ImageError
from gradcampp_ext.models import Classes, ModelError

PACKAGE = str(Path(gx.__file__).parent)
CLASSES = Classes(("cat", "dog", "kite"), ("n1", "n2", "n3"))
CASES = int(os.environ.get("FUZZ_CASES", "0"))  # 0: a few, always the same, for every test run


class Tally:
    """How the cases of one subject ended, for the figures that are printed."""

    def __init__(self, name: str) -> None:
        self.name, self.ends = name, Counter[str]()
        self._start, self.seconds = time.perf_counter(), 0.0

    def add(self, end: str) -> None:
        self.ends[_kind(end)] += 1
        self.seconds = time.perf_counter() - self._start

    def __str__(self) -> str:
        """With the distinct errors, for a look at whether each is clear."""
        errors = len(self.ends) - ("ok" in self.ends)
        return "\n".join(
            [
                f"{self.name}: {self.ends.total()} cases in {self.seconds:.0f} s, "
                f"{self.ends['ok']} without an error, {errors} distinct errors",
                *(f"  {count:6} {end}" for end, count in self.ends.most_common()),
            ]
        )


def _kind(message: str) -> str:
    """A message without its values."""
    message = re.sub(r"'[^']*'|\"[^\"]*\"|\[[^]]*\]|\([^)]*\)|\S*/\S*", "…", message)
    return " ".join(re.sub(r"\d+(\.\d+)?", "…", message).split())[:110]


def own(error: BaseException, *kinds: type[BaseException]) -> str:
    """The message of an error that the package made; any other one is raised again."""
    made_in = traceback.extract_tb(error.__traceback__)[-1].filename
    if type(error) not in kinds or not made_in.startswith(PACKAGE) or len(str(error)) < 10:
        raise error
    return str(error)


# The op


def cam(activations: Any, gradients: Any, benign: bool, options: dict[str, Any]) -> str:
    """`gx.cam`, compared with the oracle where the values are benign."""
    try:
        maps = gx.cam(activations, gradients, **options)
    except (TypeError, ValueError) as error:
        return own(error, TypeError, ValueError)
    except RuntimeError as error:
        return out_of_memory(error)
    if maps.is_meta:
        return "ok"
    a, g = activations.detach(), gradients.detach()
    if benign and usual(options):
        compare(maps, a, g, options)
    else:
        check_damage(maps, a, g, options)
    return "ok"


def usual(options: dict[str, Any]) -> bool:
    """Whether float32 can follow: an eps of 1e28 makes weights that are smaller than it has."""
    return (options.get("eps") or 0) <= 1 and 0.01 <= options.get("temperature", 1) <= 100


def out_of_memory(error: Exception) -> str:
    if "allocate" not in str(error):
        raise error
    return "cannot allocate memory"


def compare(maps: torch.Tensor, a: torch.Tensor, g: torch.Tensor, options: dict[str, Any]) -> None:
    """With the oracle, relative to the sum of the absolute terms; a and g have usual values."""
    if 0 in g.shape:  # which the oracle's interpolation does not take
        size = options.get("size") or a.shape[2:]
        assert maps.shape == (*g.shape[: g.dim() - a.dim() + 1], *size)
        return
    raw = options | {"normalize": None, "relu": options.get("relu", True)}
    expected = reference.cam(a.double(), g.double(), **raw)
    scale = reference.cam(a.double().abs(), g.double().abs(), **raw | {"relu": False})
    bound = scale.abs().amax() if scale.numel() else torch.tensor(0.0)
    tolerance = 1e-10 if maps.dtype == torch.float64 else 1e-4
    if options.get("normalize", "minmax") is None:
        assert maps.shape == expected.shape
        assert ((maps.double() - expected).abs() <= tolerance * bound).all(), (a, g, options)
        return
    flat = dict(raw, size=None)  # what is divided by, at the layer's own size
    small = reference.cam(a.double(), g.double(), **flat).flatten(g.dim() - a.dim() + 1)
    normalized = reference.cam(a.double(), g.double(), **options)
    assert maps.shape == normalized.shape
    spread = small.amax(-1) - (small.amin(-1) if options.get("normalize") == "minmax" else 0)
    clear = (spread > 1e-2 * bound) | (small.amax(-1) == small.amin(-1))
    difference = (maps.double() - normalized).abs().flatten(clear.dim())
    if difference.numel():
        assert (difference.amax(-1)[clear] <= 1e3 * tolerance).all(), (a, g, options)


def check_damage(maps: torch.Tensor, a: torch.Tensor, g: torch.Tensor, options: Any) -> None:
    """A sample and target with a value that is not finite gives NaN, all of it."""
    single = g.dim() == a.dim()
    bad_a = ~a.isfinite().flatten(1).all(1)
    if single:
        bad = bad_a | ~g.isfinite().flatten(1).all(1)
    else:
        bad = bad_a[:, None] | ~g.isfinite().flatten(2).all(2)
    assert maps[bad].isnan().all(), (a, g, options)


def cam_of_arrays(activations: Any, gradients: Any, benign: bool, options: dict[str, Any]) -> str:
    """The same by the door for NumPy."""
    try:
        maps = arrays.cam(activations, gradients, **options)
    except (TypeError, ValueError) as error:
        return own(error, TypeError, ValueError)
    except MemoryError as error:
        return out_of_memory(error) if str(error) else "cannot allocate memory"
    options = {name: value for name, value in options.items() if name != "threads"}
    tensors = [torch.from_numpy(np.array(x, x.dtype.newbyteorder("="))) for x in
               (activations, gradients)]  # fmt: skip
    check = compare if benign and usual(options) else check_damage
    check(torch.from_numpy(maps), *tensors, options)
    return "ok"


def overlay(images: Any, maps: Any, options: dict[str, Any]) -> str:
    """`gx.overlay`: pixels of the maps' shape."""
    try:
        drawn = gx.overlay(images, maps, **options)
    except (TypeError, ValueError) as error:
        return own(error, TypeError, ValueError)
    assert drawn.dtype == torch.uint8
    assert drawn.shape == (*maps.shape, 3)
    return "ok"


NATIVE = torch.ops.gradcampp_ext


def native(name: str, arguments: list[Any]) -> str:
    """An operator without the checks in Python before it; its own are the backstop."""
    try:
        getattr(NATIVE, name)(*arguments)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return "ok"


# Files


def read_source(folder: Path, name: str, content: bytes) -> str:
    """A list of pictures, a Parquet file or a shard; the first pictures are read too."""
    file = folder / name
    file.write_bytes(content)
    try:
        items = list(batch.Files([file], classes=CLASSES))
    except ValueError as error:
        return own(error, batch.SourceError)
    for item in items[:3]:
        with contextlib.suppress(ImageError):
            batch.Files.read(item)
        with Record(folder / "out", {}) as record:
            record.name(item.path, item.name)
    return "ok"


def read_annotations(folder: Path, name: str, content: bytes) -> str:
    """The same as a list of classes, and as a list of boxes."""
    file = folder / name
    file.write_bytes(content)
    ends: list[str] = []
    try:
        read_labels(file)
    except ValueError as error:
        ends.append(own(error, batch.SourceError))
    try:
        read_boxes(file, CLASSES)
    except ValueError as error:
        ends.append(own(error, batch.SourceError))
    return ends[-1] if len(ends) == 2 else "ok"


def read_model_file(folder: Path, name: str, content: bytes) -> str:
    """Class names, .txt and .json, or weights, .pth and .safetensors."""
    file = folder / name
    file.write_bytes(content)
    read: Callable[[Path], Any] = models.read_weights
    if file.suffix in (".txt", ".json"):
        read = models.read_classes
    try:
        read(file)
    except ValueError as error:
        return own(error, ModelError)
    return "ok"


def read_results(folder: Path, name: str, content: bytes) -> str:
    """A folder of results, or what looks like one: report, reproduction, a run that goes on in it.

    Its settings are {"a": 1}.
    """
    (folder / name).write_bytes(content)
    ends = []
    run = {"environment": {"gradcampp_ext": "0.1"}}
    try:
        evaluation_report.build(folder)
    except (ValueError, RecordError) as error:
        ends.append(own(error, ValueError, RecordError))
    try:
        record = reproduce.read(folder)
        list(record.pictures()), record.failures()
    except ValueError as error:
        ends.append(own(error, ValueError, reproduce.ReproduceError))
    try:
        with Record(folder, {"a": 1}, run):
            pass
        with Record(folder, {"a": 1}, run, overwrite=True):
            pass
    except RecordError as error:
        ends.append(own(error, RecordError))
    return ends[0] if ends else "ok"


# Models


LIBRARIES = ("efficientnet_lite_pytorch", "safetensors", "timm", "torchvision", "transformers")


def load(spec: str, weights: str | None) -> str:
    """`models.load`, in which only the spec's own module may be asked for."""
    asked = []
    real = importlib.import_module

    def import_module(name: str, package: str | None = None) -> Any:
        by_package = sys._getframe(1).f_globals["__name__"] == models.__name__
        if not by_package or name.split(".")[0] in (*LIBRARIES, "gradcampp_ext"):
            return real(name, package)
        asked.append(name)
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    models.importlib.import_module = import_module  # type: ignore[attr-defined]
    try:
        models.load(spec, weights=weights)
    except ValueError as error:
        message = own(error, ModelError)
    else:
        message = "ok"
    finally:
        models.importlib.import_module = real  # type: ignore[attr-defined]
    assert asked in ([], [spec.partition(":")[0]]), (spec, asked)
    return message


# The command line, and what a process does to its surroundings


WRITES = {
    "os.mkdir": 0, "os.remove": 0, "os.rmdir": 0, "os.rename": 1, "os.link": 1, "os.symlink": 1,
    "os.truncate": 0, "os.chmod": 0, "os.utime": 0,
}  # fmt: skip
OTHERS = frozenset({
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect",
    "socket.getaddrinfo", "webbrowser.open",
})  # fmt: skip


class Watch:
    """Files written, processes started and connections made by this process while it is on.

    Python tells of them itself (PEP 578), whoever asks for them; what compiled libraries write is
    found by comparing folders.
    """

    def __init__(self) -> None:
        self._on = False
        self.seen: list[tuple[str, str]] = []
        sys.addaudithook(self._hook)

    @contextlib.contextmanager
    def on(self) -> Iterator[list[tuple[str, str]]]:
        self._on, self.seen = True, []
        try:
            yield self.seen
        finally:
            self._on = False

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._on:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = isinstance(mode, str) and set(mode) & set("wax+")
            writes = writes or (mode is None and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if writes and not isinstance(path, int):
                self.seen.append(("write", os.path.abspath(os.fsdecode(path))))  # noqa: PTH100
        elif event in WRITES:
            path = arguments[WRITES[event]]
            if not isinstance(path, int):
                self.seen.append((event, os.path.abspath(os.fsdecode(path))))  # noqa: PTH100
        elif event in OTHERS:
            self.seen.append((event, repr(arguments)[:200]))


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, with contents; links are not followed."""
    found: dict[str, bytes | None] = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            plain = path.is_file() and not path.is_symlink()
            found[str(path)] = path.read_bytes() if plain else None
    return found


def png(size: int = 12) -> bytes:
    file = io.BytesIO()
    Image.radial_gradient("L").resize((size, size)).convert("RGB").save(file, "PNG")
    return file.getvalue()
