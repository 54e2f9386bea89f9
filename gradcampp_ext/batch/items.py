"""One picture of a source, and the words that sources understand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL import Image

# fmt: off
SUFFIXES = frozenset({
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm",
    ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
})
# fmt: on
PATH_COLUMNS = ("path", "file", "filename", "image")
LABEL_COLUMNS = ("class_index", "label", "class_name", "wordnet_id")


class SourceError(ValueError):
    """A source that cannot be used as a whole; the text says why."""


@dataclass(frozen=True)
class Item:
    """One picture to explain.

    Attributes:
        path: what it is called in the results, and known by when a run is resumed.
        name: what its outputs are called after: a relative path without suffix.
        image: what the source's `read` takes; usually the path again.
        label: true class: an index, a name or a WordNet id; None if it is not known.
    """

    path: str
    name: str
    image: Any
    label: str | int | None = None


Read: TypeAlias = "Callable[[Item], Image.Image | tuple[Image.Image, str | int | None]]"


def path_of(row: Mapping[str, Any], where: str) -> str | None:
    """What a row calls its picture; SourceError, which says where, unless that is text."""
    path = next((row[name] for name in PATH_COLUMNS if row.get(name)), None)
    if path is not None and not isinstance(path, str):
        raise SourceError(f"{where}: the path must be text, got {path!r}")
    return path


def label_of(row: Mapping[str, Any]) -> str | int | None:
    """The true class in a row, if it has one."""
    return next((row[name] for name in LABEL_COLUMNS if row.get(name) not in (None, "")), None)


class Reads(Protocol):
    """What reads the pictures of a source."""

    @property
    def read(self) -> Read:
        """Gives upright RGB, or raises ImageError; it is sent to the worker processes.

        With the true class, of pictures whose Item could not yet tell it.
        """


class Source(Reads, Protocol):
    """Pictures in a fixed order. `len`, where there is one, is shown as the total."""

    def __iter__(self) -> Iterator[Item]:
        """The pictures, without reading them; runs in the main process."""


def length(source: Source) -> int | None:
    """Number of pictures; None where it is not known before all have been read."""
    try:
        return len(source)  # type: ignore[arg-type]
    except TypeError:
        return None
