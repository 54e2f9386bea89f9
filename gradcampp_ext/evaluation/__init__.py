"""Evaluating explanations over pictures: which method, at which layer, is worth what.

from gradcampp_ext import batch, evaluation, models

found = evaluation.run(
    batch.Files(["photos"]), models.load("demo"), Path("out"),
    evaluation.Options(methods=["gradcampp", "gradcam", "center"]),
)
"""

from __future__ import annotations

from gradcampp_ext.evaluation import report
from gradcampp_ext.evaluation.boxes import read_boxes
from gradcampp_ext.evaluation.evaluator import Evaluator, Options
from gradcampp_ext.evaluation.measures import MEASURES, METRICS
from gradcampp_ext.evaluation.run import Evaluation, run
from gradcampp_ext.evaluation.summary import markdown, show

__all__ = [
    "MEASURES",
    "METRICS",
    "Evaluation",
    "Evaluator",
    "Options",
    "markdown",
    "read_boxes",
    "report",
    "run",
    "show",
]
