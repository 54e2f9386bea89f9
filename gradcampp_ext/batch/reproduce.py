"""Running a record once more: the same pictures in the same batches, and whether the bits agree."""

from __future__ import annotations

import filecmp
import itertools
import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from gradcampp_ext.batch import provenance
from gradcampp_ext.batch.engine import by_picture, variant
from gradcampp_ext.batch.items import Item, Read, Source, length
from gradcampp_ext.batch.progress import Progress, printable
from gradcampp_ext.batch.record import (
    ERRORS,
    MAP_SETS,
    REPORT,
    RESULTS,
    RESULTS_TABLE,
    SETTINGS,
    differences,
    read_settings,
    whole_rows,
)

if TYPE_CHECKING:
    from gradcampp_ext.batch.engine import Row
    from gradcampp_ext.batch.pipeline import Summary

_SHOWN = 10  # differences, and pictures in a message


class ReproduceError(ValueError):
    """A record that cannot be reproduced; the text says what is missing or has changed."""


@dataclass(frozen=True)
class Recorded:
    """What a folder of results says about how it was made.

    Attributes:
        folder: of the results.
        settings: that decided the outputs.
        runs: that filled the folder, the first one first; see `Record`.
    """

    folder: Path
    settings: dict[str, Any]
    runs: list[dict[str, Any]]

    @property
    def asked(self) -> dict[str, Any]:
        """The options of `gradcampp explain`, by name, of the last run."""
        return {**self.runs[-1]["command"], "batch_size": self.runs[-1]["batch_size"]}

    @property
    def environment(self) -> dict[str, Any]:
        """Of the last run; see `provenance.environment`."""
        found: dict[str, Any] = self.runs[-1]["environment"]
        return found

    def rows(self) -> Iterator[Row]:
        return self._lines(RESULTS, "path", "label", "rank", "layer", "files")

    def pictures(self) -> Iterator[Row]:
        """The first row of each picture."""
        first = None
        for row in self.rows():
            kind = row["rank"], variant(row)
            if first in (None, kind):
                first = kind
                yield row

    def failures(self) -> set[str]:
        """Paths of the pictures that were skipped."""
        return {line["path"] for line in self._lines(ERRORS, "path")}

    def _lines(self, name: str, *columns: str) -> Iterator[Row]:
        file = self.folder / name
        for line in whole_rows(file):
            if not isinstance(line, dict) or not set(columns) <= line.keys():
                raise ReproduceError(f"{file} has a line that no run has written: {line!r:.99}")
            yield line

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raises ReproduceError if what would be run is something else."""
        differ = differences(self.settings, json.loads(json.dumps(settings)))
        if differ:
            raise ReproduceError(
                f"{self.folder} cannot be reproduced: {'; '.join(differ)}. The weights, the "
                "model's code, its class names or run.json have changed since"
            )

    def doubts(self, environment: Mapping[str, Any]) -> list[str]:
        """Why the bits may differ although nothing that was asked for has changed."""
        found = differences(self.environment, environment)
        if len(self.runs) > 1:
            found.insert(
                0, f"{len(self.runs)} runs under different conditions have filled {self.folder}"
            )
        return found


def read(named: Path) -> Recorded:
    """The record of a folder, by the folder or by a file in it, such as results.jsonl.

    Raises:
        ReproduceError: there is none, it was edited, or it does not say where its pictures are.
    """
    folder = named.parent if named.is_file() else named
    file = folder / SETTINGS
    try:
        found = read_settings(folder)
        recorded = Recorded(folder, found["settings"], found["runs"])
        edited = provenance.identity(recorded.settings) != found["record"]
        by_program = recorded.runs[-1]["command"] is None
        _ = by_program or recorded.asked
        int(recorded.environment["threads"])
    except FileNotFoundError:
        raise ReproduceError(
            f"{folder} holds no {SETTINGS}, which says how results were made; name the folder of a "
            "run, or a file in it"
        ) from None
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ReproduceError(
            f"{file} is no record of a run ({type(error).__name__}: {error})"
        ) from error
    if edited:
        raise ReproduceError(
            f"{file} was edited: its settings are not those that its id, {found['record']}, is of"
        )
    if by_program:
        raise ReproduceError(
            f"{folder} was not filled by gradcampp explain: only the program that gave the "
            "pictures, with the settings in run.json, can give them again"
        )
    if next(recorded.rows(), None) is None:
        raise ReproduceError(f"{folder} has no results that could be reproduced")
    return recorded


class Pictures:
    """The recorded pictures of a source, in the batches of a run over them and no others.

    Pictures that were added to the source are left out, and those behind the last recorded one, so
    that a run that was interrupted ends where that one ended.

    Raises:
        ReproduceError: pictures are missing, or cannot be listed twice.
    """

    def __init__(self, source: Source, recorded: Recorded, batch_size: int) -> None:
        if length(source) is None:
            raise ReproduceError(
                f"the pictures of {recorded.folder} came as a stream, which nothing promises to be "
                "the same again; store them, and explain what is stored"
            )
        self._source, self._batch_size = source, batch_size
        self._wanted = Counter(row["path"] for row in recorded.pictures())
        self._wanted.update(recorded.failures())
        missing = sorted(self._wanted.keys() - {item.path for item in source})
        if missing:
            raise ReproduceError(
                f"{len(missing)} of the record's pictures are not in its source any more: "
                f"{_listed(missing)}; relative paths start from where the record was made"
            )

    def __iter__(self) -> Iterator[Item]:
        left = Counter(self._wanted)
        items = (item for item in self._source if item.path in self._wanted)
        while left and (batch := list(itertools.islice(items, self._batch_size))):
            left -= Counter(item.path for item in batch)
            yield from batch

    def __len__(self) -> int:
        return self._wanted.total()

    @property
    def read(self) -> Read:
        return self._source.read


class Watch(Progress):
    """Compares pictures with the record's while they are explained, and stops at a change."""

    def __init__(self, progress: Progress, recorded: Recorded, stop: threading.Event) -> None:
        self._progress, self._stop = progress, stop
        self._folder, self._failures = recorded.folder, recorded.failures()
        self._pictures = recorded.pictures()
        self._changed: dict[str, str] = {}  # how, by path

    def check(self) -> None:
        """Raises ReproduceError if a picture is not what it was."""
        if self._changed:
            how = [f"{path} {change}" for path, change in self._changed.items()]
            raise ReproduceError(
                f"{self._folder} cannot be reproduced, its pictures have changed: {_listed(how)}"
            )

    def __enter__(self) -> Watch:
        self._progress.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.__exit__(*error)

    def noted(self, text: str) -> None:
        self._progress.noted(text)

    def started(self, total: int | None, done: int) -> None:
        for _ in itertools.islice(self._pictures, done):
            pass
        self._progress.started(total, done)

    def explained(self, rows: Sequence[Row]) -> None:
        for now, *_ in by_picture(rows):
            if now["path"] in self._failures:
                self._change(now["path"], "was skipped then and is explained now")
                break
            then = next(self._pictures, None)
            if then is None:  # the rest of a batch that was recorded in part
                break
            if now["path"] != then["path"]:
                if then["path"] not in self._changed:  # skipped, in a batch before
                    self._change(then["path"], "does not come in its place")
                break
            if now["pixels_sha256"] != then.get("pixels_sha256"):
                self._change(then["path"], "shows something else (pixels_sha256)")
            elif now["label"] != then["label"]:
                self._change(then["path"], f"has the label {now['label']}, not {then['label']}")
        self._progress.explained(rows)

    def failed(self, path: str, reason: str) -> None:
        if path not in self._failures:
            self._change(path, f"is skipped: {reason}")
        self._progress.failed(path, reason)

    def finished(self, summary: Summary) -> None:
        self._progress.finished(summary)

    def _change(self, path: str, how: str) -> None:
        self._changed[path] = how
        self._stop.set()


@dataclass
class Comparison:
    """Outputs of a record beside those of its repetition.

    Attributes:
        same: rows and files with the same bytes.
        absent: files of the record that are not in its folder any more, or were never finished.
        differ: the first differences, told.
        different: how many there are.
    """

    same: int = 0
    absent: int = 0
    differ: list[str] = field(default_factory=list)
    different: int = 0

    def add(self, same: bool, told: str) -> None:
        if same:
            self.same += 1
            return
        self.different += 1
        if len(self.differ) < _SHOWN:
            self.differ.append(told)


def compare(recorded: Recorded, again: Path) -> Comparison:
    """Every row and output of a record with those in another folder.

    run.json is left out, and of the report everything but its pictures and data: they speak of the
    run, and of the title that somebody chose.
    """
    found = Comparison()
    files: dict[str, None] = {}
    pairs = itertools.zip_longest(recorded.rows(), whole_rows(again / RESULTS))
    for number, (then, now) in enumerate(pairs, 1):
        if then is None:  # the rest of a batch that was recorded in part
            break
        found.add(then == now, f"{RESULTS}, line {number}: {_of_rows(then, now)}")
        files |= dict.fromkeys(then["files"].values())
    for name in (ERRORS, RESULTS_TABLE):
        files[name] = None
    for folder in (*MAP_SETS, f"{REPORT}/data"):
        files |= dict.fromkeys(_below(recorded.folder, folder))
    for name in files:
        one, other = recorded.folder / name, again / name
        if one.is_file():
            same = other.is_file() and filecmp.cmp(one, other, shallow=False)
            found.add(same, name if same else f"{name}{_of_files(one, other)}")
        elif name not in (ERRORS, RESULTS_TABLE):
            found.absent += 1
    return found


def _below(root: Path, folder: str) -> list[str]:
    """Files of a data set; none of one that a killed run has left unfinished."""
    if (root / folder / ".tail").exists():
        return []
    files = sorted(file for file in (root / folder).rglob("*") if file.is_file())
    return [str(file.relative_to(root)) for file in files]


def _of_rows(then: Row, now: Row | None) -> str:
    if now is None:
        return "not made any more"
    return f"{then['path']}: {'; '.join(differences(then, now))}"


def _of_files(one: Path, other: Path) -> str:
    if not other.is_file():
        return ", not made any more"
    if one.suffix in (".jpg", ".png", ".webp"):
        with Image.open(one) as first, Image.open(other) as second:
            if np.array_equal(np.asarray(first), np.asarray(second)):
                return ", in its metadata alone"
    return ""


def _listed(texts: Sequence[str]) -> str:
    shown = "; ".join(map(printable, texts[:_SHOWN]))
    return f"{shown}; ..." if len(texts) > _SHOWN else shown
