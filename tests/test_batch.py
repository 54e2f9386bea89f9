from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from gradcampp_ext import Explainer, batch, imaging
from gradcampp_ext.batch import engine as engine_module
from gradcampp_ext.batch import explaining
from gradcampp_ext.batch import record as record_module
from gradcampp_ext.batch.engine import statistics
from gradcampp_ext.batch.record import Record, RecordError, safe_name
from gradcampp_ext.batch.sources import read_labels
from gradcampp_ext.imaging import Recipe
from gradcampp_ext.models import Classes, LoadedModel

RECIPE = Recipe((32, 32), "cover", (36, 36))
CLASSES = Classes(("cat", "dog", "kite", "crane", "crane"), ("n1", "n2", "n3", "n4", "n5"))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4, padding=2), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.features(images)).flatten(1))


def make_model() -> LoadedModel:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return LoadedModel(Net().eval(), RECIPE, CLASSES, spec="tests:make_model")


@pytest.fixture
def model() -> LoadedModel:
    return make_model()


def write_pictures(folder: Path, count: int, *, start: int = 0) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for seed in range(start, start + count):
        generator = np.random.default_rng(seed)
        small = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((64 + seed, 48), Image.Resampling.BICUBIC)
        paths.append(folder / f"{seed:03}.png")
        image.save(paths[-1])
    return paths


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


SINKS = [batch.Overlays("png"), batch.Maps()]


def run(paths, model, out, sinks=SINKS, *, progress=None, stop=None, overwrite=False, **options):
    source = paths if isinstance(paths, batch.Dataset | batch.Stream) else batch.Files(paths)
    options = {"batch_size": 4, "workers": 0} | options
    return batch.run(
        source,
        model,
        out,
        sinks,
        batch.Options(**options),
        progress=progress,
        stop=stop,
        overwrite=overwrite,
    )


def test_outputs_are_the_explainers(tmp_path, model):
    paths = write_pictures(tmp_path / "in", 6)
    summary = run([tmp_path / "in"], model, tmp_path / "out")

    assert (summary.explained, summary.failed, summary.resumed) == (6, 0, 0)
    assert sum(summary.shares.values()) == pytest.approx(1)
    rows = lines(tmp_path / "out" / "results.jsonl")
    assert [row["path"] for row in rows] == [str(path) for path in paths]
    assert not (tmp_path / "out" / "errors.jsonl").exists()
    for path, row in zip(paths, rows, strict=True):
        image = imaging.read(path)
        picture = torch.from_numpy(RECIPE.picture(image)[None].copy())
        inputs = RECIPE.normalize(picture)
        with torch.no_grad():
            output = make_model().model(inputs)[0]
        expected = Explainer(make_model().model)(inputs)
        best = int(output.argmax())
        assert (row["predicted"], row["target"], row["rank"]) == (best, best, 1)
        assert row["predicted_name"] == row["target_name"] == CLASSES.names[best]
        assert row["score"] == pytest.approx(float(output[best]), rel=1e-4)
        assert row["probability"] == pytest.approx(float(output.softmax(0)[best]), rel=1e-4)
        assert row["predicted_probability"] == row["probability"]
        assert (row["width"], row["height"]) == image.size
        assert row["view"] == pytest.approx(RECIPE.view(*image.size))
        assert (row["label"], row["label_name"], row["right"]) == (None, None, None)
        saved = np.load(tmp_path / "out" / row["files"]["map"])
        assert (saved.dtype, saved.shape) == (np.float32, (32, 32))
        np.testing.assert_allclose(saved, expected.maps[0, 0].numpy(), atol=1e-4)
        drawn = np.asarray(Image.open(tmp_path / "out" / row["files"]["overlay"]))
        overlaid = expected.overlay(picture)[0, 0].numpy()
        assert np.abs(drawn.astype(int) - overlaid).max() <= 2
        y, x = np.unravel_index(saved.argmax(), saved.shape)
        left, top, right, bottom = row["view"]
        peak = [left + (x + 0.5) / 32 * (right - left), top + (y + 0.5) / 32 * (bottom - top)]
        assert row["peak"] == pytest.approx(peak, rel=1e-5)


def test_statistics_by_hand():
    maps = torch.zeros(1, 3, 8, 8)
    maps[0, 0, 3, 5] = 0.5  # all in one pixel, which is central
    maps[0, 1] = 1.0  # everywhere: 16 of 64 pixels are central
    figures = statistics(maps)
    assert figures["peak_x"][0, 0] == pytest.approx(5.5 / 8)
    assert figures["peak_y"][0, 0] == pytest.approx(3.5 / 8)
    assert figures["central_mass"][0, :2].tolist() == pytest.approx([1, 0.25])
    assert figures["entropy"][0, :2].tolist() == pytest.approx([0, np.log(64)], abs=1e-6)
    assert figures["mass"][0].tolist() == [0.5, 64, 0]
    assert figures["finite"].tolist() == [True]
    maps[0, 2, 0, 0] = np.nan
    assert statistics(maps)["finite"].tolist() == [False]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(tmp_path, model, workers):
    write_pictures(tmp_path / "in", 11)
    (tmp_path / "in" / "004.png").write_bytes(b"")
    run([tmp_path / "in"], model, tmp_path / "alone")
    run([tmp_path / "in"], model, tmp_path / "workers", workers=workers)
    assert tree(tmp_path / "workers") == tree(tmp_path / "alone")


def test_broken_pictures_are_reported_and_the_rest_is_done(tmp_path, model):
    paths = write_pictures(tmp_path / "in", 7)
    paths[0].write_bytes(b"")
    paths[3].write_bytes(paths[3].read_bytes()[:200])
    paths[4].write_bytes(b"text")
    missing = tmp_path / "missing.png"
    summary = run([tmp_path / "in", missing], model, tmp_path / "out")
    assert (summary.explained, summary.failed) == (4, 4)
    errors = lines(tmp_path / "out" / "errors.jsonl")
    assert [error["path"] for error in errors] == [
        str(path) for path in (paths[0], paths[3], paths[4], missing)
    ]
    reasons = [error["reason"] for error in errors]
    assert reasons[0] == "empty file (0 bytes)"
    assert "truncated" in reasons[1] or "damaged" in reasons[1]
    assert "not an image" in reasons[2]
    assert "No such file" in reasons[3]


def test_failures_are_tried_again(tmp_path, model):
    paths = write_pictures(tmp_path / "in", 5)
    good = paths[2].read_bytes()
    paths[2].write_bytes(b"")
    run([tmp_path / "in"], model, tmp_path / "out")
    paths[2].write_bytes(good)
    summary = run([tmp_path / "in"], model, tmp_path / "out")
    assert (summary.explained, summary.failed, summary.resumed) == (1, 0, 4)
    assert not (tmp_path / "out" / "errors.jsonl").exists()
    assert len(lines(tmp_path / "out" / "results.jsonl")) == 5


def test_top_k(tmp_path, model):
    paths = write_pictures(tmp_path / "in", 3)
    run([tmp_path / "in"], model, tmp_path / "out", topk=2)
    rows = lines(tmp_path / "out" / "results.jsonl")
    assert [row["rank"] for row in rows] == [1, 2] * 3
    inputs = RECIPE.normalize(torch.from_numpy(RECIPE.picture(imaging.read(paths[0]))[None].copy()))
    expected = Explainer(make_model().model)(inputs, topk=2)
    assert [row["target"] for row in rows[:2]] == expected.targets[0].tolist()
    assert [row["files"]["map"] for row in rows[:2]] == ["maps/000.top1.npy", "maps/000.top2.npy"]
    for k, row in enumerate(rows[:2]):
        saved = np.load(tmp_path / "out" / row["files"]["map"])
        np.testing.assert_allclose(saved, expected.maps[0, k].numpy(), atol=1e-4)


LAYERS = ("features.0", "pool:input", "late")


class Deep(Net):
    """Its layers have maps of two sizes, 8 x 8 and 4 x 4."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Conv2d(8, 8, 2, stride=2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        early = self.features(images)
        return self.head(self.pool(early).flatten(1) + self.late(early).relu().mean((2, 3)))


@pytest.mark.parametrize("topk", [1, 2])
def test_several_layers(tmp_path, topk):
    torch.manual_seed(6)
    deep = LoadedModel(Deep().eval(), RECIPE, CLASSES)
    paths = write_pictures(tmp_path / "in", 3)
    sinks = [batch.Overlays("png"), batch.Maps()]
    options = {"topk": topk, "target_layer": LAYERS}
    summary = run([tmp_path / "in"], deep, tmp_path / "out", sinks, **options)
    assert (summary.explained, summary.layer) == (3, ", ".join(LAYERS))
    rows = lines(tmp_path / "out" / "results.jsonl")
    assert [row["layer"] for row in rows] == list(LAYERS) * topk * 3
    assert [row["rank"] for row in rows] == [k for k in range(1, topk + 1) for _ in LAYERS] * 3
    assert len({row["files"]["map"] for row in rows}) == len(rows)
    assert rows[1]["files"]["map"] == f"maps/000{'.top1' if topk > 1 else ''}.pool_input.npy"
    inputs = RECIPE.normalize(torch.from_numpy(RECIPE.picture(imaging.read(paths[0]))[None].copy()))
    expected = Explainer(deep.model, LAYERS)(inputs, topk=topk).maps[0].flatten(0, 1)
    for row, maps in zip(rows, expected, strict=False):
        saved = np.load(tmp_path / "out" / row["files"]["map"])
        np.testing.assert_allclose(saved, maps.numpy(), atol=1e-4)
        assert row["entropy"] == pytest.approx(
            float(torch.special.entr(maps / maps.sum()).sum()), rel=1e-3
        )
    assert (expected[0] - expected[2]).abs().max() > 0.05
    before = tree(tmp_path / "out")
    results = tmp_path / "out" / "results.jsonl"
    results.write_bytes(b"".join(results.read_bytes().splitlines(keepends=True)[: 3 * topk + 1]))
    assert run([tmp_path / "in"], deep, tmp_path / "out", sinks, **options).resumed == 1
    assert tree(tmp_path / "out").keys() == before.keys()


@pytest.mark.parametrize("fuse", ["mean", "max"])
def test_fused_layers(tmp_path, fuse):
    torch.manual_seed(6)
    deep = LoadedModel(Deep().eval(), RECIPE, CLASSES)
    (path,) = write_pictures(tmp_path / "in", 1)
    run([path], deep, tmp_path / "out", target_layer=LAYERS, fuse=fuse)
    (row,) = lines(tmp_path / "out" / "results.jsonl")
    assert row["layer"] == f"{fuse}(features.0, pool:input, late)"
    inputs = RECIPE.normalize(torch.from_numpy(RECIPE.picture(imaging.read(path))[None].copy()))
    expected = Explainer(deep.model, LAYERS, fuse=fuse)(inputs)
    saved = np.load(tmp_path / "out" / row["files"]["map"])
    np.testing.assert_allclose(saved, expected.maps[0, 0].numpy(), atol=1e-4)
    run([path], deep, tmp_path / "feature", [batch.Maps("feature")], target_layer=LAYERS, fuse=fuse)
    (row,) = lines(tmp_path / "feature" / "results.jsonl")
    assert np.load(tmp_path / "feature" / row["files"]["map"]).shape == (8, 8)


def test_sizes_of_maps_and_overlays(tmp_path, model):
    paths = write_pictures(tmp_path / "in", 1)
    run(paths, model, tmp_path / "out", [batch.Overlays("jpg"), batch.Maps("feature", "float16")],
        size=(60, 80))  # fmt: skip
    (row,) = lines(tmp_path / "out" / "results.jsonl")
    assert Image.open(tmp_path / "out" / row["files"]["overlay"]).size == (80, 60)
    saved = np.load(tmp_path / "out" / row["files"]["map"])
    assert (saved.shape, saved.dtype) == ((8, 8), np.float16)


def test_a_class_as_target(tmp_path, model):
    write_pictures(tmp_path / "in", 3)
    run([tmp_path / "in"], model, tmp_path / "out", target=3)
    rows = lines(tmp_path / "out" / "results.jsonl")
    assert {row["target"] for row in rows} == {3}
    assert all(row["predicted_probability"] >= row["probability"] for row in rows)
    assert any(row["predicted"] != 3 for row in rows)


def test_labels_as_targets(tmp_path, model):
    paths = write_pictures(tmp_path / "in", 4)
    (tmp_path / "labels.csv").write_text(
        f"path,class_name\n{paths[0]},dog\nin/001.png,n3\nin/002.png,unicorn\nin/003.png,\n"
    )
    summary = run([tmp_path / "labels.csv"], model, tmp_path / "out", target="label")
    rows = lines(tmp_path / "out" / "results.jsonl")
    assert [(row["target"], row["label_name"]) for row in rows] == [(1, "dog"), (2, "kite")]
    assert [row["right"] for row in rows] == [row["predicted"] == row["label"] for row in rows]
    assert summary.labelled == 2
    assert summary.right == sum(row["right"] for row in rows)
    reasons = [error["reason"] for error in lines(tmp_path / "out" / "errors.jsonl")]
    assert "no class is called 'unicorn'" in reasons[0]
    assert "no label" in reasons[1]


def test_what_is_no_sink_is_told(tmp_path, model):
    with pytest.raises(TypeError, match="FileSink or SeriesSink, got Recipe"):
        run([tmp_path], model, tmp_path / "out", [RECIPE])


def test_options_that_exclude_each_other():
    with pytest.raises(ValueError, match="cannot go with a target"):
        batch.Options(topk=2, target=1)
    with pytest.raises(ValueError, match="batch_size and topk must be at least 1"):
        batch.Options(batch_size=0)
    with pytest.raises(ValueError, match="size must be 2 positive integers"):
        batch.Options(size=(0, 5))


# Sources


def test_files_folders_and_globs_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b/2.JPG", "b/1.png", "b/a/3.webp", "b/.hidden.png", "b/.git/4.png", "b/note.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    for name in ("x[1].png", "x1.png"):
        Path(name).touch()

    def items(*arguments: str) -> list[tuple[str, str]]:
        return [(item.path, item.name) for item in batch.Files(arguments)]

    assert items("b") == [("b/1.png", "1"), ("b/2.JPG", "2"), ("b/a/3.webp", "a/3")]
    assert items("b/note.txt") == [("b/note.txt", "note")]
    assert items("b/*.png") == [("b/1.png", "1")]
    assert items("b/**/*.webp") == [("b/a/3.webp", "3")]
    assert items("x[1].png") == [("x[1].png", "x[1]")]  # a file of that name comes before a glob
    assert items("x[12].png") == [("x1.png", "x1")]
    assert len(batch.Files(["b", "x1.png"])) == 4
    with pytest.raises(batch.SourceError, match="nothing matches"):
        items("y*.png")


def test_outputs_are_no_inputs(tmp_path, model):
    write_pictures(tmp_path, 3)
    out = tmp_path / "results"
    source = batch.Files([tmp_path], leave_out=out)
    for _ in range(2):
        batch.run(source, model, out, SINKS, batch.Options(workers=0))
    assert len(lines(out / "results.jsonl")) == 3
    assert len(batch.Files([tmp_path], leave_out=out)) == 3
    assert len(batch.Files([tmp_path])) == 6


def test_folder_names_as_labels(tmp_path):
    for folder in ("dog", "n3", "crane", "5", "holidays"):
        write_pictures(tmp_path / "in" / folder, 1)
    source = batch.Files([tmp_path / "in"], folder_label=CLASSES.known)
    labels = {Path(item.path).parent.name: item.label for item in source}
    assert labels == {"dog": "dog", "n3": "n3", "crane": None, "5": None, "holidays": None}
    (item,) = batch.Files([tmp_path / "in" / "dog"], folder_label=CLASSES.known)
    assert item.label == "dog"


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_manifests_and_label_files(tmp_path, suffix):
    write_pictures(tmp_path / "in", 3)
    rows = [{"path": "in/000.png", "label": "dog"}, {"path": "in/002.png", "label": 0}]
    file = tmp_path / f"list{suffix}"
    if suffix == ".csv":
        text = "\ufeffpath,label\n" + "".join(f"{row['path']},{row['label']}\n" for row in rows)
    else:
        text = "".join(json.dumps(row) + "\n\n" for row in rows)
    file.write_text(text, encoding="utf-8")
    items = list(batch.Files([file]))
    assert [item.path for item in items] == [str(tmp_path / row["path"]) for row in rows]
    assert [str(item.label) for item in items] == ["dog", "0"]
    source = batch.Files([tmp_path / "in"], labels=read_labels(file))
    assert [item.label for item in source] == ["dog", None, "0"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "file_name,label\nx.png,1\n", "line 2: one of the columns path, file"),
        ("a.csv", "path,score\nx.png,1\n", "one of the columns class_index, label"),
        ("a.csv", "", "no rows"),
        ("a.jsonl", '{"path": "x.png", "label": 1}\n{', "cannot be read"),
        ("a.jsonl", "[1]\n", "line 1: not a JSON object"),
        ("none.csv", None, "No such file"),
    ],
)
def test_label_files_that_cannot_be_used(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(batch.SourceError, match=message):
        read_labels(tmp_path / name)


class Rows(torch.utils.data.Dataset):
    labels = (1, 0, 2, 1, 0, 1)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> object:
        pixels = np.random.default_rng(index).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        picture = torch.from_numpy(pixels).permute(2, 0, 1)
        forms = [Image.fromarray(pixels), pixels, picture, picture / 255, picture / 255 - 0.5]
        if index == 5:
            raise KeyError("lost")
        return forms[index], self.labels[index]


LABELS = [2, "dog", np.int64(3), torch.tensor(0), None, torch.tensor([0, 1]), {"boxes": []}]


@pytest.mark.parametrize("kind", [batch.Dataset, batch.Stream])
def test_labels_of_pairs(tmp_path, model, kind):
    picture = Image.new("RGB", (40, 40))
    pairs = [(picture, label) for label in LABELS]
    run(kind([*pairs, [picture, 4], (picture, "tree"), picture]), model, tmp_path)
    rows = lines(tmp_path / "results.jsonl")
    assert [row["label"] for row in rows] == [2, 1, 3, 0, None, None, None, 4, None]
    (error,) = lines(tmp_path / "errors.jsonl")
    assert "its label cannot be used: no class is called 'tree'" in error["reason"]


@pytest.mark.parametrize("workers", [0, 2])
def test_datasets(tmp_path, model, workers):
    summary = run(batch.Dataset(Rows(), name="rows"), model, tmp_path, workers=workers)
    assert (summary.explained, summary.failed, summary.labelled) == (4, 2, 4)
    rows = lines(tmp_path / "results.jsonl")
    assert [(row["path"], row["label"]) for row in rows] == [
        (f"rows/{index}", Rows.labels[index]) for index in range(4)
    ]
    # whatever form a picture came in, the pixels are those
    for index, row in enumerate(rows):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        picture = RECIPE.picture(Image.fromarray(pixels))
        inputs = RECIPE.normalize(torch.from_numpy(picture[None].copy()))
        assert row["score"] == pytest.approx(
            float(make_model().model(inputs).detach().max()), rel=1e-4
        )
    reasons = [error["reason"] for error in lines(tmp_path / "errors.jsonl")]
    assert "the model's recipe does that" in reasons[0]
    assert "KeyError: 'lost'" in reasons[1]


def test_streams(tmp_path, model):
    def pictures():
        for index in range(5):
            yield Image.new("RGB", (40, 40), (index * 50, 0, 0)), index % 2

    summary = run(batch.Stream(pictures(), name="camera"), model, tmp_path, workers=1)
    assert summary.explained == 5
    assert [row["label"] for row in lines(tmp_path / "results.jsonl")] == [0, 1, 0, 1, 0]
    assert (tmp_path / "overlays" / "camera" / "4.png").exists()


@pytest.mark.slow
def test_workers_that_are_not_forked(tmp_path):
    write_pictures(tmp_path / "in", 6)
    run([tmp_path / "in"], make_model(), tmp_path / "whole", batch_size=2)
    code = textwrap.dedent(f"""
        import multiprocessing, sys
        from pathlib import Path
        if __name__ == "__main__":
            multiprocessing.set_start_method("spawn")
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            from test_batch import make_model, run, Image, batch
            model = make_model()
            source = batch.Files([{str(tmp_path / "in")!r}], folder_label=model.classes.known)
            batch.run(source, model, Path({str(tmp_path / "out")!r}),
                      [batch.Overlays("png"), batch.Maps()], batch.Options(batch_size=2, workers=2))
            pictures = (Image.new("RGB", (40, 40)) for _ in range(3))
            run(batch.Stream(pictures), model, Path({str(tmp_path / "stream")!r}), workers=1)
    """)
    (tmp_path / "spawned.py").write_text(code)
    subprocess.run([sys.executable, tmp_path / "spawned.py"], check=True, timeout=120)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert len(lines(tmp_path / "stream" / "results.jsonl")) == 3


# Names


def test_names_that_collide_and_odd_names(tmp_path, model):
    root = tmp_path / "in"
    (first,) = write_pictures(root, 1)
    content = first.read_bytes()
    first.unlink()
    names = ["a/cat.png", "b/cat.png", "a/Cat.jpg", "a/-rf.png", "a/new\nline.png", "a/...png",
             "a/\x1b[31mred.png", "a/caf\u00e9.png", "a/x.png", "a/x.jpg/y.png", "a/con.png",
             "a/" + "l" * 240 + ".png"]  # fmt: skip
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    raw = os.fsencode(root / "a") + b"/not-utf8-\xff.png"
    Path(os.fsdecode(raw)).write_bytes(content)
    given = [root / name for name in names] + [os.fsdecode(raw), root / "a/../b/cat.png"]
    out = tmp_path / "deep" / "out"
    summary = run(given, model, out)
    assert summary.explained == len(given)
    rows = lines(out / "results.jsonl")
    assert [os.fsencode(row["path"]) for row in rows] == [os.fsencode(path) for path in given]
    overlays = [row["files"]["overlay"] for row in rows]
    assert len({overlay.casefold() for overlay in overlays}) == len(given)
    assert overlays[0] == "overlays/cat.png"
    written = {file for file in tmp_path.rglob("*") if file.is_file()} - set(root.rglob("*"))
    assert all(file.resolve().is_relative_to(out) for file in written)
    assert len([file for file in written if file.parent.name == "overlays"]) == len(given)
    for overlay in overlays:
        assert all(c.isprintable() for c in overlay)
        assert not any(part.startswith(("-", ".")) for part in overlay.split("/"))


@given(st.text(st.characters(exclude_categories=()), max_size=300))
def test_safe_names_stay_inside(wanted):
    name = safe_name(wanted)
    parts = name.split("/")
    assert name
    assert ".." not in parts
    assert all(part not in ("", ".") and len(part.encode()) <= 200 for part in parts)
    assert not any(c in name for c in '\\:*?"<>|\0\n')
    assert Path("/out", name).resolve().is_relative_to("/out")
    assert safe_name(name) == name


def test_a_folder_called_like_an_output_is_not_in_its_way(tmp_path, model):
    (first,) = write_pictures(tmp_path / "in", 1)
    content = first.read_bytes()
    for name in ("a.png", "a.png.d/b.png"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    (tmp_path / "in" / "c").mkdir()
    (tmp_path / "in" / "c" / "x.png").mkdir()
    (tmp_path / "in" / "c" / "x.png" / "y.png").write_bytes(content)
    (tmp_path / "in" / "c" / "x.jpg").write_bytes(content)
    assert run([tmp_path / "in"], model, tmp_path / "out").failed == 0


# Nothing lost


def test_a_finished_run_is_not_done_again(tmp_path, model):
    write_pictures(tmp_path / "in", 5)
    run([tmp_path / "in"], model, tmp_path / "out")
    before = tree(tmp_path / "out")
    summary = run([tmp_path / "in"], model, tmp_path / "out")
    assert (summary.explained, summary.resumed) == (0, 5)
    assert tree(tmp_path / "out") == before
    write_pictures(tmp_path / "in", 2, start=5)
    summary = run([tmp_path / "in"], model, tmp_path / "out")
    assert (summary.explained, summary.resumed) == (2, 5)


@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.35, 0.5, 0.77, 0.999])
def test_a_torn_record_is_taken_up(tmp_path, model, kept, topk):
    write_pictures(tmp_path / "in", 9)
    run([tmp_path / "in"], model, tmp_path / "whole", topk=topk)
    run([tmp_path / "in"], model, tmp_path / "torn", topk=topk)
    results = tmp_path / "torn" / "results.jsonl"
    content = results.read_bytes()
    results.write_bytes(content[: int(kept * len(content))])
    (tmp_path / "torn" / ".partial").mkdir()
    (tmp_path / "torn" / ".partial" / "7").write_bytes(b"half an overlay")
    summary = run([tmp_path / "in"], model, tmp_path / "torn", topk=topk)
    complete = content[: int(kept * len(content))].count(b"\n") // topk
    assert (summary.resumed, summary.explained) == (complete, 9 - complete)
    assert tree(tmp_path / "torn").keys() == tree(tmp_path / "whole").keys()
    # a batch of which a part was recorded is finished as a smaller one, which rounds differently
    for torn, whole in zip(lines(results), map(json.loads, content.splitlines()), strict=True):
        for figure in ("predicted_probability", "probability", "score", "central_mass", "entropy"):
            assert torn.pop(figure) == pytest.approx(whole.pop(figure), rel=1e-4)
        assert torn == whole


def test_a_picture_that_is_named_twice_is_taken_up_once(tmp_path, model):
    write_pictures(tmp_path / "in", 3)
    named = [tmp_path / "in", tmp_path / "in" / "000.png", tmp_path / "in"]
    run(named, model, tmp_path / "whole", batch_size=1)
    run(named, model, tmp_path / "torn", batch_size=1)
    results = tmp_path / "torn" / "results.jsonl"
    results.write_bytes(b"".join(results.read_bytes().splitlines(keepends=True)[:4]))
    summary = run(named, model, tmp_path / "torn", batch_size=1)
    assert (summary.resumed, summary.explained) == (4, 3)
    assert tree(tmp_path / "torn") == tree(tmp_path / "whole")


SLOW = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_batch import make_model, SINKS
from gradcampp_ext import batch

class Slow(batch.Progress):
    def explained(self, rows):
        print("recorded", flush=True)
        time.sleep({pause})

batch.run(batch.Files([{source!r}]), make_model(), Path({out!r}), SINKS,
          batch.Options(batch_size=2, workers=1), progress=Slow())
"""


def start(source: Path, out: Path, *, pause: float = 0.2) -> subprocess.Popen[str]:
    tests = str(Path(__file__).parent)
    code = SLOW.format(tests=tests, source=str(source), out=str(out), pause=pause)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_killed_and_taken_up_again(tmp_path, model):
    source, out = tmp_path / "in", tmp_path / "out"
    paths = write_pictures(source, 30)
    paths[3].write_bytes(b"broken")
    run([source], model, tmp_path / "whole", batch_size=2)
    done = 0
    for killed_after in (1, 4):
        process = start(source, out)
        for _ in range(killed_after):
            assert process.stdout.readline() == "recorded\n"
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        process.stdout.close()
        recorded = (out / "results.jsonl").read_bytes().count(b"\n")
        assert done < recorded < 29
        done = recorded
    summary = run([source], model, out, batch_size=2)
    assert summary.resumed == done
    assert summary.explained == 29 - done
    assert tree(out) == tree(tmp_path / "whole")


MEETING = threading.Barrier(2)


class Forgetful(Net):
    """Leaves on itself what it reads a moment later."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen = self.features(images)
        if len(images) > 1:
            MEETING.wait(30)
        return self.head(self.pool(self.seen).flatten(1))


def many_cores(monkeypatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def test_batches_are_explained_side_by_side_on_modules_of_their_own(tmp_path, monkeypatch):
    many_cores(monkeypatch)
    write_pictures(tmp_path / "in", 24)
    forgetful = replace(make_model(), model=Forgetful().eval())
    forgetful.model.load_state_dict(make_model().model.state_dict())
    run([tmp_path / "in"], forgetful, tmp_path / "out")  # the barrier breaks if they take turns
    monkeypatch.setattr(explaining, "_MOST_LANES", 1)
    run([tmp_path / "in"], make_model(), tmp_path / "one")
    rows, expected = (lines(tmp_path / out / "results.jsonl") for out in ("out", "one"))
    for row, other in zip(rows, expected, strict=True):
        assert (row["path"], row["predicted"]) == (other["path"], other["predicted"])
        assert row["score"] == pytest.approx(other["score"], rel=1e-5)
        map_, same = (np.load(tmp_path / out / row["files"]["map"]) for out in ("out", "one"))
        np.testing.assert_allclose(map_, same, atol=1e-5)


def test_twins_share_weights_only():
    original = make_model()
    (twin,) = explaining.twins(original, batch.Options(), 1)
    assert not set(original.model.modules()) & set(twin.model.modules())
    for one, other in zip(original.model.parameters(), twin.model.parameters(), strict=True):
        assert one is other


class Holding(Net):
    """Runs its features through a function, which a copy of it has in common with it."""

    def __init__(self) -> None:
        super().__init__()
        self.run = lambda images: self.features(images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.run(images).mean((2, 3)))


def test_a_model_whose_copy_runs_the_original_is_explained_batch_by_batch(tmp_path, monkeypatch):
    many_cores(monkeypatch)
    write_pictures(tmp_path / "in", 12)
    holding = replace(make_model(), model=Holding().eval(), target_layer="features")
    assert explaining.twins(holding, batch.Options(), 1) == []
    assert run([tmp_path / "in"], holding, tmp_path / "out").explained == 12


def test_threads_are_as_they_were(tmp_path, model):
    before = torch.get_num_threads()
    write_pictures(tmp_path / "in", 12)
    run([tmp_path / "in"], model, tmp_path / "out")
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert [torch.get_num_threads(), *seen] == [before, before]


def test_stopped_and_taken_up_again(tmp_path, model):
    write_pictures(tmp_path / "in", 30)
    stop = threading.Event()

    class StopAtFirst(batch.Progress):
        def explained(self, rows: object) -> None:
            stop.set()

    summary = run([tmp_path / "in"], model, tmp_path / "out", progress=StopAtFirst(), stop=stop)
    assert summary.interrupted
    assert 4 <= summary.explained < 30
    assert len(lines(tmp_path / "out" / "results.jsonl")) == summary.explained
    again = run([tmp_path / "in"], model, tmp_path / "out")
    assert again.explained == 30 - summary.explained
    run([tmp_path / "in"], model, tmp_path / "whole")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("full", ["files", "record"])
def test_a_full_disk_stops_the_run_which_is_taken_up(tmp_path, model, monkeypatch, full):
    write_pictures(tmp_path / "in", 20)
    run([tmp_path / "in"], model, tmp_path / "whole")
    left = [7]

    def spend() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    if full == "files":
        real = Path.write_bytes

        def write_bytes(path: Path, content: bytes) -> int:
            if ".partial" in path.parts:
                spend()
            return real(path, content)

        monkeypatch.setattr(Path, "write_bytes", write_bytes)
    else:
        left[0] = 2
        real_append = record_module._line

        def line(row: dict) -> bytes:
            spend()
            return real_append(row)

        monkeypatch.setattr(record_module, "_line", line)
    with pytest.raises(RecordError, match=r"No space left on device.*goes on from there"):
        run([tmp_path / "in"], model, tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out" / ".partial").exists()
    run([tmp_path / "in"], model, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_other_settings_need_another_folder(tmp_path, model):
    write_pictures(tmp_path / "in", 2)
    run([tmp_path / "in"], model, tmp_path / "out")
    before = tree(tmp_path / "out")
    with pytest.raises(
        RecordError, match=r"method was 'gradcampp' and is now 'gradcam'.*overwrite"
    ):
        run([tmp_path / "in"], model, tmp_path / "out", method="gradcam")
    assert tree(tmp_path / "out") == before
    (tmp_path / "out" / "mine.txt").write_text("keep")
    (tmp_path / "out" / "overlays" / "mine.png").write_text("keep")
    run([tmp_path / "in" / "000.png"], model, tmp_path / "out", method="gradcam", overwrite=True)
    assert sorted(tree(tmp_path / "out")) == [
        "maps/000.npy",
        "mine.txt",
        "overlays/000.png",
        "overlays/mine.png",
        "results.jsonl",
        "run.json",
    ]


def test_overwrite_removes_nothing_outside(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("keep")
    out = tmp_path / "out"
    out.mkdir()
    row = {"path": "x", "name": "x", "files": {"map": "../precious", "overlay": str(precious)}}
    (out / "results.jsonl").write_text(json.dumps(row) + "\nrubbish\n")
    with Record(out, {}, overwrite=True):
        pass
    assert precious.exists()


def test_a_folder_of_somebody_elses_results_is_left_alone(tmp_path):
    (tmp_path / "results.jsonl").write_text("{}\n")
    with pytest.raises(RecordError, match=r"without a run.json"):
        Record(tmp_path, {})
    assert (tmp_path / "results.jsonl").read_text() == "{}\n"


@pytest.mark.skipif(sys.platform != "linux", reason="forks as Linux does")
def test_a_fork_of_a_fork_keeps_its_files(tmp_path):
    code = textwrap.dedent(f"""
        import os, sys
        from pathlib import Path
        from gradcampp_ext.batch.record import Record

        def end_of(child):
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

        with Record(Path({str(tmp_path / "out")!r}), {{"a": 1}}):
            if child := os.fork():
                sys.exit(end_of(child))
            opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(9)]  # one has the number
            if child := os.fork():
                os._exit(end_of(child))
            try:
                for handle in opened:
                    os.fstat(handle)
            finally:
                os._exit(sys.exc_info()[0] is not None)
    """)
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_two_runs_do_not_share_a_folder(tmp_path):
    pytest.importorskip("fcntl")
    with Record(tmp_path, {"a": 1}), pytest.raises(RecordError, match="another process writes"):
        Record(tmp_path, {"a": 1})
    with Record(tmp_path, {"a": 1}):
        pass


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(RecordError, match=r"cannot write in .*out"):
        Record(tmp_path / "out", {})


# Devices and models that give up


class Small(Explainer):
    """Has memory for three pictures."""

    sizes: list[int]

    def capture(self, images, *args, **kwargs):
        Small.sizes.append(len(images))
        if len(images) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return super().capture(images, *args, **kwargs)


def test_out_of_memory_halves_the_batch(tmp_path, model, monkeypatch):
    write_pictures(tmp_path / "in", 20)
    run([tmp_path / "in"], model, tmp_path / "whole", batch_size=10)
    monkeypatch.setattr(engine_module, "Explainer", Small)
    monkeypatch.setattr(explaining, "_MOST_LANES", 1)  # as on a GPU
    Small.sizes = []
    summary = run([tmp_path / "in"], model, tmp_path / "out", batch_size=10)
    assert summary.explained == 20
    assert Small.sizes == [10, 5, 3, 3, 3, 1, 3, 3, 3, 1]
    for ours, whole in zip(
        lines(tmp_path / "out" / "results.jsonl"),
        lines(tmp_path / "whole" / "results.jsonl"),
        strict=True,
    ):
        assert ours["path"] == whole["path"]
        assert ours["score"] == pytest.approx(whole["score"], rel=1e-4)


def test_out_of_memory_for_one_picture(tmp_path, model, monkeypatch):
    def exhausted(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Explainer, "capture", exhausted)
    with pytest.raises(batch.EngineError, match="not enough memory for one picture"):
        run(write_pictures(tmp_path / "in", 2), model, tmp_path / "out")


class Greedy(batch.Maps):
    """Has memory for two pictures."""

    def render(self, rendered):
        if len(rendered.maps) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return super().render(rendered)


def test_out_of_memory_behind_the_network_halves_the_batch_too(tmp_path, model):
    write_pictures(tmp_path / "in", 9)
    sinks = [batch.ResultsTable(), batch.MapSet("parquet", "feature"), batch.Overlays("png")]
    run([tmp_path / "in"], model, tmp_path / "whole", [batch.Maps(), *sinks], batch_size=2)
    summary = run([tmp_path / "in"], model, tmp_path / "out", [Greedy(), *sinks], batch_size=8)
    assert (summary.explained, summary.failed) == (9, 0)
    ours, whole = (
        {name: content for name, content in tree(tmp_path / out).items() if "maps/" in name}
        for out in ("out", "whole")
    )
    assert len(ours) == 9
    for name, content in ours.items():
        ours_map, whole_map = (np.load(io.BytesIO(each)) for each in (content, whole[name]))
        np.testing.assert_allclose(ours_map, whole_map, atol=1e-4)


def test_maps_that_cannot_be_drawn(tmp_path, model):
    class Failing(batch.Maps):
        def render(self, rendered):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    message = r"maps of \(32, 32\) pixels cannot be drawn: DefaultCPUAllocator"
    with pytest.raises(batch.EngineError, match=message):
        run(write_pictures(tmp_path / "in", 2), model, tmp_path / "out", [Failing()])


def test_scores_that_are_not_finite_though_maps_are(tmp_path):
    net = Net().eval()
    with torch.no_grad():
        net.head.bias[:] = torch.nan
    bad = LoadedModel(net, RECIPE, CLASSES)
    sinks = [*SINKS, batch.ResultsTable(), batch.MapSet("parquet", "image")]
    summary = run(write_pictures(tmp_path / "in", 6), bad, tmp_path / "out", sinks)
    assert (summary.explained, summary.failed) == (0, 6)
    for error in lines(tmp_path / "out" / "errors.jsonl"):
        assert "scores or maps are not finite" in error["reason"]


def test_pictures_with_infinite_scores_are_failures(tmp_path, model):
    paths = write_pictures(tmp_path / "in", 4)
    Image.new("RGB", (40, 40), (255, 0, 255)).save(paths[1])

    class Overflowing(Net):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            output = super().forward(images)
            magenta = (images[:, 0] > images[:, 1] + 4).all(2).all(1)
            return output * torch.where(magenta, torch.inf, 1.0)[:, None]

    bad = LoadedModel(Overflowing().eval(), RECIPE, CLASSES)
    summary = run([tmp_path / "in"], bad, tmp_path / "out")
    assert (summary.explained, summary.failed) == (3, 1)
    (error,) = lines(tmp_path / "out" / "errors.jsonl")
    assert error["path"] == str(paths[1])
    assert "not finite; does torch.float32 overflow" in error["reason"]


def test_a_model_that_fails_is_told(tmp_path):
    class Broken(Net):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images[:, :2])

    with pytest.raises(batch.EngineError, match=r"fails on pictures \(2, 3, 32, 32\)"):
        run(write_pictures(tmp_path / "in", 2), LoadedModel(Broken(), RECIPE), tmp_path / "out")


def test_a_model_that_is_no_classifier_is_told(tmp_path):
    dense = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU())
    with pytest.raises((batch.EngineError, ValueError), match="classes"):
        run(write_pictures(tmp_path / "in", 2), LoadedModel(dense, RECIPE), tmp_path / "out")


class Deadly(batch.Dataset):
    def read(self, item: batch.Item) -> Image.Image:
        if item.image == 3:
            os._exit(9)
        return super().read(item)


def test_a_worker_that_dies_is_told(tmp_path, model):
    pictures = [Image.new("RGB", (40, 40)) for _ in range(8)]
    with pytest.raises(batch.DecodeError, match="decoding stopped"):
        run(Deadly(pictures), model, tmp_path, batch_size=2, workers=1)


class Huge(batch.Dataset):
    def read(self, item: batch.Item) -> Image.Image:
        raise MemoryError


@pytest.mark.parametrize("workers", [0, 1])
def test_decoding_without_memory_is_told(tmp_path, model, workers):
    with pytest.raises(batch.DecodeError, match="no memory for a batch of 32 x 32 pixels"):
        run(Huge([None]), model, tmp_path, workers=workers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(tmp_path, model, dtype):
    write_pictures(tmp_path / "in", 4)
    run([tmp_path / "in"], model, tmp_path / "low", dtype=dtype)
    run([tmp_path / "in"], make_model(), tmp_path / "full")
    for low, full in zip(
        lines(tmp_path / "low" / "results.jsonl"),
        lines(tmp_path / "full" / "results.jsonl"),
        strict=True,
    ):
        assert low["score"] == pytest.approx(full["score"], rel=0.05, abs=0.02)


class Nested(Deep):
    """Target layers at the top, inside, and inside twice."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Sequential(self.late, nn.ReLU(), nn.Sequential(nn.Conv2d(8, 8, 1)))


@pytest.mark.parametrize(
    ("layers", "parts"),
    [
        ("pool:input", ["features", "late", "head"]),
        ("features", ["features", "late", "head"]),
        ("features.0", ["features.0", "late", "head"]),
        (("late.2.0", "features"), ["features", "head", "late.0", "late.2.0"]),
    ],
)
def test_compiled_parts(tmp_path, monkeypatch, layers, parts):
    torch.manual_seed(6)
    nested = LoadedModel(Nested().eval(), RECIPE, CLASSES)
    write_pictures(tmp_path / "in", 5)
    run([tmp_path / "in"], nested, tmp_path / "plain", target_layer=layers)
    traced = []
    torch._dynamo.reset()

    def backend(graph, inputs):
        traced.append(graph)
        return graph

    real = torch.compile
    names: dict[str, object] = {}
    monkeypatch.setattr(torch, "compile", lambda function: real(function, backend=backend))
    compiled = engine_module.compiled
    monkeypatch.setattr(
        engine_module, "compiled", lambda *args: (names.update(compiled(*args)), names)[1]
    )
    before = [dict(vars(module)) for module in nested.model.modules()]
    run([tmp_path / "in"], nested, tmp_path / "out", target_layer=layers, compile=True)
    assert [vars(module) for module in nested.model.modules()] == before  # it is the caller's
    assert sorted(names) == sorted(parts)
    assert len(traced) >= len(parts)
    rows, plain = (lines(tmp_path / name / "results.jsonl") for name in ("out", "plain"))
    for row, expected in zip(rows, plain, strict=True):
        assert row["layer"] == expected["layer"]
        assert row["score"] == pytest.approx(expected["score"], rel=1e-4)
        np.testing.assert_allclose(
            np.load(tmp_path / "out" / row["files"]["map"]),
            np.load(tmp_path / "plain" / expected["files"]["map"]),
            atol=1e-4,
        )


def test_compiled_parts_are_put_back_after_an_error():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    network[1].forward = own = lambda x: x
    forwards = {"0": torch.neg, "1": lambda x: 1 / int(x)}
    running = engine_module.running(forwards, network)
    with pytest.raises(ZeroDivisionError), running:
        network(torch.zeros(1))
    assert "forward" not in vars(network[0])
    assert network[1].forward is own


# Progress


def test_plain_lines(tmp_path, model):
    paths = write_pictures(tmp_path / "in", 3)
    (tmp_path / "labels.csv").write_text("path,label\n" + "".join(f"{p},0\n" for p in paths))
    evil = tmp_path / "in" / "evil\x1b[2J\n.png"
    evil.write_bytes(b"")
    out, err = io.StringIO(), io.StringIO()
    progress = batch.Lines(out, err)
    run([tmp_path / "labels.csv", evil], model, tmp_path / "out", progress=progress)
    told = out.getvalue().splitlines()
    assert len(told) == 4
    for line, row in zip(told, lines(tmp_path / "out" / "results.jsonl"), strict=False):
        name, share = row["predicted_name"], 100 * row["predicted_probability"]
        right = "right" if row["predicted"] == 0 else "wrong, it is 0 cat"
        assert line == f"{row['path']}: {row['predicted']} {name} {share:.1f} %, {right}"
    assert told[3].endswith(r"evil\x1b[2J\n.png: skipped: empty file (0 bytes)")
    assert "3 explained at pool:input, " in err.getvalue()
    assert " of 3 right, 1 skipped, " in err.getvalue()
    assert "-bound: " in err.getvalue()


def test_quiet_lines(tmp_path, model):
    out, err = io.StringIO(), io.StringIO()
    paths = write_pictures(tmp_path / "in", 3)
    paths[0].write_bytes(b"")
    run(paths, model, tmp_path / "out", progress=batch.Lines(out, err, quiet=True))
    assert out.getvalue() == f"{paths[0]}: skipped: empty file (0 bytes)\n"
    assert err.getvalue().startswith("2 explained at pool:input, 1 skipped, ")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(tmp_path, model):
    terminal = Terminal()
    write_pictures(tmp_path / "in", 9)
    progress = batch.Lines(terminal, terminal)
    run([tmp_path / "in"], model, tmp_path / "out", progress=progress)
    shown = terminal.getvalue()
    assert "9/9" in shown
    assert "008.png: " in shown


def test_json_lines(tmp_path, model):
    paths = write_pictures(tmp_path / "in", 3)
    paths[1].write_bytes(b"")
    out = io.StringIO()

    class Patient(batch.JsonLines):
        def explained(self, rows: object) -> None:
            time.sleep(1.1)
            super().explained(rows)

    run(paths, model, tmp_path / "out", progress=Patient(out))
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["started", "progress", "failed", "finished"]
    assert events[0] == {"event": "started", "total": 3, "resumed": 0}
    assert events[1]["explained"] == 2
    assert events[2]["reason"] == "empty file (0 bytes)"
    assert events[3]["explained"] == 2
    assert set(events[3]["shares"]) == {"decode", "explain", "write"}


def test_importing_the_batch_package_loads_no_optional_library():
    code = textwrap.dedent("""
        import sys
        import gradcampp_ext.batch
        print(sorted({"torchvision", "timm", "transformers", "matplotlib"} & set(sys.modules)))
    """)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"
