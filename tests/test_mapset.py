"""Data sets of maps and results.parquet: what they hold, and that kills and full disks spare it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from test_batch import (
    CLASSES,
    LAYERS,
    RECIPE,
    SINKS,
    Deep,
    lines,
    make_model,
    run,
    tree,
    write_pictures,
)

from gradcampp_ext import batch
from gradcampp_ext.batch import mapset, parts
from gradcampp_ext.batch.record import RecordError
from gradcampp_ext.models import LoadedModel

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
zarr = pytest.importorskip("zarr")

FORMATS = ("parquet", "zarr")


@pytest.fixture
def model() -> LoadedModel:
    return make_model()


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Parts of a few maps, so that short runs have many."""
    monkeypatch.setattr(parts, "_BYTES", 3 * 32 * 32 * 4)
    monkeypatch.setattr(mapset, "_CHUNK_BYTES", 32 * 32 * 4)
    monkeypatch.setattr(mapset, "_SHARD", 3)


def content(out: Path, kind: str) -> dict[str, np.ndarray]:
    """Columns of the data set, as its readers see them."""
    if kind == "zarr":
        group = zarr.open_group(out / "maps.zarr", mode="r")
        return {name: array[:] for name, array in group.arrays()}
    table = pq.read_table(out / "maps.parquet")
    maps = table.column("map").combine_chunks().to_numpy_ndarray()
    return {name: np.array(table.column(name)) for name in table.column_names} | {"map": maps}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", FORMATS)
def test_rows_are_those_of_the_results(tmp_path, kind, dtype):
    torch.manual_seed(6)
    deep = LoadedModel(Deep().eval(), RECIPE, CLASSES)
    paths = write_pictures(tmp_path / "in", 7)
    paths[2].write_bytes(b"broken")
    sinks = [batch.Maps(), batch.MapSet(kind, "image", dtype), batch.ResultsTable()]
    run([tmp_path / "in"], deep, tmp_path / "out", sinks, topk=2, target_layer=LAYERS)
    rows = lines(tmp_path / "out" / "results.jsonl")
    found = content(tmp_path / "out", kind)
    assert len(rows) == 6 * 2 * 3
    assert found["map"].shape == (36, 32, 32)
    assert found["map"].dtype == dtype
    for column in ("path", "rank", "layer", "target"):
        assert found[column].tolist() == [row[column] for row in rows]
    for row, saved in zip(rows, found["map"], strict=True):
        expected = np.load(tmp_path / "out" / row["files"]["map"])
        np.testing.assert_array_equal(saved, expected.astype(dtype))
    if kind == "parquet":
        schema = pq.read_schema(next((tmp_path / "out" / "maps.parquet").iterdir()))
        value_type = pa.float16() if dtype == "float16" else pa.float32()
        assert schema.field("map").type == pa.fixed_shape_tensor(value_type, (32, 32))


@pytest.mark.parametrize("kind", FORMATS)
def test_feature_size(tmp_path, model, kind):
    write_pictures(tmp_path / "in", 5)
    sinks = [batch.Maps("feature"), batch.MapSet(kind, "feature")]
    run([tmp_path / "in"], model, tmp_path / "out", sinks)
    rows = lines(tmp_path / "out" / "results.jsonl")
    for row, saved in zip(rows, content(tmp_path / "out", kind)["map"], strict=True):
        np.testing.assert_array_equal(saved, np.load(tmp_path / "out" / row["files"]["map"]))


def test_results_as_a_table(tmp_path, model):
    paths = write_pictures(tmp_path / "in", 5)
    raw = os.fsdecode(os.fsencode(tmp_path / "in") + b"/not-utf8-\xff.png")
    os.rename(paths[4], raw)  # noqa: PTH104 - not UTF-8
    (tmp_path / "labels.csv").write_text(f"path,label\n{paths[0]},dog\n")
    sinks = [*SINKS, batch.ResultsTable()]
    run([tmp_path / "labels.csv", *paths[1:4], raw], model, tmp_path / "out", sinks)
    rows = lines(tmp_path / "out" / "results.jsonl")
    table = pq.read_table(tmp_path / "out" / "results.parquet").to_pylist()
    assert table[4]["path"].endswith(r"not-utf8-\udcff.png")
    for row, found in zip(rows[:4], table, strict=False):
        files = row.pop("files")
        assert found.pop("overlay_file") == files["overlay"]
        assert found.pop("map_file") == files["map"]
        assert found == row
    assert [row["right"] for row in table] == [rows[0]["right"], None, None, None, None]
    assert (rows[0]["label"], table[0]["label"]) == (1, 1)
    # wrong now, since the same folder is taken up with more pictures
    write_pictures(tmp_path / "in", 1, start=8)
    run([tmp_path / "labels.csv", *paths[1:4], raw, tmp_path / "in" / "008.png"], model,
        tmp_path / "out", sinks)  # fmt: skip
    assert pq.read_metadata(tmp_path / "out" / "results.parquet").num_rows == 6


@pytest.mark.parametrize("kind", FORMATS)
def test_more_pictures_are_added(tmp_path, model, kind):
    sinks = [batch.MapSet(kind)]
    for count in (0, 1, 2, 4, 6, 7, 11, 12, 12):
        write_pictures(tmp_path / "in", count)
        run([tmp_path / "in"], model, tmp_path / "out", sinks, batch_size=1)
    run([tmp_path / "in"], model, tmp_path / "whole", sinks, batch_size=1)
    out, whole = tree(tmp_path / "out"), tree(tmp_path / "whole")
    for files in (out, whole):
        del files["run.json"]  # one batch alone has all threads, and that is noted
    assert out == whole
    assert len(content(tmp_path / "out", kind)["map"]) == 12


@pytest.mark.parametrize("kind", FORMATS)
def test_every_torn_record_is_taken_up(tmp_path, model, kind):
    """After a finished run; kills during one are below."""
    write_pictures(tmp_path / "in", 8)
    sinks = [batch.MapSet(kind)]
    run([tmp_path / "in"], model, tmp_path / "out", sinks, batch_size=1)
    whole = tree(tmp_path / "out")
    results = tmp_path / "out" / "results.jsonl"
    rows = results.read_bytes().splitlines(keepends=True)
    for kept in range(len(rows)):
        results.write_bytes(b"".join(rows[:kept]))
        run([tmp_path / "in"], model, tmp_path / "out", sinks, batch_size=1)
        assert tree(tmp_path / "out") == whole, kept


@pytest.mark.parametrize("kind", FORMATS)
def test_a_data_set_that_is_gone_is_told(tmp_path, model, kind):
    paths = write_pictures(tmp_path / "in", 4)
    sinks = [batch.MapSet(kind)]
    run(paths[:2], model, tmp_path / "out", sinks)
    (tmp_path / "out" / f"maps.{kind}").rename(tmp_path / "elsewhere")
    with pytest.raises(RecordError, match=r"lacks maps of pictures that are recorded as done"):
        run(paths, model, tmp_path / "out", sinks)
    run(paths, model, tmp_path / "out", [batch.Maps()], overwrite=True)
    assert not (tmp_path / "out" / f"maps.{kind}").exists()


@pytest.mark.parametrize("kind", FORMATS)
def test_overwriting_removes_the_data_set(tmp_path, model, kind):
    paths = write_pictures(tmp_path / "in", 4)
    run(paths, model, tmp_path / "out", [batch.MapSet(kind), batch.ResultsTable()])
    (tmp_path / "out" / "mine.zarr").mkdir()
    run(paths[:1], model, tmp_path / "out", [batch.Maps()], overwrite=True)
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == ["maps", "mine.zarr", "results.jsonl", "run.json"]


def test_arguments():
    with pytest.raises(ValueError, match="format must be one of"):
        batch.MapSet("hdf5")
    with pytest.raises(ValueError, match="size must be"):
        batch.MapSet("zarr", "layer")
    with pytest.raises(ValueError, match="dtype must be"):
        batch.MapSet("zarr", "image", "float64")
