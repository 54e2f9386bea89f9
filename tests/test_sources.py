"""Pictures in Parquet files, tar shards and Hugging Face data sets; what is broken in them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_batch import CLASSES, SINKS, lines, make_model, run, tree, write_pictures
from typer.testing import CliRunner

from gradcampp_ext import batch
from gradcampp_ext.batch import hub, parquet, shards
from gradcampp_ext.cli import app
from gradcampp_ext.models import Classes, LoadedModel

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
datasets = pytest.importorskip("datasets")
pytest.importorskip("webdataset")


@pytest.fixture
def model() -> LoadedModel:
    return make_model()


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    """Ten, of which three cannot be read: empty, truncated, no picture."""
    paths = write_pictures(tmp_path / "in", 10)
    paths[2].write_bytes(b"")
    paths[5].write_bytes(paths[5].read_bytes()[:300])
    paths[6].write_bytes(b"text")
    return paths


@pytest.fixture
def maps(tmp_path, model, pictures) -> list[np.ndarray]:
    """Of the seven that can be read, as the files themselves are explained."""
    run(pictures, model, tmp_path / "files")
    return saved(tmp_path / "files")


def saved(out: Path) -> list[np.ndarray]:
    return [np.load(out / row["files"]["map"]) for row in lines(out / "results.jsonl")]


def check(out: Path, source: batch.Source, maps: list[np.ndarray], **options: object) -> list[dict]:
    """Explains a source of the ten pictures; gives the rows, without and with worker processes."""
    for workers in (0, 2):
        summary = batch.run(
            source,
            make_model(),
            out / str(workers),
            SINKS,
            batch.Options(batch_size=4, workers=workers),
        )
        assert (summary.explained, summary.failed) == (7, 3)
        for ours, expected in zip(saved(out / str(workers)), maps, strict=True):
            np.testing.assert_allclose(ours, expected, atol=1e-5)
        reasons = [row["reason"] for row in lines(out / str(workers) / "errors.jsonl")]
        assert reasons[0] == "empty file (0 bytes)"
        assert "truncated" in reasons[1] or "damaged" in reasons[1]
        assert "not an image" in reasons[2]
    assert tree(out / "0") == tree(out / "2")
    return lines(out / "0" / "results.jsonl")


# Parquet


def write_parquet(file: Path, pictures: list[Path], *, embedded: bool = True) -> None:
    """As datasets writes images, three a row group."""
    rows = [
        {"bytes": path.read_bytes() if embedded else None, "path": str(path)} for path in pictures
    ]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    labels = [index % 5 for index in range(len(rows))]
    table = pa.table({"image": pa.array(rows, kind), "label": labels})
    pq.write_table(table, file, row_group_size=3)


@pytest.mark.parametrize("embedded", [True, False])
def test_pictures_in_parquet(tmp_path, pictures, maps, embedded):
    file = tmp_path / "cats.parquet"
    write_parquet(file, pictures, embedded=embedded)
    source = batch.Files([file])
    assert len(source) == 10
    rows = check(tmp_path / "out", source, maps)
    kept = [index for index in range(10) if index not in (2, 5, 6)]
    assert [row["path"] for row in rows] == [f"{file}/{index}" for index in kept]
    assert [row["name"] for row in rows] == [f"cats/{index}" for index in kept]
    assert [row["label"] for row in rows] == [index % 5 for index in kept]


def test_plain_bytes_in_parquet(tmp_path, pictures, maps):
    file = tmp_path / "cats.parquet"
    content = [path.read_bytes() for path in pictures]
    pq.write_table(pa.table({"id": list(range(10)), "jpg": content}), file)
    assert [row["label"] for row in check(tmp_path / "out", batch.Files([file]), maps)] == [
        None
    ] * 7


def test_rows_without_a_picture_and_damaged_row_groups(tmp_path, model):
    paths = write_pictures(tmp_path / "in", 6)
    file = tmp_path / "a.parquet"
    content = [path.read_bytes() for path in paths]
    content[1] = None
    pq.write_table(pa.table({"image": content}), file, row_group_size=3, compression="zstd")
    damaged = bytearray(file.read_bytes())
    column = pq.ParquetFile(file).metadata.row_group(1).column(0)
    begin = column.dictionary_page_offset or column.data_page_offset
    damaged[begin : begin + 200] = bytes(200)
    file.write_bytes(damaged)
    summary = run([file], model, tmp_path / "out")
    assert (summary.explained, summary.failed) == (2, 4)
    errors = lines(tmp_path / "out" / "errors.jsonl")
    assert errors[0] == {"path": f"{file}/1", "reason": "the row has no picture"}
    assert all("row group 1 cannot be read" in error["reason"] for error in errors[1:])


def test_parquet_manifests_and_label_files(tmp_path, pictures, maps):
    file = tmp_path / "list.parquet"
    paths = [str(path.relative_to(tmp_path)) for path in pictures]
    names = ["dog", "n1", "kite", "0", None, "dog", "dog", "dog", "cat", "kite"]
    pq.write_table(pa.table({"score": [0.5] * 10, "path": paths, "label": names}), file)
    rows = check(tmp_path / "out", batch.Files([file]), maps)
    assert [row["label"] for row in rows] == [1, 0, 0, None, 1, 0, 2]
    labels = {k: v for k, v in zip(paths, names, strict=True) if v}
    pq.write_table(pa.table({"path": list(labels), "label": list(labels.values())}), file)
    source = batch.Files([tmp_path / "in"], labels=batch.sources.read_labels(file))
    assert [item.label for item in source] == names


def test_what_class_labels_mean():
    assert list(parquet.class_labels(["a", "b"], None)) == [0, 1]
    assert list(parquet.class_labels(["a", "b", "c", "d", "e"], CLASSES)) == [0, 1, 2, 3, 4]
    assert parquet.class_labels(["dog", "n1", "crane", "ant"], CLASSES) == ["dog", "n1", None, None]


def test_class_labels_in_parquet_that_datasets_wrote(tmp_path):
    paths = write_pictures(tmp_path / "in", 3)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "dog"])}
    )
    rows = {"image": [str(path) for path in paths], "label": [0, 1, 1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    source = batch.Files([tmp_path / "a.parquet"], classes=CLASSES)
    assert [item.label for item in source] == [None, "dog", "dog"]
    same = Classes(("x", "y"))
    source = batch.Files([tmp_path / "a.parquet"], classes=same)
    assert [item.label for item in source] == [0, 1, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no parquet", "cannot be read"),
        (None, "No such file"),
        ({"score": [1.0]}, "one of the columns path"),
    ],
)
def test_parquet_files_that_cannot_be_used(tmp_path, content, message):
    file = tmp_path / "a.parquet"
    if isinstance(content, dict):
        pq.write_table(pa.table(content), file)
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(batch.SourceError, match=message):
        list(batch.Files([file]))


# Tar shards


def write_shard(file: Path, members: list[tuple[str, bytes]]) -> None:
    mode = "w:gz" if file.suffix in (".gz", ".tgz") else "w"
    with tarfile.open(file, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_shards(folder: Path, pictures: list[Path], *, suffix: str = ".tar") -> list[Path]:
    """Two, of five samples each, the labels as numbers in one and in JSON in the other."""
    found = []
    for shard in range(2):
        members = [("__meta__", b"{}")]
        for index, path in enumerate(pictures[5 * shard : 5 * shard + 5]):
            key = f"train/{index:03}"
            label = ("cls", b"%d\n" % index) if shard else ("json", b'{"label": "dog", "id": 7}')
            members += [(f"{key}.{label[0]}", label[1]), (f"{key}.PNG", path.read_bytes())]
        found.append(folder / f"cats-{shard:03}{suffix}")
        write_shard(found[-1], members)
    return found


@pytest.mark.parametrize("how", ["names", "braces", "glob", "compressed", "pipe"])
def test_shards(tmp_path, pictures, maps, how):
    suffix = ".tar.gz" if how == "compressed" else ".tar"
    files = [str(file) for file in write_shards(tmp_path, pictures, suffix=suffix)]
    arguments = {
        "names": files,
        "compressed": files,
        "braces": [str(tmp_path / "cats-{000..001}.tar")],
        "glob": [str(tmp_path / "cats-*.tar")],
        "pipe": [f"pipe:cat {file}" for file in files],
    }[how]
    source = batch.Files(arguments)
    rows = check(tmp_path / "out", source, maps)
    first = f"pipe:cat {files[0]}" if how == "pipe" else files[0]
    assert rows[0]["path"] == f"{first}/train/000.png"
    assert rows[0]["name"] == "cats-000/train/000"
    assert [row["label"] for row in rows] == [1, 1, 1, 1, 2, 3, 4]
    if how in ("compressed", "pipe"):
        with pytest.raises(TypeError):
            len(source)
    else:
        assert len(source) == 10
        # pictures are read where they are needed, not where the shard is listed
        assert all(callable(item.image) for item in source)


def test_shards_that_are_damaged(tmp_path, model):
    picture = write_pictures(tmp_path / "in", 1)[0].read_bytes()
    good = [(f"{index}.png", picture) for index in range(3)]
    write_shard(tmp_path / "cut.tar", [*good, ("3.png", picture), ("4.png", picture)])
    content = (tmp_path / "cut.tar").read_bytes()
    with tarfile.open(tmp_path / "cut.tar") as tar:
        end = tar.getmember("3.png").offset_data + 100
    (tmp_path / "cut.tar").write_bytes(content[:end])
    write_shard(
        tmp_path / "odd.tar",
        [
            ("a.txt", b"no picture"),
            ("b.png", picture),
            ("b.png", picture),
            ("c.png", picture),
            ("c.json", b"{"),
            ("d.seg.png", b"another picture of d"),
            ("d.png", picture),
            ("e", b"no suffix"),
        ],
    )
    (tmp_path / "rubbish.tar").write_bytes(b"x" * 2000)
    files = [tmp_path / f"{name}.tar" for name in ("cut", "odd", "rubbish", "missing")]
    summary = run(files, model, tmp_path / "out")
    rows = lines(tmp_path / "out" / "results.jsonl")
    assert [row["name"] for row in rows] == ["cut/0", "cut/1", "cut/2", "odd/b", "odd/d"]
    assert rows[-1]["path"].endswith("odd.tar/d.png")
    assert summary.explained == 5
    errors = {
        row["path"].removeprefix(f"{tmp_path}/"): row["reason"]
        for row in lines(tmp_path / "out" / "errors.jsonl")
    }
    assert list(errors) == ["cut.tar/3.png", "cut.tar", "odd.tar/a", "odd.tar/c.png", "odd.tar",
                            "rubbish.tar", "missing.tar"]  # fmt: skip
    assert "truncated: the shard has 100 of" in errors["cut.tar/3.png"]
    assert errors["cut.tar"] == "the shard is damaged: unexpected end of data"
    assert errors["odd.tar/a"] == "the sample has no picture, only txt"
    assert "its label cannot be read" in errors["odd.tar/c.png"]
    assert "b.png: duplicate file name" in errors["odd.tar"]
    assert "the shard is damaged" in errors["rubbish.tar"]
    assert "No such file" in errors["missing.tar"]


def test_a_run_over_shards_is_taken_up(tmp_path, model, pictures):
    files = write_shards(tmp_path, pictures)
    run(files, model, tmp_path / "whole", batch_size=2)
    run(files[:1], model, tmp_path / "out", batch_size=2)
    results = tmp_path / "out" / "results.jsonl"
    results.write_bytes(b"".join(results.read_bytes().splitlines(keepends=True)[:2]))
    summary = run(files, model, tmp_path / "out", batch_size=2)
    assert (summary.resumed, summary.explained) == (2, 5)
    assert tree(tmp_path / "out").keys() == tree(tmp_path / "whole").keys()


def test_shards_are_listed_in_little_memory(tmp_path):
    write_shard(tmp_path / "a.tar", [(f"{index:04}.png", b"") for index in range(500)])
    tars = []
    real = tarfile.open

    def opened(*args, **kwargs):
        tars.append(real(*args, **kwargs))
        return tars[-1]

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(tarfile, "open", opened)
        for _ in shards.items(str(tmp_path / "a.tar")):
            assert len(tars[0].members) <= 1


# Hugging Face


def hugging_face(pictures: list[Path]) -> object:
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "photo": datasets.Image(),
            "kind": datasets.ClassLabel(names=["dog", "ant"]),
        }
    )
    rows = {
        "text": [""] * 10,
        "photo": [{"bytes": path.read_bytes(), "path": None} for path in pictures],
        "kind": [0, 1] * 5,
    }
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.mark.parametrize("streamed", [False, True])
def test_hugging_face_data_sets(tmp_path, pictures, maps, streamed):
    dataset = hugging_face(pictures)
    source = batch.HuggingFace(
        dataset.to_iterable_dataset() if streamed else dataset, name="photos", classes=CLASSES
    )
    rows = check(tmp_path / "out", source, maps)
    kept = [index for index in range(10) if index not in (2, 5, 6)]
    assert [row["path"] for row in rows] == [f"photos/{index}" for index in kept]
    assert [row["label_name"] for row in rows] == [
        "dog" if index % 2 == 0 else None for index in kept
    ]


def test_hugging_face_columns(pictures):
    dataset = hugging_face(pictures)
    with pytest.raises(batch.SourceError, match="no column of pictures ; its columns are text"):
        batch.HuggingFace(dataset.select_columns(["text", "kind"]))
    with pytest.raises(batch.SourceError, match="no column of pictures image"):
        batch.HuggingFace(dataset, image="image")
    with pytest.raises(batch.SourceError, match="no column number"):
        batch.HuggingFace(dataset, label="number")
    source = batch.HuggingFace(dataset.select_columns(["photo"]))
    assert [item.label for item in source] == [None] * 10


@pytest.fixture
def cache(tmp_path, monkeypatch) -> None:
    """A cache of the test's own, and no network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_hugging_face_specs(tmp_path, pictures, cache):
    dataset = hugging_face(pictures)
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([0, 1])}).save_to_disk(
        tmp_path / "two"
    )
    folder = tmp_path / "folder"
    for index, name in ((0, "dog"), (1, "kite"), (3, "kite")):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / f"{index}.png").write_bytes(pictures[index].read_bytes())

    def labels(spec: str) -> list[object]:
        return [item.label for item in hub.load(spec, CLASSES)]

    assert labels(f"hf:{tmp_path / 'one'}") == ["dog", None] * 5
    assert labels(f"hf:{tmp_path / 'two'}@test") == ["dog", None]
    assert next(iter(hub.load(f"hf:{tmp_path / 'two'}@test"))).path == "two/test/0"
    assert labels(f"hf:{folder}") == ["dog", "kite", "kite"]
    (tmp_path / "one").rename(tmp_path / "one@home")
    assert labels(f"hf:{tmp_path / 'one@home'}") == ["dog", None] * 5
    (tmp_path / "two").rename(tmp_path / "t@wo")
    assert labels(f"hf:{tmp_path / 't@wo'}@test") == ["dog", None]
    (tmp_path / "t@wo").rename(tmp_path / "two")
    assert labels(f"hf-stream:{folder}@train") == ["dog", "kite", "kite"]
    assert labels(f"hf-stream:{tmp_path / 'two'}@test") == ["dog", None]
    with pytest.raises(batch.SourceError, match=r"choose a split by @SPLIT, one of train, test"):
        hub.load(f"hf:{tmp_path / 'two'}")
    with pytest.raises(batch.SourceError, match=r"choose a split by @SPLIT, one of train"):
        hub.load(f"hf:{folder}@validation")
    with pytest.raises(batch.SourceError, match=r"hf:nobody/nothing cannot be loaded"):
        hub.load("hf:nobody/nothing")


def test_sources_on_the_command_line(tmp_path, pictures, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    write_shards(tmp_path, pictures)
    write_parquet(tmp_path / "a.parquet", pictures)
    hugging_face(pictures).save_to_disk("saved")

    def explain(*arguments: str, out: str, code: int = 1) -> str:
        command = ["explain", *arguments, "--model", "test_batch:make_model", "--out", out,
                   "--workers", "0"]  # fmt: skip
        result = CliRunner().invoke(app, command)
        assert result.exit_code == code, result.output
        return result.stderr

    explain("cats-{000..001}.tar", "a.parquet", "in/000.png", out="files")
    assert len(lines(Path("files/results.jsonl"))) == 15
    explain("hf:saved", out="hf")
    rows = lines(Path("hf/results.jsonl"))
    assert [row["path"] for row in rows][:2] == ["saved/0", "saved/1"]
    assert [row["label"] for row in rows] == [1, None, None, 1, None, 1, None]
    assert "stands alone" in explain("hf:saved", "in", out="both", code=2)
    assert "cannot be loaded" in explain("hf:gone/away", out="none", code=2)
    json.loads(Path("hf/run.json").read_text())


def test_a_bomb_in_a_shard(tmp_path, model, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    write_shard(tmp_path / "a.tar", [("0.png", write_pictures(tmp_path, 1)[0].read_bytes())])
    run([tmp_path / "a.tar"], model, tmp_path / "out")
    (error,) = lines(tmp_path / "out" / "errors.jsonl")
    assert "refused as a decompression bomb" in error["reason"]
