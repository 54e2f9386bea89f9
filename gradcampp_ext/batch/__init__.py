"""Explaining many pictures: source, decode, explain, render, sinks.

from gradcampp_ext import batch, models

summary = batch.run(
    batch.Files(["photos"]), models.load("demo"), Path("out"), [batch.Overlays(), batch.Maps()]
)
"""

from __future__ import annotations

import importlib
from typing import Any

from gradcampp_ext.batch import report
from gradcampp_ext.batch.decode import DecodeError
from gradcampp_ext.batch.engine import EngineError, Options
from gradcampp_ext.batch.explaining import Local
from gradcampp_ext.batch.hub import HuggingFace
from gradcampp_ext.batch.items import Item, Source, SourceError
from gradcampp_ext.batch.mapset import MapSet
from gradcampp_ext.batch.pipeline import Summary, run
from gradcampp_ext.batch.progress import JsonLines, Lines, Progress
from gradcampp_ext.batch.record import RecordError
from gradcampp_ext.batch.samples import Sample, explain_dataset
from gradcampp_ext.batch.sinks import Maps, Overlays, Rendered, Sink
from gradcampp_ext.batch.sources import Dataset, Files, Stream
from gradcampp_ext.batch.table import ResultsTable

__all__ = [
    "Dataset",
    "DecodeError",
    "EngineError",
    "Files",
    "HuggingFace",
    "Item",
    "JsonLines",
    "Lines",
    "Local",
    "MapSet",
    "Maps",
    "Options",
    "Overlays",
    "Progress",
    "RecordError",
    "Rendered",
    "ResultsTable",
    "Sample",
    "Sink",
    "Source",
    "SourceError",
    "Stream",
    "Summary",
    "explain_dataset",
    "report",
    "run",
]

_MODULES = ("lightning", "ray")  # which need what is not always installed


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
