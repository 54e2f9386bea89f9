"""From a batch of pictures to what every contender's maps are worth, with the passes shared.

One capture serves all methods of all layers and gives Y. Then the inputs of all contenders (behind
their maps, steps of curves, imputed images) go through the network in the same full batches.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import torch

from gradcampp_ext.batch.engine import EngineError, rounded, rows_of, statistics, trying
from gradcampp_ext.batch.sinks import Rendered
from gradcampp_ext.batch.sources import label_key
from gradcampp_ext.evaluation.boxes import Annotations, seen
from gradcampp_ext.evaluation.contenders import parse
from gradcampp_ext.evaluation.measures import METRICS
from gradcampp_ext.evaluation.scoring import Jobs, score
from gradcampp_ext.explainer import Explainer
from gradcampp_ext.metrics import agreement, confidence, localization, perturbation
from gradcampp_ext.metrics.perturbation import BASELINES, Baseline
from gradcampp_ext.metrics.randomization import cascade, stages
from gradcampp_ext.metrics.road import impute

if TYPE_CHECKING:
    from torch import Tensor

    from gradcampp_ext.batch.decode import Batch, Decoded
    from gradcampp_ext.batch.engine import Row
    from gradcampp_ext.explainer import Captured
    from gradcampp_ext.models import LoadedModel

_BOTTOMS: dict[str, Baseline] = {"input": "zero", "pixels": "black"}  # zero of each space


@dataclass(frozen=True)
class Options:
    """What is evaluated, and how.

    Attributes:
        methods: labels of contenders, see `gradcampp_ext.evaluation.contenders.parse`.
        layers: names; empty for the model's own choice, or else the explainer's.
        target: which class is explained: the predicted one or the label.
        metrics: of `gradcampp_ext.evaluation.measures.METRICS`.
        space: of the product of map and image: the normalised "input", whose zero is the mean
            colour of the training pictures, or the "pixels", whose zero is black.
        steps: of insertion and deletion.
        insertion_from: what pixels are brought into.
        deletion_to: what pixels are replaced by.
        road_shares: of pixels that ROAD removes.
        tolerance: of the pointing game, in pixels of the network's input.
        samples: of max-sensitivity.
        radius: of max-sensitivity, in units of the normalised input.
        stages: of the randomisation, at most; None for one a layer with weights.
        seed: of ROAD's noise, the noise of max-sensitivity and the random weights.
        device: where the network runs.
        dtype: in what the network runs.
        batch_size: inputs in one forward pass.
        workers: processes that decode; None for as many as the device can use.
    """

    methods: Sequence[str] = ("gradcampp", "gradcam", "layercam")
    layers: Sequence[str] = ()
    target: Literal["predicted", "label"] = "predicted"
    metrics: Sequence[str] = ("drop",)
    space: Literal["input", "pixels"] = "input"
    steps: int = 32
    insertion_from: Baseline = "blur"
    deletion_to: Baseline = "zero"
    road_shares: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    tolerance: float = 15.0
    samples: int = 10
    radius: float = 0.02
    stages: int | None = 10
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    batch_size: int = 32
    workers: int | None = None

    def __post_init__(self) -> None:
        for name in ("methods", "layers", "metrics"):
            given = list(getattr(self, name))
            twice = sorted({one for one in given if given.count(one) > 1})
            if twice:
                raise ValueError(f"{name} must be different, got {', '.join(twice)} twice")
        if not self.methods:
            raise ValueError("methods must name at least one")
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown or not self.metrics:
            got = ", ".join(unknown) or "none"
            raise ValueError(f"metrics must be of {', '.join(METRICS)}; got {got}")
        for name, choices in (
            ("target", ("predicted", "label")),
            ("space", tuple(_BOTTOMS)),
            ("insertion_from", BASELINES),
            ("deletion_to", BASELINES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}"
                )
        if not self.road_shares or any(not 0 < share < 1 for share in self.road_shares):
            raise ValueError(
                f"road_shares must be above 0 and below 1, got {list(self.road_shares)}"
            )
        counts = self.steps, self.samples, self.stages, self.batch_size
        if any(count is not None and count < 1 for count in counts) or (self.workers or 0) < 0:
            raise ValueError(
                "steps, samples, stages and batch_size must be at least 1 and workers at least 0; "
                f"got {', '.join(map(str, counts))} and {self.workers}"
            )
        if not (self.tolerance >= 0 and self.radius > 0):
            raise ValueError(
                "tolerance must be 0 or more and radius above 0, in pixels and in units of the "
                f"normalised input; got {self.tolerance} and {self.radius}"
            )

    @property
    def maps(self) -> int:
        """Maps, and rows of results, of each picture: methods times layers."""
        return len(self.methods) * len(self.layers or ("default",))


class Evaluator:
    """Evaluates batches with one model.

    Args:
        model: is moved to the device, dtype and memory layout that it runs in.
        options: what and how.
        boxes: of the pictures, for localisation.

    Attributes:
        layers: names of the layers; empty before the first batch.
        stages: what is randomised, one stage after the other, if anything is.
    """

    def __init__(
        self, model: LoadedModel, options: Options, boxes: Annotations | None = None
    ) -> None:
        if "localization" in options.metrics and boxes is None:
            raise ValueError("localization needs boxes (--boxes FILE)")
        self._model, self._options, self._boxes = model, options, boxes or {}
        self._contenders = [parse(label) for label in options.methods]
        network = model.model.to(options.device, options.dtype)
        self._network = network.to(memory_format=torch.channels_last)
        self._explainer = Explainer(self._network, list(options.layers) or model.target_layer)
        self.layers: tuple[str, ...] = ()
        self.stages: tuple[str, ...] = ()
        if "randomization" in options.metrics:
            layers = len(stages(network))
            count = min(options.stages or layers, layers)
            self.stages = tuple(stage.name for stage in stages(network, count))
        self._size = model.recipe.size
        if "insertion" in options.metrics or "deletion" in options.metrics:
            perturbation.schedule(self._size[0] * self._size[1], options.steps)

    def __call__(self, batch: Batch) -> tuple[list[list[Row]], Rendered | None]:
        """`Options.maps` rows a picture, layer by layer, and what sinks draw from.

        A row is that of an explanation, with the method and what its map is worth. A picture whose
        scores or maps are not finite has no rows, and is added to the failures.
        """
        if not batch.items:
            return [], None
        images = self._images(batch)
        try:
            with trying(images):
                return self._evaluate(images, batch)
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"{images.device} has not enough memory: {error}; choose a smaller batch_size"
            ) from error

    def maps(self, batch: Batch) -> Tensor:
        """Maps of all contenders, [M, N, H, W], layer by layer and in it method by method."""
        captured = self._capture(self._images(batch), batch.items)
        return self._maps(captured, _seeds(batch.items), self._size)

    @property
    def by_label(self) -> bool:
        """Whether the label is explained, so that pictures need one."""
        return self._options.target == "label"

    @property
    def names(self) -> list[tuple[str, str]]:
        """Layer and method of each of the M contenders."""
        return [(layer, one.label) for layer in self.layers for one in self._contenders]

    def _images(self, batch: Batch) -> Tensor:
        pictures = batch.pictures.to(self._options.device, non_blocking=True)
        return self._model.recipe.normalize(pictures, self._options.dtype)

    def _capture(self, images: Tensor, items: Sequence[Decoded]) -> Captured:
        targets = [item.label for item in items] if self.by_label else None
        captured = self._explainer.capture(images, targets)
        if captured.scores.predicted is None:
            shape = list(captured.output.shape)
            raise EngineError(f"the model gives {shape}; a classifier's [N, classes] is needed")
        self.layers = captured.layers
        return captured

    def _maps(self, captured: Captured, seeds: Sequence[int], size: Any) -> Tensor:
        """[M, N, *size]."""
        return torch.stack(list(chain.from_iterable(self._maps_of(captured, seeds, size))))

    def _maps_of(self, captured: Captured, seeds: Sequence[int], size: Any) -> list[list[Tensor]]:
        """[N, *size] a layer and contender."""
        return [
            [one.maps(activations, gradients[:, 0], seeds, size) for one in self._contenders]
            for activations, gradients in zip(captured.activations, captured.gradients, strict=True)
        ]

    def _evaluate(self, images: Tensor, batch: Batch) -> tuple[list[list[Row]], Rendered]:
        items, options, wanted = batch.items, self._options, set(self._options.metrics)
        seeds = _seeds(items)
        captured = self._capture(images, items)
        output = captured.output.float()
        scores = captured.scores
        classes = torch.as_tensor(scores.targets)[:, 0]
        full = output.softmax(1).gather(1, classes[:, None])[:, 0]
        maps = self._maps(captured, seeds, self._size)
        table = _Table(len(maps), len(items))

        table.add("complexity", torch.stack(list(map(agreement.complexity, maps))))
        jobs = _Collection(self._network, options.batch_size)
        bottom = self._baseline(images, _BOTTOMS[options.space])
        behind = None
        if "coherency" in wanted:
            behind, again = self._once_more(images, maps, bottom, classes, seeds)
            table.add("coherency", torch.stack(list(map(agreement.coherency, maps, again))))
        elif "drop" in wanted:
            jobs.add("behind", self._behind(images, maps, bottom, classes))
        for curve in ("insertion", "deletion"):
            if curve in wanted:
                self._collect_curve(jobs, curve, images, maps, classes)
        if "road" in wanted:
            jobs.add("road", self._imputed(images, maps, classes))
        jobs.run()

        if behind is None and "drop" in wanted:
            behind = jobs.probability("behind").reshape(table.shape)
        if behind is not None:
            drop = confidence.drop(full, behind)
            table.add("behind", behind)
            table.add("drop", drop)
            table.add("increase", confidence.increase(full, behind))
            if "coherency" in wanted:
                parts = table.columns["coherency"], table.columns["complexity"], drop
                table.add("adcc", agreement.adcc(*parts))
        self._read_curves(jobs, table, full)
        if "road" in wanted:
            self._read_road(jobs, table)
        if "localization" in wanted:
            self._localize(maps, items, classes.tolist(), table)
        if "sensitivity" in wanted:
            self._shake(images, maps, classes, seeds, table)
        if "randomization" in wanted:
            self._randomize(images, captured, classes, seeds, table)

        sure, predicted = output.softmax(1).max(1)
        shown = maps.transpose(0, 1)
        tensors = {
            "predicted": predicted,
            "confidence": sure,
            "target": classes[:, None],
            "probability": full[:, None],
            "score": scores.values.float(),
            **statistics(shown),
        }
        finite = tensors.pop("finite") & table.finite() & output.isfinite().all(1)
        columns = {name: tensor.tolist() for name, tensor in tensors.items()}
        kinds = [{"layer": layer, "method": method} for layer, method in self.names]
        rows: list[list[Row]] = []
        for n, (item, usable) in enumerate(zip(items, finite.tolist(), strict=True)):
            if not usable:
                reason = f"scores or maps are not finite; does {options.dtype} overflow?"
                batch.failures.append((item.path, reason))
                rows.append([])
                continue
            figures = {name: column[n] for name, column in columns.items()}
            of_picture = rows_of(item, self._model.classes, kinds, figures)
            rows.append([row | table.of(m, n) for m, row in enumerate(of_picture)])
        # the report, which is all that is drawn, takes maps as large as pictures
        return rows, Rendered(batch.displays.to(images.device), shown, shown)

    def _baseline(self, images: Tensor, kind: Baseline) -> Tensor:
        black = self._model.recipe.normalize(
            torch.zeros(1, 1, 1, 3, dtype=torch.uint8, device=images.device), images.dtype
        )
        return perturbation.baseline(images, kind, black.flatten()).expand_as(images)

    def _behind(self, images: Tensor, maps: Tensor, bottom: Tensor, classes: Tensor) -> Jobs:
        """Images behind the maps, contender by contender."""
        count, flat = len(images), maps.flatten(0, 1)

        def make(start: int, stop: int) -> Tensor:
            n = torch.arange(start, stop, device=images.device) % count
            return confidence.masked(images[n], flat[start:stop], bottom[n])

        return Jobs(classes.repeat(len(maps)), make)

    def _once_more(
        self, images: Tensor, maps: Tensor, bottom: Tensor, classes: Tensor, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """O of the images behind the maps, [M, N], and the maps of these, [M, N, H, W]."""
        behind, again = [], []
        for m, own in enumerate(maps):
            captured = self._explainer.capture(
                confidence.masked(images, own, bottom), classes[:, None]
            )
            assert captured.scores.probabilities is not None  # of classes there are
            behind.append(captured.scores.probabilities[:, 0].float())
            layer, contender = divmod(m, len(self._contenders))
            again.append(
                self._contenders[contender].maps(
                    captured.activations[layer], captured.gradients[layer][:, 0], seeds, self._size
                )
            )
        return torch.stack(behind), torch.stack(again)

    def _collect_curve(
        self, jobs: _Collection, curve: str, images: Tensor, maps: Tensor, classes: Tensor
    ) -> None:
        """The points between the ends, and the end that is not the image: it has no map in it."""
        options = self._options
        kind = options.insertion_from if curve == "insertion" else options.deletion_to
        bottom = self._baseline(images, kind)
        before, after = (bottom, images) if curve == "insertion" else (images, bottom)
        places = perturbation.ranks(maps.flatten(0, 1))
        points = torch.tensor(self.points[1:-1], device=images.device)
        count = len(images)

        def make(start: int, stop: int) -> Tensor:
            job = torch.arange(start, stop, device=images.device)
            which = job // len(points)  # contender by contender, in it picture by picture
            n = which % count
            return perturbation.changed(
                before[n], after[n], places[which], points[job % len(points)]
            )

        if len(points):
            each = classes.repeat(len(maps)).repeat_interleave(len(points))
            jobs.add(curve, Jobs(each, make))
        if f"bottom:{kind}" not in jobs:
            jobs.add(f"bottom:{kind}", Jobs(classes, lambda start, stop: bottom[start:stop]))

    @property
    def points(self) -> list[int]:
        """Pixels changed at each point of insertion and deletion."""
        return perturbation.schedule(self._size[0] * self._size[1], self._options.steps)

    def _read_curves(self, jobs: _Collection, table: _Table, full: Tensor) -> None:
        ends = {"insertion": self._options.insertion_from, "deletion": self._options.deletion_to}
        for curve, kind in ends.items():
            if curve not in self._options.metrics:
                continue
            shape = (*table.shape, self._options.steps - 1)
            inner = jobs.probability(curve) if shape[-1] else full.new_empty(0)
            bottom = jobs.probability(f"bottom:{kind}").expand(table.shape)[..., None]
            top = full.expand(table.shape)[..., None]
            ordered = (bottom, top) if curve == "insertion" else (top, bottom)
            whole = torch.cat([ordered[0], inner.reshape(shape), ordered[1]], 2)
            table.add(curve, perturbation.area(whole, self.points))
            table.add(curve, whole, curve=True)

    def _imputed(self, images: Tensor, maps: Tensor, classes: Tensor) -> Jobs:
        """Contender by contender, picture by picture, share by share, both orders."""
        shares = torch.tensor(self._options.road_shares, device=images.device)
        pixels = maps[0, 0].numel()
        counts = torch.tensor([round(s * pixels) for s in self._options.road_shares])
        flat = maps.flatten(0, 1)
        places = perturbation.ranks(flat), perturbation.ranks(-flat)
        each = 2 * len(shares)

        def make(start: int, stop: int) -> Tensor:
            removed, n = [], []
            for job in range(start, stop):
                which, kind = divmod(job, each)
                order, share = divmod(kind, len(shares))
                removed.append(places[order][which] < counts[share])
                n.append(which % len(images))
            return impute(images[n].float(), torch.stack(removed), seed=self._options.seed).to(
                images.dtype
            )

        return Jobs(classes.repeat(len(maps)).repeat_interleave(each), make)

    def _read_road(self, jobs: _Collection, table: _Table) -> None:
        shape = (*table.shape, 2, len(self._options.road_shares))
        morf, lerf = jobs.probability("road").reshape(shape).unbind(2)
        table.add("road", (lerf - morf).mean(2) / 2)
        table.add("road_morf", morf, curve=True)
        table.add("road_lerf", lerf, curve=True)
        for name, still in zip(
            ("road_morf_accuracy", "road_lerf_accuracy"),
            jobs.predicted("road").reshape(shape).unbind(2),
            strict=True,
        ):
            table.add(name, still, curve=True)

    def _localize(
        self, maps: Tensor, items: Sequence[Decoded], classes: Sequence[int], table: _Table
    ) -> None:
        boxes = [
            seen(self._boxes.get(label_key(item.path), ()), target, item.view, self._size)
            for item, target in zip(items, classes, strict=True)
        ]
        masks = torch.stack([localization.box_mask(each, self._size) for each in boxes])
        known = masks.flatten(1).any(1)
        if not known.any():
            return
        masks = masks.to(maps.device)
        for name, values in (
            (
                "pointing",
                [localization.pointing(m, masks, tolerance=self._options.tolerance) for m in maps],
            ),
            ("energy", [localization.energy(m, masks) for m in maps]),
            ("box_overlap", [localization.box_overlap(m, boxes) for m in maps]),
        ):
            table.add(name, torch.stack(values), only=known)
        loc = torch.stack([localization.overlap(m, masks) for m in maps])
        for number, threshold in enumerate(localization.THRESHOLDS):
            table.add(f"loc_{threshold:g}", loc[..., number], only=known)

    def _shake(
        self,
        images: Tensor,
        maps: Tensor,
        classes: Tensor,
        seeds: Sequence[int],
        table: _Table,
    ) -> None:
        generator = torch.Generator().manual_seed(self._options.seed)
        worst = torch.zeros(table.shape, device=maps.device)
        for _ in range(self._options.samples):
            noise = torch.rand(images.shape[1:], generator=generator) * 2 - 1
            captured = self._explainer.capture(
                images + self._options.radius * noise.to(images), classes[:, None]
            )
            noisy = self._maps(captured, seeds, self._size)
            change = torch.stack(
                [agreement.sensitivity(a, b[None]) for a, b in zip(maps, noisy, strict=True)]
            )
            worst = torch.maximum(worst, change)
        table.add("sensitivity", worst)

    def _randomize(
        self,
        images: Tensor,
        captured: Captured,
        classes: Tensor,
        seeds: Sequence[int],
        table: _Table,
    ) -> None:
        options, found = self._options, []
        true = self._maps_of(captured, seeds, None)
        for _, network in cascade(self._network, count=len(self.stages), seed=options.seed):
            blank = Explainer(network, list(self.layers), head="autograd")
            made = self._maps_of(blank.capture(images, classes[:, None]), seeds, None)
            pairs = zip(chain.from_iterable(true), chain.from_iterable(made), strict=True)
            correlations = [agreement.rank_correlation(a, b.nan_to_num()) for a, b in pairs]
            found.append(torch.stack(correlations))
        table.add("randomization", found[-1])
        table.add("randomization", torch.stack(found, 2), curve=True)


class _Collection:
    """Jobs by name, run together."""

    def __init__(self, network: torch.nn.Module, batch_size: int) -> None:
        self._network, self._batch_size = network, batch_size
        self._jobs: dict[str, Jobs] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._jobs

    def add(self, name: str, jobs: Jobs) -> None:
        self._jobs[name] = jobs

    def run(self) -> None:
        found = score(self._network, list(self._jobs.values()), self._batch_size)
        self._found = dict(zip(self._jobs, found, strict=True))

    def probability(self, name: str) -> Tensor:
        return self._found[name].probability

    def predicted(self, name: str) -> Tensor:
        return self._found[name].predicted


class _Table:
    """Numbers and curves of M contenders and N pictures."""

    def __init__(self, contenders: int, pictures: int) -> None:
        self.shape = contenders, pictures
        self.columns: dict[str, Tensor] = {}
        self._curves: dict[str, list[Any]] = {}
        self._lists: dict[str, list[Any]] = {}
        self._only: dict[str, list[bool]] = {}

    def add(
        self, name: str, values: Tensor, *, curve: bool = False, only: Tensor | None = None
    ) -> None:
        """Values [M, N], or curves [M, N, points]; of the pictures in ``only``, if given."""
        if curve:
            self._curves[name] = values.tolist()
            return
        self.columns[name] = values
        self._lists[name] = values.double().tolist()
        if only is not None:
            self._only[name] = only.tolist()

    def finite(self) -> Tensor:
        """Whether all numbers of a picture are, boolean [N]."""
        columns = torch.stack([column.double() for column in self.columns.values()])
        return columns.isfinite().all(0).all(0)

    def of(self, m: int, n: int) -> dict[str, Any]:
        """What one map is worth; a measure that it has not is left out."""
        numbers = {
            name: rounded(column[m][n])
            for name, column in self._lists.items()
            if name not in self._only or self._only[name][n]
        }
        curves = {
            name: [value if isinstance(value, bool) else rounded(value) for value in column[m][n]]
            for name, column in self._curves.items()
        }
        return {**numbers, "curves": curves} if curves else numbers


def _seeds(items: Sequence[Decoded]) -> list[int]:
    return [zlib.crc32(item.name.encode("utf-8", "surrogateescape")) for item in items]
