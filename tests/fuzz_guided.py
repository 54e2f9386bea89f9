"""Fuzzing guided by coverage (atheris): bytes that reach new code in a reader are kept and changed.

    python tests/fuzz_guided.py SUBJECT -runs=10000

SUBJECT is one of SUBJECTS. What may happen, and what is a find, stands in fuzzing.py. `make fuzz`
runs all of them.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=["gradcampp_ext", "fuzzing", "csv", "json", "tarfile", "webdataset.tariterators"]
):
    import fuzzing
    import test_fuzz

import torch

LISTS = (".csv", ".jsonl")
MODEL_FILES = (".txt", ".json", ".pth", ".safetensors")


def chosen(data: bytes, names: Sequence[str]) -> tuple[str, bytes]:
    """The first byte chooses one of the names."""
    return names[data[0] % len(names) if data else 0], data[1:]


def lists(data: bytes, folder: Path) -> str:
    suffix, content = chosen(data, LISTS)
    return fuzzing.read_source(folder, f"list{suffix}", content)


def annotations(data: bytes, folder: Path) -> str:
    suffix, content = chosen(data, LISTS)
    return fuzzing.read_annotations(folder, f"list{suffix}", content)


def parquet(data: bytes, folder: Path) -> str:
    return fuzzing.read_source(folder, "pictures.parquet", data)


def shards(data: bytes, folder: Path) -> str:
    return fuzzing.read_source(folder, "shard.tar", data)


def model_files(data: bytes, folder: Path) -> str:
    suffix, content = chosen(data, MODEL_FILES)
    return fuzzing.read_model_file(folder, f"file{suffix}", content)


def results(data: bytes, folder: Path) -> str:
    out = folder / "results"
    test_fuzz.fill(out)
    return fuzzing.read_results(out, *chosen(data, test_fuzz.RESULTS))


def specs(data: bytes, folder: Path) -> str:
    text = data.decode("utf-8", "replace")
    spec, _, weights = text.partition("\n")
    return fuzzing.load(spec, weights or "none")


def native(data: bytes, folder: Path) -> str:
    """An operator with tensors cut out of one piece of memory, by sizes and strides from bytes."""
    source = atheris.FuzzedDataProvider(data)
    dtypes = [*test_fuzz.DTYPES, torch.uint8, torch.int32]

    def tensor(dims: int | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        dims = source.ConsumeIntInRange(0, 7) if dims is None else dims
        shape = [source.ConsumeIntInRange(0, 4) for _ in range(dims)]
        strides = [source.ConsumeIntInRange(0, 6) for _ in range(dims)]
        reach = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if n)
        if dtype is None:
            dtype = dtypes[source.ConsumeIntInRange(0, len(dtypes) - 1)]
        memory = torch.linspace(-1, 2, reach, dtype=torch.float64).to(dtype)
        return memory.as_strided(shape, strides)

    def text(words: list[str]) -> str:
        return words[source.ConsumeIntInRange(0, len(words) - 1)]

    methods = [*test_fuzz.methods.METHODS, "gradcam+"]
    dims = source.ConsumeIntInRange(2, 6)
    a = tensor(dims)
    g = tensor(dims + 1, a.dtype)
    if source.ConsumeBool() and g.numel():  # of a shape that fits
        g = g.flatten()[:1].expand(a.shape[0], source.ConsumeIntInRange(0, 3), *a.shape[1:])
    real, flag = source.ConsumeFloat, source.ConsumeBool
    kind = source.ConsumeIntInRange(0, 5)
    size = [source.ConsumeIntInRange(-1, 20) for _ in range(source.ConsumeIntInRange(0, 4))]
    name, arguments = [
        ("cam", [a, g, text(methods), size or None, text(["minmax", "max", "none", "l2"]),
                 text(["linear", "nearest", "cubic"]), flag(), flag(), real(), real()]),
        ("channel_weights", [a, g, text(methods), flag(), real(), real()]),
        ("cam_backward", [tensor(dims, torch.float32), a, g, text(methods), flag(), real(), flag(),
                          flag()]),
        ("overlay", [tensor(4), tensor(3), torch.zeros(256, 3, dtype=torch.uint8), real(), real()]),
        ("add_powers", [tensor(dims + 1, torch.float64), tensor(dims + 1)]),
        ("power_weights", [a, tensor(dims + 2, torch.float64), source.ConsumeInt(4), flag(),
                           real()]),
    ][kind]  # fmt: skip
    if name == "add_powers" and arguments[0].numel() != arguments[0].unique_consecutive().numel():
        arguments[0] = arguments[0].contiguous()  # to memory that is written once
    return fuzzing.native(name, arguments)


SUBJECTS: dict[str, Callable[[bytes, Path], str]] = {
    each.__name__: each
    for each in (lists, annotations, parquet, shards, model_files, results, specs, native)
}


def begun(names: Sequence[str]) -> list[bytes]:
    """Good files, as `chosen` takes them apart."""
    return [bytes([n]) + file for n, name in enumerate(names) for file in test_fuzz.SEEDS[name]]


SEEDS = {
    "lists": [*begun(LISTS), *test_fuzz.PIECES],
    "annotations": [*begun(LISTS), *test_fuzz.PIECES],
    "parquet": test_fuzz.SEEDS[".parquet"],
    "shards": test_fuzz.SEEDS[".tar"],
    "model_files": begun(MODEL_FILES),
    "results": begun(test_fuzz.RESULTS),
    "specs": [
        b"demo\nnone",
        b"timm:resnet18.a2\nno.pth",
        b"torchvision:resnet18x",
        b"a.b:c",
        b"hf:",
    ],
    "native": [bytes(range(256))],
}


def main() -> None:
    name, *options = sys.argv[1:]
    subject, tally = SUBJECTS[name], fuzzing.Tally(f"{name}, guided by coverage")
    torch.set_num_threads(1)
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, content in enumerate(SEEDS[name]):
        (corpus / str(number)).write_bytes(content)
    work = folder / "work"
    work.mkdir()
    os.chdir(work)
    atexit.register(lambda: print(tally, flush=True))

    def one(data: bytes) -> None:
        with contextlib.redirect_stdout(None):
            tally.add(subject(data, work))

    atheris.Setup([sys.argv[0], *options, "-close_fd_mask=0", str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
