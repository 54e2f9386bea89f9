"""The output folder: what is done, in which run, under which names; safe against kills.

A picture is done when its lines are in results.jsonl, which are appended, in the order of the
source, after its files are in place. Files are written under .partial and moved. Whatever moment
the process dies at, the next run drops an unfinished last line and goes on from there.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

RESULTS, ERRORS, SETTINGS = "results.jsonl", "errors.jsonl", "run.json"
RESULTS_TABLE, MAP_SETS = "results.parquet", ("maps.parquet", "maps.zarr")
EVALUATION = "evaluation.json"  # comes last of what an evaluation ends with
_EVALUATED = (
    *("bars.png", "wins.png", "curves.png", "randomization.png", "disagreements.jpg"),
    *("evaluation.csv", EVALUATION),
)
REPORT = "report"  # folder of the report
_PARTIAL = ".partial"
_LIKE_OUTPUT = r"(?i)\.(jpg|png|webp|npy)$"  # a folder called like a file would be in its way
_LONGEST = 200  # bytes of a name's part; file systems take 255, suffixes need some


class RecordError(RuntimeError):
    """The output folder cannot be used, or no longer; the text says what to do."""


class Record:
    """An output folder, locked while it is open.

    Args:
        folder: made if it is missing.
        settings: whatever decides the outputs. A folder can be continued with equal ones only.
        rows: lines in results.jsonl per picture.
        overwrite: remove what an earlier run has written, and nothing else.

    Raises:
        RecordError: another process writes there, or another run has written there.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], *, rows: int = 1, overwrite: bool = False
    ) -> None:
        self.folder = folder
        self.done: dict[str, str] = {}
        self.lines = 0  # rows that an earlier run has recorded
        self._rows = rows
        self._counter = itertools.count()
        with contextlib.ExitStack() as stack:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_locked(folder))
                shutil.rmtree(folder / _PARTIAL, ignore_errors=True)
                if overwrite:
                    _remove_outputs(folder)
                self._check(settings)
                self._read_results()
                (folder / _PARTIAL).mkdir()
                stack.callback(shutil.rmtree, folder / _PARTIAL, ignore_errors=True)
                self._results = stack.enter_context((folder / RESULTS).open("ab", buffering=0))
                self._errors = stack.enter_context((folder / ERRORS).open("wb", buffering=0))
            except OSError as error:
                raise _explained(folder, error) from error
            self._open = stack.pop_all()
        self._names = {name.casefold() for name in self.done.values()}

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *_: object) -> None:
        if self._errors.tell() == 0:
            (self.folder / ERRORS).unlink(missing_ok=True)
        self._open.close()

    def name(self, path: str, wanted: str) -> str:
        """A name for a picture's outputs: relative, harmless, and no other picture's.

        Args:
            path: of the picture; a picture that is done keeps its name.
            wanted: any text; its parts between slashes become folders.
        """
        if path in self.done:
            return self.done[path]
        name = safe_name(wanted)
        if name.casefold() in self._names:
            name = f"{name}-{zlib.crc32(path.encode('utf-8', 'surrogateescape')):08x}"
        for number in itertools.count(2):
            if name.casefold() not in self._names:
                break
            name = f"{name}-{number}"
        self._names.add(name.casefold())
        return name

    def write(self, name: str, content: bytes) -> None:
        """A file, complete or not at all. `name` is relative to the folder."""
        partial = self.folder / _PARTIAL / str(next(self._counter))
        target = self.folder / name
        with self.writing():
            partial.write_bytes(content)
            try:
                partial.replace(target)
            except FileNotFoundError:
                target.parent.mkdir(parents=True, exist_ok=True)
                partial.replace(target)

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
        self._append(self._results, rows)

    def fail(self, path: str, reason: str) -> None:
        """A picture that is skipped. The next run tries it again."""
        self._append(self._errors, [{"path": path, "reason": reason}])

    def _append(self, file: FileIO, rows: Sequence[Mapping[str, Any]]) -> None:
        with self.writing():
            write_all(file, b"".join(map(_line, rows)))

    def _check(self, settings: Mapping[str, Any]) -> None:
        file = self.folder / SETTINGS
        wanted = json.loads(_line(settings))
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            if (self.folder / RESULTS).exists():
                raise RecordError(
                    f"{self.folder} holds a {RESULTS} without a {SETTINGS}, so it is not known "
                    "how it was made; choose another folder"
                ) from None
            partial = self.folder / f".{SETTINGS}"
            partial.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
            partial.replace(file)
            return
        except ValueError as error:
            raise RecordError(f"{file} is damaged: {error}; choose another folder") from error
        differ = [
            f"{key} was {found.get(key)!r} and is now {wanted.get(key)!r}"
            for key in sorted({*found, *wanted})
            if found.get(key) != wanted.get(key)
        ]
        if differ:
            raise RecordError(
                f"{self.folder} holds the results of another run: {'; '.join(differ)}. Choose "
                "another folder, or overwrite these results (--overwrite)"
            )

    def _read_results(self) -> None:
        """Takes up the finished pictures and cuts off what a kill left unfinished."""
        try:
            file = (self.folder / RESULTS).open("r+b")
        except FileNotFoundError:
            return
        with file:
            position, end, pending = 0, 0, 0
            for line in file:
                try:
                    row = json.loads(line)
                    path, name = row["path"], row["name"]
                except (ValueError, KeyError, TypeError):
                    break
                if not line.endswith(b"\n"):
                    break
                position += len(line)
                pending += 1
                if pending == self._rows:
                    self.done[path] = name
                    self.lines += pending
                    end, pending = position, 0
            file.truncate(end)


def safe_name(wanted: str) -> str:
    """A relative path without suffix that stays inside its folder on every file system.

    Parts "." and ".." are dropped; control characters, and those that some systems forbid,
    become "_", as do a leading "-" and a leading or trailing dot or space.
    """
    parts = [_safe_part(part) for part in re.split(r"[/\\]", wanted) if part not in ("", ".", "..")]
    folders = [re.sub(_LIKE_OUTPUT, r"\g<0>_", part) for part in parts[:-1]]
    return "/".join([*folders, *parts[-1:]]) or "_"


def _safe_part(part: str) -> str:
    part = "".join(c if c.isprintable() and c not in '<>:"|?*' else "_" for c in part)
    part = re.sub(r"^[-. ]|[. ]$", "_", part)
    if re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", part):
        part = f"_{part}"
    return part.encode()[:_LONGEST].decode(errors="ignore")


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


def _explained(folder: Path, error: OSError) -> RecordError:
    reason = error.strerror or str(error)
    return RecordError(
        f"cannot write in {folder}: {reason}. What is finished is kept; the same command goes on "
        "from there"
    )


def _remove_outputs(folder: Path) -> None:
    """Removes what results.jsonl names, data sets, summaries and report, then the records."""
    inside = folder.resolve()
    if (folder / SETTINGS).exists():
        for name in (RESULTS_TABLE, f"{REPORT}/index.html"):
            (folder / name).unlink(missing_ok=True)
        for name in (*MAP_SETS, f"{REPORT}/data", f"{REPORT}/assets"):
            shutil.rmtree(folder / name, ignore_errors=True)
    if (folder / EVALUATION).exists():
        for name in _EVALUATED:
            (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError), (folder / RESULTS).open("rb") as lines:
        for line in lines:
            with contextlib.suppress(ValueError):
                for name in json.loads(line).get("files", {}).values():
                    file = folder / name
                    if file.resolve().is_relative_to(inside):
                        file.unlink(missing_ok=True)
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


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_locks)
