"""Loading the native libraries, and what is said when that fails."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from gradcampp_ext import _native

PACKAGE = Path(_native.__file__).parent


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An installation that has its build information, but no library."""
    shutil.copy(PACKAGE / "_build_info.json", tmp_path)
    monkeypatch.setattr(_native, "_FOLDER", tmp_path)
    monkeypatch.setattr(_native, "_libraries", None)
    return tmp_path


def built(**facts):
    return dataclasses.replace(_native.build_info(), **facts)


def test_threads_load_once():
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: _native.load(), range(64)))
    assert all(result is results[0] for result in results)
    assert results[0].loaded[0] == "_cpu"


def test_status_names_what_is_in_use():
    status = _native.status()
    assert status.torch == torch.__version__
    assert status.cpu_capability in status.cpu_capabilities
    assert set(status.cpu_capabilities) <= set(status.build.cpu_targets)
    assert ("_cuda" in status.libraries) or status.cuda_missing


def test_missing_library_is_explained(folder):
    with pytest.raises(ImportError, match="the installation is incomplete") as error:
        _native.load()
    text = str(error.value)
    assert f"tried: {folder / '_cpu.so'}" in text
    assert f"built with: torch {_native.build_info().torch}" in text
    assert f"found: torch {torch.__version__}" in text


def test_foreign_library_is_explained(folder):
    (folder / "_cpu.so").write_bytes(b"\x7fELF of another machine")
    with pytest.raises(ImportError, match="built for another platform"):
        _native.load()


def test_old_torch_is_explained(folder, monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.1"))
    with pytest.raises(ImportError, match=r"found: torch 2\.9\.1;.*\n.*torch is older than 2\.10"):
        _native.load()


def test_package_without_build_is_explained(folder):
    (folder / "_build_info.json").unlink()
    with pytest.raises(ImportError, match="native libraries of gradcampp_ext are not built"):
        _native.load()


@pytest.mark.parametrize(
    ("built_for", "found", "reason"),
    [
        (None, "13.0", "built without CUDA: no nvcc was found"),
        ("13.0", None, "has no CUDA"),
        ("13.0", "12.8", "built for CUDA 13.0, but torch .* has 12.8"),
    ],
)
def test_cuda_library_of_another_kind_is_not_loaded(folder, monkeypatch, built_for, found, reason):
    info = built(cuda=built_for, cuda_omitted=None if built_for else "no nvcc was found")
    shutil.copy(PACKAGE / "_cpu.so", folder)
    monkeypatch.setattr(_native, "build_info", lambda: info)
    monkeypatch.setattr(torch.version, "cuda", found)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    libraries = _native.load()
    assert libraries.loaded == ("_cpu",)
    assert re.search(reason, libraries.cuda_missing)


def test_broken_cuda_library_is_recorded(folder, monkeypatch):
    def load_library(path):
        if path.name == "_cuda.so":
            raise OSError("libtorch_cuda.so: cannot open shared object file")

    info = built(cuda="13.0")
    monkeypatch.setattr(_native, "build_info", lambda: info)
    monkeypatch.setattr(torch.version, "cuda", "13.1")
    monkeypatch.setattr(torch.ops, "load_library", load_library)
    assert _native.load() == _native.Libraries(
        ("_cpu",), "_cuda.so did not load: libtorch_cuda.so: cannot open shared object file"
    )


@pytest.mark.parametrize(
    ("expression", "printed"),
    [
        ("gx.targets.Contrast(3, 5), gx.reference.cam", "Contrast(index=3, others=5"),
        ("gx.metrics.confidence.masked", "<function masked"),
        ("'road' in dir(gx.metrics)", "True"),
        ("gx.batch.lightning.LogOverlays", "<class 'gradcampp_ext.batch.lightning.LogOverlays'>"),
    ],
)
def test_modules_are_attributes_of_the_package(expression: str, printed: str) -> None:
    if "lightning" in expression:
        pytest.importorskip("lightning")
    program = f"import gradcampp_ext as gx; print({expression})"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.startswith(printed), run.stderr
