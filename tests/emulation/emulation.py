"""Builds the CUDA sources for the host and runs the op on them; see emulator.h for what is checked.

A case that the emulator or a sanitizer objects to raises ``EmulationError`` with the report.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradcampp_ext import methods

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]  # as in csrc/cam.h
METHODS = list(methods.METHODS)
NORMALIZE = [None, "minmax", "max"]
INTERPOLATION = ["linear", "nearest"]
SPARSE = 1 << 30

COMPILE = [
    *("-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
]


class EmulationError(RuntimeError):
    """The emulator or a sanitizer stopped the program; the message is its report."""


@dataclass(frozen=True)
class Device:
    """What the launches are planned for: processors, bytes of shared memory, clusters of blocks."""

    processors: int = 4
    shared_per_block: int = 64 * 1024
    shared_per_processor: int = 128 * 1024
    clusters: bool = False


def compiler() -> str | None:
    """The C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


def build(folder: Path) -> Path:
    """The program for the sources as they are; compiled anew where one of them has changed."""
    sources = [*sorted((CSRC / "cuda").glob("*.cu")), HERE / "driver.cpp", HERE / "emulator.cpp"]
    program = folder / "emulation"
    stamp = folder / "digest"
    digest = hashlib.sha256(" ".join([str(compiler()), *COMPILE]).encode())
    for file in sorted([*CSRC.rglob("*"), *HERE.rglob("*")]):
        if file.suffix in (".h", ".cuh", ".cu", ".cpp"):
            digest.update(file.read_bytes())
    if not stamp.exists() or stamp.read_text() != digest.hexdigest():
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda source: _compile(source, folder, CSRC), sources))
        _link(objects, program)
        stamp.write_text(digest.hexdigest())
    return program


def build_changed(folder: Path, original: Path, changes: dict[str, tuple[str, str]]) -> Path:
    """The float32 Grad-CAM++ of a copy of the sources in which texts are replaced, each of which
    must occur once; everything else comes from the objects beside the program ``original``."""
    csrc = folder / "csrc"
    shutil.copytree(CSRC, csrc, ignore=shutil.ignore_patterns("cpu", "bindings"))
    for name, (old, new) in changes.items():
        text = (csrc / name).read_text()
        assert text.count(old) == 1, f"{name} has {text.count(old)} times {old!r}"
        (csrc / name).write_text(text.replace(old, new))
    changed = _compile(HERE / "one_method.cpp", folder, csrc)
    objects = [str(o) for o in original.parent.glob("*.o") if o.name != "cam_float.o"]
    program = folder / "emulation"
    _link([changed, *objects], program)  # the linker keeps the first of equal functions
    return program


def _compile(source: Path, folder: Path, csrc: Path) -> str:
    target = str(folder / f"{source.stem}.o")
    include = [f"-I{HERE / 'include'}", f"-I{csrc}"]
    command = [compiler() or "", *COMPILE, *include, "-x", "c++", "-c", str(source), "-o", target]
    subprocess.run(command, check=True)
    return target


def _link(objects: list[str], program: Path) -> None:
    subprocess.run([compiler() or "", *COMPILE, *objects, "-o", str(program)], check=True)


class Emulator:
    """The op on emulated CUDA. Calls mirror ``gradcampp_ext.cam`` and its siblings."""

    def __init__(self, program: Path) -> None:
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self.launches = 0  # of the last call, memory operations left out
        self.workspace = 0  # bytes of the last call

    def cam(
        self,
        activations: Tensor,
        gradients: Tensor,
        *,
        method: str = "gradcampp",
        size: tuple[int, ...] | None = None,
        normalize: str | None = "minmax",
        interpolation: str = "linear",
        relu: bool = True,
        rectify: bool | None = None,
        eps: float | None = None,
        temperature: float = 1.0,
        seed: int = 1,
        device: Device = Device(),
        weights: bool = False,
    ) -> Tensor:
        single = gradients.dim() == activations.dim()
        g = gradients.unsqueeze(1) if single else gradients
        row = methods.get(method)
        space = activations.shape[2:]
        pad = 3 - len(space)
        pixels = tuple(space) if size is None else size
        request = [
            *(0, seed, *astuple(device)),
            *self._tensors(activations, g),
            *(METHODS.index(method), row.rectify if rectify is None else rectify),
            *((row.eps or 0.0) if eps is None else float(eps), float(temperature), weights),
            *([1] * pad + list(pixels)),
            *(relu, NORMALIZE.index(normalize), INTERPOLATION.index(interpolation)),
            *(x.storage_offset() * x.element_size() for x in (activations, g)),
        ]
        shape = (*g.shape[:2], g.shape[2]) if weights else (*g.shape[:2], *pixels)
        dtype = torch.float64 if activations.dtype == torch.float64 else torch.float32
        out = self._call(_pack(request), [activations, g], shape, dtype)
        return out.squeeze(1) if single else out

    def channel_weights(self, activations: Tensor, gradients: Tensor, **options: Any) -> Tensor:
        return self.cam(activations, gradients, weights=True, **options)

    def overlay(
        self, images: Tensor, maps: Tensor, table: Tensor, alpha: float, seed: int = 1
    ) -> Tensor:
        n, h, w, _ = images.shape
        request = [
            *(1, seed, *astuple(Device()), n, h, w, images.dtype == torch.uint8),
            *(images.stride(0), images.stride(3), images.stride(1), images.stride(2)),
            *maps.stride(),
            *(1.0 - alpha, float(alpha)),
            *(x.storage_offset() * x.element_size() for x in (images, maps)),
        ]
        return self._call(_pack(request), [images, maps, table], (n, h, w, 3), torch.uint8)

    def add_powers(self, sums: Tensor, gradients: Tensor, seed: int = 1) -> Tensor:
        """Sums [3, N, K, C, *S], without gaps in memory, after ``gradients`` [M, N, K, C, *S]."""
        pad = [1] * (7 - sums.dim())

        def dims(values: Sequence[int]) -> list[int]:
            return [*values[1:4], *pad, *values[4:]]

        request = [
            *(2, seed, *astuple(Device()), DTYPES.index(gradients.dtype), len(gradients)),
            *dims(sums.shape),
            *(gradients.stride(0), *dims(gradients.stride())),
            *(sums.stride(0), *dims(sums.stride())),
            gradients.storage_offset() * gradients.element_size(),
        ]
        memory = self._call(_pack(request), [sums, gradients], (sums.numel(),), torch.float64)
        return memory.as_strided(sums.shape, sums.stride())

    def power_weights(
        self,
        activations: Tensor,
        sums: Tensor,
        copies: int,
        *,
        rectify: bool = True,
        eps: float = 0.0,
        seed: int = 1,
    ) -> Tensor:
        space = activations.shape[2:]
        pad = 3 - len(space)
        request = [
            *(3, seed, *astuple(Device()), DTYPES.index(activations.dtype), *sums.shape[1:4]),
            *([1] * pad + list(space)),
            *activations.stride()[:2],
            *([0] * pad + list(activations.stride()[2:])),
            *sums.stride()[:4],
            *([0] * pad + list(sums.stride()[4:])),
            *(float(copies), rectify, float(eps)),
            *(x.storage_offset() * x.element_size() for x in (activations, sums)),
        ]
        dtype = torch.float64 if activations.dtype == torch.float64 else torch.float32
        return self._call(_pack(request), [activations, sums], tuple(sums.shape[1:4]), dtype)

    def cam_backward(
        self,
        map_gradients: Tensor,
        activations: Tensor,
        gradients: Tensor,
        method: str,
        rectify: bool,
        eps: float,
        by_activations: bool = True,
        by_gradients: bool = True,
        seed: int = 1,
    ) -> tuple[Tensor, Tensor]:
        wanted = (by_activations, by_gradients)
        like = [torch.empty_like(activations), torch.empty_like(gradients)]
        sizes = [x.numel() if want else 0 for x, want in zip(like, wanted, strict=True)]
        request = [
            *(4, seed, *astuple(Device())),
            *self._tensors(activations, gradients),
            *(METHODS.index(method), rectify, float(eps)),
            *_strides(like[0], 2),
            *_strides(like[1], 3),
            *(size * activations.element_size() for size in sizes),
            *(
                x.storage_offset() * x.element_size()
                for x in (map_gradients, activations, gradients)
            ),
        ]
        tensors = [map_gradients, activations, gradients]
        memory = self._call(_pack(request), tensors, (sum(sizes),), activations.dtype)
        parts = memory.split(sizes)
        return tuple(
            part.as_strided(x.shape, x.stride()) if want else part
            for part, x, want in zip(parts, like, wanted, strict=True)
        )  # type: ignore[return-value]

    @staticmethod
    def _tensors(activations: Tensor, gradients: Tensor) -> list[int]:
        """dtype, sizes and strides of activations [N, C, *S] and gradients [N, K, C, *S]."""
        space = activations.shape[2:]
        return [
            *(DTYPES.index(activations.dtype), *gradients.shape[:3]),
            *([1] * (3 - len(space)) + list(space)),
            *_strides(activations, 2),
            *_strides(gradients, 3),
        ]

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _call(
        self, request: bytes, tensors: list[Tensor], shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        if self._process is None:
            pipe = subprocess.PIPE
            options = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
            self._process = subprocess.Popen(
                self._program, stdin=pipe, stdout=pipe, stderr=pipe, env=options
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(request + b"".join(_storage(x) for x in tensors))
            process.stdin.flush()
        except BrokenPipeError:
            pass  # the report follows
        head = process.stdout.read(24)
        out = torch.empty(shape, dtype=dtype)
        body = process.stdout.read(out.numel() * out.element_size()) if len(head) == 24 else b""
        if len(body) < out.numel() * out.element_size() or len(head) < 24:
            _, report = process.communicate()
            self._process = None
            raise EmulationError(report.decode(errors="replace"))
        error, self.workspace, self.launches = struct.unpack("<3q", head)
        if error:
            raise EmulationError(f"cudaError {error}")
        if body:
            out.view(torch.uint8).flatten().copy_(
                torch.frombuffer(bytearray(body), dtype=torch.uint8)
            )
        return out


def _strides(x: Tensor, first: int) -> list[int]:
    """Strides with those of space, from dimension ``first`` on, filled up to three."""
    strides = list(x.stride())
    return [*strides[:first], *([0] * (first + 3 - x.dim())), *strides[first:]]


def _pack(values: list[float]) -> bytes:
    return b"".join(struct.pack("<d" if type(v) is float else "<q", v) for v in values)


def _storage(x: Tensor) -> bytes:
    """The memory behind a tensor: its size and pieces of it (see Storage in driver.cpp).

    Of memory beyond 1 GiB only the elements of the tensor are sent.
    """
    storage = x.untyped_storage()
    if storage.nbytes() <= SPARSE:
        data = torch.empty(0, dtype=torch.uint8).set_(storage)
        return _pack([storage.nbytes(), 1, 0, storage.nbytes()]) + data.numpy().tobytes()
    element = x.element_size()
    values = x.contiguous().view(torch.uint8).reshape(-1, element)
    grid = torch.meshgrid(*(torch.arange(n) for n in x.shape), indexing="ij")
    offsets = sum(i * s for i, s in zip(grid, x.stride(), strict=True)).flatten()  # type: ignore[union-attr]
    pieces = b"".join(
        _pack([(int(offset) + x.storage_offset()) * element, element]) + value.numpy().tobytes()
        for offset, value in zip(offsets, values, strict=True)
    )
    return _pack([storage.nbytes(), len(values)]) + pieces
