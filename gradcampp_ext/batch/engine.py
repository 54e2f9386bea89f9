"""From decoded pictures to maps and rows of results, on the device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, TypeVar

import torch
from torch import nn
from torch.nn.functional import interpolate

from gradcampp_ext import checks
from gradcampp_ext.batch.sinks import Rendered
from gradcampp_ext.capture import CaptureError
from gradcampp_ext.explainer import Explainer
from gradcampp_ext.ops import cam

if TYPE_CHECKING:
    from torch import Tensor

    from gradcampp_ext.batch.decode import Batch, Decoded
    from gradcampp_ext.models import Classes, LoadedModel

Row: TypeAlias = dict[str, Any]
Forward: TypeAlias = Callable[..., Any]
_T = TypeVar("_T")


class EngineError(RuntimeError):
    """The model cannot be run on the pictures; the text says why."""


@dataclass(frozen=True)
class Options:
    """What to explain, and how.

    Attributes:
        method: see `gradcampp_ext.methods.METHODS`.
        target_layer: a name, or several; None for the model's own choice, or else the explainer's.
        fuse: of several layers, the "mean" or "max" of their maps; None gives a map a layer.
        target: None for the predicted class, "label" for the true one, or a class index.
        topk: explain the K classes of the largest outputs; only with target None.
        size: height and width of overlays and maps; None for the size of the network's input.
        device: where the network runs.
        dtype: in what the network runs.
        compile: whether torch.compile takes the parts of the network before and after the target
            layers; see `compiled`.
        batch_size: pictures in one forward pass; halved where the device's memory runs out.
        workers: processes that decode; None for as many as the device can use.
    """

    method: str = "gradcampp"
    target_layer: str | Sequence[str] | None = None
    fuse: Literal["mean", "max"] | None = None
    target: int | Literal["label"] | None = None
    topk: int = 1
    size: tuple[int, int] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    compile: bool = False
    batch_size: int = 32
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.topk < 1 or (self.workers or 0) < 0:
            raise ValueError(
                "batch_size and topk must be at least 1 and workers at least 0; "
                f"got {self.batch_size}, {self.topk} and {self.workers}"
            )
        if self.size is not None:
            checks.size(self.size, 2)
        if self.topk > 1 and self.target is not None:
            raise ValueError("topk explains the largest outputs, so it cannot go with a target")
        if self.fuse not in (None, "mean", "max"):
            raise ValueError(f"fuse must be 'mean', 'max' or None, got {self.fuse!r}")
        if self.layers == () or len(set(self.layers or ())) < len(self.layers or ()):
            raise ValueError(f"target_layer must name different layers, got {self.target_layer}")
        if self.fuse is not None and len(self.layers or ()) < 2:
            raise ValueError("fuse joins the maps of several layers, so target_layer must name two")

    @property
    def layers(self) -> tuple[str, ...] | None:
        """Names of the target layers; None for the default."""
        if self.target_layer is None or isinstance(self.target_layer, str):
            return None if self.target_layer is None else (self.target_layer,)
        return tuple(self.target_layer)

    @property
    def maps(self) -> int:
        """Maps, and rows of results, of each picture: classes times layers."""
        return self.topk * (1 if self.fuse else len(self.layers or ("default",)))


class _Explained(NamedTuple):
    """A batch as the explainer gives it; N pictures, K targets, a map a layer."""

    maps: tuple[Tensor, ...]  # [N, K, h, w] each
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
        layer: the layer that is explained, or the names of several; None before the first batch.
    """

    def __init__(self, model: LoadedModel, options: Options) -> None:
        self._model, self._options = model, options
        self._size = options.size or model.recipe.size
        self._limit = options.batch_size
        self._layers: tuple[str, ...] = ()
        self._compiled: dict[str, Forward] = {}
        network = model.model.to(options.device, options.dtype)
        self._explainer = Explainer(
            network.to(memory_format=torch.channels_last),
            options.layers or model.target_layer,
            options.method,
        )
        if options.compile:
            picture = blank(model, options)
            with trying(picture):
                captured = self._explainer.capture(picture)
            self._compiled = compiled(self._explainer.model, captured.layers)

    @property
    def layer(self) -> str | None:
        return ", ".join(self._layers) or None

    def __call__(
        self, batch: Batch, draw: Callable[[Rendered], _T]
    ) -> tuple[list[list[Row]], list[_T]]:
        """`Options.maps` rows a picture, and what `draw` makes of the maps.

        In as many parts as the device's memory asks for, of which `draw` gets one after the other.
        A picture whose scores or maps are not finite has no rows, and is added to the failures.
        """
        rows: list[list[Row]] = []
        drawn: list[_T] = []
        while len(rows) < len(batch.items):
            part = batch.part(len(rows), len(rows) + self._limit)
            try:
                with telling(f"maps of {self._size} pixels cannot be drawn"):
                    found, rendered = self._explain(part)
                    drawn.append(draw(rendered))
            except torch.OutOfMemoryError as error:
                if self._limit == 1:
                    raise EngineError(
                        f"{self._options.device} has not enough memory for one picture: {error}"
                    ) from error
            else:
                rows += found
                batch.failures += part.failures
                continue
            self._limit = (min(self._limit, len(part.items)) + 1) // 2
            if self._options.device.type == "cuda":
                torch.cuda.empty_cache()  # the error held what it was raised among
        return rows, drawn

    def _explain(self, batch: Batch) -> tuple[list[list[Row]], Rendered]:
        device = self._options.device
        explained = self._maps_of(batch.pictures.to(device, non_blocking=True), batch.items)
        maps = self._joined(explained.maps, self._size)
        tensors = explained._asdict() | statistics(maps)
        del tensors["maps"]
        for numbers in (explained.score, explained.probability, explained.confidence[:, None]):
            tensors["finite"] &= numbers.isfinite().all(1)
        columns = {name: tensor.tolist() for name, tensor in tensors.items()}
        rows: list[list[Row]] = []
        kinds = [{"layer": layer} for layer in self._named_layers()]
        for index, item in enumerate(batch.items):
            figures = {name: column[index] for name, column in columns.items()}
            if figures.pop("finite"):
                rows.append(rows_of(item, self._model.classes, kinds, figures))
            else:
                rows.append([])
                reason = f"scores or maps are not finite; does {self._options.dtype} overflow?"
                batch.failures.append((item.path, reason))
        displays = batch.displays.to(device, non_blocking=True)
        largest = max((each.shape[2:] for each in explained.maps), key=math.prod)
        return rows, Rendered(displays, maps, self._joined(explained.maps, largest))

    def _joined(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Maps of the layers at one size, [N, K, *size] if fused, else [N, K * layers, *size]."""
        resized = [
            each
            if each.shape[2:] == tuple(size)
            else interpolate(each, tuple(size), mode="bilinear")
            for each in maps
        ]
        if len(resized) == 1:
            return resized[0]
        stacked = torch.stack(resized, 2)
        if self._options.fuse is None:
            return stacked.flatten(1, 2)
        return stacked.mean(2) if self._options.fuse == "mean" else stacked.amax(2)

    def _maps_of(self, pictures: Tensor, items: Sequence[Decoded]) -> _Explained:
        images = self._model.recipe.normalize(pictures, self._options.dtype)
        targets: Any = self._options.target
        if targets == "label":
            targets = [item.label for item in items]
        topk = self._options.topk if targets is None else None
        with trying(images), running(self._compiled, self._explainer.model):
            captured = self._explainer.capture(images, targets, topk=topk)
        self._layers, scores = captured.layers, captured.scores
        predicted, probabilities = scores.predicted, scores.probabilities
        if predicted is None or probabilities is None:
            shape = list(captured.output.shape)
            raise EngineError(f"the model gives {shape}; a classifier's [N, classes] is needed")
        confidence = captured.output.float().softmax(-1).gather(-1, predicted[:, None])[:, 0]
        return _Explained(
            tuple(
                cam(activations, gradients, method=self._options.method).float()
                for activations, gradients in zip(
                    captured.activations, captured.gradients, strict=True
                )
            ),
            torch.as_tensor(scores.targets),
            scores.values.float(),
            probabilities.float(),
            predicted,
            confidence,
        )

    def _named_layers(self) -> tuple[str, ...]:
        """Of the maps that there are for each class."""
        if self._options.fuse is None:
            return self._layers
        return (f"{self._options.fuse}({', '.join(self._layers)})",)


def blank(model: LoadedModel, options: Options) -> Tensor:
    """The network's input for one black picture, to try it with."""
    picture = torch.zeros(1, *model.recipe.size, 3, dtype=torch.uint8, device=options.device)
    return model.recipe.normalize(picture, options.dtype)


@contextmanager
def telling(what: str) -> Iterator[None]:
    """What torch raises here, a CPU's lack of memory too, as an EngineError that says what failed.

    A GPU's lack of memory stays what it is, since the batch may be halved.
    """
    try:
        yield
    except (EngineError, CaptureError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        raise EngineError(f"{what}: {error}") from error


def trying(pictures: Tensor) -> AbstractContextManager[None]:
    """Where a network that fails on these pictures is told of."""
    return telling(f"the model fails on pictures {tuple(pictures.shape)}")


def compiled(network: nn.Module, layers: Sequence[str]) -> dict[str, Forward]:
    """Compiles a network part by part, leaving alone what stands around target layers.

    torch.compile of a whole network traces through the hooks on it, once, and cannot switch
    the graph on at a target layer. So the largest modules that have no target layer inside are
    compiled, each by its `forward`: hooks on a module are called around that. A network whose
    target layer lies deep inside many modules gains less.

    Returns: by the names of the modules, what `running` puts in the place of their `forward`.
    """
    targets = [layer.removesuffix(":input") for layer in layers]
    found: dict[str, Forward] = {}

    def visit(name: str, module: nn.Module) -> None:
        inside = f"{name}." if name else ""
        whole = bool(name) and not any(target.startswith(inside) for target in targets)
        if whole and type(module).forward is not nn.Module.forward:
            if any(True for _ in module.parameters()):  # an activation alone is not worth it
                found[name] = torch.compile(module.forward)
            return
        for child, part in module.named_children():
            visit(f"{inside}{child}", part)

    visit("", network)
    return found


@contextmanager
def running(forwards: Mapping[str, Forward], network: nn.Module) -> Iterator[None]:
    """The network runs what `compiled` gave; as it was on the way out, since it is the caller's."""
    if not forwards:
        yield
        return
    parts = [network.get_submodule(name) for name in forwards]
    own = [vars(part).get("forward") for part in parts]
    # parts of one class, or of torch's own, share a cache that else holds eight graphs
    with torch._dynamo.config.patch(
        recompile_limit=8 * len(forwards), accumulated_recompile_limit=64 * len(forwards)
    ):
        try:
            for part, forward in zip(parts, forwards.values(), strict=True):
                part.forward = forward
            yield
        finally:
            for part, before in zip(parts, own, strict=True):
                vars(part).pop("forward", None)
                if before is not None:
                    part.forward = before


def rows_of(
    item: Decoded, classes: Classes, kinds: Sequence[Mapping[str, str]], figures: Mapping[str, Any]
) -> list[Row]:
    """The rows of one picture's maps: class by class, in it kind by kind.

    Args:
        classes: gives the names.
        kinds: what tells the maps of one class apart: "layer", perhaps "method".
        figures: of the picture, "predicted" and "confidence"; of its K classes, lists "target",
            "probability" and "score"; of its maps, lists as `statistics` gives them.
    """
    names = classes.name
    left, top, right, bottom = item.view
    rows = []
    for index, (target, kind) in enumerate(itertools.product(figures["target"], kinds)):
        k = index // len(kinds)
        row: Row = {
            "path": item.path,
            "name": item.name,
            "predicted": figures["predicted"],
            "predicted_name": names(figures["predicted"]),
            "predicted_probability": rounded(figures["confidence"]),
            "label": item.label,
            "label_name": None if item.label is None else names(item.label),
            "right": None if item.label is None else item.label == figures["predicted"],
            "rank": k + 1,
            **kind,
            "target": target,
            "target_name": names(target),
            "probability": rounded(figures["probability"][k]),
            "score": rounded(figures["score"][k]),
            "width": item.width,
            "height": item.height,
            "view": [rounded(side) for side in item.view],
            "peak": None,
            "central_mass": None,
            "entropy": None,
            "pixels_sha256": item.pixels_sha256,
        }
        if figures["mass"][index] > 0:
            x, y = figures["peak_x"][index], figures["peak_y"][index]
            row["peak"] = [
                rounded(left + x * (right - left)),
                rounded(top + y * (bottom - top)),
            ]
            row["central_mass"] = rounded(figures["central_mass"][index])
            row["entropy"] = rounded(figures["entropy"][index])
        rows.append(row)
    return rows


def variant(row: Row) -> tuple[str | None, str | None]:
    """What tells the maps of one class apart: the layer, and the method where several are made."""
    return row.get("layer"), row.get("method")


def by_picture(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of pictures, which have all of them one after the other, apart."""
    pictures: list[list[Row]] = []
    for row in rows:
        first = pictures[-1][0] if pictures else row
        if row["rank"] == first["rank"] and variant(row) == variant(first):
            pictures.append([])
        pictures[-1].append(row)
    return pictures


def statistics(maps: Tensor) -> dict[str, Tensor]:
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


def rounded(value: float) -> float:
    """As many digits as float32 has."""
    return float(f"{value:.7g}")
