"""results.parquet, the columns of results.jsonl with types; made when the run ends."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradcampp_ext.batch.mapset import utf8
from gradcampp_ext.batch.provenance import parquet
from gradcampp_ext.batch.record import RESULTS_TABLE

if TYPE_CHECKING:
    import numpy.typing as npt
    import pyarrow as pa
    import torch

    from gradcampp_ext.batch.engine import Row
    from gradcampp_ext.batch.record import Record
    from gradcampp_ext.batch.sinks import Rendered, Store

_ROWS = 4096  # converted at a time


@dataclass(frozen=True)
class ResultsTable:
    """results.parquet: a row a map, for pandas, DuckDB, Polars and Spark (needs pyarrow).

    It is made from results.jsonl when a run ends or is stopped in order, so that it says what
    that says, and is whole or not there.
    """

    def __post_init__(self) -> None:
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f"{RESULTS_TABLE} needs pyarrow: pip install 'gradcampp_ext[datasets]'"
            ) from error

    def settings(self) -> dict[str, Any]:
        return {}

    def values(self, batch: Rendered) -> torch.Tensor:
        return batch.maps.new_empty((*batch.maps.shape[:2], 0), device="cpu")

    def store(self, record: Record) -> Store:
        return _Table(record)


class _Table:
    def __init__(self, record: Record) -> None:
        self._record = record
        with record.writing():  # until the end it would lack rows
            (record.folder / RESULTS_TABLE).unlink(missing_ok=True)

    def append(self, values: npt.NDArray[Any]) -> None:
        """Nothing: the rows themselves are recorded."""

    def finish(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet

        rows = self._record.rows()
        first = next(rows, None)
        if first is None:
            return
        schema = _schema(list(first["files"])).with_metadata(parquet(self._record.about))
        rows = itertools.chain([first], rows)
        partial = self._record.partial()
        with self._record.writing():
            with pyarrow.parquet.ParquetWriter(partial, schema, compression="zstd") as writer:
                while chunk := [_plain(row) for row in itertools.islice(rows, _ROWS)]:
                    writer.write_table(pa.Table.from_pylist(chunk, schema))
            partial.replace(self._record.folder / RESULTS_TABLE)

    def close(self) -> None:
        """Nothing is open."""


def _schema(files: list[str]) -> pa.Schema:
    import pyarrow as pa

    box = pa.list_(pa.float64(), 4)
    return pa.schema(
        {
            "path": pa.string(),
            "name": pa.string(),
            "predicted": pa.int64(),
            "predicted_name": pa.string(),
            "predicted_probability": pa.float64(),
            "label": pa.int64(),
            "label_name": pa.string(),
            "right": pa.bool_(),
            "rank": pa.int32(),
            "layer": pa.string(),
            "target": pa.int64(),
            "target_name": pa.string(),
            "probability": pa.float64(),
            "score": pa.float64(),
            "width": pa.int32(),
            "height": pa.int32(),
            "view": box,
            "peak": pa.list_(pa.float64(), 2),
            "central_mass": pa.float64(),
            "entropy": pa.float64(),
            "pixels_sha256": pa.string(),
            **{f"{name}_file": pa.string() for name in files},
            "record": pa.string(),
        }.items()
    )


def _plain(row: Row) -> Row:
    files = {f"{name}_file": file for name, file in row["files"].items()}
    named = {**row, **files}
    return {name: utf8(value) if isinstance(value, str) else value for name, value in named.items()}
