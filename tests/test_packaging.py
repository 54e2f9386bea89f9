"""The distributions: complete, free of this machine's paths, and working outside the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

CHECKOUT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow

# Two cells, gradients 1: S = 1 + 3, so w = 2 * 1 / (2 + 4) = 1/3 and the map is A / 3.
ONE_OP = """
import sys
{prepare}
import numpy as np
A = np.array([[[[1.0, 3.0]]]], dtype=np.float32)
G = np.ones_like(A)
{call}
assert abs(maps[0, 0, 0] - 1 / 3) < 1e-6 and abs(maps[0, 0, 1] - 1) < 1e-6, maps
import gradcampp_ext
assert gradcampp_ext.__file__.startswith(sys.prefix), gradcampp_ext.__file__
"""
TORCH_DOOR = ONE_OP.format(
    prepare="import torch",
    call="""
import gradcampp_ext as gx
maps = gx.cam(torch.from_numpy(A), torch.from_numpy(G), normalize=None).numpy()
""",
)
NUMPY_DOOR = ONE_OP.format(
    prepare="sys.modules['torch'] = None",
    call="""
from gradcampp_ext import arrays
maps = arrays.cam(A, G, normalize=None)
""",
)


def run(command: list[str], cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}"
    return result.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    code = f"import gradcampp_backend as b; print(b.build_sdist({str(folder)!r}))"
    run([sys.executable, "-c", code], CHECKOUT, PYTHONPATH=str(CHECKOUT / "_build_backend"))
    (file,) = folder.iterdir()
    return file


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the unpacked source distribution, so that what is missing in it shows."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, **({"filter": "data"} if sys.version_info >= (3, 12) else {}))
    (source,) = folder.iterdir()
    code = f"import gradcampp_backend as b; b.build_wheel({str(folder)!r})"
    environment = {
        "PYTHONPATH": str(source / "_build_backend"),
        "GRADCAMPP_EXT_CUDA": "0",
        "GRADCAMPP_EXT_LABEL": "+cpu",
    }
    output = run([sys.executable, "-c", code], source, **environment)
    assert "CUDA is left out: GRADCAMPP_EXT_CUDA=0 was set for the build" in output
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel, which sees the packages of this one; its Python."""
    folder = tmp_path_factory.mktemp("venv")
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)], folder)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    outer = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "outer.pth").write_text("\n".join(sorted(outer)))
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    # This environment's own gradcampp_ext is visible too; pip shall neither keep nor remove it.
    run([*pip, "install", "--no-deps", "--ignore-installed", str(wheel)], folder)
    return python


def test_sdist_holds_every_tracked_file(sdist: Path) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "csrc", "gradcampp_ext", "tests", "benchmarks", "_build_backend"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
    )
    if tracked.returncode != 0:
        pytest.skip("the tests do not run in a git checkout")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert set(tracked.stdout.split()) - packed == set()
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "COMMIT"} <= packed


def test_label_stands_behind_the_version(sdist: Path, wheel: Path) -> None:
    name = sdist.name.removesuffix(".tar.gz")
    assert wheel.name.startswith(f"{name}+cpu-cp"), (sdist.name, wheel.name)


def test_wheel_holds_the_package_alone(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    numpy_library = f"gradcampp_ext/_numpy{sysconfig.get_config_var('EXT_SUFFIX')}"
    modules = {
        str(file.relative_to(CHECKOUT))
        for file in (CHECKOUT / "gradcampp_ext").rglob("*")
        if file.suffix in (".py", ".json", ".csv", ".typed", ".j2", ".css", ".js")
    }
    assert modules | {"gradcampp_ext/_cpu.so", numpy_library} <= names
    assert "gradcampp_ext/_cuda.so" not in names
    top = {name.split("/")[0] for name in names}
    assert all(name.startswith("gradcampp_ext") for name in top), top


def test_wheel_knows_the_commit_that_it_was_built_from(wheel: Path) -> None:
    command = ["git", "rev-parse", "HEAD"]
    head = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    if head.returncode != 0:
        pytest.skip("the tests do not run in a git checkout")
    info = json.loads(zipfile.ZipFile(wheel).read("gradcampp_ext/_build_info.json"))
    assert info["commit"].removesuffix("+") == head.stdout.strip()


def test_wheel_names_no_folder_of_this_machine(wheel: Path) -> None:
    folders = {CHECKOUT, wheel.parent, sys.prefix, sys.base_prefix, Path(torch.__file__).parent}
    archive = zipfile.ZipFile(wheel)
    found = [
        (name, str(folder))
        for name in archive.namelist()
        for folder in folders
        if f"{folder}/".encode() in archive.read(name)
    ]
    assert found == []


@pytest.mark.parametrize("code", [TORCH_DOOR, NUMPY_DOOR], ids=["torch", "numpy_without_torch"])
def test_installed_wheel_computes(installed: Path, code: str) -> None:
    run([str(installed), "-c", code], installed.parent)


def test_installed_command_line_starts(installed: Path) -> None:
    output = run([str(installed.parent / "gradcampp"), "info"], installed.parent)
    assert metadata.version("gradcampp_ext") in output


def test_torch_is_found_around_an_isolated_build() -> None:
    # -S leaves the site-packages out of the path, as pip's isolation does.
    code = "import gradcampp_toolchain as t; print(t.find_torch().root)"
    environment = {"PYTHONPATH": str(CHECKOUT / "_build_backend")}
    root = run([sys.executable, "-S", "-c", code], CHECKOUT, **environment).strip()
    assert Path(root) == Path(torch.__file__).parent


def test_torch_below_the_stable_abi_is_passed_over(toolchain, tmp_path, monkeypatch):
    (tmp_path / "version.py").write_text("__version__ = '2.9.1+cpu'\ncuda = None\n")
    monkeypatch.setattr(toolchain, "_importable_torch", lambda: tmp_path)
    monkeypatch.setattr(toolchain, "_outer_torch", lambda: None)
    assert toolchain.find_torch() is None


@pytest.mark.parametrize(
    ("switch", "cuda", "message"),
    [
        ("auto", None, "torch 2.14.1 was built without CUDA"),
        ("0", "13.0", "GRADCAMPP_EXT_CUDA=0 was set for the build"),
        ("auto", "12.8", "nvcc is of CUDA 13.0, torch 2.14.1 of CUDA 12.8"),
    ],
)
def test_cuda_is_left_out_with_a_reason(toolchain, nvcc, monkeypatch, switch, cuda, message):
    monkeypatch.setenv("GRADCAMPP_EXT_CUDA", switch)
    assert toolchain.find_cuda(toolchain.Torch(Path("torch"), "2.14.1", cuda)) == message


def test_required_cuda_makes_the_reason_fatal(toolchain, nvcc, monkeypatch):
    monkeypatch.setenv("GRADCAMPP_EXT_CUDA", "1")
    with pytest.raises(SystemExit, match=r"GRADCAMPP_EXT_CUDA=1, but nvcc is of CUDA 13\.0"):
        toolchain.find_cuda(toolchain.Torch(Path("torch"), "2.14.1", "12.8"))


def test_unknown_cuda_switch_is_refused(toolchain, monkeypatch):
    monkeypatch.setenv("GRADCAMPP_EXT_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be 0, auto or 1, got 'yes'"):
        toolchain.find_cuda(toolchain.Torch(Path("torch"), "2.14.1", "13.0"))


def test_default_architectures_are_those_that_nvcc_knows(toolchain, nvcc, monkeypatch):
    monkeypatch.delenv("GRADCAMPP_EXT_CUDA", raising=False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    cuda = toolchain.find_cuda(toolchain.Torch(Path("torch"), "2.14.1", "13.0"))
    assert cuda == toolchain.Cuda(nvcc, "13.0", ("8.0", "9.0+PTX"))


def test_no_nvcc_is_a_reason(toolchain, monkeypatch):
    monkeypatch.delenv("GRADCAMPP_EXT_CUDA", raising=False)
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: None)
    reason = toolchain.find_cuda(toolchain.Torch(Path("torch"), "2.14.1", "13.0"))
    assert reason.startswith("no nvcc was found")


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="would measure this GPU")
def test_gpu_report_says_what_each_step_came_to(tmp_path):
    result = subprocess.run(
        [CHECKOUT / "benchmarks" / "gpu_report.sh", tmp_path],
        env={**os.environ, "PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert result.returncode == 1
    steps = json.loads((tmp_path / "summary.json").read_text())
    results = {step["step"]: step["result"] for step in steps}
    assert results["device"] == "failed: nvidia-smi is not installed"
    assert results["build"] == "failed: nvidia-smi names no GPU to build for"
    for step in ("about", "benchmark", "tests"):
        assert "CUDA cannot be used: " in results[step]
    for step in ("memcheck", "racecheck", "profile"):
        assert results[step].startswith("failed: ")
    for step, reason in results.items():
        assert reason in result.stdout
        assert (tmp_path / f"{step}.log").exists()


@pytest.fixture
def toolchain(monkeypatch):
    monkeypatch.syspath_prepend(str(CHECKOUT / "_build_backend"))
    import gradcampp_toolchain

    return gradcampp_toolchain


@pytest.fixture
def nvcc(tmp_path, monkeypatch) -> str:
    """A compiler that answers the two questions which the build asks, as CUDA 13.0 for Ampere."""
    file = tmp_path / "nvcc"
    file.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        '  --version) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;\n'
        "  --list-gpu-arch) printf 'compute_80\\ncompute_90\\n' ;;\n"
        "esac\n"
    )
    file.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(file))
    return str(file)
