"""Reading and preparing pictures, in worker processes."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from gradcampp_ext._environment import cores
from gradcampp_ext.imaging import Box, ImageError, Pixels

if TYPE_CHECKING:
    from gradcampp_ext.batch.items import Item, Reads
    from gradcampp_ext.models import LoadedModel

Chunk = list[tuple["Item", str]]  # pictures of one batch, and what their outputs are called

_MOST_WORKERS = 16


class DecodeError(RuntimeError):
    """A decoding process died; the text says what is known."""


class Decoded(NamedTuple):
    """A picture that was read.

    Attributes:
        width: upright.
        height: upright.
        view: the part of it that the network sees.
        pixels_sha256: of what the network sees, uint8 [h, w, 3].
    """

    path: str
    name: str
    label: int | None
    width: int
    height: int
    view: Box
    pixels_sha256: str


@dataclass
class Batch:
    """N pictures, and path and reason of each that could not be read.

    Attributes:
        pictures: uint8 [N, h, w, 3], for the network.
        displays: uint8 [N, H, W, 3], the same views at the size of the outputs.
    """

    items: list[Decoded] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    pictures: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    displays: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def part(self, first: int, end: int) -> Batch:
        """Some of the pictures that were read."""
        some = slice(first, end)
        return Batch(self.items[some], [], self.pictures[some], self.displays[some])

    def pin_memory(self) -> Batch:
        self.pictures, self.displays = self.pictures.pin_memory(), self.displays.pin_memory()
        return self


class Decoder(Dataset[Batch]):
    """Reads whole batches; its "indices" are the chunks themselves, so that it holds no list.

    Args:
        source: gives `read`.
        model: gives the recipe, and the classes that labels speak of.
        size: height and width of the displays.
        needs_label: whether a picture without a label is a failure.
    """

    def __init__(
        self, source: Reads, model: LoadedModel, size: tuple[int, int], *, needs_label: bool
    ) -> None:
        self._read = source.read
        self._recipe, self._classes = model.recipe, model.classes
        self._size, self._needs_label = size, needs_label

    def __getitem__(self, chunk: Chunk) -> Batch:
        batch = Batch()
        pictures: list[Pixels] = []
        displays: list[Pixels] = []
        for item, name in chunk:
            try:
                read = self._read(item)
                image, label = read if isinstance(read, tuple) else (read, item.label)
                index = self._index(label)
            except ImageError as error:
                batch.failures.append((item.path, str(error)))
                continue
            pictures.append(np.ascontiguousarray(self._recipe.picture(image)))
            if self._size != self._recipe.size:
                displays.append(self._recipe.display(image, self._size))
            view = self._recipe.view(*image.size)
            sha256 = hashlib.sha256(pictures[-1].data).hexdigest()
            batch.items.append(Decoded(item.path, name, index, *image.size, view, sha256))
        if pictures:
            batch.pictures = torch.from_numpy(np.stack(pictures))
            batch.displays = torch.from_numpy(np.stack(displays)) if displays else batch.pictures
        return batch

    def _index(self, label: str | int | None) -> int | None:
        if label is None:
            if self._needs_label:
                raise ImageError("it has no label that could be explained")
            return None
        try:
            return self._classes.index(str(label))
        except ValueError as error:
            raise ImageError(f"its label cannot be used: {error}") from error


class Decoding:
    """Batches in the order of the chunks, from worker processes that end with the context.

    Args:
        workers: 0 decodes in this process.
        pin: whether tensors are copied to page-locked memory, for transfers to a GPU.
    """

    def __init__(
        self, decoder: Decoder, chunks: Iterable[Chunk], *, workers: int, pin: bool
    ) -> None:
        loader = DataLoader(
            decoder,
            batch_size=None,
            sampler=chunks,
            num_workers=workers,
            pin_memory=pin,
            worker_init_fn=partial(_belong_to, os.getpid()),
        )
        self._batches: Any = iter(loader)
        self._size = decoder._size

    def __enter__(self) -> Decoding:
        return self

    def __exit__(self, *_: object) -> None:
        # left to the garbage collector, they would outlive an exception that refers to them
        if hasattr(self._batches, "_shutdown_workers"):
            self._batches._shutdown_workers()

    def next(self) -> Batch | None:
        """The next batch; None after the last. DecodeError if a worker died, or memory ran out."""
        try:
            batch: Batch | None = next(self._batches, None)
        except RuntimeError as error:
            raise DecodeError(
                f"decoding stopped: {error}; if a process was killed for its memory, try fewer "
                "workers or a smaller batch"
            ) from error
        except MemoryError as error:
            height, width = self._size
            raise DecodeError(
                f"decoding stopped: there is no memory for a batch of {height} x {width} pixels a "
                "picture; try a smaller size or batch"
            ) from error
        return batch


def default_workers(device: torch.device, batches: int | None) -> int:
    """How many processes feed a device; none is worth its start for one batch.

    A CPU's cores are wanted for explaining, which takes several times as long as decoding even
    with a small network.
    """
    if batches is not None and batches <= 1:
        return 0
    wanted = cores() // 4 if device.type == "cpu" else cores() - 1
    return max(1, min(wanted, _MOST_WORKERS))


def _belong_to(main: int, _: int) -> None:
    """A worker ends with the main process, and by nothing else.

    Terminals and schedulers signal the whole group; the main process ends the workers. If it is
    killed, torch notices by the parent's number, which is another process's where workers are
    started by a server (the default from Python 3.14 on).
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(main,), daemon=True).start()


def _end_with(main: int) -> None:
    while True:
        time.sleep(1)
        try:
            os.kill(main, 0)
        except ProcessLookupError:
            os._exit(1)
