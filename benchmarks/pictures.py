"""The pictures of the documentation: maps side by side, each with its error.

    python benchmarks/pictures.py   # writes docs/images/*.jpg

The demo network (EfficientNet-Lite0, ImageNet weights) on photographs that scikit-image bundles;
the contenders are those of bench_accuracy.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib as mpl
import skimage.data
import torch
from bench_accuracy import LAYERS, ours, ours_literal, paper, pytorch_grad_cam, torchcam
from matplotlib import pyplot
from PIL import Image
from torch.nn.functional import interpolate

import gradcampp_ext as gx
from gradcampp_ext import models

if TYPE_CHECKING:
    from torch import Tensor

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
SIZE = (224, 224)


class Column(NamedTuple):
    title: str
    map: Tensor | None = None  # [1, h, w] in [0, 1]
    truth: Tensor | None = None  # that the error is taken against


class Subject:
    """A photograph, as the demo network sees it, and what a layer gives for it."""

    def __init__(self, name: str) -> None:
        self.demo = models.load("demo")
        photograph = Image.fromarray(getattr(skimage.data, name)())
        picture = torch.from_numpy(self.demo.recipe.picture(photograph).copy())[None]
        self.images = self.demo.recipe.normalize(picture)
        self.seen = torch.from_numpy(self.demo.recipe.display(photograph, SIZE).copy())[None]

    def captured(self, layer: str | None) -> tuple[Tensor, Tensor]:
        explainer = gx.Explainer(self.demo.model, layer or self.demo.target_layer)
        found = explainer.capture(self.images)
        return found.activations[0], found.gradients[0][:, 0]

    def drawn(self, column: Column) -> Any:
        if column.map is None:
            return self.seen[0].numpy()
        maps = interpolate(column.map[:, None].float(), SIZE, mode="bilinear")[:, 0]
        return gx.overlay(self.seen, maps)[0].numpy()


def comparison(subject: Subject) -> list[tuple[str, list[Column]]]:
    rows = []
    for title, layer in LAYERS.items():
        a, g = subject.captured(layer)
        literal = paper(a, g, rectify=False)
        mine = ours(a, g) if title != "signed" else ours_literal(a, g)
        columns = [
            Column("photograph"),
            Column("the paper's eq. 19, float64", literal),
            Column("gradcampp_ext", mine, literal),
            Column("pytorch-grad-cam", pytorch_grad_cam(a, g), literal),
            Column("torchcam", torchcam(a, g), literal),
        ]
        rows.append((f"layer {title}", columns))
    return rows


def rectify(subject: Subject) -> list[tuple[str, list[Column]]]:
    a, g = subject.captured(LAYERS["signed"])
    columns = [
        Column("photograph"),
        Column("Grad-CAM", gx.cam(a, g, method="gradcam")),
        Column("Grad-CAM++, as printed", gx.cam(a, g, rectify=False)),
        Column("Grad-CAM++, rectified", gx.cam(a, g)),
    ]
    return [("signed layer", columns)]


def pooled_head(subject: Subject) -> list[tuple[str, list[Column]]]:
    a, g = subject.captured(None)
    columns = [
        Column("photograph"),
        Column("Grad-CAM", gx.cam(a, g, method="gradcam")),
        Column("Grad-CAM++", gx.cam(a, g)),
    ]
    return [("before the pooling", columns)]


def migration(subject: Subject) -> list[tuple[str, list[Column]]]:
    """The extractors themselves, as their users call them, with one import and with the other."""
    import torchcam.methods

    from gradcampp_ext.compat import torchcam as compat

    rows = []
    for title, layer in {"behind a ReLU": "_blocks.10._swish", "signed": "_blocks.10"}.items():
        maps = []
        for library in (torchcam.methods, compat):
            with library.GradCAMpp(subject.demo.model, layer) as extractor:
                scores = subject.demo.model(subject.images)
                maps.append(extractor(int(scores.argmax()), scores)[0])
                truth = paper(*extractor.hook_a, *extractor.hook_g, rectify=True)
        columns = [
            Column("photograph"),
            Column("the paper's eq. 19, float64", truth),
            Column("gradcampp_ext.compat", maps[1], truth),
            Column("torchcam 0.5.0", maps[0], truth),
        ]
        rows.append((f"layer {title}", columns))
    return rows


def sheet(subject: Subject, rows: list[tuple[str, list[Column]]]) -> Any:
    mpl.use("Agg")
    width, height = 2.1 * len(rows[0][1]), 2.35 * len(rows)
    figure, axes = pyplot.subplots(
        len(rows), len(rows[0][1]), figsize=(width, height), layout="constrained", squeeze=False
    )
    for line, (label, columns) in zip(axes, rows, strict=True):
        for axis, column in zip(line, columns, strict=True):
            axis.imshow(subject.drawn(column))
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            title = column.title
            if column.map is not None and column.truth is not None:
                error = (column.map.double() - column.truth).norm() / column.truth.norm()
                title += f"\nerror {float(error):.1g}"
            axis.set_title(title, fontsize=8)
        line[0].set_ylabel(label, fontsize=8)
    return figure


def main() -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    cat, coffee = Subject("chelsea"), Subject("coffee")
    sheets = {
        "comparison": (coffee, comparison(coffee)),
        "rectify": (cat, rectify(cat)),
        "pooled-head": (coffee, pooled_head(coffee)),
        "torchcam": (cat, migration(cat)),
    }
    for name, (subject, rows) in sheets.items():
        sheet(subject, rows).savefig(
            IMAGES / f"{name}.jpg", dpi=130, pil_kwargs={"quality": 88, "optimize": True}
        )


if __name__ == "__main__":
    main()
