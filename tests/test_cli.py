from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import gradcampp_ext
from gradcampp_ext import demo, imaging, models
from gradcampp_ext.bench import BENCHMARKS
from gradcampp_ext.cli import app

PHOTOS = Path(__file__).parents[1].parent / "shared" / "data"
needs_photos = pytest.mark.skipif(
    not (PHOTOS / "labels.csv").exists(), reason="the labelled photographs are not here"
)
CATS = {"tabby", "tiger cat", "Egyptian cat"}


@pytest.fixture(autouse=True)
def small_network(tmp_path, monkeypatch):
    """A folder to work in with small:net, a network of three classes."""
    (tmp_path / "small.py").write_text(
        textwrap.dedent("""
        from torch import nn
        from gradcampp_ext.imaging import Recipe
        from gradcampp_ext.models import Classes, LoadedModel

        def net():
            layers = nn.Conv2d(3, 4, 5, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
            return LoadedModel(
                nn.Sequential(*layers, nn.Linear(4, 3)),
                Recipe((32, 32), "stretch", (32, 32)),
                Classes(("cat", "dog", "kite")),
            )

        def narrow():
            loaded = net()
            loaded.model[4] = nn.Linear(5, 3)
            return loaded
        """)
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("small", None)


def call(*arguments: object, code: int = 0) -> tuple[str, str]:
    """Standard output and standard error of gradcampp in this process."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def explain(*arguments: object, code: int = 0) -> tuple[str, str]:
    return call("explain", "--model", "small:net", "--workers", 0, *arguments, code=code)


def picture(path: str, *, size: tuple[int, int] = (48, 40)) -> Path:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.radial_gradient("L").resize(size).convert("RGB").save(file)
    return file


def results(out: str = "out") -> list[dict]:
    return [json.loads(line) for line in Path(out, "results.jsonl").read_text().splitlines()]


def test_results_have_these_columns():
    picture("in/a.png")
    explain("in", "--out", "out")
    (row,) = results()
    assert list(row) == [
        "path", "name", "predicted", "predicted_name", "predicted_probability", "label",
        "label_name", "right", "rank", "layer", "target", "target_name", "probability", "score",
        "width", "height", "view", "peak", "central_mass", "entropy", "pixels_sha256", "files",
        "record",
    ]  # fmt: skip
    assert row["files"] == {"overlay": "overlays/a.jpg", "map": "maps/a.npy"}
    assert Image.open("out/overlays/a.jpg").size == (32, 32)
    assert np.load("out/maps/a.npy").shape == (32, 32)


def test_broken_pictures_and_the_exit_code():
    picture("in/a.png")
    Path("in/b.png").write_bytes(b"")
    out, err = explain("in", "gone.png", "--out", "out", code=1)
    assert "in/b.png: skipped: empty file (0 bytes)" in out
    assert "gone.png: skipped: No such file or directory" in out
    assert "2 skipped, the reasons are in out/errors.jsonl" in err
    assert len(results()) == 1
    assert len(Path("out/errors.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet"], "a model is demo, torchvision:NAME"),
        (["--model", "small:missing"], "no attribute 'missing'"),
        (["--weights", "none.pth"], "the weights file none.pth does not exist"),
        (["--method", "gradcam3"], "gradcam3"),
        (["--target-layer", "nowhere"], "'nowhere' is not the name of a module"),
        (["--target", "unicorn"], "no class is called 'unicorn'"),
        (["--target", "3"], "only 0 to 2"),
        (["--target", "cat", "--top-k", "2"], "cannot go with a target"),
        (["--fuse", "mean"], "target_layer must name two"),
        (["--target-layer", "0", "--target-layer", "0"], "must name different layers"),
        (["--top-k", "4"], "topk must be from 1 to the 3 classes"),
        (["--colormap", "beige"], "colormap must be one of turbo, jet"),
        (["--labels", "none.csv"], "none.csv cannot be read"),
        (["--class-names", "none.txt"], "none.txt cannot be read"),
        (["--device", "teapot"], "--device teapot cannot be used"),
        (["--size", "big"], "--size must be N or HxW in pixels"),
        (["--size", "0"], "size must be 2 positive integers"),
        (["--size", "99999999"], "size must be of a map that memory can hold, got (99999999, "),
        (["--model", "small:narrow"], "the model fails on pictures (1, 3, 32, 32): mat1"),
        (["--model", "small:narrow", "--compile"], "the model fails on pictures (1, 3, 32, 32)"),
        (["--overlays", "gif"], "'gif'"),
        (["--batch-size", "0"], "--batch-size"),
        (["--out", "small.py"], "cannot write in small.py"),
    ],
)
def test_wrong_arguments_exit_with_2_and_say_why(arguments, message):
    picture("in/a.png")
    result = CliRunner().invoke(
        app,
        ["explain", "in", "--model", "small:net", "--out", "out", "--workers", "0", *arguments],
        env={"COLUMNS": "200"},
    )
    assert result.exit_code == 2, result.output
    assert message in re.sub(r"\s*\n?│?\s+", " ", result.stderr)
    assert "Traceback" not in result.output
    assert not Path("out/results.jsonl").exists() or not results()


def test_nothing_to_explain():
    Path("empty").mkdir()
    assert "no pictures in empty" in explain("empty", "--out", "out", code=2)[1]
    assert "nothing matches '*.png'" in explain("*.png", "--out", "out", code=2)[1]


def test_files_globs_folders_and_lists_together():
    for name in ("a/1.png", "a/b/2.png", "c/3.png", "c/4.png", "d/5.png"):
        picture(name)
    Path("list.csv").write_text("path,label\nd/5.png,dog\n")
    explain("a", "c/*.png", "list.csv", "--out", "out")
    assert [row["name"] for row in results()] == ["1", "b/2", "3", "4", "d/5"]
    assert [row["label"] for row in results()] == [None, None, None, None, 1]


def test_right_and_wrong_by_labels_and_by_folder():
    for name in ("in/cat/1.png", "in/dog/1.png", "in/kite/1.png", "in/other/1.png"):
        picture(name)
    out, err = explain("in", "--out", "out")
    predicted = results()[0]["predicted_name"]
    assert [row["label_name"] for row in results()] == ["cat", "dog", "kite", None]
    assert out.count(", right\n") == 1
    assert out.count(", wrong, it is ") == 2
    assert "1 of 3 right" in err
    Path("labels.csv").write_text(f"path,label\nin/other/1.png,{predicted}\n")
    out, err = explain("in", "--labels", "labels.csv", "--out", "out2")
    assert [row["right"] for row in results("out2")] == [None, None, None, True]
    Path("labels.csv").write_text("path,label\nother/1.png,cat\n")
    _, err = explain("in", "--labels", "labels.csv", "--out", "out3", code=2)
    assert "labels.csv speaks of none of these pictures" in err


def test_target_top_k_size_recipe_and_formats():
    picture("a.png", size=(90, 60))
    explain("a.png", "--target", "kite", "--out", "class", "--size", "40x50", "--overlays", "webp")
    (row,) = results("class")
    assert row["target_name"] == "kite"
    assert Image.open("class/overlays/a.webp").size == (50, 40)
    out, _ = explain("a.png", "--top-k", 3, "--out", "top", "--maps", "none", "--overlays", "png")
    assert [row["rank"] for row in results("top")] == [1, 2, 3]
    assert sorted(row["target"] for row in results("top")) == [0, 1, 2]
    assert sum(row["probability"] for row in results("top")) == pytest.approx(1)
    assert len(list(Path("top/overlays").iterdir())) == 3
    assert not Path("top/maps").exists()
    assert out.count(" %") == 3
    explain("a.png", "--recipe", "article", "--out", "article", "--maps", "feature")
    assert results("article")[0]["view"] == [15, 0, 75, 60]  # the central square, all of it kept
    assert np.load("article/maps/a.npy").shape == (55, 55)
    explain("a.png", "--recipe", "article-fit", "--out", "fit", "--overlays", "none")
    left, top, right, bottom = results("fit")[0]["view"]
    assert (left, right) == (0, 90)
    assert (top, bottom) == pytest.approx((-15, 75), abs=0.5)


def test_data_sets_of_maps_and_a_table():
    pq = pytest.importorskip("pyarrow.parquet")
    zarr = pytest.importorskip("zarr")
    for name in ("in/a.png", "in/b.png"):
        picture(name)
    explain("in", "--out", "out", "--maps-as", "zarr", "--maps-as", "parquet", "--table",
            "--maps-dtype", "float16", "--maps", "feature", "--overlays", "none",
            "--target-layer", "0", "--target-layer", "2:input")  # fmt: skip
    (maps,) = [array for name, array in zarr.open_group("out/maps.zarr").arrays() if name == "map"]
    assert (maps.shape, maps.dtype) == ((4, 7, 7), np.float16)
    assert pq.read_table("out/maps.parquet").num_rows == 4
    assert pq.read_table("out/results.parquet").column("layer").to_pylist() == ["0", "2:input"] * 2
    assert not Path("out/maps").exists()
    explain("in", "--out", "both", "--maps-as", "npy", "--maps-as", "parquet")
    assert np.load("both/maps/a.npy").dtype == np.float32
    _, err = explain("in", "--out", "both", code=2)
    assert "maps_parquet was" in err


def test_weights_of_overlays():
    picture("a.png")
    options = ("--overlays", "png", "--colormap", "gray")
    explain("a.png", "--out", "image", *options, "--image-weight", 1, "--heatmap-weight", 0)
    drawn = np.asarray(Image.open("image/overlays/a.png"))
    recipe = imaging.Recipe((32, 32), "stretch", (32, 32))
    np.testing.assert_array_equal(drawn, recipe.picture(imaging.read("a.png")))
    explain("a.png", "--out", "heat", *options, "--image-weight", 0, "--heatmap-weight", 1)
    drawn = np.asarray(Image.open("heat/overlays/a.png"))[..., 0]
    assert np.abs(drawn - 255 * np.load("heat/maps/a.npy")).max() <= 0.51


def test_class_names_from_a_file():
    picture("a.png")
    Path("names.txt").write_text("one\ntwo\nthree\n")
    explain("a.png", "--class-names", "names.txt", "--target", "three", "--out", "out")
    assert (results()[0]["target"], results()[0]["target_name"]) == (2, "three")


def test_weights_from_a_file():
    sys.path.insert(0, ".")
    model = models.load("small:net").model
    with torch.no_grad():
        model[4].bias.copy_(torch.tensor([0, 1000, 0]))
    torch.save(model.state_dict(), "dogs.pth")
    picture("a.png")
    explain("a.png", "--weights", "dogs.pth", "--out", "out")
    assert results()[0]["predicted_name"] == "dog"
    assert results()[0]["predicted_probability"] == 1


def test_the_same_command_goes_on_and_another_one_does_not():
    picture("in/a.png")
    explain("in", "--out", "out")
    picture("in/b.png")
    out, err = explain("in", "--out", "out")
    assert out.startswith("in/b.png: ")
    assert "1 explained at 2:input, 1 done before" in err
    _, err = explain("in", "--out", "out", "--method", "gradcam", code=2)
    assert "--overwrite" in err
    explain("in", "--out", "out", "--method", "gradcam", "--overwrite")
    assert len(results()) == 2


def test_json_progress():
    picture("in/a.png")
    out, _ = explain("in", "--out", "out", "--json-progress")
    events = [json.loads(line) for line in out.splitlines()]
    assert events[0]["event"] == "started"
    assert events[-1]["event"] == "finished"
    assert events[-1]["explained"] == 1


def test_layers():
    out, _ = call("layers", "small:net")
    table = [line.split() for line in out.splitlines()]
    assert table[0] == ["layer", "type", "shape"]
    assert ["0", "Conv2d", "1", "x", "4", "x", "7", "x", "7"] in table
    assert ["*", "2:input", "AdaptiveAvgPool2d", "1", "x", "4", "x", "7", "x", "7"] in table
    _, err = call("layers", "small:narrow", code=2)
    assert "error: the model fails on pictures (1, 3, 32, 32): mat1" in err


def test_layers_of_the_demo():
    out, _ = call("layers", "demo")
    assert re.search(r"^\*  _avg_pooling:input +AdaptiveAvgPool2d +1 x 1280 x 7 x 7$", out, re.M)


def test_info():
    out, _ = call("info")
    facts = dict(line.split("  ", 1) for line in out.splitlines())
    assert facts["torch"].strip().startswith(torch.__version__)
    assert "_cpu" in facts["libraries"]
    assert re.match(r" *(baseline|avx2|avx512|neon) of ", facts["instruction set"])
    assert facts["CUDA"].strip()


def test_version():
    assert call("--version")[0] == f"gradcampp_ext {gradcampp_ext.__version__}\n"
    assert re.match(r"\d+\.\d+\.\d+", gradcampp_ext.__version__)
    command = [sys.executable, "-m", "gradcampp_ext", "--version"]
    assert call("--version")[0] == subprocess.check_output(command, text=True)


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ([], ["explain", "bench"]),
        (["explain"], ["130 by Ctrl-C", "143 by SIGTERM"]),
        (["evaluate"], ["130 by Ctrl-C", "143 by SIGTERM"]),
        (["layers"], []),
        (["bench"], list(BENCHMARKS)),
        (["info"], []),
    ],
)
def test_help(command, named):
    out, _ = call(*command, "--help")
    text = re.sub(r"[\s│]+", " ", out)
    assert [each for each in ("Usage", *named) if each not in text] == []


def test_help_does_not_load_torch():
    code = "import sys, gradcampp_ext.cli; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "False\n"


# As a program of its own


def program(*arguments: str, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from gradcampp_ext.cli import main; main()", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_the_installed_program():
    script = Path(sys.executable).with_name("gradcampp")
    if not script.exists():
        pytest.skip("the package is not installed here")
    picture("-odd name.png")
    done = subprocess.run(
        [script, "explain", "--model", "small:net", "--out", "out", "--", "-odd name.png"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("-odd name.png: ")
    assert Path("out/overlays/_odd name.jpg").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_finish_the_batch_and_say_how_to_go_on(number, code):
    for index in range(60):
        picture(f"in/{index:02}.png")
    slow = textwrap.dedent("""
        import time, small
        def net():
            loaded = small.net()
            forward = loaded.model.forward
            loaded.model.forward = lambda images: (time.sleep(0.2), forward(images))[1]
            return loaded
        """)
    Path("slow.py").write_text(slow)
    command = ("explain", "in", "--model", "slow:net", "--out", "out", "--batch-size", "2",
               "--workers", "2")  # fmt: skip
    process = program(*command, start_new_session=True)
    process.stdout.readline()
    os.killpg(process.pid, number)  # as a terminal does: the workers get it too
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "finishing the batch in flight; the same command goes on from there" in err
    assert "Traceback" not in err
    assert "Traceback" not in out
    recorded = len(results())
    assert 0 < recorded < 60
    explain("in", "--model", "slow:net", "--out", "out", "--batch-size", 20)
    assert len(results()) == 60


def test_a_reader_that_goes_away_ends_the_program_quietly():
    for index in range(40):
        picture(f"in/{index:02}.png")
    process = program("explain", "in", "--model", "small:net", "--out", "out", "--batch-size", "1")
    process.stdout.readline()
    process.stdout.close()
    process.wait(60)
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()


# With the real network


def test_demo(tmp_path):
    summary = demo.explain(tmp_path / "demo")
    assert (summary.explained, summary.failed) == (5, 0)
    rows = {row["name"]: row for row in results(str(tmp_path / "demo"))}
    assert rows["cat"]["predicted_name"] in CATS
    assert rows["coffee"]["predicted_name"] in {"espresso", "cup", "coffee mug"}
    assert rows["rocket"]["predicted_name"] in {"missile", "projectile"}
    assert rows["motorcycle"]["predicted_name"] in {"moped", "motor scooter"}
    overview = Image.open(tmp_path / "demo" / "overview.png")
    assert overview.width > 5 * demo.SIZE
    for name, row in rows.items():
        assert Image.open(tmp_path / "demo" / row["files"]["overlay"]).size == (336, 336), name


def density(saved: np.ndarray, view: list[float], box: tuple[int, int, int, int]) -> float:
    """Share of the map's energy inside a box, over the box's share of what the network saw."""
    left, top, right, bottom = view
    height, width = saved.shape
    x = left + (np.arange(width) + 0.5) / width * (right - left)
    y = top + (np.arange(height) + 0.5) / height * (bottom - top)
    inside = ((y >= box[1]) & (y < box[3]))[:, None] & ((x >= box[0]) & (x < box[2]))[None]
    return saved[inside].sum() / saved.sum() / inside.mean()


def test_the_heat_is_on_the_object(tmp_path):
    demo.photographs(tmp_path / "photographs")
    call("explain", tmp_path / "photographs", "--model", "demo", "--out", "out", "--quiet")
    # left, top, right, bottom by eye: the cat's face without ears and fur, the cup, the motorcycle
    boxes = {"cat": (125, 70, 300, 270), "coffee": (165, 30, 445, 250),
             "motorcycle": (140, 130, 560, 400)}  # fmt: skip
    for row in results():
        if row["name"] in boxes:
            saved = np.load(Path("out") / row["files"]["map"])
            assert density(saved, row["view"], boxes[row["name"]]) > 1.25, row["name"]


@needs_photos
def test_labelled_photographs():
    with (PHOTOS / "labels.csv").open() as file:
        labels = {row["path"]: int(row["class_index"]) for row in csv.DictReader(file)}
    start = time.perf_counter()
    _, err = call(
        "explain", PHOTOS / "photos", "--labels", PHOTOS / "labels.csv", "--out", "out", "--quiet"
    )
    print(f"{len(labels) / (time.perf_counter() - start):.1f} images/s")
    rows = results()
    assert {str(Path(row["path"]).relative_to(PHOTOS)): row["label"] for row in rows} == labels
    right = sum(row["predicted"] == row["label"] for row in rows)
    assert f"{right} of 63 right" in err
    # 88.5 % of a thousand such photographs are; 51 of 63 is two standard deviations below
    assert right >= 51


def test_bench_runs_programs_and_names_those_that_fail(tmp_path, monkeypatch):
    from gradcampp_ext import bench

    (tmp_path / "good.py").write_text(
        "import sys, pathlib; pathlib.Path(sys.argv[sys.argv.index('--json') + 1]).write_text('{}')"
    )
    (tmp_path / "bad.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(bench, "folder", lambda: tmp_path)
    programs = {name: bench.Benchmark(f"{name}.py", "a test", 1) for name in ("good", "bad")}
    monkeypatch.setattr(bench, "BENCHMARKS", programs)
    out = tmp_path / "out"
    assert bench.run(["good"], out, "cpu") == [out / "good-cpu.json"]
    with pytest.raises(bench.BenchError, match="failed: bad"):
        bench.run([], out, "cpu")
    with pytest.raises(bench.BenchError, match="no benchmark is called 'ugly'"):
        bench.run(["ugly"], out, "cpu")
    with pytest.raises(bench.BenchError, match="runs on cuda"):
        bench.run(["good"], out, "cuda")
    (tmp_path / "file").touch()
    _, err = call("bench", "good", "--out", tmp_path / "file", code=2)
    assert re.search(r"error: cannot write in .*file: File exists", err)


def test_bench_finds_its_programs():
    from gradcampp_ext import bench

    for benchmark in bench.BENCHMARKS.values():
        assert (bench.folder() / benchmark.program).exists(), benchmark.program


@pytest.mark.parametrize(
    "name", ["accuracy", "op", "end-to-end", "classes", "pipeline", "training"]
)
def test_benchmarks_can_be_imported(name, monkeypatch):
    """What they take from the package and from their libraries is there."""
    from gradcampp_ext import bench

    for module in ("torchvision", "torchcam", "pytorch_grad_cam"):
        pytest.importorskip(module)
    monkeypatch.setattr(sys, "path", [*sys.path, str(bench.folder())])
    file = bench.folder() / bench.BENCHMARKS[name].program
    specification = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, file.stem, module)
    specification.loader.exec_module(module)
    assert module.main


def test_quartiles_of_a_benchmark_lie_among_its_values(tmp_path, monkeypatch):
    from gradcampp_ext import bench

    monkeypatch.setattr(sys, "path", [*sys.path, str(bench.folder())])
    environment = importlib.import_module("environment")
    assert environment.quartiles([1.0, 2.0]) == (1.25, 1.5, 1.75)
    op_on_cuda = importlib.import_module("op_on_cuda")
    assert op_on_cuda.Times([1.0, 2.0], call=0.0).stats()["iqr"] == 0.5
    environment.write(tmp_path / "new" / "a.json", {"b": 1})
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"b": 1}
