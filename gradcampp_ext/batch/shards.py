"""WebDataset shards: tar files of samples, each a run of files with one key (7.jpg, 7.cls)."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradcampp_ext.batch.items import SUFFIXES, Item, SourceError, label_of
from gradcampp_ext.imaging import ImageError

_SHARD = re.compile(r"\.(tar|tar\.\w+|tgz)$", re.IGNORECASE)
_LABEL_BYTES = 2**20  # of a file beside a picture; what is longer is no label
_URL = re.compile(r"^\w{2,}:")


def is_shard(argument: str) -> bool:
    """Whether an argument names a tar file, or a pattern of several, or a URL of one."""
    return _SHARD.search(argument) is not None


def is_stream(shard: str) -> bool:
    """Whether a shard can only be read from its beginning: a URL, or compressed."""
    return _is_url(shard) or not shard.lower().endswith(".tar")


def _is_url(shard: str) -> bool:
    """A file stays a file, though it be called like a URL, of which some run commands."""
    return _URL.match(shard) is not None and not os.path.lexists(shard)


def expand(pattern: str) -> list[str]:
    """Shards by a pattern with braces, {000..127}, as WebDataset has it."""
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise SourceError(
            f"tar shards need {error.name}: pip install 'gradcampp_ext[datasets]'"
        ) from error
    try:
        found: list[str] = expand_urls(pattern)
    except ValueError as error:  # braces without a match
        raise SourceError(f"{pattern} is no pattern of shards: {error}") from error
    return found


def items(shard: str) -> Iterator[Item]:
    """A picture a sample, in the order of the shard, without reading the pictures.

    A sample without a picture, a label that cannot be read and a shard that breaks off are items
    whose reading fails, with the reason.

    Args:
        shard: path of a tar file; or a compressed one, or a URL as WebDataset takes it (pipe:,
            http:, ...), whose pictures are read here and now, one after the other.
    """
    from webdataset.tariterators import group_by_keys

    failures: list[str] = []

    def told(error: Exception) -> bool:
        failures.append(str(error.args[0] if error.args else error))
        return True

    called = shard.rpartition("/")[2]
    for sample in group_by_keys(_members(shard, failures), handler=told):
        yield _item(shard, _SHARD.sub("", called), sample)
    for reason in failures:
        yield Item(shard, called, _Broken(f"the shard is damaged: {reason}"))


@dataclass(frozen=True)
class _Member:
    """A file inside a tar file, read when it is called."""

    shard: str
    offset: int
    size: int

    def __call__(self) -> bytes:
        try:
            with Path(self.shard).open("rb") as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as error:
            raise ImageError(error.strerror or str(error)) from error
        if len(content) < self.size:
            raise ImageError(f"truncated: the shard has {len(content)} of {self.size} bytes of it")
        return content


@dataclass(frozen=True)
class _Broken:
    """What cannot be read, and why."""

    reason: str

    def __call__(self) -> bytes:
        raise ImageError(self.reason)


def _members(shard: str, failures: list[str]) -> Iterator[dict[str, Any]]:
    """Files of a shard, pictures by their place where that is possible; stops where it breaks."""
    stream = is_stream(shard)
    try:
        with _opened(shard) if stream else tarfile.open(shard, "r:") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # or memory would grow
                if (
                    not info.isreg()
                    or info.issparse()
                    or re.match(r"(.*/)?__[^/]*__($|/)", info.name)
                ):
                    continue
                data: Any = _Member(shard, info.offset_data, info.size)
                if stream or not _is_picture(info.name):
                    file = tar.extractfile(info)
                    most = info.size if _is_picture(info.name) else _LABEL_BYTES
                    data = b"" if file is None else file.read(most)
                yield {"fname": info.name, "data": data, "__url__": shard}
    except Exception as error:  # tarfile and decompressors raise anything on damaged data
        failures.append(getattr(error, "strerror", None) or str(error))


def _opened(url: str) -> tarfile.TarFile:
    from webdataset.gopen import gopen

    return tarfile.open(fileobj=gopen(url) if _is_url(url) else Path(url).open("rb"), mode="r|*")


def _item(shard: str, stem: str, sample: Mapping[str, Any]) -> Item:
    key = sample["__key__"]
    found = sorted((name for name in sample if _is_picture(name)), key=lambda n: n.count("."))
    if not found:
        names = ", ".join(name for name in sample if not name.startswith("__"))
        reason = f"the sample has no picture, only {names}"
        return Item(f"{shard}/{key}", f"{stem}/{key}", _Broken(reason))
    path, name = f"{shard}/{key}.{found[0]}", f"{stem}/{key}"
    try:
        return Item(path, name, sample[found[0]], _label(sample))
    except (ValueError, RecursionError) as error:
        return Item(path, name, _Broken(f"its label cannot be read: {error}"))


def _label(sample: Mapping[str, Any]) -> str | int | None:
    if "cls" in sample:
        return str(sample["cls"].decode()).strip()
    if "json" in sample:
        about = json.loads(sample["json"])
        if isinstance(about, dict):
            return label_of(about)
    return None


def _is_picture(name: str) -> bool:
    return f".{name.rpartition('.')[2]}".lower() in SUFFIXES
