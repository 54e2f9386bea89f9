"""The CPU libraries under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

`make sanitize-cpu` runs it with gcc or another compiler that has them. The libraries are built in
copies of the source under build/, so that those in use stay as they are.

address: both libraries, for torch and for NumPy, every instruction set; the tests of the ops and
    their fuzzing run on them. Any finding ends the process. Leaks are not looked for, since Python
    and torch keep memory until they end; test_robustness.py measures what calls keep.
thread: the kernels with threads.cpp, without Python and torch, whose threads synchronise by means
    that the sanitizer does not see. Nothing is suppressed.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = {"address": "address,undefined,float-cast-overflow", "thread": "thread"}
TESTS = [
    "test_ops.py",
    "test_arrays.py",
    "test_differentiable.py",
    "test_smooth.py",
    "test_fuzz.py",
]
# No compilers under the sanitizer, no children that drop it, no test that is not about the ops.
CHOSEN = (
    "not compile and not opcheck and not export and not data_loader and not importable "
    "and not list and not name and not folder and not model_spec and not command and not overlays"
)
COPIED = ["csrc", "gradcampp_ext", "_build_backend", "benchmarks", "setup.py", "pyproject.toml",
          "README.md", "LICENSE"]  # fmt: skip


def build(kind: str) -> Path:
    """A copy of the source with libraries that are instrumented; compiled where it has changed."""
    folder = ROOT / "build" / f"sanitize-{kind}"
    for name in COPIED:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    flags = f"-fsanitize={SANITIZERS[kind]} -fno-sanitize-recover=all -g1 -fno-omit-frame-pointer"
    environment = os.environ | {"GRADCAMPP_EXT_CUDA": "0", "CXXFLAGS": flags, "LDFLAGS": flags}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=folder, env=environment, check=True)
    return folder


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


def runtime(library: str) -> str:
    """Path of a library of the compiler's."""
    command = [*compiler(), f"-print-file-name={library}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def instruction_sets(folder: Path, environment: dict[str, str]) -> list[str]:
    program = "from gradcampp_ext import _native; print(*_native.status().cpu_capabilities)"
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE)
    return run.stdout.decode().split()


def address() -> None:
    folder = build("address")
    # libstdc++ beside it, or the first exception that is thrown would not find its way
    preloaded = map(runtime, ("libasan.so", "libubsan.so", "libstdc++.so"))
    environment = os.environ | {
        "PYTHONPATH": str(folder),
        "LD_PRELOAD": " ".join(preloaded),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # as malloc does
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "FUZZ_CASES": os.environ.get("FUZZ_CASES", "300"),
    }
    tests = [str(ROOT / "tests" / name) for name in TESTS]
    pytest = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    pytest += ["--capture=sys", "-k", CHOSEN]  # reports go to the real standard error
    for name in instruction_sets(folder, environment):
        start = time.perf_counter()
        chosen = environment | {"GRADCAMPP_EXT_CPU": name}
        check = "import gradcampp_ext as gx; print(gx.__file__)"
        used = [sys.executable, "-P", "-c", check]
        found = subprocess.run(used, env=chosen, check=True, capture_output=True, text=True).stdout
        assert Path(found.strip()).is_relative_to(folder), f"{found} is tested instead"
        subprocess.run([*pytest, *tests], cwd=folder, env=chosen, check=True)
        print(f"address and undefined: {name} in {time.perf_counter() - start:.0f} s", flush=True)


def thread() -> None:
    folder = build("thread")
    (objects,) = folder.glob("build/native-*/csrc/cpu")
    program = folder / "threads"
    flags = ["-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-pthread"]
    sources = [str(Path(__file__).with_name("threads.cpp")), *map(str, objects.glob("*.o"))]
    command = [*compiler(), *flags, f"-I{folder / 'csrc'}", "-fsanitize=thread", *sources]
    subprocess.run([*command, "-o", str(program)], check=True)
    # where addresses are drawn from more than it knows of, it does not start
    fixed = (
        [shutil.which("setarch") or "", os.uname().machine, "-R"] if shutil.which("setarch") else []
    )
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    for name in ("baseline", "avx2", "avx512"):
        start = time.perf_counter()
        chosen = environment | {"GRADCAMPP_EXT_CPU": name}
        run = subprocess.run([*fixed, str(program)], env=chosen, capture_output=True, text=True)
        if "must name an instruction set" in run.stderr:
            continue
        if run.returncode:
            sys.exit(f"{name}:\n{run.stdout}{run.stderr}")
        print(f"thread: {run.stdout.strip()} in {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    for each in sys.argv[1:] or ["address", "thread"]:
        {"address": address, "thread": thread}[each]()
