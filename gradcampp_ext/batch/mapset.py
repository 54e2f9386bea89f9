"""All maps of a run as one data set, Parquet or Zarr, in the order of results.jsonl."""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from gradcampp_ext.batch import provenance
from gradcampp_ext.batch.parts import Parts

if TYPE_CHECKING:
    from gradcampp_ext.batch.engine import Row
    from gradcampp_ext.batch.record import Record
    from gradcampp_ext.batch.sinks import Rendered, Store

MAP_SET_FORMATS = ("parquet", "zarr")
_SHARD = 16  # chunks of a Zarr shard
_CHUNK_BYTES = 2**20
_COLUMNS: dict[str, Any] = {"path": str, "rank": "int32", "layer": str, "target": "int64"}
_TEXTS = ("path", "layer")


@dataclass(frozen=True)
class MapSet:
    """One data set of maps with equal shapes, in [0, 1].

    maps.parquet is a folder of files with the columns path, rank, layer, target (a class index)
    and map (Arrow's fixed_shape_tensor [H, W]); maps.zarr is a group (Zarr 3) of the arrays path,
    rank, layer, target [M] and map [M, H, W]. Row m is line m of results.jsonl. What made them
    stands under "gradcampp_ext", in the metadata of each file or in the group's attributes.

    Attributes:
        format: "parquet" (needs pyarrow) or "zarr" (needs zarr).
        size: "image", the size of the network's input (or of --size), or "feature", that of the
            target layer (the largest, of several).
        dtype: "float32" or "float16", which is off by 0.00025 at most.
    """

    format: Literal["parquet", "zarr"]
    size: Literal["image", "feature"] = "image"
    dtype: Literal["float32", "float16"] = "float32"

    def __post_init__(self) -> None:
        if self.format not in MAP_SET_FORMATS:
            raise ValueError(f"format must be one of {MAP_SET_FORMATS}, got {self.format!r}")
        if self.size not in ("image", "feature"):
            raise ValueError(f"size must be 'image' or 'feature', got {self.size!r}")
        if self.dtype not in ("float32", "float16"):
            raise ValueError(f"dtype must be 'float32' or 'float16', got {self.dtype!r}")
        try:
            _ = __import__("pyarrow" if self.format == "parquet" else "zarr")
        except ImportError as error:
            raise ImportError(
                f"a {self.format} data set of maps needs {error.name}: "
                "pip install 'gradcampp_ext[datasets]'"
            ) from error

    def settings(self) -> dict[str, Any]:
        return {f"maps_{self.format}": {"size": self.size, "dtype": self.dtype}}

    def values(self, batch: Rendered) -> torch.Tensor:
        maps = batch.maps if self.size == "image" else batch.feature_maps
        return maps.to(getattr(torch, self.dtype)).cpu()

    def store(self, record: Record) -> Store:
        kind = _ParquetParts if self.format == "parquet" else _ZarrParts
        return kind(record, f"maps.{self.format}")


class _ParquetParts(Parts):
    """A file a part, each written at once: readers never find half of one."""

    def save(self, index: int, rows: Sequence[Row], values: npt.NDArray[Any]) -> None:
        import pyarrow as pa
        import pyarrow.parquet

        table = pa.table(
            {
                **{
                    name: pa.array(column, "string" if name in _TEXTS else _COLUMNS[name])
                    for name, column in _columns(rows).items()
                },
                "map": pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values)),
            },
            metadata=provenance.parquet(self.record.about),
        )
        file = io.BytesIO()
        pyarrow.parquet.write_table(table, file, compression="zstd")
        self.record.write(f"{self.folder.name}/{self._file(index)}", file.getvalue())

    def load(self, index: int) -> npt.NDArray[Any]:
        import pyarrow.parquet

        # as one file, not as a part of a data set: a damaged neighbour does not matter
        with pyarrow.parquet.ParquetFile(self.folder / self._file(index)) as file:
            maps = file.read(columns=["map"]).column("map").combine_chunks()
        values: npt.NDArray[Any] = maps.to_numpy_ndarray()
        return values

    def drop(self, index: int) -> None:
        for file in self.folder.glob("part-*.parquet"):
            if file.name >= self._file(index):
                file.unlink()

    @staticmethod
    def _file(index: int) -> str:
        return f"part-{index:06}.parquet"


class _ZarrParts(Parts):
    """A shard a part, of sixteen chunks; zarr moves each file into its place when it is whole."""

    def length(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
        return _SHARD * max(1, _CHUNK_BYTES // max(1, math.prod(shape) * dtype.itemsize))

    def save(self, index: int, rows: Sequence[Row], values: npt.NDArray[Any]) -> None:
        length = self.length(values.shape[1:], values.dtype)
        start, end = index * length, index * length + len(values)
        group = self._group(values, length)
        for name, column in {**_columns(rows), "map": values}.items():
            array = group[name]
            array.resize((end, *array.shape[1:]))
            array[start:end] = np.asarray(column, object if name in _TEXTS else None)

    def load(self, index: int) -> npt.NDArray[Any]:
        import zarr

        # Zarr 2 has a codec that unpickles
        maps: Any = zarr.open_group(self.folder, mode="r", zarr_format=3)["map"]
        length = self.length(maps.shape[1:], maps.dtype)
        values: npt.NDArray[Any] = maps[index * length : (index + 1) * length]
        if not len(values):
            raise FileNotFoundError(f"{self.folder} has no rows from {index * length} on")
        return values

    def drop(self, index: int) -> None:
        import zarr

        for left in self.folder.rglob("*.partial"):  # by a kill, while zarr wrote a file
            left.unlink()
        try:
            group = zarr.open_group(self.folder, mode="r+", zarr_format=3)
            for name in (*_COLUMNS, "map"):
                array: Any = group[name]
                length = (array.shards or array.chunks)[0]
                array.resize((min(array.shape[0], index * length), *array.shape[1:]))
        except (FileNotFoundError, KeyError):  # not made yet, or by half
            for name in (*_COLUMNS, "map"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / "zarr.json").unlink(missing_ok=True)

    def _group(self, values: npt.NDArray[Any], length: int) -> Any:
        import zarr

        if (self.folder / "zarr.json").exists():
            return zarr.open_group(self.folder, mode="r+", zarr_format=3)
        group = zarr.create_group(self.folder, attributes={provenance.KEY: self.record.about})
        for name, dtype in _COLUMNS.items():
            group.create_array(
                name,
                shape=(0,),
                dtype=dtype,
                chunks=(length,),
                dimension_names=("row",),
            )
        group.create_array(
            "map",
            shape=(0, *values.shape[1:]),
            dtype=values.dtype,
            chunks=(length // _SHARD, *values.shape[1:]),
            shards=(length, *values.shape[1:]),
            dimension_names=("row", "y", "x"),
        )
        return group


def _columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """What tells the maps apart. Paths that are not UTF-8 have escapes."""
    columns: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in _COLUMNS}
    columns["path"] = [utf8(path) for path in columns["path"]]
    return columns


def utf8(text: str) -> str:
    """The text, with escapes for what came from bytes that are not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()
