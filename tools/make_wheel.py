"""One wheel by hand, as cibuildwheel makes all of them: built, repaired, tested away from here.

    python tools/make_wheel.py TORCH...                 a new wheel, left in dist/
    python tools/make_wheel.py --wheel FILE TORCH...    one that was built before

Each TORCH is a version, beside which the wheel is installed in an environment of its own. What is
run stands in pyproject.toml under [tool.cibuildwheel]. Needs Python 3.11; to build, auditwheel
(the extra `wheel`), or delocate on macOS.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import tomllib

CHECKOUT = Path(__file__).resolve().parent.parent
PLATFORM = "macos" if sys.platform == "darwin" else "linux"

# Printed for each environment; fails where something else than the wheel is imported.
WHAT_IS_TESTED = """
import pathlib, sys
from gradcampp_ext import _native
status = _native.status()
assert pathlib.Path(_native.__file__).is_relative_to(sys.prefix), _native.__file__
print(f"gradcampp_ext {status.version}, built with torch {status.build.torch}, beside "
      f"{status.torch}; loaded: {', '.join(status.libraries)}; CUDA: {status.cuda_missing}")
"""


def settings() -> dict[str, str | list[str]]:
    text = (CHECKOUT / "pyproject.toml").read_text(encoding="utf-8")
    table = tomllib.loads(text)["tool"]["cibuildwheel"]
    return {**table, **table[PLATFORM]}


def run(command: str | list[str], folder: Path, **environment: str) -> None:
    print("+", command if isinstance(command, str) else " ".join(command), flush=True)
    subprocess.run(
        command,
        cwd=folder,
        shell=isinstance(command, str),
        env={**os.environ, **environment},
        check=True,
    )


def build() -> Path:
    """A repaired wheel for this Python and the torch that is installed beside it."""
    dist = CHECKOUT / "dist"
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
        run([*pip, "--wheel-dir", "built", str(CHECKOUT)], folder)
        (wheel,) = folder.glob("built/*.whl")
        repair = str(settings()["repair-wheel-command"])
        places = {"wheel": wheel, "dest_dir": folder / "repaired"}
        run(repair.format(**places, delocate_archs=platform.machine()), folder, PATH=tools)
        (repaired,) = folder.glob("repaired/*.whl")
        dist.mkdir(exist_ok=True)
        return Path(shutil.copy(repaired, dist))


def test(wheel: Path, torch: str) -> None:
    """Runs the tests on the installed wheel, in a fresh environment with this version of torch."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder / "venv", with_pip=True)
        python = str(folder / "venv" / "bin" / "python")
        packages = [str(wheel), f"torch=={torch}", *settings()["test-requires"]]
        run([python, "-m", "pip", "install", "--quiet", *packages], folder)
        run([python, "-c", WHAT_IS_TESTED], folder)
        for source in settings()["test-sources"]:
            shutil.copytree(CHECKOUT / source, folder / source)
        run(
            str(settings()["test-command"]),
            folder,
            PATH=f"{folder / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        )


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--wheel", type=Path)
    parser.add_argument("torch", nargs="+")
    arguments = parser.parse_args()
    os.environ.pop("PYTHONPATH", None)  # nothing of the checkout may be seen
    wheel = arguments.wheel.resolve() if arguments.wheel else build()
    for torch in arguments.torch:
        test(wheel, torch)


if __name__ == "__main__":
    main()
