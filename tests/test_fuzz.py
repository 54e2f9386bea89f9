"""Nothing that is given to the package breaks it. `make fuzz` runs 10,000 cases of each.

A run of all tests takes a few cases, always the same ones.
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import shutil
import string
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import fuzzing
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st
from samples import LAYOUTS, arrange
from typer.testing import CliRunner

from gradcampp_ext import methods
from gradcampp_ext.batch import provenance
from gradcampp_ext.cli import app

pytest.importorskip("pyarrow")
pytest.importorskip("webdataset")


def cases(few: int) -> Any:
    """So many cases in a run of all tests; FUZZ_CASES new ones under `make fuzz`."""
    return settings(
        max_examples=fuzzing.CASES or few,
        derandomize=not fuzzing.CASES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
    )


@pytest.fixture
def tally(request) -> fuzzing.Tally:
    counted = fuzzing.Tally(request.node.name.removeprefix("test_"))
    if fuzzing.CASES:  # as it stands when all tests have run
        request.node.user_properties.append(("figures", counted))
    return counted


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# The op

JUNK = st.sampled_from(
    [None, "", "minmaxx", b"max", 3, 0, -1, 1e400, float("nan"), True, [], {}, ("linear",), 2**70,
     object(), torch.ones(2), np.ones(3), 1j]
)  # fmt: skip
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
ODD_DTYPES = (torch.int8, torch.bool, torch.complex64, torch.float8_e5m2, torch.int64)
LAYER = st.integers(1, 3).flatmap(
    lambda dims: st.tuples(
        st.integers(0, 3), st.integers(0, 9), *[st.integers(0, 7 if dims < 3 else 4)] * dims
    )
)
VALUES = ("benign", "benign", "nan", "inf", "huge", "tiny", "zeros")


def filled(shape: tuple[int, ...], values: str, seed: int, *, signed: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = x * 1e-3 if signed else x.relu()
    if values in ("nan", "inf") and x.numel():
        x.view(-1)[seed % x.numel()] = float(values)
    return x * {"huge": 1e30, "tiny": 1e-30, "zeros": 0.0}.get(values, 1.0)


@st.composite
def options(draw: Any, dims: int) -> dict[str, Any]:
    """Keyword arguments of the op, mostly good ones."""
    length = st.integers(1, 12) | st.sampled_from([0, -1, 2**44, 2**62, 2**70, 2.5, "8", None])
    good: dict[str, Any] = {
        "method": st.sampled_from(list(methods.METHODS)),
        "size": st.none() | st.tuples(*[st.integers(1, 12)] * dims),
        "normalize": st.sampled_from(["minmax", "max", None]),
        "interpolation": st.sampled_from(["linear", "nearest"]),
        "relu": st.booleans(),
        "rectify": st.none() | st.just(True),
        "eps": st.none() | st.just(0) | st.just(0.0),
        "temperature": st.floats(0.5, 2) | st.just(1),
    }
    chosen = {name: draw(good[name]) for name in draw(st.sets(st.sampled_from(sorted(good))))}
    if draw(st.integers(0, 3)) == 0:
        name = draw(st.sampled_from(sorted(good)))
        chosen[name] = draw(JUNK | st.floats() | st.text(max_size=4) | st.lists(length, max_size=4))
    return chosen


@st.composite
def pairs(draw: Any) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Activations, gradients, and whether their values are usual ones."""
    shape = draw(LAYER)
    targets = draw(st.none() | st.integers(0, 3))
    values, seed = draw(st.sampled_from(VALUES)), draw(st.integers(0, 2**20))
    dtype = draw(st.sampled_from(DTYPES))
    g_shape = shape if targets is None else (shape[0], targets, *shape[1:])
    where = draw(st.integers(0, 1))
    a = filled(shape, values if where else "benign", seed, signed=False).to(dtype)
    g = filled(g_shape, "benign" if where else values, seed + 1, signed=True).to(dtype)
    a = arrange(a, draw(st.sampled_from(LAYOUTS)), 1)
    g = arrange(g, draw(st.sampled_from(LAYOUTS)), 1 if targets is None else 2)
    if draw(st.integers(0, 3)) == 0:
        a, g = draw(st.sampled_from(WARPS))(a, g)
    # halves of 1e-30 are zeros, of 1e30 infinite
    return a, g, values == "benign"


def strange(x: torch.Tensor) -> torch.Tensor:
    """Strides that no operation makes: overlapping, jumping, zero."""
    small = torch.arange(1, 1 + 4 * sum(x.shape) or 1, dtype=torch.float64).div(997).to(x.dtype)
    strides = [1 + (7 * d) % 3 if d % 2 else 2 for d in range(x.dim())]
    return small.as_strided(x.shape, strides) if x.numel() else x


WARPS = [
    lambda a, g: (a, g.to(torch.float64)),
    lambda a, g: (a.to(ODD_DTYPES[a.dim() % 5]), g.to(ODD_DTYPES[a.dim() % 5])),
    lambda a, g: (a, g[:, 1:]),
    lambda a, g: (a[0] if len(a) else a, g),
    lambda a, g: (a, g.to("meta")),
    lambda a, g: (a.to("meta"), g.to("meta")),
    lambda a, g: (a.to_sparse(), g),
    lambda a, g: (a, g.to_sparse()),
    lambda a, g: (torch.nested.nested_tensor([a]), g),
    lambda a, g: (a.requires_grad_(), g),
    lambda a, g: (strange(a), strange(g)),
    lambda a, g: (a.mean((-1,), keepdim=True).expand(a.shape), g),
    lambda a, g: (a, g.flip(0).conj()),
    lambda a, g: (torch._neg_view(a), g),
    lambda a, g: (a.numpy(), g) if a.dtype != torch.bfloat16 else (a.tolist(), g),
    lambda a, g: (a, None),
]  # fmt: skip


@cases(120)
@given(data=st.data())
def test_arguments_of_the_op(tally, data):
    a, g, benign = data.draw(pairs())
    chosen = data.draw(options(max(1, a.dim() - 2) if isinstance(a, torch.Tensor) else 2))
    if isinstance(a, torch.Tensor) and isinstance(g, torch.Tensor):
        benign = benign and a.dtype in DTYPES and not a.is_sparse and not a.is_nested
        benign = benign and bool((a.detach() >= 0).all()) if benign and not a.is_meta else benign
    tally.add(fuzzing.cam(a, g, benign, chosen))


@cases(60)
@given(data=st.data())
def test_arguments_of_the_op_for_arrays(tally, data):
    a, g, benign = data.draw(pairs())
    assume(isinstance(a, torch.Tensor) and isinstance(g, torch.Tensor))
    assume(a.dtype in (torch.float16, torch.float32, torch.float64, torch.int8, torch.complex64))
    assume(not (a.is_sparse or g.is_sparse or a.is_nested or a.is_meta or g.is_meta))
    a, g = (x.detach().resolve_neg().resolve_conj().numpy() for x in (a, g))
    kind = data.draw(st.integers(0, 5))
    if kind == 0 and a.dtype.kind == "f":
        a, g = a.astype(a.dtype.newbyteorder()), g.astype(g.dtype.newbyteorder())
    elif kind == 1:
        axis = data.draw(st.integers(1, a.ndim - 1)) - a.ndim
        a, g = np.flip(a, axis), np.flip(g, axis)  # negative strides
    elif kind == 2:
        a = np.frombuffer(b"\0" + a.tobytes(), np.uint8)[1:].view(a.dtype).reshape(a.shape)
    chosen = data.draw(options(max(1, a.ndim - 2)))
    if data.draw(st.booleans()):
        chosen["threads"] = data.draw(st.integers(1, 5) | JUNK | st.integers())
    benign = benign and a.dtype.kind == "f" and bool((a >= 0).all())
    tally.add(fuzzing.cam_of_arrays(a, g, benign, chosen))


@cases(60)
@given(data=st.data())
def test_arguments_of_overlays(tally, data):
    n, h, w = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 9)))
    maps: Any = torch.rand(n, h, w, dtype=data.draw(st.sampled_from(DTYPES)))
    images: Any = torch.rand(n, 3, h, w)
    if data.draw(st.booleans()):
        images = (images * 255).byte().permute(0, 2, 3, 1)
    if data.draw(st.integers(0, 3)) == 0:
        images = data.draw(st.sampled_from([images[..., :2], images.long(), images.numpy()]) | JUNK)
    if data.draw(st.integers(0, 3)) == 0:
        maps = data.draw(
            st.sampled_from([maps[0:1], maps * float("nan"), maps.float().numpy()]) | JUNK
        )
    weight = st.floats() | st.floats(0, 1)
    chosen = {"alpha": data.draw(weight), "image_weight": data.draw(st.none() | weight)}
    chosen["colormap"] = data.draw(st.sampled_from(["turbo", "jet_r", "x"]) | st.text(max_size=5))
    tally.add(fuzzing.overlay(images, maps, chosen))


@st.composite
def raw_arguments(draw: Any) -> tuple[str, list[Any]]:
    """Of an operator, of the right types, so that the native checks are reached."""
    shape = st.lists(st.integers(0, 5), min_size=0, max_size=6)
    dtype = st.sampled_from([*DTYPES, torch.uint8, torch.int32])

    def tensor() -> torch.Tensor:
        x = torch.rand(draw(shape)).mul(3).to(draw(dtype))
        return x.transpose(0, -1) if x.dim() > 1 and draw(st.booleans()) else x

    number = st.floats() | st.floats(0, 1)
    length = st.integers(-1, 9) | st.sampled_from([2**44, 2**62, -(2**63)])
    method = st.sampled_from([*methods.METHODS, "gradcam+"])
    a, g, by_maps = tensor(), tensor(), tensor()
    if draw(st.booleans()):  # of shapes that fit
        a, g, _ = draw(pairs().filter(lambda pair: all(map(plain, pair[:2]))))
        by_maps = torch.rand(*g.shape[:2], *a.shape[2:])
    bools = [draw(st.booleans()) for _ in range(3)]
    return draw(
        st.sampled_from(
            [
                ("cam", [a, g, draw(method), draw(st.none() | st.lists(length, max_size=4)),
                         draw(st.sampled_from(["minmax", "max", "none", "l2"])),
                         draw(st.sampled_from(["linear", "nearest", "cubic"])), *bools[:2],
                         draw(number), draw(number)]),
                ("channel_weights", [a, g, draw(method), bools[0], draw(number), draw(number)]),
                ("cam_backward", [by_maps, a, g, draw(method), bools[0], draw(number), *bools[1:]]),
                ("overlay", [tensor(), tensor(), draw(st.sampled_from(
                    [torch.zeros(256, 3, dtype=torch.uint8), tensor()])),
                    draw(number), draw(number)]),
                ("add_powers", [tensor().double(), tensor()]),
                ("power_weights", [a, tensor().double(), draw(length), bools[0], draw(number)]),
            ]
        )
    )  # fmt: skip


def plain(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and not (x.is_sparse or x.is_nested or x.is_meta)


@cases(120)
@given(arguments=raw_arguments())
def test_arguments_of_the_native_operators(tally, arguments):
    tally.add(fuzzing.native(*arguments))


# Files

PIECES = [
    b"path,label\n", b"../a.png,cat\n", b"a.png,dog\n", b'{"path": "a.png"}\n', b'"', b",", b"\0",
    b"\xff\xfe", b"\xef\xbb\xbf", b"[" * 5000, b'{"path": ["a"]}\n', b'{"path": "\\ud800"}\n',
    b'{"path": "a\\u0000b", "label": {}}\n', b'{"path": ".", "class_index": 1e999}\n', b"9" * 5000,
    b'{"path": 5}\n', b"PAR1", b"1" + b"0" * 300, b"path,left,top,right,bottom\n", b"a,0,0,inf,1\n",
    b'{"path": "a", "left": 1' + b"0" * 400 + b', "top": 0, "right": 2, "bottom": 9}\n', b"\n",
    b'{"0": "cat", "1": "dog"}', b'["cat"]', b"null", b"-1", b"cat\ndog\n", b"/\n", b"path\n..\n",
    b'{"path": "%s"}\n' % (b"d/" * 3000), b"\r", b"path,path,label\n", b"\x1b[2J", b"nan",
]  # fmt: skip


def parquet_file(columns: dict[str, Any]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet

    file = io.BytesIO()
    pa.parquet.write_table(pa.table(columns), file)
    return file.getvalue()


def tar_file(members: dict[str, bytes], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def saved_weights() -> bytes:
    file = io.BytesIO()
    torch.save({"a.weight": torch.ones(2, 3)}, file)
    return file.getvalue()


PNG = fuzzing.png()
ROW = {
    "path": "in/a.png", "name": "a", "predicted": 1, "predicted_name": "dog", "right": None,
    "predicted_probability": 0.5, "label": None, "label_name": None, "rank": 1, "layer": "0",
    "target": 1, "target_name": "dog", "probability": 0.5, "score": 1.0, "width": 9, "height": 9,
    "view": [0.0, 0.0, 9.0, 9.0], "peak": [1.0, 2.0], "central_mass": 0.3, "entropy": 1.0,
    "files": {"thumbnail": "report/images/a.jpg", "grey": "report/maps/a.jpg"},
}  # fmt: skip


def run_file() -> bytes:
    settings = {"a": 1}
    run = {
        "first_row": 0,
        "batch_size": 8,
        "command": {"paths": ["a.png"], "model": "demo"},
        "environment": {"gradcampp_ext": "0.1", "threads": 2},
    }
    record = {"record": provenance.identity(settings), "settings": settings, "runs": [run]}
    return json.dumps(record).encode()


def evaluation_file() -> bytes:
    measure = {"method": "gradcam++", "measure": "drop", "mean": 0.5, "low": 0.4, "high": 0.6}
    result = {
        "images": 9,
        "interval": {"confidence": 0.95},
        "settings": {"methods": ["gradcam++", "gradcam"], "layers": ["l"]},
        "summary": [
            {"layer": "l", **measure},
            {"layer": "l", **measure, "method": "gradcam"},
        ],
        "definitions": {
            "drop": {
                "title": "Drop %",
                "unit": "%",
                "better": "lower",
                "definition": "d",
                "source": "s",
            }
        },
        "wins": [
            {"layer": "l", "methods": ["gradcam++", "gradcam"], "percent": [[None, 50], [50, None]]}
        ],
    }
    return json.dumps(result).encode()


def seeds() -> dict[str, list[bytes]]:
    """Good files, by suffix, that cases are made from."""
    members = {"0.png": PNG, "0.cls": b"1", "1.png": PNG, "1.json": b'{"label": "cat"}'}
    jsonl = [b'{"path": "a.png", "label": "cat"}\n{"path": "b.png", "class_index": 1}\n']
    return {
        ".csv": [b"path,label\na.png,cat\nb.png,1\n", b"path,left,top,right,bottom\na,0,0,2,2\n"],
        ".jsonl": jsonl,
        ".parquet": [
            parquet_file({"path": ["a.png", "b.png"], "label": ["cat", None]}),
            parquet_file({"image": [PNG, None], "label": [1, 2]}),
            parquet_file({"image": [{"bytes": PNG, "path": "x"}], "class_name": ["dog"]}),
        ],
        ".tar": [tar_file(members)],
        ".tar.gz": [tar_file(members, "w:gz")],
        ".txt": [b"cat\ndog\nkite\n"],
        ".json": [b'["cat", "dog"]', b'{"0": "cat", "1": "dog"}'],
        ".pth": [saved_weights()],
        ".safetensors": [b'8\0\0\0\0\0\0\0{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}1'],
        "results.jsonl": [json.dumps(ROW).encode() + b"\n"],
        "run.json": [run_file()],
        "evaluation.json": [evaluation_file()],
    }


SEEDS = seeds()


@st.composite
def damaged(draw: Any, suffixes: list[str]) -> tuple[str, bytes]:
    """A suffix, and bytes that begin as a good file, or as nothing at all."""
    suffix = draw(st.sampled_from(suffixes))
    content = bytearray(draw(st.sampled_from([*SEEDS[suffix], b""])))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, max(0, len(content))))
        change = draw(st.integers(0, 4))
        if change == 0 and at < len(content):
            content[at] = draw(st.integers(0, 255))
        elif change == 1:
            content[at : at + draw(st.integers(0, 30))] = b""
        elif change == 2:
            content[at:at] = draw(st.sampled_from(PIECES))
        elif change == 3:
            content[at:at] = draw(st.binary(max_size=8) | st.text(max_size=6).map(utf8))
        else:
            del content[at:]
    return suffix, bytes(content)


def utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


COLUMN = st.sampled_from(["path", "file", "label", "class_index", "wordnet_id", "left", "top",
                          "right", "bottom", "xmin", "bytes"])  # fmt: skip
SCALAR = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
    | st.sampled_from(["a.png", "in/../a.png", "..", ".", "/", "a\0b", "-x", "cat", "1" * 50])
)  # fmt: skip
VALUE = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(
    st.text(max_size=5), inner, max_size=2), max_leaves=4)  # fmt: skip


CELLS = [
    st.text(max_size=5),
    st.integers(-9, 2**60),
    st.binary(max_size=4),
    st.floats(),
    st.lists(st.integers(0, 3), max_size=2),
    st.fixed_dictionaries({"bytes": st.none() | st.binary(), "path": st.text(max_size=3)}),
]


@st.composite
def rows(draw: Any) -> tuple[str, bytes]:
    """A list of pictures, labels or boxes with columns that are known, and any values in them."""
    kind = draw(st.sampled_from([".csv", ".jsonl", ".parquet"]))
    if kind == ".jsonl":
        table = draw(st.lists(st.dictionaries(COLUMN, VALUE, max_size=6), max_size=4))
        return kind, b"".join(json.dumps(row).encode() + b"\n" for row in table)
    names = draw(st.lists(COLUMN, min_size=1, max_size=6, unique=True))
    if kind == ".csv":
        file = io.StringIO(newline="")
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(draw(st.lists(st.lists(SCALAR, max_size=7), max_size=4)))
        return kind, utf8(file.getvalue())
    count = draw(st.integers(0, 3))
    columns = {}
    for name in names:
        column = draw(st.sampled_from(CELLS))
        columns[name] = draw(st.lists(st.none() | column, min_size=count, max_size=count))
    try:
        return kind, parquet_file(columns)
    except (ValueError, UnicodeError):  # surrogates, which Arrow's text cannot have
        assume(False)
        raise


@cases(150)
@given(file=damaged([".csv", ".jsonl", ".parquet", ".tar", ".tar.gz"]) | rows())
@example(file=(".tar.gz", SEEDS[".tar.gz"][0][:-9]))
@example(file=(".tar.gz", SEEDS[".tar"][0]))
@example(file=(".parquet", SEEDS[".parquet"][0][:-5]))
def test_lists_of_pictures(tally, folder, file):
    tally.add(fuzzing.read_source(folder, f"source{file[0]}", file[1]))


@cases(100)
@given(file=damaged([".csv", ".jsonl", ".parquet"]) | rows())
def test_lists_of_classes_and_boxes(tally, folder, file):
    tally.add(fuzzing.read_annotations(folder, f"list{file[0]}", file[1]))


@cases(60)
@given(file=damaged([".txt", ".json", ".pth", ".safetensors"]))
@example(file=(".pth", SEEDS[".tar"][0]))
@example(file=(".safetensors", SEEDS[".pth"][0]))
@example(file=(".json", b"[" * 100_000))
def test_class_names_and_weights(tally, folder, file):
    pytest.importorskip("safetensors")
    tally.add(fuzzing.read_model_file(folder, f"file{file[0]}", file[1]))


@st.composite
def results(draw: Any) -> tuple[str, bytes]:
    row = {**ROW, **draw(st.dictionaries(st.sampled_from(sorted(ROW)), VALUE, max_size=2))}
    return "results.jsonl", json.dumps(row).encode() + b"\n"


RESULTS = ["results.jsonl", "run.json", "evaluation.json"]


def fill(out: Path) -> None:
    """A folder of results with one picture."""
    for name in ("images", "maps"):
        (out / "report" / name).mkdir(parents=True, exist_ok=True)
        (out / "report" / name / "a.jpg").write_bytes(PNG)
    for name in RESULTS:
        (out / name).write_bytes(SEEDS[name][0])


@cases(60)
@given(file=damaged(RESULTS) | results())
@example(
    file=("results.jsonl", json.dumps({**ROW, "predicted_probability": 1e307}).encode() + b"\n")
)
@example(
    file=("results.jsonl", json.dumps({**ROW, "right": False, "label": None}).encode() + b"\n")
)
@example(file=("run.json", b'{"a": 1}'))
@example(file=("run.json", b"[]"))
@example(file=("evaluation.json", b"[" * 100_000))
@example(file=("evaluation.json", b"{}"))
def test_folders_of_results(tally, folder, file):
    name, content = file
    out = folder / "results"
    shutil.rmtree(out, ignore_errors=True)
    fill(out)
    before = fuzzing.tree(folder)
    tally.add(fuzzing.read_results(out, name, content))
    outside = {path: old for path, old in before.items() if not path.startswith(f"{out}/")}
    after = {path for path in fuzzing.tree(folder) if not path.startswith(f"{out}/")}
    assert after == set(outside)


# Models

WORD = st.text(string.ascii_lowercase + string.digits + "._-", max_size=8) | st.text(max_size=8)
SPEC = st.one_of(
    st.text(max_size=30),
    st.tuples(
        st.sampled_from(["torchvision", "timm", "demo", "small", "a.b", "os", "for", "", "hf-hub"]),
        st.sampled_from([":", "::", "", ".", ":local-dir:", ":hf-hub:"]),
        WORD,
    ).map("".join),
    st.sampled_from(["torchvision:resnet18x", "timm:resnet18.a2", "timm:hf-hub:a/b", "os:abort"]),
)


@pytest.fixture
def offline(monkeypatch) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    huggingface = sys.modules.get("huggingface_hub.constants")
    if huggingface is not None:  # imported by another test
        monkeypatch.setattr(huggingface, "HF_HUB_OFFLINE", True)


@cases(150)
@given(spec=SPEC, weights=st.just("none") | st.text(max_size=8) | st.just("no.pth"))
def test_model_specs(tally, offline, spec, weights):
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    with WATCH.on() as seen:
        end = fuzzing.load(spec, weights)
    tally.add(end)
    assert not seen, (spec, seen)


# The command line

WATCH = fuzzing.Watch()
SMALL = """
from torch import nn
from gradcampp_ext.imaging import Recipe
from gradcampp_ext.models import Classes, LoadedModel

def net():
    layers = nn.Conv2d(3, 4, 5, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    classes = Classes(("cat", "dog", "kite"))
    model = nn.Sequential(*layers, nn.Linear(4, 3))
    return LoadedModel(model, Recipe((24, 24), "stretch", (24, 24)), classes)
"""
# What would be imported from the working folder, were anything but the factory looked for there.
TRAPS = ("timm", "torchvision", "pyarrow", "webdataset", "datasets", "transformers", "safetensors",
         "efficientnet_lite_pytorch", "matplotlib", "zarr", "scipy", "sitecustomize")  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder to work in, with a network, pictures, lists, and traps."""
    # What libraries do once, when they are imported or first asked: a list of fonts is written,
    # a folder for compiled code made, uname run.
    pytest.importorskip("matplotlib.font_manager")
    pytest.importorskip("timm")
    platform.platform()
    place = tmp_path_factory.mktemp("place")
    (place / "in" / "cat").mkdir(parents=True)
    (place / "in" / "a.png").write_bytes(PNG)
    (place / "in" / "cat" / "b.png").write_bytes(PNG)
    (place / "broken").mkdir()
    (place / "broken" / "c.png").write_bytes(PNG[:60])
    (place / "list.csv").write_text("path,label\nin/a.png,dog\nin/cat/b.png,cat\n")
    (place / "boxes.csv").write_text("path,left,top,right,bottom\nin/a.png,0,0,6,6\n")
    (place / "names.txt").write_text("cat\ndog\nkite\n")
    (place / "small.py").write_text(SMALL)
    for suffix in (".parquet", ".tar", ".pth"):
        (place / f"some{suffix}").write_bytes(SEEDS[suffix][-1])
    return place


TOKEN = st.text(max_size=9) | st.sampled_from(
    ["", "0", "-1", "1", "3", "1e9", "nan", "inf", "-inf", "9" * 30, "٣", "a" * 300, "in", "cat",
     "none", "list.csv", "boxes.csv", "names.txt", "some.pth", "some.tar", "in/a.png", "hf:x@y",
     "\x1b[2J", "a\nb", "\udcff", "[red]", "[/]", "{0..3}.tar", "{", "*", "in/*.png", "--", "-"]
)  # fmt: skip
VALUES_OF = {
    "--model": ["small:net", "small:net", "small:net", "small:nothing", "timm:no", "", ":", "a"],
    "--weights": ["none", "no.pth", "some.pth", "list.csv"],
    "--method": [*methods.METHODS, "gradcam++"],
    "--target-layer": ["0", "1", "2:input", "4", "9", "", "0:input"],
    "--fuse": ["mean", "max", "min"],
    "--target": ["predicted", "label", "cat", "2", "3", "unicorn", "9" * 30],
    "--top-k": ["1", "2", "3", "4", "0", "9" * 30],
    "--size": ["8", "8x9", "0", "x", "8x", "1x1", "99999999999", "-3", "1e3"],
    "--recipe": ["model", "article", "article-fit", "x"],
    "--labels": ["list.csv", "in", "no.csv", "some.parquet", "small.py"],
    "--class-names": ["names.txt", "list.csv", "in", "some.pth"],
    "--overlays": ["jpg", "png", "webp", "none", "gif"],
    "--image-weight": ["0.5", "0", "nan", "inf", "-1", "1e39"],
    "--heatmap-weight": ["0.5", "1e300", "nan"],
    "--colormap": ["jet", "viridis_r", "beige", ""],
    "--maps": ["image", "feature", "none"],
    "--maps-as": ["npy", "parquet", "zarr", "hdf5"],
    "--maps-dtype": ["float16", "float32", "int8"],
    "--device": ["cpu", "auto", "cuda:99", "meta", "mps", "", "CPU", "xla", "cpu:7"],
    "--dtype": ["float32", "bfloat16", "float16"],
    "--batch-size": ["1", "2", "0", "9" * 20, "x"],
    "--workers": ["0", "-1", "x", ""],
    "--ray-address": ["auto"],
    "--methods": ["gradcampp", "gradcam,random", "center:x=1", "a:b:c", "", "gradcampp:eps=nan"],
    "--layers": ["0", "1,2", ",", "nowhere"],
    "--metrics": ["drop", "all", "localization", "road,coherency", "", "insertion"],
    "--space": ["input", "pixels"],
    "--steps": ["1", "4", "0", "9" * 30],
    "--insertion-from": ["blur", "zero", "x"],
    "--road": ["10,50", "", "nan", "100", "x", "1e-9", "99.9999"],
    "--tolerance": ["3", "nan", "-1", "inf"],
    "--samples": ["1", "2", "0"],
    "--radius": ["0.1", "nan", "inf", "0", "1e300"],
    "--stages": ["1", "2", "0"],
    "--boxes": ["boxes.csv", "list.csv", "no.csv", "in"],
    "--title": ["x", "<b>", "\udcff"],
}
OPTIONS = {
    "explain": ["--model", "--weights", "--method", "--target-layer", "--fuse", "--target",
                "--top-k", "--size", "--recipe", "--labels", "--class-names", "--overlays",
                "--image-weight", "--heatmap-weight", "--colormap", "--maps", "--maps-as",
                "--maps-dtype", "--device", "--dtype", "--batch-size", "--workers",
                "--ray-address"],
    "evaluate": ["--model", "--weights", "--methods", "--layers", "--target", "--metrics",
                 "--space", "--steps", "--insertion-from", "--road", "--tolerance", "--samples",
                 "--radius", "--stages", "--recipe", "--labels", "--boxes", "--class-names",
                 "--device", "--dtype", "--batch-size", "--workers"],
    "report": ["--title"],
    "layers": ["--weights"],
    "info": [],
    "nothing": ["--model"],
}  # fmt: skip
FLAGS = ["--overwrite", "--quiet", "--json-progress", "--table", "--report", "--nonsense", "-h"]
OUT = st.sampled_from(["out", "out", "out/deep/er", "out/new\nline", "out/-x", "out/\udcff",
                       "list.csv/under", "in/a.png", "o" * 300])  # fmt: skip


@st.composite
def commands(draw: Any) -> tuple[list[str], str | None]:
    """Words of a command line, and where its outputs may go."""
    command = draw(st.sampled_from(["explain"] * 4 + ["evaluate", *OPTIONS]))
    words = [command]
    takes = {"explain": ["in", "in/a.png", "list.csv", "broken", "some.parquet", "some.tar"],
             "evaluate": ["in", "list.csv"], "report": ["out", "in"],
             "layers": ["small:net", "small:no"]}.get(command, [])  # fmt: skip
    if takes and draw(st.integers(0, 9)):
        words.append(draw(st.sampled_from(takes)))
    if command in ("explain", "evaluate"):  # by the demo network and a decoding process it is slow
        words += ["--model", "small:net", "--workers", "0"]
        if command == "evaluate":
            words += ["--stages", "1", "--steps", "2", "--samples", "1"]
    most = draw(st.integers(0, 4))
    for name in draw(st.lists(st.sampled_from(OPTIONS[command] or [""]), max_size=most)):
        value = draw(
            st.sampled_from(VALUES_OF.get(name, [""]))
            | (TOKEN if most > 2 and name != "--workers" else st.nothing())
        )
        words += [f"{name}={value}"] if draw(st.integers(0, 5)) == 0 else [name, value]
    words += draw(st.lists(st.sampled_from(FLAGS[:5]), max_size=2))
    if draw(st.integers(0, 4)) == 0:
        words += draw(st.lists(TOKEN | st.sampled_from(FLAGS), max_size=2))
    out = draw(st.none() | OUT) if draw(st.integers(0, 9)) == 0 else draw(OUT)
    if command in ("explain", "evaluate") and out is not None:
        words[1:1] = ["--out", out]
    return words, out


def reaches_out(words: list[str]) -> bool:
    """Whether words name what lies outside of the working folder, or another place for outputs."""
    return any(
        word.startswith(("/", "..", "~", "-o", "hf")) or "/.." in word or "=/" in word
        or "\0" in word or ("o" in word and word[:1] == "-" and word[1:2] != "-")
        for word in words
    )  # fmt: skip


@cases(40)
@given(command=commands())
def test_command_lines(tally, place, offline, command):
    words, out = command
    assume(not reaches_out([w for w in words if w != out]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(sys, "path", list(sys.path))
        patch.setenv("HOME", str(place / "home"))
        patch.setenv("COLUMNS", "200")
        before = fuzzing.tree(place)
        try:
            with WATCH.on() as seen:
                result = CliRunner().invoke(app, words)
            after = fuzzing.tree(place)
        finally:
            sys.modules.pop("small", None)
            shutil.rmtree(place / "out", ignore_errors=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(words) from result.exception
    assert result.exit_code in (0, 1, 2), (words, result.exit_code)
    assert "Traceback" not in result.output
    if result.exit_code:
        assert result.stderr.strip(), words
    tally.add(f"exit {result.exit_code}: {last_line(result.stderr)}" if result.exit_code else "ok")

    root = str(place / "out")
    changed = {path for path in after if path not in before or after[path] != before[path]}
    changed |= before.keys() - after.keys()
    assert {path for path in changed if not inside(path, root)} == set(), words
    assert [one for one in seen if one[0] in fuzzing.OTHERS] == []
    tried = os.path.abspath(place / (out or "out"))  # noqa: PTH100 - of any text
    assert [one for one in seen if not (inside(one[1], root) or inside(one[1], tried))] == [], words


def inside(path: str, root: str) -> bool:
    return path == root or path.startswith(f"{root}{os.sep}")


def last_line(text: str) -> str:
    lines = [line.strip("│╭╮╰╯─ ") for line in text.splitlines()]
    return next((line for line in reversed(lines) if line), "")


def test_nothing_but_the_factory_is_imported_from_the_working_folder(tmp_path):
    """In a process of its own, since this one has imported everything already."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(PNG)
    for name in TRAPS:
        (tmp_path / f"{name}.py").write_text(
            f"open({str(tmp_path / 'sprung')!r}, 'a').write('{name} ')"
        )
    program = """
import sys
from gradcampp_ext.cli import app
for words in sys.argv[1:]:
    try:
        app(words.split())
    except SystemExit as ended:
        print(ended.code)
"""
    commands = [
        "explain in --model torchvision:no --out out",
        "explain in --model timm:no --weights none --out out",
        "layers demo --weights no.safetensors",
    ]
    command = [sys.executable, "-P", "-c", program, *commands]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.split() == ["2"] * len(commands), run.stderr
    assert not (tmp_path / "sprung").exists(), (tmp_path / "sprung").read_text()
