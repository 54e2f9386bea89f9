"""Runs that are killed, stopped, or have no room left: nothing is lost and nothing done twice."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from test_batch import make_model, run, tree, write_pictures

from gradcampp_ext import batch, evaluation
from gradcampp_ext.batch import mapset, parts, report, table
from gradcampp_ext.batch.engine import Engine
from gradcampp_ext.batch.record import Record, RecordError

pytest.importorskip("pyarrow")
zarr = pytest.importorskip("zarr")

PICTURES, BROKEN = 40, 3
SINKS = [
    batch.Overlays("png"),
    batch.Maps("feature"),
    batch.MapSet("parquet"),
    batch.MapSet("zarr", "image", "float16"),
    batch.ResultsTable(),
]


def shrink_parts() -> None:
    """Parts of a few maps, so that short runs have many."""
    parts._BYTES, mapset._CHUNK_BYTES, mapset._SHARD = 5 * 32 * 32 * 4, 32 * 32 * 4, 3


@pytest.fixture(autouse=True, scope="module")
def small_parts() -> Iterator[None]:
    before = parts._BYTES, mapset._CHUNK_BYTES, mapset._SHARD
    shrink_parts()
    yield
    parts._BYTES, mapset._CHUNK_BYTES, mapset._SHARD = before


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("in")
    paths = write_pictures(folder, PICTURES)
    paths[1].write_bytes(b"")
    paths[7].write_bytes(paths[7].read_bytes()[:300])
    paths[20].write_bytes(b"\x89PNG but no more")
    return folder


def explain(
    pictures: Path, out: Path, sinks: list[Any] = SINKS, **options: object
) -> batch.Summary:
    return run([pictures], make_model(), out, sinks, batch_size=3, **options)


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory) -> dict[str, bytes]:
    """The outputs of a run that nothing happens to."""
    out = tmp_path_factory.mktemp("whole")
    summary = explain(pictures, out)
    assert (summary.explained, summary.failed) == (PICTURES - BROKEN, BROKEN)
    return tree(out)


# Runs of their own start in a process that has imported everything and has run nothing.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["gradcampp_ext.evaluation", "hypothesis", "pyarrow.parquet", "pytest", "zarr"]
)


def child(
    pictures: Path, out: Path, workers: int, before: Callable[[], None] | None, sinks: list[Any]
) -> None:
    """A run that appends the paths that it explains to OUT.log and writes errors to OUT.err."""
    os.dup2(os.open(f"{out}.err", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
    log = os.open(f"{out}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    real = Engine.__call__

    def call(engine: Engine, pictures: Any, draw: Any) -> Any:
        os.write(log, "".join(f"{item.path}\n" for item in pictures.items).encode())
        time.sleep(0.02)
        return real(engine, pictures, draw)

    Engine.__call__ = call
    signal.signal(signal.SIGINT, signal.default_int_handler)
    shrink_parts()
    if before is not None:
        before()
    Path(f"{out}.ready").touch()
    explain(pictures, out, sinks, workers=workers)


def start(
    pictures: Path,
    out: Path,
    *,
    workers: int = 1,
    before: Callable[[], None] | None = None,
    sinks: list[Any] = SINKS,
) -> Any:
    """A child that is about to begin, or has ended."""
    ready = Path(f"{out}.ready")
    ready.unlink(missing_ok=True)
    process = FORKS.Process(target=child, args=(pictures, out, workers, before, sinks))
    process.start()
    while process.is_alive() and not ready.exists():
        time.sleep(0.005)
    return process


def end(process: Any, out: Path) -> str:
    """What a child that ends said on its standard error."""
    process.join(60)
    assert process.exitcode is not None, "it hangs"
    return Path(f"{out}.err").read_text()


def wait_for_a_record(process: Any, out: Path) -> None:
    while not recorded(out):
        assert process.is_alive(), end(process, out)
        time.sleep(0.01)


def recorded(out: Path) -> list[str]:
    """Paths that results.jsonl says are done; a torn last line is not one."""
    with contextlib.suppress(FileNotFoundError):
        content = (out / "results.jsonl").read_text()
        return [json.loads(line)["path"] for line in content.splitlines(True) if line[-1] == "\n"]
    return []


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_moments(tmp_path, pictures, whole, seed):
    moments = random.Random(seed)
    out, log = tmp_path / "out", tmp_path / "out.log"
    kills = 0
    while kills < 4 and len(recorded(out)) < PICTURES - BROKEN:
        done = set(recorded(out))
        log.unlink(missing_ok=True)
        process = start(pictures, out, workers=kills % 2)
        time.sleep(moments.uniform(0, 0.6))
        assert process.is_alive() or process.exitcode == 0, end(process, out)
        process.kill()
        process.join(60)
        kills += 1
        explained = log.read_text().splitlines() if log.exists() else []
        assert not done & set(explained), "explained although it was done"
        assert len(explained) == len(set(explained))
    before = recorded(out)
    summary = explain(pictures, out)
    assert summary.resumed == len(before)
    assert summary.explained == PICTURES - BROKEN - len(before)
    assert tree(out) == whole


def writers(err: Path) -> list[str]:
    """Processes whose standard error goes to a file."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "fd" / "2").readlink() == err:
                found.append(process.name)
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_workers_end_with_a_run_that_is_killed(tmp_path, pictures):
    out = tmp_path / "out"
    process = start(pictures, out, workers=1)
    wait_for_a_record(process, out)
    assert len(writers(Path(f"{out}.err"))) > 1
    process.kill()
    process.join(60)
    deadline = time.monotonic() + 30
    while left := writers(Path(f"{out}.err")):
        assert time.monotonic() < deadline, f"processes {left} are left"
        time.sleep(0.1)


# what is killed at its n-th call, before it runs or after
WORST = {
    "before a file is in its place": (Path, "replace", 9, False),
    "after a file is in its place": (Path, "replace", 13, True),
    "before maps are in the tail": (parts.Parts, "append", 2, False),
    "between the tails of two data sets": (parts.Parts, "append", 3, True),
    "before a Parquet part": (mapset._ParquetParts, "save", 2, False),
    "after a Parquet part": (mapset._ParquetParts, "save", 2, True),
    "amid the first Zarr part": (zarr.Array, "resize", 2, False),
    "amid a Zarr part": (zarr.Array, "resize", 8, True),
    "before rows are recorded": (Record, "finish", 4, False),
    "after rows are recorded": (Record, "finish", 4, True),
    "before the table": (table._Table, "finish", 1, False),
}


def kill_at(owner: Any, name: str, number: int, after: bool) -> None:
    """In a child: SIGKILL at the n-th call of a function."""
    function, calls = getattr(owner, name), itertools.count(1)

    def called(*args: Any, **kwargs: Any) -> Any:
        at = next(calls) == number
        if at and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, called)


@pytest.mark.parametrize("moment", WORST)
def test_killed_at_the_worst_moments(tmp_path, pictures, whole, moment):
    out = tmp_path / "out"
    process = start(pictures, out, workers=0, before=partial(kill_at, *WORST[moment]))
    end(process, out)
    assert process.exitcode == -signal.SIGKILL
    explain(pictures, out)
    assert tree(out) == whole


def evaluate(pictures: Path, out: Path) -> evaluation.Evaluation:
    options = evaluation.Options(
        methods=("gradcampp", "random"), metrics=("drop", "deletion", "road", "sensitivity"),
        steps=2, road_shares=(0.5,), samples=1, batch_size=3, workers=0,
    )  # fmt: skip
    return evaluation.run(batch.Files([pictures]), make_model(), out, options)


def evaluating(pictures: Path, out: Path, before: Callable[[], None] | None) -> None:
    """In a child."""
    if before is not None:
        before()
    evaluate(pictures, out)


@pytest.fixture(scope="module")
def evaluated(pictures, tmp_path_factory) -> dict[str, bytes]:
    """The outputs of an evaluation that nothing happens to."""
    out = tmp_path_factory.mktemp("evaluated")
    found = evaluate(pictures, out)
    assert (found.run.explained, found.run.failed) == (PICTURES - BROKEN, BROKEN)
    made = tree(out)
    assert made["results.jsonl"].count(b"\n") == 2 * (PICTURES - BROKEN)
    assert {"evaluation.json", "bars.png", "disagreements.jpg", "report/index.html"} < {*made}
    return made


# each picture has three files of the report; then come those of the summary
WORST_OF_EVALUATE = {
    "before a file of the report": (Record, "write", 7, False),
    "before rows are recorded": (Record, "finish", 4, False),
    "after rows are recorded": (Record, "finish", 4, True),
    "before the summary": (Record, "write", 3 * (PICTURES - BROKEN) + 1, False),
    "amid the summary": (Record, "write", 3 * (PICTURES - BROKEN) + 2, True),
    "amid the report": (report._Summary, "add", 20, True),
}


@pytest.mark.parametrize("moment", WORST_OF_EVALUATE)
def test_an_evaluation_killed_at_the_worst_moments(tmp_path, pictures, evaluated, moment):
    out = tmp_path / "out"
    before = partial(kill_at, *WORST_OF_EVALUATE[moment])
    process = FORKS.Process(target=evaluating, args=(pictures, out, before))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    done = len(set(recorded(out)))
    resumed = evaluate(pictures, out).run
    assert (resumed.resumed, resumed.explained) == (done, PICTURES - BROKEN - done)
    assert tree(out) == evaluated


def test_an_evaluation_killed_at_random_moments(tmp_path, pictures, evaluated):
    moments, out = random.Random(0), tmp_path / "out"
    kills, done = 0, []
    while kills < 4 and len(done) < 2 * (PICTURES - BROKEN):
        process = FORKS.Process(target=evaluating, args=(pictures, out, None))
        process.start()
        while process.is_alive() and recorded(out) == done:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.join(60)
        kills += 1
        assert recorded(out)[: len(done)] == done
        done = recorded(out)
    evaluate(pictures, out)
    assert tree(out) == evaluated


def test_interrupted_by_an_exception(tmp_path, pictures, whole):
    """As a second Ctrl-C does, which does not wait for the batch in flight."""
    out = tmp_path / "out"
    process = start(pictures, out)
    wait_for_a_record(process, out)
    os.kill(process.pid, signal.SIGINT)
    assert "KeyboardInterrupt" in end(process, out)
    assert 0 < len(recorded(out)) < PICTURES - BROKEN
    explain(pictures, out)
    assert tree(out) == whole


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A file system of so many bytes; skipped where it may not be mounted."""
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("kilobytes", [64, 160, 300])
def test_a_full_disk(tmp_path, pictures, whole, kilobytes):
    with small_disk(tmp_path / "disk", kilobytes * 1024):
        out = tmp_path / "disk" / "out"
        with pytest.raises(RecordError, match=r"No space left on device\. What is finished is"):
            explain(pictures, out)
        # a run that cannot write one picture more ends in the same way
        with pytest.raises(RecordError, match="No space left on device"):
            explain(pictures, out)
        subprocess.run(["mount", "-o", "remount,size=20m", str(tmp_path / "disk")], check=True)
        summary = explain(pictures, out)
        assert summary.resumed + summary.explained == PICTURES - BROKEN
        assert tree(out) == whole


@pytest.mark.parametrize("limit", [5_000, 9_000])
def test_files_that_may_not_grow(tmp_path, pictures, whole, limit):
    """RLIMIT_FSIZE: the records themselves reach their limit, and writing them fails."""
    out = tmp_path / "out"
    before = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
    err = end(start(pictures, out, workers=0, before=before), out)
    assert "RecordError" in err.splitlines()[-1], err
    assert "File too large. What is finished is kept" in err
    assert len(recorded(out)) < PICTURES - BROKEN
    explain(pictures, out)
    assert tree(out) == whole


def test_a_record_that_may_not_grow(tmp_path, pictures):
    """The same where nothing but results.jsonl is too large."""
    sinks, limit = [batch.Maps("feature", "float16")], 5_000
    explain(pictures, tmp_path / "whole", sinks)
    out = tmp_path / "out"
    before = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
    err = end(start(pictures, out, workers=0, before=before, sinks=sinks), out)
    assert "RecordError: cannot write in" in err.splitlines()[-1], err
    assert (out / "results.jsonl").stat().st_size == limit
    explain(pictures, out, sinks)
    assert tree(out) == tree(tmp_path / "whole")


def test_a_folder_that_cannot_be_written(tmp_path, pictures):
    out = tmp_path / "out"
    out.mkdir(mode=0o555)
    if os.access(out, os.W_OK):  # as root
        with small_disk(tmp_path / "disk", 65536):
            subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
            with pytest.raises(RecordError, match=r"cannot write in .*Read-only file system"):
                explain(pictures, tmp_path / "disk" / "out")
        return
    with pytest.raises(RecordError, match=r"cannot write in .*Permission denied"):
        explain(pictures, out)
