"""From decoded pictures to maps and rows of results, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch
from torch.nn.functional import interpolate

from gradcampp_ext.batch.sinks import Rendered
from gradcampp_ext.capture import CaptureError
from gradcampp_ext.explainer import Explainer
from gradcampp_ext.targets import select

if TYPE_CHECKING:
    from torch import Tensor

    from gradcampp_ext.batch.decode import Batch, Decoded
    from gradcampp_ext.models import LoadedModel

Row: TypeAlias = dict[str, Any]


class EngineError(RuntimeError):
    """The model cannot be run on the pictures; the text says why."""


@dataclass(frozen=True)
class Options:
    """What to explain, and how.

    Attributes:
        method: see `gradcampp_ext.methods.METHODS`.
        target_layer: None for the model's own choice, or else the explainer's.
        target: None for the predicted class, "label" for the true one, or a class index.
        topk: explain the K classes of the largest outputs; only with target None.
        size: height and width of overlays and maps; None for the size of the network's input.
        device, dtype: where and in what the network runs.
        batch_size: pictures in one forward pass; halved where the device's memory runs out.
        workers: processes that decode; None for as many as the device can use.
    """

    method: str = "gradcampp"
    target_layer: str | None = None
    target: int | Literal["label"] | None = None
    topk: int = 1
    size: tuple[int, int] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    batch_size: int = 32
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.topk < 1 or (self.workers or 0) < 0:
            raise ValueError(
                "batch_size and topk must be at least 1 and workers at least 0; "
                f"got {self.batch_size}, {self.topk} and {self.workers}"
            )
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"size must be positive, in pixels, got {self.size}")
        if self.topk > 1 and self.target is not None:
            raise ValueError("topk explains the largest outputs, so it cannot go with a target")


class _Explained(NamedTuple):
    """A batch as the explainer gives it; N pictures, K targets."""

    maps: Tensor  # [N, K, h, w]
    target: Tensor  # [N, K]
    score: Tensor  # [N, K]
    probability: Tensor  # [N, K]
    predicted: Tensor  # [N]
    confidence: Tensor  # [N], probability of the predicted class


class Engine:
    """Explains batches with one model.

    Args:
        model: is moved to the device, dtype and memory layout that it runs in.
        options: how.

    Attributes:
        layer: the layer that is explained; None before the first batch.
    """

    def __init__(self, model: LoadedModel, options: Options) -> None:
        self._model, self._options = model, options
        self._size = options.size or model.recipe.size
        self._limit = options.batch_size
        self.layer: str | None = None
        network = model.model.to(options.device, options.dtype)
        self._explainer = Explainer(
            network.to(memory_format=torch.channels_last),
            options.target_layer or model.target_layer,
            options.method,
            output=self._remember,
        )

    def __call__(self, batch: Batch) -> tuple[list[list[Row]], Rendered | None]:
        """K rows a picture, and what sinks draw from.

        A picture whose scores or maps are not finite has no rows, and is added to the failures.
        """
        if not batch.items:
            return [], None
        device = self._options.device
        explained = self._explain(batch.pictures.to(device, non_blocking=True), batch.items)
        shape = (*explained.maps.shape[:2], *self._size)
        flat = explained.maps.flatten(0, 1).unsqueeze(1)
        maps = interpolate(flat, self._size, mode="bilinear").reshape(shape)
        tensors = explained._asdict() | _statistics(maps)
        del tensors["maps"]
        columns = {name: tensor.tolist() for name, tensor in tensors.items()}
        rows: list[list[Row]] = []
        for index, item in enumerate(batch.items):
            figures = {name: column[index] for name, column in columns.items()}
            if figures.pop("finite"):
                rows.append(self._rows(item, figures))
            else:
                rows.append([])
                reason = f"scores or maps are not finite; does {self._options.dtype} overflow?"
                batch.failures.append((item.path, reason))
        displays = batch.displays.to(device, non_blocking=True)
        return rows, Rendered(displays, maps, explained.maps)

    def _explain(self, pictures: Tensor, items: Sequence[Decoded]) -> _Explained:
        """In parts of `_limit` pictures, which is halved where memory runs out."""
        parts: list[_Explained] = []
        start = 0
        while start < len(pictures):
            part = slice(start, start + self._limit)
            try:
                parts.append(self._explain_part(pictures[part], items[part]))
                start += self._limit
            except torch.OutOfMemoryError as error:
                if self._limit == 1:
                    raise EngineError(
                        f"{pictures.device} has not enough memory for one picture: {error}"
                    ) from error
                self._limit = (min(self._limit, len(pictures)) + 1) // 2
                if pictures.is_cuda:
                    torch.cuda.empty_cache()
            except CaptureError:
                raise
            except RuntimeError as error:
                shape = (len(pictures[part]), 3, *self._model.recipe.size)
                raise EngineError(f"the model fails on pictures {shape}: {error}") from error
        return _Explained(*map(torch.cat, zip(*parts, strict=True)))

    def _explain_part(self, pictures: Tensor, items: Sequence[Decoded]) -> _Explained:
        images = self._model.recipe.normalize(pictures, self._options.dtype)
        targets: Any = self._options.target
        if targets == "label":
            targets = [item.label for item in items]
        topk = self._options.topk if targets is None else None
        explanation = self._explainer(images, targets, topk=topk, size="feature")
        self.layer = str(explanation.layer)
        predicted, probabilities = explanation.predicted, explanation.probabilities
        if predicted is None or probabilities is None:
            shape = list(self._output.shape)
            raise EngineError(f"the model gives {shape}; a classifier's [N, classes] is needed")
        confidence = self._output.float().softmax(-1).gather(-1, predicted[:, None])[:, 0]
        return _Explained(
            explanation.maps.float(),
            torch.as_tensor(explanation.targets),
            explanation.scores.float(),
            probabilities.float(),
            predicted,
            confidence,
        )

    def _remember(self, returned: Any) -> Any:
        output = select(returned, None)
        self._output: Tensor = output.detach()
        return output

    def _rows(self, item: Decoded, figures: dict[str, Any]) -> list[Row]:
        names = self._model.classes.name
        left, top, right, bottom = item.view
        rows = []
        for k, target in enumerate(figures["target"]):
            row: Row = {
                "path": item.path,
                "name": item.name,
                "predicted": figures["predicted"],
                "predicted_name": names(figures["predicted"]),
                "predicted_probability": _rounded(figures["confidence"]),
                "label": item.label,
                "label_name": None if item.label is None else names(item.label),
                "right": None if item.label is None else item.label == figures["predicted"],
                "rank": k + 1,
                "target": target,
                "target_name": names(target),
                "probability": _rounded(figures["probability"][k]),
                "score": _rounded(figures["score"][k]),
                "width": item.width,
                "height": item.height,
                "view": [_rounded(side) for side in item.view],
                "peak": None,
                "central_mass": None,
                "entropy": None,
            }
            if figures["mass"][k] > 0:
                x, y = figures["peak_x"][k], figures["peak_y"][k]
                row["peak"] = [
                    _rounded(left + x * (right - left)),
                    _rounded(top + y * (bottom - top)),
                ]
                row["central_mass"] = _rounded(figures["central_mass"][k])
                row["entropy"] = _rounded(figures["entropy"][k])
            rows.append(row)
        return rows


def _statistics(maps: Tensor) -> dict[str, Tensor]:
    """Of maps [N, K, H, W], each [N, K]; the shares mean nothing where the mass is 0."""
    height, width = maps.shape[2:]
    mass = maps.sum((2, 3))
    shares = maps / mass[..., None, None]
    central = shares[..., height // 4 : height - height // 4, width // 4 : width - width // 4]
    peak = maps.flatten(2).argmax(2)
    return {
        "mass": mass,
        "finite": mass.isfinite().all(1),
        "central_mass": central.sum((2, 3)),
        "entropy": torch.special.entr(shares).sum((2, 3)),
        "peak_x": (peak % width + 0.5) / width,
        "peak_y": (peak.div(width, rounding_mode="floor") + 0.5) / height,
    }


def _rounded(value: float) -> float:
    """As many digits as float32 has."""
    return float(f"{value:.7g}")
