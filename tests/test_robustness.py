"""Many calls, threads, processes, exceptions and hostile names: nothing leaks, breaks or escapes.

The figures are printed at the end of a run. ROBUSTNESS_CALLS=100000 takes minutes; without it the
same is done with fewer calls.
"""

from __future__ import annotations

import gc
import json
import os
import re
import sys
import tarfile
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import PACKAGE, png, tree
from test_batch import make_model, run, write_pictures
from torch import nn
from typer.testing import CliRunner

import gradcampp_ext as gx
from gradcampp_ext import batch
from gradcampp_ext.batch import mapset, report
from gradcampp_ext.batch.record import RecordError, safe_name
from gradcampp_ext.cli import app

CALLS = int(os.environ.get("ROBUSTNESS_CALLS", "4000"))
EXCEPTIONS = 1000


class Net(nn.Module):
    """Has what explanations could disturb: dropout, batch normalisation, frozen parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU())
        self.drop, self.pool = nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1)
        self.hidden, self.head = nn.Linear(8, 8), nn.Linear(8, 5)
        self.features[0].weight.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.drop(self.features(images))).flatten(1)
        return self.head(self.hidden(x).relu())


def state(model: nn.Module) -> dict[str, Any]:
    """All that a call has to leave as it is."""
    found: dict[str, Any] = {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
    }
    for name, module in model.named_modules():
        hooks = [v for k, v in vars(module).items() if k.endswith("_hooks") and v]
        found[f"{name} module"] = (module.training, hooks, sorted(vars(module)))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        grad = None if tensor.grad is None else tensor.grad.clone()
        found[f"{name} tensor"] = (tensor.requires_grad, grad, tensor._version, tensor.data_ptr())
    return found


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(plain, value))
        return value.tolist() if isinstance(value, torch.Tensor) else value

    return {k: plain(v) for k, v in before.items()} == {k: plain(v) for k, v in after.items()}


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Of torch: small calls by several wait for each other, and for other programs, most of all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")


@needs_proc
@pytest.mark.parametrize("what", ["op", "op with backward", "arrays", "explainer", "overlay"])
def test_memory_stays_flat_over_many_calls(what, one_thread, request):
    a, g = torch.rand(2, 16, 7, 7), torch.randn(2, 16, 7, 7)
    images = torch.rand(2, 3, 16, 16)
    model = Net().eval()
    explainer = gx.Explainer(model, "features")
    leaf = a.clone().requires_grad_()
    pictures, maps = torch.rand(2, 3, 14, 14), torch.rand(2, 14, 14)
    calls = {
        "op": lambda: gx.cam(a, g, size=(14, 14)),
        "op with backward": lambda: torch.autograd.grad(gx.cam(leaf, g).sum(), leaf),
        "arrays": lambda: gx.arrays.cam(a.numpy(), g.numpy(), size=(14, 14), threads=1),
        "explainer": lambda: explainer(images, topk=2),
        "overlay": lambda: gx.overlay(pictures, maps),
    }
    call, count = calls[what], CALLS if what in ("op", "arrays") else CALLS // 10
    before = state(model)
    for _ in range(200):
        call()
    gc.collect()
    objects = len(gc.get_objects())  # first, as the list of them takes memory itself
    start, begin = resident(), time.perf_counter()
    for _ in range(count):
        call()
    gc.collect()
    grown, more = resident() - start, len(gc.get_objects()) - objects
    seconds = time.perf_counter() - begin
    request.node.user_properties.append(
        (
            "figures",
            f"{what}: {count} calls in {seconds:.1f} s, {grown / 1024:+.0f} KiB of memory, "
            f"{more:+} Python objects",
        )
    )
    # a map kept by each call would be 1.5 KiB and more; the allocator may move a little
    assert grown < max(2 * 2**20, count * 64)
    assert more < 100
    assert same(before, state(model))


def test_eight_explainers_at_once_on_one_model():
    """Different layers, methods and targets on shared modules, whose hooks meet."""
    model = Net().eval()
    images = [
        torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(n)) for n in range(8)
    ]
    layers = ["features", "features.0", "features.2:input", ["features.1", "features"]]
    explainers = [
        gx.Explainer(
            model, layers[n % 4], list(gx.METHODS)[n], head="auto" if n % 2 else "autograd"
        )
        for n in range(8)
    ]
    before = state(model)
    expected = [explainers[n](images[n], targets=n % 5) for n in range(8)]
    barrier = threading.Barrier(8)

    def work(n: int) -> int:
        barrier.wait()
        right = 0
        for _ in range(25):
            found = explainers[n](images[n], targets=n % 5)
            right += torch.equal(found.maps, expected[n].maps)
            right += torch.equal(found.scores, expected[n].scores)
        return right

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [50] * 8
    assert same(before, state(model))


class Explained(torch.utils.data.Dataset):
    """Maps made in the worker, by an explainer that came there or was made there."""

    def __init__(self, explainer: gx.Explainer) -> None:
        self.explainer = explainer

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(index))
        return self.explainer(images, topk=2).maps[0]


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.skipif(sys.platform != "linux", reason="starts processes as Linux does")
def test_explainers_in_workers_of_a_data_loader(context):
    torch.manual_seed(3)
    data = Explained(gx.Explainer(Net().eval(), "features"))
    expected = [data[index] for index in range(6)]  # by all threads, alive when processes fork
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=2, multiprocessing_context=context, timeout=100
    )
    for found, wanted in zip(loader, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


class FailureError(Exception):
    """Of a layer of somebody's."""


def fail(*_: Any) -> None:
    raise FailureError("a layer fails")


FAILURES = {
    "before the layer": lambda m: m.features[0].register_forward_pre_hook(fail),
    "in the layer": lambda m: m.features[1].register_forward_hook(fail),
    "behind the layer": lambda m: m.hidden.register_forward_hook(fail),
    "in the backward pass": lambda m: m.hidden.register_full_backward_hook(fail),
}


@pytest.mark.parametrize("kind", [FailureError, KeyboardInterrupt], ids=lambda kind: kind.__name__)
def test_a_thousand_exceptions(kind, one_thread, monkeypatch, request):
    """Everywhere in a call, in every mode that a caller can be in: all is as before."""
    monkeypatch.setattr(sys.modules[__name__], "FailureError", kind)
    model = Net()
    model.hidden.eval()  # flags that differ
    images = torch.rand(2, 3, 32, 32)
    model(images).sum().backward()
    explainers = [
        gx.Explainer(model, "features"),
        gx.Explainer(model, ["features.0", "features"], "layercam", head="autograd"),
        gx.Explainer(model, "features", average=gx.Smooth(samples=2)),
        gx.Explainer(model),  # looks for its layer first
    ]
    modes = [torch.enable_grad, torch.no_grad, torch.inference_mode]
    raised = 0
    for number in range(EXCEPTIONS // 2):
        where = list(FAILURES)[number % 4]
        explainer = explainers[number // 4 % 4]
        with (
            modes[number // 16 % 3](),
            torch.autocast("cpu", enabled=number % 7 == 0),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # of torch, about full backward hooks
            handle = FAILURES[where](model)
            before = state(model)
            with pytest.raises(kind):
                explainer(images, targets=1)
            raised += 1
            assert same(before, state(model)), where
            handle.remove()
    with torch.no_grad():
        assert explainers[0](images).maps.isfinite().all()
    request.node.user_properties.append(("figures", f"{raised} {kind.__name__}s in a forward, "
                                         "all flags restored"))  # fmt: skip


# Names

HOSTILE = [
    "new\nline.png", "carriage\rreturn.png", "\x1b[2J\x1b[31mred.png", "bell\x07.png", "\x7f.png",
    "<script>hacked()<\u2215script>.png", '"><img src=x onerror=hacked()>.png', "&lt;b&gt;.png",
    "-rf.png", "--out=elsewhere.png", "-.png", "...png", "..%2f..%2fx.png", "..\\..\\x.png",
    "a..png", " leading and trailing .png", "con.png", "$(touch hacked).png", "`touch hacked`.png",
    "; touch hacked #.png", "|touch hacked.png", "%s%n%x.png", "{0..3}.png", "[a-z]*?.png",
    "\u202egnp.exe.png", "\u2028.png", "\u00e9.png", "e\u0301.png", "\u00df.png", "\U0001f408.png",
    "'; DROP TABLE pictures;--.png", "hf:cats@train.png", "a" * 251 + ".png",
    "\u00e9" * 125 + ".png",
]  # fmt: skip
RAW = [b"not-utf8-\xff.png", b"\xc3\x28.png", b"\xed\xa0\x80.png", b"\xf0\x9f.png"]


@pytest.fixture
def hostile(tmp_path) -> Path:
    folder = tmp_path / "in"
    for parent in ("", "..hidden", "-dash", "new\nline", "<b>", " "):
        (folder / parent).mkdir(parents=True, exist_ok=True)
        (folder / parent / "plain.png").write_bytes(png())
    for name in HOSTILE:
        (folder / name).write_bytes(png())
    for name in RAW:
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(png())
    (folder / "broken\n\x1b[2J<script>hacked()").with_suffix(".png").write_bytes(b"no picture")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "dangling.png").symlink_to("nowhere")
    return folder


SMALL = """
from torch import nn
from gradcampp_ext.imaging import Recipe
from gradcampp_ext.models import LoadedModel

def net():
    layers = nn.Conv2d(3, 4, 5, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    recipe = Recipe((24, 24), "stretch", (24, 24))
    return LoadedModel(nn.Sequential(*layers, nn.Linear(4, 3)), recipe)
"""


@pytest.fixture
def small(tmp_path, monkeypatch) -> Iterator[Path]:
    (tmp_path / "small.py").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("small", None)


def gradcampp(*words: str, code: int) -> Any:
    result = CliRunner().invoke(app, [*words])
    assert result.exit_code == code, result.output
    return result


def test_hostile_names_through_the_whole_pipeline(small, hostile):
    before = tree(small)
    options = ["--model", "small:net", "--workers", "0", "--report", "--table",
               "--maps-as", "npy", "--maps-as", "parquet"]  # fmt: skip
    result = gradcampp("explain", "in", "--out", "out", *options, code=1)
    # what is printed cannot steer a terminal
    assert all(c.isprintable() or c == "\n" for c in result.output)
    rows = [json.loads(line) for line in (small / "out" / "results.jsonl").open()]
    hidden = sum(name.startswith(".") for name in [*HOSTILE, "..hidden"])
    expected = len(HOSTILE) + len(RAW) + 6 - hidden
    assert len(rows) == expected
    assert {os.fsencode(row["path"]) for row in rows} <= {
        os.fsencode(p) for p in Path("in").rglob("*")
    }
    failures = [json.loads(line) for line in (small / "out" / "errors.jsonl").open()]
    assert len(failures) == 3  # the broken one and the two links
    after = tree(small)
    new = {path for path in after if path not in before}
    assert {path for path in new if not path.startswith(f"{small}/out")} == set()
    assert all(after[path] == content for path, content in before.items())
    for column in ("overlay", "map", "thumbnail", "grey"):
        files = [row["files"][column] for row in rows]
        assert len({file.casefold() for file in files}) == expected
        assert all((small / "out" / file).is_file() for file in files)
        for file in files:
            assert all(c.isprintable() for c in file)
            assert all(
                part not in ("", ".", "..") and part[0] not in "-." for part in file.split("/")
            )
    for page in [small / "out/report/index.html", *(small / "out/report/data").iterdir()]:
        text = page.read_text(encoding="utf-8")
        assert not re.search("<script>hacked|<img src=x|[\u2028\u202e\x00-\x08\x1b]", text)
    again = gradcampp("explain", "in", "--out", "out", *options, code=1)
    assert f"{expected} done by an earlier run" in again.output


def test_lists_and_labels_with_hostile_names(small, hostile):
    names = ["new\nline.png", "-rf.png", "\x1b[2J\x1b[31mred.png", os.fsdecode(RAW[0])]
    rows = [json.dumps({"path": f"in/{name}", "class_index": 1}) for name in names]
    odd = ["in/../../../../../etc/hostname", "a\0b.png", "\ud800.png", "..", ".", "/", "x" * 5000]
    rows += [json.dumps({"path": path, "class_index": 1}) for path in odd]
    (small / "list.jsonl").write_text("\n".join(rows) + "\n")
    options = ["--model", "small:net", "--workers", "0", "--out"]
    gradcampp("explain", "list.jsonl", *options, "out", code=1)
    done = [json.loads(line) for line in (small / "out" / "results.jsonl").open()]
    assert [row["path"] for row in done] == [f"in/{name}" for name in names]
    assert all(row["label"] == 1 for row in done)
    assert len((small / "out" / "errors.jsonl").read_text().splitlines()) == len(odd)
    gradcampp("explain", "in", "--labels", "list.jsonl", *options, "other", code=1)
    # and a name that is longer than any file may have
    result = gradcampp("explain", "y" * 5000, *options, "third", code=1)
    assert "File name too long" in result.output
    made = {path.name for path in small.iterdir()} - {"__pycache__"}
    assert made == {"in", "list.jsonl", "small.py", "out", "other", "third"}


def test_a_file_called_like_a_command_is_not_run(small, monkeypatch):
    """WebDataset's URLs of the kind pipe: are commands; a name that a glob found is none."""
    pytest.importorskip("webdataset")
    names = [
        "pipe:touch hacked #.tar",
        "pipe:touch hacked; cat shard #.tar.gz",
        "hf:cats@train.tar",
    ]
    for name in names:
        mode = "w:gz" if name.endswith("gz") else "w"
        with tarfile.open(small / name.replace("/", "_"), mode) as tar:
            (small / "p.png").write_bytes(png())
            tar.add(small / "p.png", "0.png")
    options = ["--model", "small:net", "--workers", "0", "--out"]
    for number, arguments in enumerate([["*.tar*"], names, names[:1], names[2:]]):
        gradcampp("explain", *arguments, *options, f"out{number}", code=0)
        rows = (small / f"out{number}" / "results.jsonl").read_text().splitlines()
        assert len(rows) == (1 if len(arguments) == 1 and number else 3)
    assert not (small / "hacked").exists()


def test_names_too_long_for_a_file_system_are_shortened(tmp_path):
    wanted = "/".join(["folder"] * 700) + "/cat"
    name = safe_name(wanted)
    assert len(name) < 300
    assert name.endswith("/cat")
    assert safe_name(name) == name
    assert safe_name(wanted.replace("folder", "holder", 1)) != name
    pictures = [("d/" * 2500 + "0", png()), ("e/" * 2500 + "0", png())]
    items = [batch.Item(path, path, content) for path, content in pictures]

    class Source(list):
        read = staticmethod(batch.Files.read)

    options = batch.Options(workers=0)
    summary = batch.run(Source(items), make_model(), tmp_path / "out", [batch.Maps()], options)
    assert (summary.explained, summary.failed) == (2, 0)


# Links


def sinks() -> list[Any]:
    return [batch.Overlays("png"), batch.Maps(), batch.MapSet("parquet"), batch.MapSet("zarr"),
            batch.ResultsTable(), *report.sinks()]  # fmt: skip


@pytest.fixture
def pictures(tmp_path) -> Path:
    write_pictures(tmp_path / "in", 3)
    (tmp_path / "in" / "broken.png").write_bytes(b"")
    return tmp_path / "in"


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """A folder that nothing may be written to."""
    folder = tmp_path / "elsewhere"
    (folder / "data").mkdir(parents=True)
    (folder / "precious").write_text("keep")
    (folder / "data" / "precious").write_text("keep")
    return folder


def test_a_results_folder_may_be_a_link(tmp_path, pictures):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    assert run([pictures], make_model(), tmp_path / "out", sinks()).explained == 3
    report.build(tmp_path / "out")
    assert (tmp_path / "disk" / "results.jsonl").exists()
    assert (tmp_path / "out").is_symlink()
    assert run([pictures], make_model(), tmp_path / "disk", sinks()).resumed == 3
    assert run([pictures], make_model(), tmp_path / "out", sinks(), overwrite=True).explained == 3


@pytest.mark.parametrize("target", ["nowhere", "out"])
def test_a_results_folder_that_is_a_link_to_nothing(tmp_path, pictures, target):
    (tmp_path / "out").symlink_to(target)
    with pytest.raises(RecordError, match=r"is a symbolic link to .*, which does not exist; make"):
        run([pictures], make_model(), tmp_path / "out")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("name", ["overlays/000.png", "maps/000.npy", "report/index.html",
                                  "results.parquet", "maps.parquet/part-000000.parquet",
                                  ".run.json", "maps.parquet/.tail.partial",
                                  "maps.parquet/.tail", ".results.parquet"])  # fmt: skip
def test_links_in_the_place_of_files_are_replaced(tmp_path, pictures, elsewhere, name):
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).symlink_to(elsewhere / "precious")
    before = tree(elsewhere)
    assert run([pictures], make_model(), out, sinks()).explained == 3
    report.build(out)
    assert tree(elsewhere) == before
    left = [str(path) for path in out.rglob("*") if path.is_symlink()]
    assert left in ([], [str(out / name)] if Path(name).name.startswith(".") else [])


@pytest.mark.parametrize(
    "name",
    ["results.jsonl", "errors.jsonl", "overlays", "maps", "maps.zarr", "maps.parquet", "report",
     "report/images", ".partial"],
)  # fmt: skip
@pytest.mark.parametrize("overwrite", [False, True])
def test_links_in_the_place_of_folders_and_records_are_refused(
    tmp_path, pictures, elsewhere, name, overwrite
):
    out = tmp_path / "out"
    run([pictures], make_model(), out, sinks())
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    if (out / name).is_dir():
        (out / name).rename(tmp_path / "moved")
    else:
        (out / name).unlink(missing_ok=True)
    target = elsewhere / "precious" if name.endswith("jsonl") else elsewhere
    (out / name).symlink_to(target)
    write_pictures(pictures, 4)
    before = tree(elsewhere)
    said = "overwritten" if overwrite else "nothing"
    try:
        run([pictures], make_model(), out, sinks(), overwrite=overwrite)
        report.build(out)
    except RecordError as error:
        said = str(error)
    assert re.search(r"symbolic link|cannot write in|lacks maps|overwritten", said)
    assert tree(elsewhere) == before


def test_the_report_does_not_follow_links(tmp_path, pictures, elsewhere):
    out = tmp_path / "out"
    run([pictures], make_model(), out, sinks())
    (out / "report").rename(tmp_path / "moved")
    (out / "report").symlink_to(elsewhere)
    before = tree(elsewhere)
    with pytest.raises(
        RecordError, match=r"leads out of .*; remove the symbolic link|outputs stay"
    ):
        report.build(out)
    assert tree(elsewhere) == before


# Pickles


class Bomb:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("exploded"),)


def test_no_pickle_is_loaded(small, pictures):
    """Everywhere that a file from strangers is taken: weights, lists, arrays, shards, data sets."""
    import io
    import pickle

    zarr = pytest.importorskip("zarr")
    bomb = io.BytesIO()
    torch.save({"x": Bomb()}, bomb)
    legacy = io.BytesIO()
    torch.save(Bomb(), legacy, _use_new_zipfile_serialization=False)
    array = io.BytesIO()
    np.save(array, np.array([Bomb()], dtype=object), allow_pickle=True)
    contents = [bomb.getvalue(), legacy.getvalue(), pickle.dumps(Bomb()), array.getvalue()]
    options = ["--workers", "0", "--out", "out"]
    for number, content in enumerate(contents):
        for suffix in (".pth", ".pt", ".bin", ".safetensors", ".csv", ".jsonl", ".parquet", ".tar",
                       ".tar.gz", ".npy", ".png", ".txt", ".json", ".pkl"):  # fmt: skip
            file = small / f"bomb{number}{suffix}"
            file.write_bytes(content)
            for words in (
                [str(file), "--model", "small:net"],
                ["in", "--model", "small:net", "--weights", str(file)],
                ["in", "--model", "small:net", "--labels", str(file)],
                ["in", "--model", "small:net", "--class-names", str(file)],
            )[: 4 if number == 0 else 2]:
                CliRunner().invoke(app, ["explain", *words, *options])
    assert not (small / "exploded").exists()
    # maps of a run in a folder that somebody else has filled
    group = zarr.open_group(small / "maps.zarr", mode="w", zarr_format=2)
    group.create_array("map", shape=(2, 2, 2), dtype="f4", chunks=(2, 2, 2))
    meta = small / "maps.zarr" / "map" / ".zarray"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"compressor": {"id": "pickle"}}))
    (small / "maps.zarr" / "map" / "0.0.0").write_bytes(pickle.dumps(Bomb()))
    parts = mapset._ZarrParts.__new__(mapset._ZarrParts)
    parts.folder = small / "maps.zarr"
    with pytest.raises((FileNotFoundError, KeyError, ValueError)):
        parts.load(0)
    assert not (small / "exploded").exists()
    assert (pickle.loads(contents[2]), (small / "exploded").exists())[1], "the bomb is a bomb"


def test_libraries_that_would_unpickle_are_told_not_to(tmp_path, monkeypatch):
    """A checkpoint that timm's own loader reads, by an old version of it that unpickles."""
    timm = pytest.importorskip("timm")
    from gradcampp_ext import models

    monkeypatch.chdir(tmp_path)
    torch.save({"x": Bomb()}, tmp_path / "bomb.pth")

    def create_model(name: str, **_: Any) -> nn.Module:
        torch.load(tmp_path / "bomb.pth", weights_only=False)
        return nn.Identity()

    monkeypatch.setattr(timm, "create_model", create_model)
    for weights in (None, "none"):
        with pytest.raises(models.ModelError, match=r"cannot be fetched: .*[Ww]eights"):
            models.load("timm:resnet18", weights=weights)
    assert not (tmp_path / "exploded").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_sources_that_load_pickles_or_foreign_code_say_so_in_the_text():
    """The calls that could, all of them, with the argument that forbids it."""
    import ast

    found = []
    for file in sorted(Path(PACKAGE).rglob("*.py")):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            name = ast.unparse(call.func)
            given = {k.arg: ast.unparse(k.value) for k in call.keywords}
            where = f"{file.name}:{call.lineno}"
            if name in ("torch.load", "torch.hub.load"):
                found.append(name)
                assert given.get("weights_only") == "True", where
            if name in ("np.load", "numpy.load", "np.save", "np.savez"):
                assert given.get("allow_pickle") == "False", where
            if name.endswith((".from_pretrained", "classifier.from_config")):
                found.append(name)
                assert given.get(None) == "_NO_CODE", where
            if re.search(r"(^|\.)(pickle|dill|joblib|shelve|cloudpickle)\.", name):
                assert file.name == "ray.py", where  # between the processes of one run
            # accelerate runs the script that it is asked to run
            assert name not in ("eval", "exec", "os.system") or file.name == "accelerate.py", where
            assert "shell" not in given, where
            assert not name.startswith("yaml.") or "safe" in name, where
            assert given.get("trust_remote_code", "False") == "False", where
    assert "torch.load" in found
    assert len([name for name in found if name.endswith("from_pretrained")]) == 3
