"""The output folder: what is done, in which run, under which names; safe against kills.

A picture is done when its lines are in results.jsonl, which are appended, in the order of the
source, after its files are in place. Files are written under .partial and moved. Whatever moment
the process dies at, the next run drops an unfinished last line and goes on from there.

The folder may be a symbolic link. Those inside it are never followed: a link in the place of a file
is replaced, and one in the place of a folder or a record is an error.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from gradcampp_ext.batch.provenance import about, identity

RESULTS, ERRORS, SETTINGS = "results.jsonl", "errors.jsonl", "run.json"
RESULTS_TABLE, MAP_SETS = "results.parquet", ("maps.parquet", "maps.zarr")
EVALUATION = "evaluation.json"  # comes last of what an evaluation ends with
BARS, WINS, CURVES, RANDOMIZATION = "bars.png", "wins.png", "curves.png", "randomization.png"
DISAGREEMENTS, MEANS = "disagreements.jpg", "evaluation.csv"
_EVALUATED = BARS, WINS, CURVES, RANDOMIZATION, DISAGREEMENTS, MEANS, EVALUATION
REPORT = "report"  # folder of the report
_PARTIAL = ".partial"
_LIKE_OUTPUT = r"(?i)\.(jpg|png|webp|npy)$"  # a folder called like a file would be in its way
_LONGEST = 200  # bytes of a name's part; file systems take 255, suffixes need some
_LONGEST_PATH = 1000  # of a name with its folders; Linux takes 4096, macOS 1024


class RecordError(RuntimeError):
    """The output folder cannot be used, or no longer; the text says what to do."""


class Record:
    """An output folder, locked while it is open.

    Args:
        folder: made if it is missing.
        settings: whatever decides the outputs. A folder can be continued with equal ones only.
        run: under which conditions: "batch_size", "command" and "environment", see
            `gradcampp_ext.batch.provenance.conditions`. It can be continued under others, except by
            another version of this package: run.json lists all that rows were made under.
        rows: lines in results.jsonl per picture.
        overwrite: remove what an earlier run has written, and nothing else.

    Attributes:
        about: what outputs say of themselves.
        conditions: how those of this run differ from those of the rows that are there.

    Raises:
        RecordError: another process writes there, or another run has written there.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        run: Mapping[str, Any] | None = None,
        *,
        rows: int = 1,
        overwrite: bool = False,
    ) -> None:
        settings = json.loads(_line(settings))  # as run.json gives it back
        run = {} if run is None else json.loads(_line(run))
        self.folder = folder
        self.about = about(settings, run.get("environment", {}))
        self.conditions: list[str] = []
        self.done: Counter[str] = Counter()  # paths; a picture can be named twice
        self._names: set[str] = set()
        self.lines = 0  # rows that an earlier run has recorded
        self._rows = rows
        self._counter = itertools.count()
        with contextlib.ExitStack() as stack:
            try:
                if folder.is_symlink() and not folder.exists():
                    raise RecordError(
                        f"{folder} is a symbolic link to {folder.readlink()}, which does not "
                        "exist; make that folder, or choose another"
                    )
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_locked(folder))
                shutil.rmtree(folder / _PARTIAL, ignore_errors=True)
                if overwrite:
                    _remove_outputs(folder)
                (folder / _PARTIAL).mkdir()
                stack.callback(shutil.rmtree, folder / _PARTIAL, ignore_errors=True)
                runs = self._check(settings, run)
                self._read_results()
                self._results = stack.enter_context(_open(folder / RESULTS, "ab"))
                self._errors = stack.enter_context(_open(folder / ERRORS, "wb"))
            except OSError as error:
                raise _explained(folder, error) from error
            self._open = stack.pop_all()
        self._new: bytes | None = None  # what run.json has to say before the next row
        if runs[-1] != {"first_row": runs[-1]["first_row"], **run}:
            earlier = [one for one in runs if one["first_row"] < self.lines]
            self._new = _contents(settings, [*earlier, {"first_row": self.lines, **run}])
            self.conditions = differences(_flat(runs[-1]), _flat(run)) if earlier else []

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *_: object) -> None:
        if self._errors.tell() == 0:
            (self.folder / ERRORS).unlink(missing_ok=True)
        self._open.close()

    def name(self, path: str, wanted: str) -> str:
        """A name for a picture's outputs: relative, harmless, and no other picture's.

        Args:
            path: of the picture.
            wanted: any text; its parts between slashes become folders.
        """
        name = safe_name(wanted)
        if name.casefold() in self._names:
            name = f"{name}-{_digest(path)}"
        for number in itertools.count(2):
            if name.casefold() not in self._names:
                break
            name = f"{name}-{number}"
        self._names.add(name.casefold())
        return name

    def write(self, name: str, content: bytes) -> None:
        """A file, complete or not at all. `name` is relative to the folder."""
        partial, target = self.partial(), self.folder / name
        with self.writing():
            inside(self.folder, target.parent)
            partial.write_bytes(content)
            try:
                partial.replace(target)
            except FileNotFoundError:
                target.parent.mkdir(parents=True, exist_ok=True)
                partial.replace(target)

    def partial(self) -> Path:
        """Where a file can be written that is then moved into its place."""
        return self.folder / _PARTIAL / str(next(self._counter))

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Failures to write, told as RecordError."""
        try:
            yield
        except OSError as error:
            raise _explained(self.folder, error) from error

    def rows(self, start: int = 0) -> Iterator[Any]:
        """Recorded rows from a line on; those recorded while it runs follow."""
        return _read_rows(self.folder / RESULTS, start)

    def failures(self) -> Iterator[Any]:
        """Path and reason of each picture that this run has skipped."""
        return _read_rows(self.folder / ERRORS, 0)

    def finish(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Pictures whose files are in place: their rows, all of each picture."""
        if self._new is not None and rows:
            self.write(SETTINGS, self._new)
            self._new = None
        self._append(self._results, [{**row, "record": self.about["record"]} for row in rows])

    def fail(self, path: str, reason: str) -> None:
        """A picture that is skipped. The next run tries it again."""
        self._append(self._errors, [{"path": path, "reason": reason}])

    def _append(self, file: FileIO, rows: Sequence[Mapping[str, Any]]) -> None:
        with self.writing():
            write_all(file, b"".join(map(_line, rows)))

    def _check(self, settings: Mapping[str, Any], run: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The runs that filled the folder so far; this one where it is the first."""
        try:
            found = read_settings(self.folder)
        except FileNotFoundError:
            if (self.folder / RESULTS).exists():
                raise RecordError(
                    f"{self.folder} holds a {RESULTS} without a {SETTINGS}, so it is not known "
                    "how it was made; choose another folder"
                ) from None
            new = [{"first_row": 0, **run}]
            self.write(SETTINGS, _contents(settings, new))
            return new
        except ValueError as error:
            raise RecordError(str(error)) from error
        runs: list[dict[str, Any]] = found["runs"]
        then = {**_version(runs[-1]), **found["settings"]}
        differ = differences(then, {**_version(run), **settings})
        if differ:
            raise RecordError(
                f"{self.folder} holds the results of another run: {'; '.join(differ)}. Choose "
                "another folder, or overwrite these results (--overwrite)"
            )
        return runs

    def _read_results(self) -> None:
        """Takes up the finished pictures and cuts off what a kill left unfinished."""
        try:
            file = _open(self.folder / RESULTS, "r+b")
        except FileNotFoundError:
            return
        with file:
            position, end, pending = 0, 0, 0
            for line in file:
                try:
                    row = json.loads(line)
                    path, name = row["path"], row["name"]
                except (ValueError, KeyError, TypeError, RecursionError):
                    break
                if not (line.endswith(b"\n") and isinstance(path, str) and isinstance(name, str)):
                    break
                position += len(line)
                pending += 1
                if pending == self._rows:
                    self.done[path] += 1
                    self._names.add(name.casefold())
                    self.lines += pending
                    end, pending = position, 0
            file.truncate(end)


def safe_name(wanted: str) -> str:
    """A relative path without suffix that stays inside its folder on every file system.

    Parts "." and ".." are dropped; control characters, and those that some systems forbid,
    become "_", as do a leading "-" and a leading or trailing dot or space. Where all is too long,
    the folders become one.
    """
    parts = [_safe_part(part) for part in re.split(r"[/\\]", wanted) if part not in ("", ".", "..")]
    folders = [re.sub(_LIKE_OUTPUT, r"\g<0>_", part) for part in parts[:-1]]
    name = "/".join([*folders, *parts[-1:]]) or "_"
    if len(name.encode()) > _LONGEST_PATH:
        return f"{_digest(wanted)}/{parts[-1]}"
    return name


def _safe_part(part: str) -> str:
    part = "".join(c if c.isprintable() and c not in '<>:"|?*' else "_" for c in part)
    part = re.sub(r"^[-. ]|[. ]$", "_", part)
    if re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", part):
        part = f"_{part}"
    return part.encode()[:_LONGEST].decode(errors="ignore")


def inside(folder: Path, place: Path) -> Path:
    """A place in the output folder; RecordError if a symbolic link leads out of that."""
    if not _is_inside(folder, place):
        raise RecordError(
            f"{place} leads out of {folder}, to {place.resolve()}: outputs stay in their folder; "
            "remove the symbolic link"
        )
    return place


def _is_inside(folder: Path, place: Path) -> bool:
    return place.resolve().is_relative_to(folder.resolve())


def _open(file: Path, mode: str) -> Any:
    """A record, which is nobody else's file: a symbolic link is an OSError."""

    def unlinked(path: str, flags: int) -> int:
        return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)

    return open(file, mode, buffering=0, opener=unlinked)


def _digest(text: str) -> str:
    return f"{zlib.crc32(text.encode('utf-8', 'surrogatepass')):08x}"


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What has become another value, in words."""
    return [
        f"{key} was {then.get(key)!r} and is now {now.get(key)!r}"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key)
    ]


def whole_rows(file: Path) -> Iterator[Any]:
    """Complete lines, one more of which a run may be writing; none if there is no file."""
    with contextlib.suppress(FileNotFoundError), file.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                yield parsed(line, file)


def parsed(text: bytes, file: Path) -> Any:
    """JSON of a file, or ValueError that names it."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def read_settings(folder: Path) -> dict[str, Any]:
    """What run.json says: "record", "settings" and "runs".

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not what a run writes.
    """
    file = folder / SETTINGS
    found = parsed(file.read_bytes(), file)
    try:
        _ = str(found["record"]), {**found["settings"]}, found["runs"][-1]
        _ = [(int(one["first_row"]), _flat(one)) for one in found["runs"]]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged: {error!r}") from error
    return dict(found)


def write_all(file: FileIO, content: bytes | memoryview) -> None:
    """To a file without a buffer, which on a full disk would fail once more when it is closed."""
    left = memoryview(content).cast("B")
    while left:
        left = left[file.write(left) :]


def _read_rows(file: Path, start: int) -> Iterator[Any]:
    with file.open("rb") as lines:
        for line in itertools.islice(lines, start, None):
            yield json.loads(line)


def _line(row: Mapping[str, Any]) -> bytes:
    """ASCII, so that file names that are not UTF-8 survive as escapes."""
    return (json.dumps(row, allow_nan=False) + "\n").encode("ascii")


def _contents(settings: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> bytes:
    """Of run.json."""
    found = {"record": identity(settings), "settings": settings, "runs": runs}
    return (json.dumps(found, indent=1, allow_nan=False) + "\n").encode("ascii")


def _version(run: Mapping[str, Any]) -> dict[str, Any]:
    """Of this package: settings may mean something else to another one."""
    return {"gradcampp_ext": run.get("environment", {}).get("gradcampp_ext")}


def _flat(run: Mapping[str, Any]) -> dict[str, Any]:
    """All conditions of a run, by name."""
    command, environment = run.get("command") or {}, run.get("environment") or {}
    return {"batch_size": run.get("batch_size"), **command, **environment}


def _explained(folder: Path, error: OSError) -> RecordError:
    reason = error.strerror or str(error)
    if error.errno == errno.ELOOP:
        reason = f"{error.filename} is a symbolic link, which is not followed"
    return RecordError(
        f"cannot write in {folder}: {reason}. What is finished is kept; the same command goes on "
        "from there"
    )


def _remove_outputs(folder: Path) -> None:
    """Removes what results.jsonl names, data sets, summaries and report, then the records."""

    def remove(name: str) -> None:
        if _is_inside(folder, (folder / name).parent):
            (folder / name).unlink(missing_ok=True)

    if (folder / SETTINGS).exists():
        for name in (RESULTS_TABLE, f"{REPORT}/index.html"):
            remove(name)
        for name in (*MAP_SETS, f"{REPORT}/data", f"{REPORT}/assets"):
            if _is_inside(folder, folder / name):
                shutil.rmtree(folder / name, ignore_errors=True)
    if (folder / EVALUATION).exists():
        for name in _EVALUATED:
            remove(name)
    with contextlib.suppress(FileNotFoundError), (folder / RESULTS).open("rb") as lines:
        for line in lines:
            # not a run's line, or not this folder's
            with contextlib.suppress(ValueError, AttributeError, TypeError, RecursionError):
                for name in json.loads(line).get("files", {}).values():
                    remove(name)
    for name in (RESULTS, ERRORS, SETTINGS):
        (folder / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Held until the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _locks.add(handle)
        yield
    except BlockingIOError:
        raise RecordError(f"another process writes in {folder}; choose another folder") from None
    finally:
        _locks.discard(handle)
        os.close(handle)


_locks: set[int] = set()


def _drop_locks() -> None:
    """A forked worker would hold the lock for as long as it outlives a killed main process."""
    for handle in _locks:
        os.close(handle)
    _locks.clear()  # the numbers are other files' when this process forks again


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_locks)
