"""How a run is followed: nothing, a bar, plain lines or JSON lines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.text import Text

from gradcampp_ext.batch.engine import by_picture, variant

if TYPE_CHECKING:
    from gradcampp_ext.batch.engine import Row
    from gradcampp_ext.batch.pipeline import Summary


class Progress:
    """Is told what happens in a run, which is its context; does nothing with it.

    `explained` and `failed` are called from another thread than the rest.
    """

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        """The run has ended, perhaps by an exception."""

    def started(self, total: int | None, done: int) -> None:
        """`total` pictures, if that is known, of which `done` were explained earlier."""

    def noted(self, text: str) -> None:
        """Something that whoever looks at the outputs should know."""

    def explained(self, rows: Sequence[Row]) -> None:
        """Rows of pictures that are recorded; `engine.by_picture` has them apart."""

    def failed(self, path: str, reason: str) -> None:
        """A picture that is skipped."""

    def finished(self, summary: Summary) -> None:
        """All is written, or as much as was in flight when the run was told to stop."""


class Lines(Progress):
    """A line a picture on `out`; on `err` a bar, or a line now and then if it is no terminal.

    Args:
        quiet: only failures and the end.
    """

    def __init__(
        self, out: IO[str] | None = None, err: IO[str] | None = None, *, quiet: bool = False
    ) -> None:
        self._out, self._err = out or sys.stdout, err or sys.stderr
        self._quiet = quiet
        self._pace = _Pace()
        self._bar: Bar | None = None

    def started(self, total: int | None, done: int) -> None:
        self._pace.started(total, done)
        if done:
            print(f"{done} done by an earlier run", file=self._err)
        if self._quiet or not self._err.isatty():
            return
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TaskProgressColumn(show_speed=True),
            TimeRemainingColumn(),
            TextColumn("[red]{task.fields[failed]}"),
            # one console for bar and lines where they share the terminal
            console=Console(file=self._out if self._out.isatty() else self._err),
        )
        self._task = self._bar.add_task("explaining", total=total, completed=done, failed="")
        self._bar.start()

    def noted(self, text: str) -> None:
        print(printable(text), file=self._err)

    def explained(self, rows: Sequence[Row]) -> None:
        pictures = by_picture(rows)
        self._pace.explained += len(pictures)
        if not self._quiet and pictures:
            self._print(Text("\n").join(map(_line, pictures)))
        self._advance(len(pictures))

    def failed(self, path: str, reason: str) -> None:
        self._pace.failed += 1
        self._print(Text.assemble(f"{printable(path)}: ", (f"skipped: {printable(reason)}", "red")))
        self._advance(1)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def finished(self, summary: Summary) -> None:
        if self._bar is not None:
            self._bar.stop()
        print(sentence(summary), file=self._err)

    def _print(self, text: Text) -> None:
        if self._bar is not None and self._out.isatty():
            self._bar.console.print(text, soft_wrap=True)
        else:
            print(text.plain, file=self._out, flush=True)

    def _advance(self, pictures: int) -> None:
        if self._bar is not None:
            failed = f"{self._pace.failed} failed" if self._pace.failed else ""
            self._bar.update(self._task, advance=pictures, failed=failed)
        elif not self._quiet and self._pace.due(every=10):
            print(self._pace.sentence(), file=self._err, flush=True)


class JsonLines(Progress):
    """JSON objects on `out`, one a line: started, progress (at most one a second), finished, ..."""

    def __init__(self, out: IO[str] | None = None) -> None:
        self._out = out or sys.stdout
        self._pace = _Pace()

    def started(self, total: int | None, done: int) -> None:
        self._pace.started(total, done)
        self._write("started", total=total, resumed=done)

    def noted(self, text: str) -> None:
        self._write("note", text=text)

    def explained(self, rows: Sequence[Row]) -> None:
        self._pace.explained += len(by_picture(rows))
        self._tell()

    def failed(self, path: str, reason: str) -> None:
        self._pace.failed += 1
        self._write("failed", path=path, reason=reason)
        self._tell()

    def finished(self, summary: Summary) -> None:
        self._write("finished", **asdict(summary))

    def _tell(self) -> None:
        if self._pace.due(every=1):
            self._write("progress", **self._pace.figures())

    def _write(self, event: str, **figures: Any) -> None:
        print(json.dumps({"event": event, **figures}), file=self._out, flush=True)


def printable(text: str) -> str:
    """Control characters, and what is not UTF-8, as escapes: a terminal would obey them."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def sentence(summary: Summary) -> str:
    """A run in a line."""
    at = f" at {summary.layer}" if summary.layer else ""
    parts = [f"{summary.explained} explained{at}"]
    if summary.labelled:
        parts.append(f"{summary.right} of {summary.labelled} right")
    if summary.resumed:
        parts.append(f"{summary.resumed} done before")
    if summary.failed:
        parts.append(f"{summary.failed} skipped")
    if summary.explained:
        stage, share = summary.bound
        parts.append(f"{summary.explained / summary.seconds:.1f} images/s")
        parts.append(f"{stage}-bound: {share:.0%}".replace("%", " %"))
    return ", ".join(parts)


def _line(rows: Sequence[Row]) -> Text:
    """One picture: the prediction, or the explained classes where it is not the one explained."""
    first = rows[0]
    text = Text(f"{printable(first['path'])}: ")
    text.append(_class(first, "predicted", "predicted_probability"), "bold")
    if first["right"] is not None:
        true = f"wrong, it is {_class(first, 'label')}"
        text.append(", ")
        text.append(*(("right", "green") if first["right"] else (true, "red")))
    explained = [row for row in rows if variant(row) == variant(first)]
    others = [row for row in explained if row["target"] != first["predicted"]]
    if others:
        text.append("; explained: " if len(explained) == 1 else "; ")
        text.append(", ".join(_class(row, "target", "probability") for row in others))
    return text


def _class(row: Row, which: str, probability: str | None = None) -> str:
    name = row[f"{which}_name"]
    text = str(row[which]) if name is None else f"{row[which]} {printable(name)}"
    return text if probability is None else f"{text} {100 * row[probability]:.1f} %"


class _Pace:
    """How many, how fast, how long yet."""

    def started(self, total: int | None, done: int) -> None:
        self.total, self.resumed = total, done
        self.explained = self.failed = 0
        self._start = self._told = time.monotonic()

    def due(self, *, every: float) -> bool:
        now = time.monotonic()
        if now - self._told < every:
            return False
        self._told = now
        return True

    def figures(self) -> dict[str, Any]:
        handled = self.explained + self.failed
        rate = handled / max(time.monotonic() - self._start, 1e-9)
        left = None if self.total is None else max(0, self.total - self.resumed - handled)
        return {
            "total": self.total,
            "resumed": self.resumed,
            "explained": self.explained,
            "failed": self.failed,
            "images_per_second": round(rate, 2),
            "seconds_left": None if left is None or not rate else round(left / rate),
        }

    def sentence(self) -> str:
        figures = self.figures()
        of = "" if self.total is None else f" of {self.total}"
        left = figures["seconds_left"]
        parts = [
            f"{self.resumed + self.explained}{of}",
            f"{figures['images_per_second']:.1f} images/s",
            *([] if left is None else [f"{left} s left"]),
            *([f"{self.failed} skipped"] if self.failed else []),
        ]
        return ", ".join(parts)
