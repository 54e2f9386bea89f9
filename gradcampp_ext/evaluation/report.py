"""The report of an evaluation: that of the batch pipeline, with the scores in its summary."""

from __future__ import annotations

import base64
from pathlib import Path

from markupsafe import Markup

from gradcampp_ext.batch import record, report
from gradcampp_ext.evaluation.summary import Result, layers_of, table, wins_table

_PLOTS = {  # of wins there is a table
    record.BARS: "Means with intervals",
    record.CURVES: "Curves",
    record.RANDOMIZATION: "Maps of networks that lose their weights",
    record.DISAGREEMENTS: "The images on which maps differ most in what they keep",
}


def build(folder: Path, *, title: str | None = None) -> Path:
    """Write the report of an evaluation, or write it again (see `gradcampp_ext.batch.report`).

    Methods and layers are switches, and what each map is worth is among its figures. Tables and
    plots of an evaluation that has ended, which are read from the folder, stand in the summary.

    Args:
        folder: of `gradcampp_ext.evaluation.run`, finished or not.
        title: default: the model.

    Returns: the page to open.

    Raises: what `gradcampp_ext.batch.report.build` raises; ValueError: evaluation.json is damaged.
    """
    sections = {}
    file = folder / record.EVALUATION
    if file.is_file():
        result = record.parsed(file.read_bytes(), file)
        try:
            sections["Scores"] = _scores(result)
        except (*report.DAMAGE, StopIteration, ValueError) as error:
            raise ValueError(f"{file} is damaged: {error!r}") from error
        sections["Plots"] = _plots(folder)
    return report.build(folder, title=title, sections=sections)


def _scores(result: Result) -> Markup:
    tables = {}
    for layer in layers_of(result):
        tables[layer] = [table(result, layer)]
        if "wins" in result and len(result["settings"]["methods"]) > 1:
            tables[layer].append(wins_table(result, layer))
    template = report.template("scores.html.j2")
    return Markup(template.render(result=result, tables=tables))


def _plots(folder: Path) -> Markup:
    """As data, so that the report stays a folder of its own."""
    made = Markup()
    for name, title in _PLOTS.items():
        if (folder / name).is_file():
            kind = "jpeg" if name.endswith("jpg") else "png"
            content = base64.b64encode((folder / name).read_bytes()).decode()
            url = f"data:image/{kind};base64,{content}"
            made += Markup('<h4>{}</h4><img src="{}" alt="{}">').format(title, url, title)
    return made
