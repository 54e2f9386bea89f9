"""Where maps go: files of overlays and of maps, data sets. The record writes results.jsonl."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt
from PIL import Image

from gradcampp_ext import imaging
from gradcampp_ext.batch.provenance import exif

if TYPE_CHECKING:
    import torch

    from gradcampp_ext.batch.engine import Row
    from gradcampp_ext.batch.record import Record

OVERLAY_FORMATS = ("jpg", "png", "webp")


@dataclass(frozen=True)
class Rendered:
    """A batch of N pictures with K maps each, on the device that explained them.

    K counts classes times layers, in the order of the pictures' rows of results.

    Attributes:
        pictures: uint8 [N, H, W, 3], what the network saw, at the size of the maps.
        maps: float [N, K, H, W] in [0, 1].
        feature_maps: the same at the size of the layer, or of the largest of them, [N, K, h, w].
    """

    pictures: torch.Tensor
    maps: torch.Tensor
    feature_maps: torch.Tensor


@runtime_checkable
class FileSink(Protocol):
    """One kind of file, for each map or for each picture.

    Batches are explained side by side: `render` and `encode` run in several threads at once, on one
    sink, and must not change it.

    Attributes:
        column: its key under "files" in the results.
        per_picture: one file a picture, however many maps it has.
    """

    @property
    def column(self) -> str: ...

    @property
    def per_picture(self) -> bool: ...

    def settings(self) -> dict[str, Any]:
        """What decides its files, for run.json."""

    def render(self, batch: Rendered) -> torch.Tensor:
        """[N, K, ...], or [N, ...] per picture, on the CPU; in the threads that explain."""

    def path(self, name: str) -> str:
        """Of the file for one of render's [n, k] or [n], relative to the output folder."""

    def encode(self, value: npt.NDArray[Any], row: Row, about: Mapping[str, Any]) -> bytes:
        """What that file contains; in background threads, or in other processes.

        Args:
            value: one of render's [n, k] or [n].
            row: its row of results, or the picture's first one.
            about: what made it, see `gradcampp_ext.batch.provenance.about`.
        """


@runtime_checkable
class SeriesSink(Protocol):
    """One data set of all maps, in the order of results.jsonl.

    As `FileSink.render`, `values` runs in several threads at once, and must not change the sink.
    """

    def settings(self) -> dict[str, Any]:
        """What decides it, for run.json."""

    def values(self, batch: Rendered) -> torch.Tensor:
        """[N, K, ...] on the CPU, for the store; in the threads that explain."""

    def store(self, record: Record) -> Store:
        """Takes up what an earlier run has stored; in the main thread, before all else."""


class Store(Protocol):
    """A data set while a run writes it; `Parts` is one.

    One background thread appends. When it has ended, the main thread finishes and closes.
    """

    def append(self, values: npt.NDArray[Any]) -> None:
        """Arrays of the next rows, which are recorded before the next call."""

    def finish(self) -> None:
        """The run has ended, or was stopped in order."""

    def close(self) -> None:
        """In any case, the last call."""


Sink: TypeAlias = FileSink | SeriesSink


class Drawn(NamedTuple):
    """What sinks made of a batch: an array each.

    Attributes:
        files: what `render` gave, or, of dtype object, what `encode` made of it.
        series: what `values` gave.
    """

    files: list[npt.NDArray[Any]]
    series: list[npt.NDArray[Any]]


def draw(sinks: Sequence[Sink], batch: Rendered) -> Drawn:
    """Runs the sinks' part of the work on the batch's device."""
    return Drawn(
        [sink.render(batch).numpy() for sink in sinks if isinstance(sink, FileSink)],
        [sink.values(batch).numpy() for sink in sinks if isinstance(sink, SeriesSink)],
    )


def together(parts: Sequence[Drawn]) -> Drawn | None:
    """What was drawn of a batch in parts; None of none."""
    if len(parts) <= 1:
        return parts[0] if parts else None
    files, series = (
        [np.concatenate(each) for each in zip(*kind, strict=True)]
        for kind in zip(*parts, strict=True)
    )
    return Drawn(files, series)


def encode(
    sinks: Sequence[Sink], rows: Sequence[Sequence[Row]], drawn: Drawn, about: Mapping[str, Any]
) -> Drawn:
    """Contents of files instead of arrays, where others than the writer's threads encode.

    Args:
        rows: of the batch, picture by picture; none of a picture that failed.
    """
    files = []
    for sink, values in zip(
        (sink for sink in sinks if isinstance(sink, FileSink)), drawn.files, strict=True
    ):
        contents = np.full(values.shape[: 1 if sink.per_picture else 2], None, object)
        for n, own in enumerate(rows):
            if own and sink.per_picture:
                contents[n] = sink.encode(values[n], own[0], about)
            elif own:
                for k, row in enumerate(own):
                    contents[n, k] = sink.encode(values[n, k], row, about)
        files.append(contents)
    return drawn._replace(files=files)


@dataclass(frozen=True)
class Overlays:
    """Pictures with the map over them, in overlays/NAME.FORMAT; what made them is in their EXIF.

    Attributes:
        format: "jpg" (quality 92, full colour resolution), "png" or "webp".
        colormap: see `imaging.colormap`.
        image_weight: see `imaging.overlay`.
        heatmap_weight: its alpha.
    """

    format: Literal["jpg", "png", "webp"] = "jpg"
    colormap: str = "turbo"
    image_weight: float = 0.5
    heatmap_weight: float = 0.5

    column, per_picture = "overlay", False

    def __post_init__(self) -> None:
        imaging.colormap(self.colormap)
        imaging.check_weights(self.image_weight, self.heatmap_weight)
        if self.format not in OVERLAY_FORMATS:
            raise ValueError(f"format must be one of {OVERLAY_FORMATS}, got {self.format!r}")

    def settings(self) -> dict[str, Any]:
        return {
            "overlays": self.format,
            "colormap": self.colormap,
            "image_weight": self.image_weight,
            "heatmap_weight": self.heatmap_weight,
        }

    def render(self, batch: Rendered) -> torch.Tensor:
        n, k, height, width = batch.maps.shape
        drawn = imaging.overlay(
            batch.pictures.unsqueeze(1).expand(-1, k, -1, -1, -1).flatten(0, 1),
            batch.maps.flatten(0, 1),
            colormap=self.colormap,
            alpha=self.heatmap_weight,
            image_weight=self.image_weight,
        )
        return drawn.reshape(n, k, height, width, 3).cpu()

    def path(self, name: str) -> str:
        return f"overlays/{name}.{self.format}"

    def encode(self, value: npt.NDArray[Any], row: Row, about: Mapping[str, Any]) -> bytes:
        options: dict[str, dict[str, Any]] = {
            "jpg": {"format": "JPEG", "quality": 92, "subsampling": 0},
            "png": {"format": "PNG", "compress_level": 3},
            "webp": {"format": "WEBP", "quality": 92},
        }
        file = io.BytesIO()
        Image.fromarray(value).save(file, **options[self.format], exif=exif(about, row))
        return file.getvalue()


@dataclass(frozen=True)
class Maps:
    """Raw maps in maps/NAME.npy, in [0, 1].

    Attributes:
        size: "image", the size of the network's input (or of --size), or "feature", that of the
            target layer (the largest, of several).
        dtype: "float32" or "float16".
    """

    size: Literal["image", "feature"] = "image"
    dtype: Literal["float32", "float16"] = "float32"

    column, per_picture = "map", False

    def settings(self) -> dict[str, Any]:
        return {"maps": self.size, "maps_dtype": self.dtype}

    def render(self, batch: Rendered) -> torch.Tensor:
        return (batch.maps if self.size == "image" else batch.feature_maps).cpu()

    def path(self, name: str) -> str:
        return f"maps/{name}.npy"

    def encode(self, value: npt.NDArray[Any], row: Row, about: Mapping[str, Any]) -> bytes:
        file = io.BytesIO()
        np.save(file, value.astype(self.dtype), allow_pickle=False)
        return file.getvalue()
