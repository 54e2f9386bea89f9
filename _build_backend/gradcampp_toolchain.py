"""What the native libraries are built with: torch, the C++ compiler, ninja, CUDA."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

TORCH_MINIMUM = (2, 10)
TORCH_REQUIREMENT = "torch>=2.10"
CUDA_ARCHITECTURES = ("7.5", "8.0", "9.0", "10.0", "12.0")


@dataclass(frozen=True)
class Torch:
    root: Path
    version: str
    cuda: str | None


@dataclass(frozen=True)
class Cuda:
    nvcc: str
    version: str
    architectures: tuple[str, ...]  # as in TORCH_CUDA_ARCH_LIST


def find_torch() -> Torch | None:
    """The importable torch, else the one of the environment around an isolated build.

    torch itself is not imported: its headers, its libraries and version.py are enough.
    """
    for root in filter(None, (_importable_torch(), _outer_torch())):
        facts = runpy.run_path(str(root / "version.py"))
        version = facts["__version__"]
        if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) >= TORCH_MINIMUM:
            return Torch(root, version, facts["cuda"])
    return None


def _importable_torch() -> Path | None:
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def _outer_torch() -> Path | None:
    # pip hides the outer site-packages through PYTHONPATH, which -E ignores.
    question = "import importlib.util as u; s = u.find_spec('torch'); print(s and s.origin or '')"
    answer = subprocess.run(
        [sys.executable, "-E", "-c", question],
        cwd=tempfile.gettempdir(),
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    return Path(answer).parent if answer else None


def find_compiler() -> list[str]:
    """The C++ compiler's command: $CXX, or the first of c++, g++ and clang++."""
    if "CXX" in os.environ:
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    sys.exit("gradcampp_ext: no C++ compiler found; install g++ or clang++, or set CXX")


def find_ninja() -> str:
    """The ninja of the Python package, which need not be on PATH, else the one on PATH."""
    if importlib.util.find_spec("ninja"):
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    return shutil.which("ninja") or sys.exit("gradcampp_ext: no ninja; pip install ninja")


def find_cuda(torch: Torch) -> Cuda | str:
    """The CUDA compiler to use, or the reason to build without CUDA.

    GRADCAMPP_EXT_CUDA decides: 0 leaves CUDA out, auto (the default) takes it where it can be
    built, 1 makes the reason against it fatal.
    """
    switch = os.environ.get("GRADCAMPP_EXT_CUDA", "auto")
    if switch not in ("0", "auto", "1"):
        sys.exit(f"gradcampp_ext: GRADCAMPP_EXT_CUDA must be 0, auto or 1, got {switch!r}")
    if switch == "0":
        return "GRADCAMPP_EXT_CUDA=0 was set for the build"
    cuda = _cuda_or_reason(torch)
    if isinstance(cuda, str) and switch == "1":
        sys.exit(f"gradcampp_ext: GRADCAMPP_EXT_CUDA=1, but {cuda}")
    return cuda


def _cuda_or_reason(torch: Torch) -> Cuda | str:
    if torch.cuda is None:
        return f"torch {torch.version} was built without CUDA"
    nvcc = _find_nvcc()
    if nvcc is None:
        return "no nvcc was found (looked at CUDACXX, CUDA_HOME, PATH and /usr/local/cuda)"
    banner = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    version = re.search(r"release (\d+\.\d+)", banner)
    if version is None:
        return f"{nvcc} --version names no release"
    if version[1].split(".")[0] != torch.cuda.split(".")[0]:
        return f"nvcc is of CUDA {version[1]}, torch {torch.version} of CUDA {torch.cuda}"
    return Cuda(nvcc, version[1], _architectures(nvcc))


def _find_nvcc() -> str | None:
    candidates = [os.environ.get("CUDACXX"), "nvcc", "/usr/local/cuda/bin/nvcc"]
    if "CUDA_HOME" in os.environ:
        candidates.insert(1, str(Path(os.environ["CUDA_HOME"], "bin", "nvcc")))
    return next(filter(None, (shutil.which(name) for name in candidates if name)), None)


def _architectures(nvcc: str) -> tuple[str, ...]:
    """TORCH_CUDA_ARCH_LIST, or all of the default list that this nvcc knows, the last with PTX."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return tuple(re.split(r"[;,\s]+", os.environ["TORCH_CUDA_ARCH_LIST"].strip()))
    known = subprocess.run(
        [nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True
    ).stdout.split()
    usable = [a for a in CUDA_ARCHITECTURES if f"compute_{a.replace('.', '')}" in known]
    return (*usable[:-1], f"{usable[-1]}+PTX")


def version_line(command: list[str]) -> str:
    return subprocess.run(
        [*command, "--version"], check=True, capture_output=True, text=True
    ).stdout.splitlines()[0]
