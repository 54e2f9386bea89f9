"""Several processes of a real Ray cluster on this machine, some of which are killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from test_batch import CLASSES, RECIPE, SINKS, Net, lines, make_model, tree, write_pictures

from gradcampp_ext import batch
from gradcampp_ext.batch.items import Item
from gradcampp_ext.imaging import ImageError
from gradcampp_ext.models import LoadedModel

pytest.importorskip("ray")
import ray

from gradcampp_ext.batch import ray as ours

TESTS = str(Path(__file__).parent)


@pytest.fixture(scope="module")
def cluster() -> Iterator[ours.Cluster]:
    """Of two cores, and a GPU that no worker has a use for."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": ""}
    ray.init(
        "local",
        num_cpus=2,
        num_gpus=1,
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
    )
    with ours.Cluster() as connected:
        yield connected
    assert ray.is_initialized()  # what it did not start, it does not end
    ray.shutdown()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in Ray's workers of one core: the same sums in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Telling(batch.Files):
    """Leaves word of the process that reads each picture, and takes its time."""

    def __init__(self, folder: Path, told: Path) -> None:
        super().__init__([folder])
        self._told = told

    def read(self, item: Item):
        with self._told.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.05)
        return super().read(item)


def run(source, out: Path, engine, *, model=None, progress=None, stop=None, **options):
    options = {"batch_size": 4, "workers": 2} | options
    source = source if isinstance(source, batch.Files) else batch.Files([source])
    model = model or make_model()
    return batch.run(
        source, model, out, SINKS, batch.Options(**options),
        engine=engine, progress=progress, stop=stop,
    )  # fmt: skip


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """30, one of them broken, and their outputs by the local engine in "whole"."""
    write_pictures(tmp_path / "in", 30)
    (tmp_path / "in" / "003.png").write_bytes(b"broken")
    run(tmp_path / "in", tmp_path / "whole", batch.Local, workers=0)
    return tmp_path / "in"


class Killing(batch.Progress):
    """Kills the process that read the first picture when a batch has been recorded."""

    def __init__(self, told: Path) -> None:
        self._told, self.killed = told, 0

    def explained(self, rows: object) -> None:
        if not self.killed:
            self.killed = int(self._told.read_text().split()[0])
            os.kill(self.killed, signal.SIGKILL)


def test_outputs_are_the_local_ones_though_a_worker_is_killed(tmp_path, pictures, cluster):
    told = tmp_path / "told"
    killing = Killing(told)
    summary = run(Telling(pictures, told), tmp_path / "out", cluster, progress=killing)
    assert (summary.explained, summary.failed, summary.layer) == (29, 1, "pool:input")
    assert sum(summary.shares.values()) == pytest.approx(1)
    processes = told.read_text().split()
    assert killing.killed != os.getpid()
    assert str(killing.killed) != processes[-1]
    assert len(processes) > 30  # the batch that was lost has been read again
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


DRIVER = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_ray

class Slow(test_ray.batch.Progress):
    def explained(self, rows):
        print("recorded", flush=True)

with test_ray.ours.Cluster({address!r}) as cluster:
    source = test_ray.Telling(Path({source!r}), Path({told!r}))
    test_ray.run(source, Path({out!r}), cluster, progress=Slow())
"""


def test_taken_up_after_the_driver_was_killed(tmp_path, pictures, cluster):
    out, told = tmp_path / "out", tmp_path / "told"
    code = DRIVER.format(
        tests=TESTS, source=str(pictures), told=str(told), out=str(out),
        address=ray.get_runtime_context().gcs_address,
    )  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stdout.readline() == "recorded\n"
        driver.kill()
    done = len(lines(out / "results.jsonl"))
    assert 0 < done < 29
    summary = run(pictures, out, cluster)
    assert (summary.resumed, summary.explained) == (done, 29 - done)
    assert tree(out) == tree(tmp_path / "whole")


class OnGpu(ours.Cluster):
    """Places actors and decoding tasks as for GPUs; the workers compute on the CPU all the same."""

    def __call__(self, job):
        remote = super().__call__(job)
        remote._gpus, remote._actors, remote._decoders = 1, 1, 2
        return remote


def test_an_actor_a_gpu_and_decoding_tasks(tmp_path, pictures, cluster):
    assert cluster.device.type == "cuda"
    told = tmp_path / "told"
    killing = Killing(told)  # of a decoding task
    summary = run(Telling(pictures, told), tmp_path / "out", OnGpu(), progress=killing)
    assert (summary.explained, summary.failed) == (29, 1)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


class Encoding(batch.Maps):
    """Says which process encodes a file; refuses those of the picture that it is told."""

    def encode(self, value, row, about) -> bytes:
        if row["name"] == "007":
            raise ValueError("007 cannot be encoded")
        return f"{os.getpid()} {about['record']} {row['name']}".encode()


@pytest.mark.parametrize("engine", ["actors", "tasks"])
def test_files_are_encoded_by_the_workers(tmp_path, cluster, engine):
    engine = cluster if engine == "actors" else OnGpu()
    out = tmp_path / "out"
    files, options = write_pictures(tmp_path / "in", 8), batch.Options(batch_size=4, workers=2)
    with pytest.raises(ValueError, match="007 cannot be encoded"):
        batch.run(batch.Files(files), make_model(), out, [Encoding()], options, engine=engine)
    batch.run(batch.Files(files[:7]), make_model(), out, [Encoding()], options, engine=engine)
    made = [(out / row["files"]["map"]).read_text().split() for row in lines(out / "results.jsonl")]
    assert [name for _, _, name in made] == [f"00{n}" for n in range(7)]
    assert {record for _, record, _ in made} == {lines(out / "results.jsonl")[0]["record"]}
    assert str(os.getpid()) not in {process for process, _, _ in made}


def test_a_picture_that_kills_its_worker_is_named(tmp_path, cluster, monkeypatch):
    monkeypatch.setattr(ours, "_TRIES", 1)
    paths = write_pictures(tmp_path / "in", 8)
    with pytest.raises(batch.DecodeError, match=r"1 workers .* from .*000.png to .*003.png"):
        run(Deadly(paths), tmp_path / "out", cluster, workers=1)
    assert not (tmp_path / "out" / ".partial").exists()


class Deadly(batch.Files):
    def read(self, item: Item):
        if item.name == "002":
            os._exit(9)
        return super().read(item)


def test_what_workers_lack_is_told(tmp_path, cluster, monkeypatch):
    paths = write_pictures(tmp_path / "in", 2)
    monkeypatch.setitem(sys.modules, "only_here", types.ModuleType("only_here"))
    only_here = type("OnlyHere", (Net,), {"__module__": "only_here"})
    sys.modules["only_here"].OnlyHere = only_here
    model = LoadedModel(only_here().eval(), RECIPE, CLASSES)
    with pytest.raises(batch.EngineError, match=r"cannot load.*No module named 'only_here'"):
        run(paths[0].parent, tmp_path / "module", cluster, model=model, workers=1)
    versions = ours._versions()
    monkeypatch.setattr(ours, "_versions", lambda: versions | {"torch": "0.4"})
    told = re.escape(f"torch 0.4 here and {versions['torch']} on ")
    with pytest.raises(batch.EngineError, match=f"different versions: {told}"):
        run(paths[0].parent, tmp_path / "version", cluster, workers=1)


def test_a_file_that_another_machine_does_not_see(tmp_path, cluster):
    missing = str(tmp_path / "missing.png")
    item = Item(missing, "missing", missing)
    here = ray.get_runtime_context().get_node_id()
    with pytest.raises(ImageError) as local:
        ours._Reader(batch.Files.read, here)(item)
    assert str(local.value) == "No such file or directory"
    with pytest.raises(ImageError, match=r"^No such file or directory on .* all machines share$"):
        ours._Reader(batch.Files.read, "elsewhere")(item)


def test_what_cannot_be_is_told_before_anything_is_written(tmp_path, cluster, monkeypatch):
    write_pictures(tmp_path / "in", 1)
    for options, error, text in (
        ({"target_layer": "none"}, ValueError, "none"),
        ({"method": "none"}, ValueError, "none"),
        ({"workers": 0}, ValueError, "at least 1"),
        ({"device": torch.device("cuda:1")}, ValueError, "its own GPU: cuda, got cuda:1"),
    ):
        with pytest.raises(error, match=text):
            run(tmp_path / "in", tmp_path / "out", cluster, **options)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    assert cluster.device.type == "cpu"
    with pytest.raises(batch.EngineError, match="the cluster has no GPU"):
        run(tmp_path / "in", tmp_path / "out", cluster, device=torch.device("cuda"))
    assert not (tmp_path / "out").exists()


def test_explain_batch_in_a_pipeline_of_ones_own(tmp_path, cluster):
    paths = write_pictures(tmp_path / "in", 5)
    paths[3].write_bytes(b"broken")
    run(tmp_path / "in", tmp_path / "out", batch.Local, batch_size=5, topk=2, workers=0)
    ray.cloudpickle.register_pickle_by_value(sys.modules[Net.__module__])
    data = ray.data.read_binary_files(str(tmp_path / "in"), include_paths=True)
    data = data.repartition(1).sort("path")
    data = data.map_batches(
        ours.ExplainBatch,
        fn_constructor_kwargs={"model": make_model(), "topk": 2},
        batch_size=5,
        concurrency=1,
    )
    found = data.take_all()
    assert [Path(row["path"]) for row in found] == paths
    assert found[3]["error"] == "not an image, or in a format that Pillow cannot read"
    assert found[3]["predicted"] == -1
    assert np.isnan(found[3]["map"]).all()
    rows = iter(lines(tmp_path / "out" / "results.jsonl"))
    for row in (row for row in found if row["error"] is None):
        for k in range(2):
            expected = next(rows)
            assert expected["predicted"] == row["predicted"]
            assert expected["predicted_name"] == row["predicted_name"]
            assert expected["target"] == row["target"][k]
            assert expected["score"] == pytest.approx(row["score"][k], rel=1e-5)
            saved = np.load(tmp_path / "out" / expected["files"]["map"])
            np.testing.assert_allclose(row["map"][k], saved, atol=1e-6)


@pytest.mark.parametrize("maps", ["image", "feature"])
def test_explain_batch_by_itself(tmp_path, maps):
    paths = write_pictures(tmp_path / "in", 3)
    explain = ours.ExplainBatch(make_model(), maps=maps, target="label", device=torch.device("cpu"))
    labels = np.array([1, 99, 2])
    found = explain({"path": np.array(list(map(str, paths))), "label": labels})
    side = 32 if maps == "image" else 8
    assert found["map"].shape == (3, 1, side, side)
    assert found["target"].tolist() == [[1], [-1], [2]]
    assert "no class 99" in found["error"][1]
    most = found["map"][[0, 2]].max((1, 2, 3))
    assert (most == 1).all() if maps == "feature" else ((most > 0.5) & (most <= 1)).all()
    again = ours.ExplainBatch(make_model(), maps=maps, target="label", device=torch.device("cpu"))
    failed = again({"path": np.array(["gone", "gone"]), "label": labels[:2]})
    assert failed["map"].shape == (2, 1, side, side)  # as of the batches that can be read
    assert np.isnan(failed["map"]).all()
    with pytest.raises(ValueError, match=r"needs a column 'bytes', 'image' or 'path'.* label"):
        explain({"label": labels})
    with pytest.raises(ValueError, match="maps must be"):
        ours.ExplainBatch(make_model(), maps="none")


def gradcampp(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from gradcampp_ext.cli import main; main()", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_the_command_line(tmp_path, cluster):
    write_pictures(tmp_path / "in", 5)
    (tmp_path / "mine.py").write_text(f"import sys\nsys.path.append({TESTS!r})\nimport test_batch\n"
                                      "factory = test_batch.make_model\n")  # fmt: skip
    common = ("explain", "in", "--model", "mine:factory", "--device", "cpu", "--json-progress")
    address = ray.get_runtime_context().gcs_address
    done = gradcampp(*common, "-o", "ray", "--engine=ray", f"--ray-address={address}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[-1]["explained"] == 5
    done = gradcampp(*common, "-o", "x", "--ray-address", address, cwd=tmp_path)
    assert "--ray-address needs --engine ray" in done.stderr


def test_no_cluster_at_the_address(tmp_path):
    done = gradcampp("explain", TESTS + "/../docs/demo.jpg", "-o", "out", "--weights", "none",
                     "--engine", "ray", "--ray-address", "127.0.0.1:1", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 2
    assert "error: no Ray cluster can be reached at 127.0.0.1:1" in done.stderr
    assert not (tmp_path / "out").exists()
