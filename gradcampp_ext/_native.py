"""Loads the native operator libraries; says what is loaded and why something is not.

`_cpu` holds the operators for CPU tensors and must load. `_cuda` needs the libraries of a
CUDA build of torch, so it is loaded only beside one of the CUDA major version it was built for.
"""

from __future__ import annotations

import functools
import json
import threading
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradcampp_ext._environment import of_checkout

if TYPE_CHECKING:
    from types import ModuleType

_FOLDER = Path(__file__).parent
_TORCH_MINIMUM = (2, 10)  # the stable ABI that the libraries are compiled for


@dataclass(frozen=True)
class BuildInfo:
    """What the libraries were built with, as the build wrote it down."""

    torch: str
    torch_cuda: str | None
    compiler: str
    cpu_targets: tuple[str, ...]  # instruction sets compiled
    cuda: str | None  # CUDA toolkit's version; None if CUDA was left out
    cuda_architectures: tuple[str, ...]
    cuda_omitted: str | None  # why CUDA was left out
    commit: str | None = None  # of the sources; a + where they differ from it; None if not known


@dataclass(frozen=True)
class Libraries:
    """The libraries in this process."""

    loaded: tuple[str, ...]
    cuda_missing: str | None  # why _cuda is not loaded; None if it is


@dataclass(frozen=True)
class Status:
    """The state of the native part in this process, for `gradcampp info`."""

    version: str
    commit: str | None  # as of `commit`
    torch: str
    torch_cuda: str | None
    build: BuildInfo
    libraries: tuple[str, ...]
    cpu_capability: str  # instruction set in use
    cpu_capabilities: tuple[str, ...]  # instruction sets that this machine can use, best first
    cuda_missing: str | None  # why CUDA tensors cannot be used; None if they can


_lock = threading.Lock()
_libraries: Libraries | None = None


def load() -> Libraries:
    """Load the operator libraries once; later calls return the first result.

    Raises:
        ImportError: `_cpu` cannot be loaded. A `_cuda` that cannot be loaded is only recorded.
    """
    global _libraries
    with _lock:
        if _libraries is None:
            _libraries = _load()
        return _libraries


def build_info() -> BuildInfo:
    """What the libraries were built with.

    Raises:
        ImportError: the package was not built.
    """
    file = _FOLDER / "_build_info.json"
    try:
        facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ImportError(
            f"the native libraries of gradcampp_ext are not built: there is no {file}; "
            "if this is a source folder, run `pip install -e .` in it or import from elsewhere"
        ) from None
    for name in ("cpu_targets", "cuda_architectures"):
        facts[name] = tuple(facts[name])
    return BuildInfo(**facts)


@functools.cache
def commit() -> str | None:
    """The commit that this package is of, with a + where its files differ; None if not known.

    A checkout is asked itself, since its Python files may be newer than what was built in it; an
    installed package says what it was built from.
    """
    ours = "gradcampp_ext", "csrc", "setup.py"
    return of_checkout(_FOLDER.parent, *ours) or build_info().commit


def status() -> Status:
    """The state of the native part, after loading it.

    Raises:
        ImportError: the libraries cannot be loaded.
    """
    import torch

    from gradcampp_ext import ops as ops  # defines the operators that are asked below

    libraries = load()
    native = torch.ops.gradcampp_ext
    cuda_missing = libraries.cuda_missing
    if cuda_missing is None and not torch.cuda.is_available():
        cuda_missing = "torch finds no usable GPU (torch.cuda.is_available() is False)"
    return Status(
        version=metadata.version("gradcampp_ext"),
        commit=commit(),
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        build=build_info(),
        libraries=libraries.loaded,
        cpu_capability=native.cpu_capability(),
        cpu_capabilities=tuple(native.cpu_capabilities().split(", ")),
        cuda_missing=cuda_missing,
    )


def _load() -> Libraries:
    import torch

    build = build_info()
    cpu = _FOLDER / "_cpu.so"
    try:
        torch.ops.load_library(cpu)
    except OSError as error:
        raise ImportError(_cpu_failure(cpu, error, build, torch)) from error
    cuda_missing = _cuda_mismatch(build, torch)
    if cuda_missing is None:
        try:
            torch.ops.load_library(_FOLDER / "_cuda.so")
        except OSError as error:
            cuda_missing = f"_cuda.so did not load: {error.__cause__ or error}"
    loaded = ("_cpu",) if cuda_missing else ("_cpu", "_cuda")
    return Libraries(loaded, cuda_missing)


def _cuda_mismatch(build: BuildInfo, torch: ModuleType) -> str | None:
    if build.cuda is None:
        return f"gradcampp_ext was built without CUDA: {build.cuda_omitted}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if torch.version.cuda.split(".")[0] != build.cuda.split(".")[0]:
        return (
            f"built for CUDA {build.cuda}, but torch {torch.__version__} has {torch.version.cuda}"
        )
    return None


def _cpu_failure(file: Path, error: OSError, build: BuildInfo, torch: ModuleType) -> str:
    minimum = ".".join(map(str, _TORCH_MINIMUM))
    if torch.__version__ < _TORCH_MINIMUM:
        cause = f"torch is older than {minimum}"
    elif not file.exists():
        cause = "the file is missing, the installation is incomplete; install gradcampp_ext again"
    else:
        cause = (
            "it was built for another platform or C++ library; install gradcampp_ext from source"
        )
    return (
        "gradcampp_ext's native operators cannot be loaded\n"
        f"  tried: {file}\n"
        f"  error: {error.__cause__ or error}\n"
        f"  built with: torch {build.torch}, {build.compiler}\n"
        f"  found: torch {torch.__version__}; torch {minimum} or newer is needed\n"
        f"  likely cause: {cause}"
    )
