"""What outputs say of themselves, and whether the same bits come again; by the command line."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_batch import make_model, tree, write_pictures
from test_cli import call, explain, results, small_network  # noqa: F401 - a fixture for all tests

from gradcampp_ext import _native, batch, evaluation, imaging, models
from gradcampp_ext.batch import provenance, reproduce
from gradcampp_ext.batch.record import Record, RecordError

CPU = torch.device("cpu")


def run_json(out: str = "out") -> dict:
    return json.loads(Path(out, "run.json").read_text())


def again(*arguments: object, named: str = "out", code: int = 0) -> str:
    """Standard error of gradcampp explain --reproduce, without the help's line breaks."""
    words = ("--reproduce", named, "--out", "again", "--workers", 0, *arguments)
    return re.sub(r"[\s│]+", " ", call("explain", *words, code=code)[1])


def told(file: str) -> dict:
    """What a picture says of itself."""
    with Image.open(file) as image:
        return json.loads(image.getexif()[270])


# What outputs say


@pytest.mark.parametrize("form", ["jpg", "png", "webp"])
def test_a_lone_overlay_says_what_made_it(form):
    write_pictures(Path("in"), 1)
    explain("in", "--out", "out", "--overlays", form, "--top-k", 2, "--method", "layercam")
    found = told(f"out/overlays/000.top2.{form}")
    status = _native.status()
    settings = run_json()["settings"]
    assert found["gradcampp_ext"] == status.version
    assert found["commit"] == status.commit
    assert found["torch"] == torch.__version__
    assert (found["model"], found["method"]) == ("small:net", "layercam")
    assert found["weights_sha256"] == settings["weights_sha256"]
    assert settings.items() <= found.items()
    row = results()[1]
    assert found["map"] == {
        name: row[name] for name in ("layer", "rank", "target", "target_name", "pixels_sha256")
    }
    assert found["map"]["layer"] == "2:input"
    assert found["record"] == row["record"] == run_json()["record"]
    with Image.open(f"out/overlays/000.top2.{form}") as image:
        assert image.getexif()[305].startswith(f"gradcampp_ext {status.version}, commit ")


def test_run_json_has_settings_command_and_environment():
    write_pictures(Path("in"), 1)
    explain("in", "--out", "out", "--size", "40x50", "--batch-size", 3)
    (run,) = run_json()["runs"]
    assert (run["first_row"], run["batch_size"]) == (0, 3)
    assert (run["command"]["paths"], run["command"]["size"]) == (["in"], "40x50")
    assert run["command"]["device"] == "cpu"
    assert run["environment"] == provenance.environment(CPU, torch.get_num_threads())
    assert run["environment"]["instruction_set"] in ("baseline", "avx2", "avx512", "neon")


def test_pixels_are_those_that_the_network_sees():
    (path,) = write_pictures(Path("in"), 1)
    explain("in", "--out", "out")
    seen = imaging.Recipe((32, 32), "stretch", (32, 32)).picture(imaging.read(path))
    digest = hashlib.sha256(np.ascontiguousarray(seen)).hexdigest()
    assert results()[0]["pixels_sha256"] == digest


def test_data_sets_and_tables_say_what_made_them():
    pq = pytest.importorskip("pyarrow.parquet")
    zarr = pytest.importorskip("zarr")
    write_pictures(Path("in"), 2)
    explain("in", "--out", "out", "--maps-as", "zarr", "--maps-as", "parquet", "--table")
    settings = run_json()["settings"]
    for file in ("out/maps.parquet/part-000000.parquet", "out/results.parquet"):
        found = json.loads(pq.read_schema(file).metadata[b"gradcampp_ext"])
        assert settings.items() <= found.items()
        assert found["commit"] == _native.commit()
    found = dict(zarr.open_group("out/maps.zarr", mode="r").attrs)["gradcampp_ext"]
    assert settings.items() <= found.items()
    table = pq.read_table("out/results.parquet")
    for column in ("pixels_sha256", "record"):
        assert table[column].to_pylist() == [row[column] for row in results()]


def test_the_report_says_what_made_it():
    write_pictures(Path("in"), 1)
    explain("in", "--out", "out", "--report")
    page = Path("out/report/index.html").read_text()
    commit = str(_native.commit()).replace("+", "&#43;")
    for text in (run_json()["record"], commit, run_json()["settings"]["weights_sha256"]):
        assert text in page.replace("+", "&#43;")


def test_an_evaluation_says_what_made_it(tmp_path):
    write_pictures(tmp_path / "in", 3)
    options = evaluation.Options(methods=["gradcampp", "gradcam"], workers=0, batch_size=2)
    found = evaluation.run(
        batch.Files([tmp_path / "in"]), make_model(), tmp_path / "out", options
    ).result
    written = run_json(str(tmp_path / "out"))
    assert found["record"] == written["record"]
    assert found["environment"] == provenance.environment(CPU, torch.get_num_threads())
    assert all(row["record"] == written["record"] for row in results(str(tmp_path / "out")))
    for name in ("bars.png", "disagreements.jpg"):
        about = told(str(tmp_path / "out" / name))
        assert about["record"] == written["record"]
        assert about["methods"] == ["gradcampp", "gradcam"]


def test_the_commit_of_an_installed_package_is_the_builds(tmp_path, monkeypatch):
    info = _native.BuildInfo("2.14", None, "c++", (), None, (), None, commit="0123abc")
    monkeypatch.setattr(_native, "build_info", lambda: info)
    monkeypatch.setattr(_native, "_FOLDER", tmp_path / "site-packages" / "gradcampp_ext")
    assert _native.commit.__wrapped__() == "0123abc"


def test_an_overlay_says_what_its_map_is_of():
    about = provenance.about({"method": "several"}, {})
    row = {"method": "gradcam", "layer": "pool:input", "rank": 2, "target": 3, "path": "a.jpg"}
    told = json.loads(provenance.exif(about, row)[270])
    assert told == {
        **about,
        "map": {"method": "gradcam", "layer": "pool:input", "rank": 2, "target": 3},
    }


def test_the_id_of_settings_stays_what_it_is_in_outputs_already_made():
    assert provenance.identity({"size": [2, 3], "method": "x"}) == "f3fbf7bccf2f66c4"


# Going on under other conditions


def conditions(version: str = "1.0", **others: object) -> dict:
    environment = {"gradcampp_ext": version, "threads": 2, **others}
    return {"batch_size": 4, "command": None, "environment": environment}


ROW = {"path": "a", "name": "a", "files": {}}


def test_another_version_does_not_go_on(tmp_path):
    with Record(tmp_path, {"method": "x"}, conditions()) as opened:
        opened.finish([ROW])
    with pytest.raises(RecordError, match=r"gradcampp_ext was '1\.0' and is now '1\.1'"):
        Record(tmp_path, {"method": "x"}, conditions("1.1"))
    with Record(tmp_path, {"method": "x"}, conditions("1.1"), overwrite=True) as opened:
        assert opened.conditions == []


def test_other_conditions_are_noted_with_the_first_row(tmp_path):
    with Record(tmp_path, {}, conditions(threads=1)):  # makes no row, so leaves no note
        pass
    for threads, path in ((2, "a"), (2, "b"), (3, "c")):
        with Record(tmp_path, {}, conditions(threads=threads)) as opened:
            opened.finish([{**ROW, "path": path}])
    assert opened.conditions == ["threads was 2 and is now 3"]
    with Record(tmp_path, {}, conditions(threads=4)):
        pass
    runs = run_json(str(tmp_path))["runs"]
    noted = [(run["first_row"], run["environment"]["threads"]) for run in runs]
    assert noted == [(0, 2), (2, 3)]


def test_options_of_the_command_are_conditions(tmp_path):
    for device in ("cpu", "cuda"):
        run = {**conditions(), "command": {"device": device}}
        with Record(tmp_path, {}, run) as opened:
            opened.finish([{**ROW, "path": device}])
    assert opened.conditions == ["device was 'cpu' and is now 'cuda'"]


def test_whoever_goes_on_under_other_conditions_is_told():
    write_pictures(Path("in"), 2)
    explain("in", "--out", "out", "--batch-size", 2)
    write_pictures(Path("in"), 1, start=2)
    _, err = explain("in", "--out", "out", "--batch-size", 5)
    assert "going on under other conditions" in err
    assert "batch_size was 2 and is now 5" in err
    out, _ = explain("in", "--out", "out", "--batch-size", 7, "--json-progress")
    assert "batch_size was 5 and is now 7" in json.loads(out.splitlines()[0])["text"]
    write_pictures(Path("in"), 1, start=3)
    explain("in", "--out", "out", "--batch-size", 5)
    shutil.rmtree("again", ignore_errors=True)
    err = again()
    assert "2 runs under different conditions have filled out" in err


# The same bits again


EVERYTHING = (
    *("--overlays", "png", "--top-k", 2, "--target-layer", "0", "--target-layer", "2:input"),
    *("--maps-as", "npy", "--maps-as", "zarr", "--maps-as", "parquet", "--table", "--report"),
    *("--size", "40x50", "--batch-size", 3, "--method", "layercam"),
)


def test_all_outputs_come_again_bit_by_bit():
    pytest.importorskip("pyarrow")
    pytest.importorskip("zarr")
    paths = write_pictures(Path("in/dog"), 7)
    paths[4].write_bytes(b"broken")
    Path("list.csv").write_text("path,label\nin/dog/001.png,kite\nin/dog/000.png,cat\n")
    explain("in", "list.csv", "--out", "out", *EVERYTHING, code=1)
    for named in ("out", "out/results.jsonl", "out/run.json"):
        shutil.rmtree("again", ignore_errors=True)
        err = again(named=named)
        found = re.search(r"reproduced: (\d+) rows and files of out, bit by bit", err)
        assert found, err
    assert tree(Path("again")) == tree(Path("out"))
    rows = results()
    files = {file for row in rows for file in row["files"].values()}
    data = r"maps\.(zarr|parquet)/|report/data/"
    sets = [file for file in tree(Path("out")) if re.match(data, file)]
    assert int(found[1]) == len(rows) + len(files) + len(sets) + 2  # errors.jsonl, results.parquet


def test_labels_names_weights_and_classes_come_from_the_record():
    write_pictures(Path("in"), 3)
    Path("labels.csv").write_text("path,label\nin/000.png,b\nin/001.png,a\nin/002.png,c\n")
    Path("names.txt").write_text("a\nb\nc\n")
    sys.path.insert(0, ".")
    import small

    state = small.net().model.state_dict()
    torch.save(state, "w.pth")
    explain("in", "--out", "out", "--labels", "labels.csv", "--class-names", "names.txt",
            "--weights", "w.pth", "--target", "label", "--recipe", "article")  # fmt: skip
    again()
    assert tree(Path("again")) == tree(Path("out"))
    torch.save({name: tensor + 1 for name, tensor in state.items()}, "w.pth")
    assert "weights_sha256 was '" in again("--overwrite", code=2)
    torch.save(state, "w.pth")
    Path("labels.csv").write_text("path,label\nin/000.png,b\nin/001.png,c\nin/002.png,c\n")
    err = again("--overwrite", code=2)
    assert "in/001.png has the label 2, not 0" in err


def test_an_interrupted_run_ends_where_it_ended():
    write_pictures(Path("in"), 20)
    Path("in/001.png").write_bytes(b"broken")
    stop = threading.Event()
    explain("in", "--out", "whole", "--batch-size", 4, code=1)

    class StopAtFirst(batch.Lines):
        def explained(self, rows: object) -> None:
            stop.set()

    command = run_json("whole")["runs"][0]["command"]
    sys.path.insert(0, ".")
    batch.run(
        batch.Files(["in"]), models.load("small:net"), Path("out"),
        [batch.Overlays(), batch.Maps()], batch.Options(batch_size=4, workers=0),
        command=command, progress=StopAtFirst(), stop=stop,
    )  # fmt: skip
    assert len(results()) < 19
    assert "bit by bit" in again()
    assert tree(Path("again")) == tree(Path("out"))
    # and a replay that is itself taken up
    lines = Path("again/results.jsonl").read_bytes().splitlines(keepends=True)
    Path("again/results.jsonl").write_bytes(b"".join(lines[:3]))
    assert "3 done before" in again()
    assert tree(Path("again")) == tree(Path("out"))


def test_a_picture_that_is_named_twice():
    write_pictures(Path("in"), 2)
    words = ("in/000.png", "in/001.png", "in/000.png", "--batch-size", 1)
    explain(*words, "--out", "out")
    assert "bit by bit" in again()
    assert [row["name"] for row in results("again")] == [row["name"] for row in results()]


def test_pictures_that_were_added_are_left_out():
    write_pictures(Path("in"), 5)
    explain("in", "--out", "out", "--batch-size", 2)
    write_pictures(Path("in"), 1, start=9)
    shutil.copy("in/009.png", "in/0005.png")
    again()
    assert tree(Path("again")) == tree(Path("out"))


def test_the_number_of_threads_is_the_records():
    write_pictures(Path("in"), 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        explain("in", "--out", "out")
    finally:
        torch.set_num_threads(threads)
    assert "bits may differ" not in again()
    assert run_json("again")["runs"][0]["environment"]["threads"] == 1
    assert torch.get_num_threads() == threads


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("two_threads")
def test_threads_are_those_of_one_batch():
    write_pictures(Path("in"), 2)
    explain("in", "--out", "out", "--batch-size", 2)
    assert run_json()["runs"][0]["environment"]["threads"] == 2
    write_pictures(Path("in"), 3, start=2)  # now batches are explained side by side
    again()
    assert run_json("again")["runs"][0]["environment"]["threads"] == 2
    out, _ = explain("in", "--out", "out", "--batch-size", 2, "--json-progress")
    assert "threads was 2 and is now 1" in json.loads(out.splitlines()[0])["text"]
    assert [run["first_row"] for run in run_json()["runs"]] == [0, 2]


def test_differences_are_told_one_by_one():
    write_pictures(Path("in"), 3)
    explain("in", "--out", "out", "--overlays", "png")
    lines = Path("out/results.jsonl").read_text().splitlines()
    row = json.loads(lines[1])
    lines[1] = json.dumps({**row, "score": 7.5})
    Path("out/results.jsonl").write_text("\n".join(lines) + "\n")
    np.save("out/maps/002.npy", np.zeros((32, 32), np.float32))
    with Image.open("out/overlays/000.png") as image:
        Image.fromarray(np.asarray(image)).save("out/overlays/000.png")
    Path("out/overlays/001.png").unlink()
    err = again(code=1)
    assert "results.jsonl, line 2: in/001.png: score was 7.5 and is now" in err
    assert "differs: maps/002.npy " in err
    assert "differs: overlays/000.png, in its metadata alone" in err
    assert "not reproduced: 3 of 8 rows and files of out" in err
    again("--overwrite", code=1)
    np.save("out/maps/002.npy", np.load("again/maps/002.npy"))
    shutil.copy("again/overlays/000.png", "out/overlays/000.png")
    shutil.copy("again/results.jsonl", "out/results.jsonl")
    assert "bit by bit; 1 of its files are not there any more" in again("--overwrite")


def test_another_environment_is_a_doubt():
    write_pictures(Path("in"), 1)
    explain("in", "--out", "out")
    written = run_json()
    written["runs"][0]["environment"] |= {"torch": "2.10.0", "cpu": "abacus"}
    Path("out/run.json").write_text(json.dumps(written))
    err = again()
    assert "bits may differ: cpu was 'abacus' and is now" in err
    assert "bits may differ: torch was '2.10.0' and is now" in err


# What cannot be reproduced


def test_changed_pictures_are_named():
    write_pictures(Path("in"), 6)
    explain("in", "--out", "out", "--batch-size", 2)
    kept = Path("in/003.png").read_bytes()
    write_pictures(Path("other"), 1, start=50)
    shutil.copy("other/050.png", "in/003.png")
    err = again(code=2)
    assert "out cannot be reproduced, its pictures have changed: in/003.png shows" in err
    Path("in/003.png").write_bytes(b"broken")
    err = again("--overwrite", code=2)
    assert "in/003.png is skipped: " in err
    Path("in/003.png").unlink()
    err = again("--overwrite", code=2)
    assert "1 of the record's pictures are not in its source any more: in/003.png" in err
    Path("in/003.png").write_bytes(kept)
    assert "bit by bit" in again("--overwrite")


def test_a_picture_that_was_broken_and_is_not_any_more_is_a_change():
    (path, *_) = write_pictures(Path("in"), 3)
    whole = path.read_bytes()
    path.write_bytes(b"broken")
    explain("in", "--out", "out", code=1)
    path.write_bytes(whole)
    assert "in/000.png was skipped then and is explained now" in again(code=2)


def test_another_order_is_a_change():
    write_pictures(Path("in"), 2)
    Path("list.csv").write_text("path\nin/000.png\nin/001.png\n")
    explain("list.csv", "--out", "out")
    Path("list.csv").write_text("path\nin/001.png\nin/000.png\n")
    assert "in/000.png does not come in its place" in again(code=2)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--method", "gradcam"), "--method gradcam contradicts the record, which has gradcampp"),
        (("--batch-size", 7), "--batch-size 7 contradicts the record, which has 32"),
        (("--table",), "--table True contradicts the record, which has False"),
        (("--target-layer", "0"), "--target-layer ['0'] contradicts the record"),
        (("other",), "contradicts the record, which has ['in']"),
    ],
)
def test_options_that_contradict_the_record(option, message):
    write_pictures(Path("in"), 1)
    explain("in", "--out", "out")
    assert message in again(*option, code=2)
    assert not Path("again").exists()


def test_options_that_agree_with_the_record():
    write_pictures(Path("in"), 1)
    explain("in", "--out", "out", "--target-layer", "0")
    assert "bit by bit" in again("in", "--method", "gradcampp", "--target-layer", "0", "--quiet")


def edited(change: object) -> None:
    written = run_json()
    change(written)
    Path("out/run.json").write_text(json.dumps(written))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run["settings"].update(method="gradcam"), "run.json was edited"),
        (lambda run: run["runs"][-1]["command"].update(method="gradcam"), "method was 'gradcampp'"),
        (lambda run: run["runs"][-1]["command"].update(top_k="many"), "--top-k"),
        (lambda run: run["runs"][-1]["command"].pop("size"), "other options: size"),
        (lambda run: run["runs"][-1].update(command=None), "was not filled by gradcampp explain"),
        (lambda run: run["runs"][-1].update(command=7), "is no record of a run"),
        (lambda run: run.update(runs=[]), "is no record of a run"),
        (lambda run: run.clear(), "is no record of a run"),
    ],
)
def test_edited_records(change, message):
    write_pictures(Path("in"), 1)
    explain("in", "--out", "out")
    edited(change)
    assert message in again(code=2)


def test_where_there_is_no_record():
    write_pictures(Path("in"), 1)
    assert "nowhere holds no run.json" in again(named="nowhere", code=2)
    assert "in holds no run.json" in again(named="in", code=2)
    explain("in", "--out", "out")
    Path("out/results.jsonl").write_text('{"a": 1}\n')
    assert "has a line that no run has written: {'a': 1}" in again(code=2)
    Path("out/results.jsonl").write_text("rubbish\n")
    assert "results.jsonl is damaged: " in again(code=2)
    Path("out/results.jsonl").write_text("")
    assert "out has no results that could be reproduced" in again(code=2)
    call("explain", "--reproduce", "out", "--out", "out", code=2)
    _, err = call("explain", "--out", "out", code=2)
    assert "name PATHs of pictures" in re.sub(r"[\s│]+", " ", err)


def test_programs_of_ones_own_and_streams(tmp_path):
    write_pictures(tmp_path / "in", 2)
    pictures = [Image.open(file) for file in sorted((tmp_path / "in").iterdir())]
    batch.run(batch.Stream(pictures), make_model(), Path("out"), [], batch.Options(workers=0))
    assert "out was not filled by gradcampp explain" in again(code=2)
    edited(lambda run: run["runs"][-1].update(command={}))
    with pytest.raises(reproduce.ReproduceError, match="came as a stream"):
        reproduce.Pictures(batch.Stream(pictures), reproduce.read(Path("out")), 32)


def test_a_data_set_that_a_killed_run_left_is_not_compared(tmp_path):
    (tmp_path / "maps.zarr").mkdir()
    (tmp_path / "maps.zarr" / "zarr.json").write_text("{}")
    assert reproduce._below(tmp_path, "maps.zarr") == ["maps.zarr/zarr.json"]
    (tmp_path / "maps.zarr" / ".tail").write_text("")
    assert reproduce._below(tmp_path, "maps.zarr") == []
