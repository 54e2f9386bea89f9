"""Builds the native libraries with ninja; everything else stands in pyproject.toml.

gradcampp_ext/_cpu.so        operators for CPU tensors, LibTorch stable ABI
gradcampp_ext/_cuda.so       operators for CUDA tensors, LibTorch stable ABI
gradcampp_ext/_numpy.*.so    the CPU kernels for NumPy arrays, pybind11, without torch
"""

from __future__ import annotations

import json
import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info
from setuptools.command.sdist import sdist

if int(setuptools.__version__.split(".")[0]) < 77:  # pyproject.toml says so to isolated builds only
    sys.exit(
        f"gradcampp_ext: setuptools must be 77 or newer, got {setuptools.__version__}; "
        "pip install --upgrade setuptools, or build with isolation (pip's default)"
    )

sys.path.insert(0, str(Path(__file__).parent / "_build_backend"))
import gradcampp_toolchain as toolchain

BUILD_INFO = "gradcampp_ext/_build_info.json"
COMMIT = Path("COMMIT")  # in source distributions only

# One kernel source, compiled once per instruction set that the machine's family may have.
CPU_TARGETS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    CPU_TARGETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    CPU_TARGETS["avx512"] = [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ]

COMPILE = ["-std=c++20", "-O3", "-Icsrc"]
HOST = ["-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall"]
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000ULL", "-DTORCH_STABLE_ONLY"]
if sys.platform == "darwin":
    SHARED = ["-bundle", "-undefined", "dynamic_lookup"]
    COMPLETE = []
else:
    SHARED = ["-shared", "-pthread"]
    COMPLETE = ["-Wl,-z,defs"]  # a missing symbol is an error of the build, not of the import


class NinjaFile:
    """Collects compile and link steps, with commands spelt out, for one ninja run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = [
            "ninja_required_version = 1.5",
            f"builddir = {folder}",
            "rule compile",
            "  command = $tool -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $tool -o $out $in $libraries",
        ]

    def compile(self, source: str, command: list[str], label: str = "") -> str:
        target = self._path(f"{Path(source).with_suffix('')}{label and '.' + label}.o")
        self.lines += [f"build {target}: compile {source}", f"  tool = {_quote(command)}"]
        return target

    def link(
        self, library: str, objects: list[str], command: list[str], libraries: list[str]
    ) -> None:
        self.lines += [
            f"build {self._path(library)}: link {' '.join(objects)}",
            f"  tool = {_quote(command)}",
            f"  libraries = {_quote(libraries)}",
        ]

    def run(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "build.ninja"
        file.write_text("\n".join([*self.lines, ""]), encoding="utf-8")
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        if subprocess.run([toolchain.find_ninja(), "-f", str(file), *jobs]).returncode:
            sys.exit(
                "gradcampp_ext: the native build failed, see the compiler's message above "
                "(GRADCAMPP_EXT_CUDA=0 leaves CUDA out)"
            )

    def _path(self, name: str) -> str:
        return str(self.folder / name)


def _quote(command: list[str]) -> str:
    return shlex.join(command).replace("$", "$$")


class BuildNative(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("_numpy"):
            return super().get_ext_filename(fullname)
        return f"{fullname.replace('.', os.sep)}.so"  # no Python symbols, so no Python's tag

    def build_extensions(self) -> None:
        torch = toolchain.find_torch()
        if torch is None:
            sys.exit(
                f"gradcampp_ext: no {toolchain.TORCH_REQUIREMENT} found to compile against; "
                "install it first, or build with isolation (pip's default)"
            )
        cuda = toolchain.find_cuda(torch)
        cuda_omitted = cuda if isinstance(cuda, str) else None
        print(f"gradcampp_ext: torch {torch.version} in {torch.root}")
        if cuda_omitted:
            print(f"gradcampp_ext: CUDA is left out: {cuda_omitted}")
            self.extensions = [e for e in self.extensions if e.name != "gradcampp_ext._cuda"]
        else:
            print(f"gradcampp_ext: CUDA {cuda.version} for {' '.join(cuda.architectures)}")

        # Not in build_temp: an editable install would throw the objects away each time.
        folder = Path("build", f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}")
        compiler = toolchain.find_compiler()
        ninja = NinjaFile(folder)
        plan_cpu(ninja, compiler, torch, self.get_ext_filename("gradcampp_ext._numpy"))
        if not cuda_omitted:
            plan_cuda(ninja, torch, cuda)
        ninja.run()

        for extension in self.extensions:
            target = self.get_ext_fullpath(extension.name)
            self.mkpath(str(Path(target).parent))
            self.copy_file(str(folder / self.get_ext_filename(extension.name)), target)
        Path(self.build_lib, BUILD_INFO).write_text(
            json.dumps(
                {
                    "torch": torch.version,
                    "torch_cuda": torch.cuda,
                    "compiler": toolchain.version_line(compiler),
                    "cpu_targets": list(CPU_TARGETS),
                    "cuda": None if cuda_omitted else cuda.version,
                    "cuda_architectures": [] if cuda_omitted else list(cuda.architectures),
                    "cuda_omitted": cuda_omitted,
                    "commit": commit(),
                },
                indent=2,
            ),
            encoding="utf-8",
        )

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        shutil.copy(Path(self.build_lib, BUILD_INFO), BUILD_INFO)
        if all(extension.name != "gradcampp_ext._cuda" for extension in self.extensions):
            Path("gradcampp_ext", "_cuda.so").unlink(missing_ok=True)

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), str(Path(self.build_lib, BUILD_INFO))]

    def get_output_mapping(self) -> dict[str, str]:
        mapping = super().get_output_mapping()
        return {**mapping, str(Path(self.build_lib, BUILD_INFO)): BUILD_INFO} if mapping else {}


class LabelVersion(egg_info):
    """Puts GRADCAMPP_EXT_LABEL behind the version: "+cpu" makes 0.1.0+cpu of 0.1.0."""

    def finalize_options(self) -> None:
        self.tag_build = os.environ.get("GRADCAMPP_EXT_LABEL") or self.tag_build
        super().finalize_options()


def commit() -> str | None:
    """Of the sources, with a + where they differ; a source distribution has it in a file."""
    if COMMIT.exists():
        return COMMIT.read_text(encoding="utf-8").strip() or None
    of_checkout = runpy.run_path("gradcampp_ext/_environment.py")["of_checkout"]
    return of_checkout(Path())


class SourceDistribution(sdist):
    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        Path(base_dir, COMMIT).write_text(f"{commit() or ''}\n", encoding="utf-8")


def plan_cpu(
    ninja: NinjaFile, compiler: list[str], torch: toolchain.Torch, numpy_library: str
) -> None:
    cxx = [*compiler, *shlex.split(os.environ.get("CXXFLAGS", "")), *COMPILE, *HOST]
    link = [*compiler, *shlex.split(os.environ.get("LDFLAGS", "")), *SHARED]
    kernels = [
        ninja.compile("csrc/cpu/kernels.cpp", [*cxx, *flags, f"-DGCPP_TARGET={name}"], name)
        for name, flags in CPU_TARGETS.items()
    ]
    kernels.append(ninja.compile("csrc/cpu/dispatch.cpp", cxx))

    torch_cpu = [*cxx, *STABLE_ABI, *_include(torch.root / "include")]
    ninja.link(
        "gradcampp_ext/_cpu.so",
        [ninja.compile("csrc/bindings/torch_cpu.cpp", torch_cpu), *kernels],
        [*link, *COMPLETE],
        [f"-L{torch.root / 'lib'}", "-ltorch_cpu", "-lc10"],
    )

    import pybind11

    python = [*_include(_python_headers()), *_include(pybind11.get_include())]
    binding = ninja.compile("csrc/bindings/numpy.cpp", [*cxx, *python])
    ninja.link(numpy_library, [binding, *kernels], link, [])


def plan_cuda(ninja: NinjaFile, torch: toolchain.Torch, cuda: toolchain.Cuda) -> None:
    nvcc = [cuda.nvcc, *COMPILE, "--threads=2", "-DUSE_CUDA", *STABLE_ABI]
    if int(cuda.version.split(".")[0]) >= 13:  # drivers of CUDA 12.0 to 12.3 cannot unpack it
        nvcc.append("--compress-mode=size")
    if "CXX" in os.environ:
        nvcc += ["-ccbin", toolchain.find_compiler()[-1]]
    folder, prefix_map = _include(torch.root / "include")
    nvcc += [folder, *(f"-Xcompiler={flag}" for flag in (*HOST, prefix_map))]
    for architecture in cuda.architectures:
        number = architecture.removesuffix("+PTX").replace(".", "")
        nvcc.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if architecture.endswith("+PTX"):
            nvcc.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    sources = ["csrc/bindings/torch_cuda.cpp", *sorted(map(str, Path("csrc/cuda").glob("*.cu")))]
    ninja.link(
        "gradcampp_ext/_cuda.so",
        [ninja.compile(source, nvcc, "cuda") for source in sources],
        [cuda.nvcc, "-shared", "-nodlink", "-cudart=static", "-Xlinker", "-z,defs"],
        [f"-L{torch.root / 'lib'}", "-ltorch_cuda", "-ltorch_cpu", "-lc10"],
    )


def _include(folder: Path | str) -> list[str]:
    # Error messages print __FILE__: without the folder it is the same on every machine.
    return [f"-I{folder}", f"-fmacro-prefix-map={folder}/="]


def _python_headers() -> str:
    folder = sysconfig.get_path("include")
    if not Path(folder, "Python.h").exists():
        sys.exit(f"gradcampp_ext: {folder} has no Python.h; install Python's headers (python3-dev)")
    return folder


setup(
    packages=[*find_packages(include=["gradcampp_ext*"]), "gradcampp_ext.benchmarks"],
    package_dir={"gradcampp_ext.benchmarks": "benchmarks"},
    ext_modules=[Extension(f"gradcampp_ext.{name}", []) for name in ("_cpu", "_cuda", "_numpy")],
    cmdclass={
        "build_ext": BuildNative,
        "egg_info": LabelVersion,
        "sdist": SourceDistribution,
    },
)
