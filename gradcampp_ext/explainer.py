"""From a model and its input to maps: the door for people who hold a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import chain
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import nn

from gradcampp_ext import checks, head, layers, methods
from gradcampp_ext.capture import Capture, Site, inference
from gradcampp_ext.ops import cam
from gradcampp_ext.smooth import PowerSums
from gradcampp_ext.targets import Output, Scores, Target, Targets, resolve, select
from gradcampp_ext.variations import Smooth, Variations

if TYPE_CHECKING:
    from torch import Tensor

    from gradcampp_ext.layers import Layout

Images: TypeAlias = "Tensor | tuple[Any, ...] | Mapping[str, Any]"
Size: TypeAlias = "Sequence[int] | Literal['feature'] | None"
Args: TypeAlias = "tuple[Any, ...]"
Kwargs: TypeAlias = "Mapping[str, Any]"
TargetLayer: TypeAlias = "str | nn.Module"

CHUNK_BYTES = 128 * 2**20  # of gradients, held at a time when one call explains many targets


@dataclass(frozen=True, repr=False, eq=False)
class Explanation:
    """Maps and what they explain, for a batch of N samples with K targets each.

    Attributes:
        maps: [N, K, *size], float32 (float64 for float64 models), in [0, 1] as normalized by
            default; [N, K, L, *size] for L layers that were not fused.
        targets: class indices [N, K], or the K callables.
        scores: what was explained, [N, K]: logits for classes.
        probabilities: of the explained classes, [N, K]; None for callables.
        predicted: index of the largest output, [N]; None if the output is not [N, classes].
        layer: name of the target layer; a tuple of names for several.
        method: name of the method.
    """

    maps: Tensor
    targets: Tensor | tuple[Target, ...]
    scores: Tensor
    probabilities: Tensor | None
    predicted: Tensor | None
    layer: str | tuple[str, ...]
    method: str

    def overlay(self, images: Any, *, colormap: str = "turbo", alpha: float = 0.5) -> Tensor:
        """The maps laid over images, uint8 [*maps.shape, 3].

        Args:
            images: as seen, not as normalized for the model: uint8 [N, H, W, 3] or [N, 3, H, W],
                or floats in [0, 1]; H and W as the maps have.
            colormap, alpha: as ``gradcampp_ext.overlay`` takes them.
        Raises: TypeError, ValueError as ``gradcampp_ext.overlay``.
        """
        from gradcampp_ext import imaging

        pictures = imaging.tensor(images, self.maps.device)
        if self.maps.dim() < 4 or pictures.dim() != 4:
            raise ValueError(
                "overlays are of 2-D maps and images [N, H, W, 3] or [N, 3, H, W], got maps "
                f"{list(self.maps.shape)} and images {list(pictures.shape)}"
            )
        flat = self.maps.flatten(1, -3)
        repeated = pictures.repeat_interleave(flat.shape[1], 0)
        drawn = imaging.overlay(repeated, flat.flatten(0, 1), colormap=colormap, alpha=alpha)
        return drawn.reshape(*self.maps.shape, 3)

    def __repr__(self) -> str:
        parts = (
            f"{name}={list(value.shape) if isinstance(value, torch.Tensor) else repr(value)}"
            for name, value in vars(self).items()
        )
        return f"Explanation({', '.join(parts)})"


@dataclass(frozen=True, repr=False, eq=False)
class Captured:
    """What maps are made from: for methods side by side, or rules of one's own.

    Attributes:
        activations: [N, C, *S] of each layer.
        gradients: [N, K, C, *S] of each layer; perhaps expanded (stride 0), so not to write to.
        scores: what they are the gradients of.
        layers: their names.
        output: what the model gave, the part that ``output=`` of the explainer selects.
    """

    activations: list[Tensor]
    gradients: list[Tensor]
    scores: Scores
    layers: tuple[str, ...]
    output: Any


@dataclass(frozen=True)
class _Run:
    """A forward pass with what it captured; gradients can be asked for once."""

    capture: Capture
    layouts: list[Layout]
    output: Any
    scores: Scores
    image_size: list[int]

    def pixels(self, size: Size) -> Sequence[int] | None:
        """A size of maps as the op takes it."""
        if isinstance(size, str) and size != "feature":
            raise ValueError(f"size must be integers, 'feature' or None, got {size!r}")
        if size is not None:
            return None if isinstance(size, str) else size
        for site, activations in zip(self.capture.sites, self.activations, strict=True):
            if activations.dim() - 2 != len(self.image_size):
                raise ValueError(
                    f"size=None is that of the images, {self.image_size}, but layer {site.name!r} "
                    f"gives {list(activations.shape)}, which does not lie over them; give a size, "
                    "or 'feature'"
                )
        return self.image_size

    @property
    def activations(self) -> list[Tensor]:
        """[N, C, *S] a layer."""
        pairs = zip(self.layouts, self.capture.activations, strict=True)
        return [layout(activations) for layout, activations in pairs]

    def gradients(self) -> Iterator[list[Tensor]]:
        """[N, k, C, *S] a layer, of so many targets k at a time as CHUNK_BYTES hold."""
        scores = self.scores.values
        bytes_a_target = max(1, sum(a.nbytes for a in self.capture.activations))
        chunks = scores.split(max(1, CHUNK_BYTES // bytes_a_target), dim=1)
        for chunk in chunks:
            gradients = self.capture.gradients(chunk, keep_graph=chunk is not chunks[-1])
            for site, layout, gradient in zip(
                self.capture.sites, self.layouts, gradients, strict=True
            ):
                layers.check_patches(site, layout, gradient)
            yield [layout(g) for layout, g in zip(self.layouts, gradients, strict=True)]

    def closed_form(self) -> list[Tensor] | None:
        """[N, K, C, *S] a layer, expanded, where the head needs no backward pass; else None."""
        classes = self.scores.targets
        if not isinstance(classes, torch.Tensor):
            return None
        found = []
        for layout, edge, activations in zip(
            self.layouts, self.capture.edges, self.capture.activations, strict=True
        ):
            gradients = head.gradients(self.output, edge, activations.shape, classes)
            if gradients is None:
                return None
            found.append(layout(gradients))
        return found

    def agrees(self, closed: list[Tensor]) -> bool:
        """Whether autograd finds the same for the first target; its graph is kept."""
        found = self.capture.gradients(self.scores.values[:, :1], keep_graph=True)
        return all(
            torch.allclose(layout(gradients), each[:, :1], rtol=1e-2, atol=0)
            for layout, gradients, each in zip(self.layouts, found, closed, strict=True)
        )


class Explainer:
    """Explains a model's outputs by maps over its input.

    Between calls nothing of it is on the model. A call runs the model in evaluation mode, builds
    a graph from the target layer on, and leaves training flags, ``requires_grad``, ``.grad``,
    grad mode and hooks as it found them, also after an exception. Several threads may explain one
    model at once if it is in evaluation mode already.

    Args:
        model: any nn.Module. Of nn.DataParallel and torch.compile(model) the module inside is
            run, on one device and not compiled.
        target_layer: a module, its name, or "NAME:input" for what goes into it; or a list of
            these. None takes the input of the global pooling, or else the last layer with maps.
        method: a name of ``gradcampp_ext.methods.METHODS``.
        output: which part of what the model returns is explained: a key, attribute, index or
            callable. None takes the tensor, or what is called ``logits``.
        tokens: (prefix, height, width) of a layer that gives tokens [N, T, C], or (0, height,
            width) for [N, height, width, C]. None finds it from the model.
        fuse: of several layers, the "mean" or "max" of their maps; None keeps them apart.
        average: variations of the images whose maps are averaged, ``Smooth(...)`` (noise) or
            ``Augment(...)`` (flips, intensities). Scores and classes are those of the images.
            ``Smooth(powers=True)`` averages powers of gradients instead: Smooth Grad-CAM++.
        head: "auto" reads the gradients of classes from the weights where the head is a mean over
            space and one linear layer: no backward pass runs. The head is recognised in autograd's
            graph, and the first such gradients are compared with autograd's (a hook may change
            those). "autograd" always runs the backward pass.
        activation: what makes outputs probabilities; "sigmoid" for multi-label models.
        normalize, interpolation, relu, rectify, eps, temperature: as ``gradcampp_ext.cam``.
    Raises: ValueError for arguments that do not fit the model or each other; CaptureError if the
        layer gives no activations or gradients; both name the likely cause.
    """

    def __init__(
        self,
        model: nn.Module,
        target_layer: TargetLayer | Sequence[TargetLayer] | None = None,
        method: str = "gradcampp",
        *,
        output: Output = None,
        tokens: Sequence[int] | None = None,
        fuse: Literal["mean", "max"] | None = None,
        average: Variations | None = None,
        head: Literal["auto", "autograd"] = "auto",
        activation: Literal["softmax", "sigmoid"] = "softmax",
        normalize: Literal["minmax", "max"] | None = "minmax",
        interpolation: Literal["linear", "nearest"] = "linear",
        relu: bool = True,
        rectify: bool | None = None,
        eps: float | None = None,
        temperature: float = 1.0,
    ) -> None:
        if fuse not in (None, "mean", "max"):
            raise ValueError(f"fuse must be 'mean', 'max' or None, got {fuse!r}")
        if head not in ("auto", "autograd"):
            raise ValueError(f"head must be 'auto' or 'autograd', got {head!r}")
        if activation not in ("softmax", "sigmoid"):
            raise ValueError(f"activation must be 'softmax' or 'sigmoid', got {activation!r}")
        if not isinstance(average, Variations | None):
            raise TypeError(f"average must be Smooth(...), Augment(...) or None, got {average!r}")
        if isinstance(average, Smooth) and average.powers and method != "gradcampp":
            raise ValueError(
                "average=Smooth(powers=True) is Smooth Grad-CAM++ and needs method 'gradcampp', "
                f"got {method!r}; powers=False averages the maps of any method"
            )
        self.model = explainable(model)
        self.method = methods.get(method).name
        self._several = not isinstance(target_layer, (str, nn.Module, NoneType))
        self._sites = self._find(target_layer)
        self.output = output
        self._tokens = None if tokens is None else checks.integers("tokens", tokens)
        self._fuse = fuse
        self._average = average
        self._activation = activation
        self._head = head
        self._by_weights: dict[tuple[Site, ...], bool] = {}  # that were compared
        self._options: dict[str, Any] = {
            "normalize": normalize,
            "interpolation": interpolation,
            "relu": relu,
            "rectify": rectify,
            "eps": eps,
        }
        self._temperature = temperature
        self._cam(torch.ones(1, 1, 1), torch.ones(1, 1, 1), None)  # the op checks its options
        self._layouts: dict[tuple[Any, ...], Layout] = {}
        self._image_sizes: dict[tuple[int, ...], list[int]] = {}
        self._default_sites: dict[tuple[int, ...], tuple[Site, ...]] = {}

    def __call__(
        self,
        images: Images,
        targets: Targets = None,
        *,
        topk: int | None = None,
        size: Size = None,
    ) -> Explanation:
        """Maps of a batch, by one forward pass and a backward pass through the head a target.

        Args:
            images: what the model takes: a tensor [N, C, *S], or a tuple of its positional or a
                mapping of its keyword arguments, of which the first floating-point tensor of three
                or more dimensions is what maps lie over (in a mapping, put it first). Samples must
                not influence each other.
            targets: None for the predicted class, a class for all samples, "all" classes,
                classes [N] or [N, K], a callable from the model's output to scores [N] (see
                ``gradcampp_ext.targets``), or K callables.
            topk: explain the K classes of the largest outputs.
            size: of the maps; None is that of the images, "feature" that of the layer.
        Raises: ValueError, TypeError for arguments that do not fit; CaptureError.
        """
        with inference(self.model):
            args, kwargs = arguments(images)
            sites = self._located(args, kwargs)
            powers = isinstance(self._average, Smooth) and self._average.powers
            if self._average is None or powers:
                run = self._run(sites, args, kwargs, targets, topk)
                scores = run.scores
                maps = self._smoothed(run, args, kwargs, size) if powers else self._maps(run, size)
            else:
                output = select(self.model(*args, **kwargs), self.output)
                scores = self._scores(output, targets, topk, len(layers.image_of(args, kwargs)))
                maps = self._averaged(self._average, sites, args, kwargs, scores, size)
        names = tuple(site.name for site in sites)
        return Explanation(
            maps=maps,
            targets=scores.targets,
            scores=scores.values.detach(),
            probabilities=scores.probabilities,
            predicted=scores.predicted,
            layer=names if self._several else names[0],
            method=self.method,
        )

    def all_classes(self, images: Images, *, size: Size = "feature") -> Explanation:
        """Maps of every class, [N, classes, *size].

        Cheap where the head is a mean over space and one linear layer: no backward pass runs, and
        the maps are one matrix product. ``size`` is that of the layer unless said otherwise:
        a thousand maps at the size of images are large.
        """
        return self(images, "all", size=size)

    def capture(
        self, images: Images, targets: Targets = None, *, topk: int | None = None
    ) -> Captured:
        """Activations and gradients instead of maps; arguments as for a call.

        Nothing is averaged over variations, and the gradients of all targets are held at once.
        """
        with inference(self.model):
            args, kwargs = arguments(images)
            run = self._run(self._located(args, kwargs), args, kwargs, targets, topk)
            gradients = self._all_gradients(run)
        scores = replace(run.scores, values=run.scores.values.detach())
        names = tuple(site.name for site in run.capture.sites)
        output = run.output
        if isinstance(output, torch.Tensor):
            output = output.detach()
        return Captured(run.activations, gradients, scores, names, output)

    def _find(
        self, target_layer: TargetLayer | Sequence[TargetLayer] | None
    ) -> tuple[Site, ...] | None:
        if target_layer is None:
            return None
        if isinstance(target_layer, (str, nn.Module)):
            return (layers.find(self.model, target_layer),)
        if not target_layer:
            raise ValueError("target_layer must name at least one layer, got an empty list")
        return tuple(layers.find(self.model, layer) for layer in target_layer)

    def _located(self, args: Args, kwargs: Kwargs) -> tuple[Site, ...]:
        if self._sites is not None:
            return self._sites
        shape = layers.image_of(args, kwargs).shape[1:]
        if shape not in self._default_sites:
            site = layers.default(self.model, args, kwargs, self._top_score, self._tokens)
            self._default_sites[shape] = (site,)
        return self._default_sites[shape]

    def _top_score(self, returned: Any) -> Tensor:
        output = select(returned, self.output)
        return resolve(output, None, batch=len(output)).values

    def _scores(self, output: Any, targets: Targets, topk: int | None, batch: int) -> Scores:
        return resolve(output, targets, batch=batch, topk=topk, activation=self._activation)

    def _run(
        self,
        sites: tuple[Site, ...],
        args: Args,
        kwargs: Kwargs,
        targets: Targets,
        topk: int | None = None,
    ) -> _Run:
        """The forward pass with hooks, and what is to be explained."""
        image = layers.image_of(args, kwargs)
        with Capture(sites) as capture:
            output = select(self.model(*args, **kwargs), self.output)
            scores = self._scores(output, targets, topk, len(image))
        layouts = []
        for site, activations in zip(sites, capture.activations, strict=True):
            key = (site, activations.shape[1:], image.shape[1:])
            if key not in self._layouts:
                self._layouts[key] = layers.layout(
                    self.model, site, activations.shape, args, kwargs, tokens=self._tokens
                )
            layouts.append(self._layouts[key])
        if image.shape[1:] not in self._image_sizes:
            self._image_sizes[image.shape[1:]] = layers.image_size(self.model, args, kwargs)
        return _Run(capture, layouts, output, scores, self._image_sizes[image.shape[1:]])

    def _gradients(self, run: _Run) -> Iterator[list[Tensor]]:
        sites = tuple(run.capture.sites)
        by_weights = self._by_weights.get(sites) if self._head == "auto" else False
        closed = None if by_weights is False else run.closed_form()
        if closed is not None and by_weights is None and len(run.scores.values):
            by_weights = self._by_weights[sites] = run.agrees(closed)
        if closed is not None and by_weights:
            yield closed
        else:
            yield from run.gradients()

    def _all_gradients(self, run: _Run) -> list[Tensor]:
        """[N, K, C, *S] a layer, of all targets."""
        layers_ = zip(*self._gradients(run), strict=True)
        return [torch.cat(parts, 1) if len(parts) > 1 else parts[0] for parts in layers_]

    def _cam(self, a: Tensor, g: Tensor, size: Sequence[int] | None) -> Tensor:
        options = self._options
        return cam(a, g, method=self.method, size=size, temperature=self._temperature, **options)

    def _maps(self, run: _Run, size: Size) -> Tensor:
        """Maps [N, K, *size], or [N, K, L, *size] of layers kept apart."""
        pixels = run.pixels(size)
        chunks = []
        for gradients in self._gradients(run):
            pairs = zip(run.activations, gradients, strict=True)
            chunks.append(self._fused([self._cam(a, g, pixels) for a, g in pairs]))
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks, 1)

    def _smoothed(self, run: _Run, args: Args, kwargs: Kwargs, size: Size) -> Tensor:
        """Smooth Grad-CAM++ of what ``run`` explains."""
        noise = self._average
        assert noise is not None
        sums = [PowerSums(activations) for activations in run.activations]
        for batch in noise.batches(args, kwargs, layers.image_of(args, kwargs)):
            noisy = self._run(
                run.capture.sites, batch.args, batch.kwargs, batch.targets(run.scores.targets)
            )
            for each, gradients in zip(sums, self._all_gradients(noisy), strict=True):
                each.add(gradients)
        pixels = run.pixels(size)
        return self._fused([each.cam(size=pixels, **self._options) for each in sums])

    def _averaged(
        self,
        variations: Variations,
        sites: tuple[Site, ...],
        args: Args,
        kwargs: Kwargs,
        scores: Scores,
        size: Size,
    ) -> Tensor:
        """The mean of the variations' maps, of what ``scores`` explains of the images."""
        sums = (
            batch.sum(
                self._maps(
                    self._run(sites, batch.args, batch.kwargs, batch.targets(scores.targets)), size
                )
            )
            for batch in variations.batches(args, kwargs, layers.image_of(args, kwargs))
        )
        return reduce(torch.add, sums) / len(variations)

    def _fused(self, maps: list[Tensor]) -> Tensor:
        if not self._several:
            return maps[0]
        sizes = {tuple(each.shape[2:]) for each in maps}
        if len(sizes) > 1:
            raise ValueError(
                f"the layers' maps must have one size to stand together, got {sorted(sizes)}; "
                "give size= in numbers, or None for that of the images"
            )
        stacked = torch.stack(maps, 2)
        if self._fuse is None:
            return stacked
        return stacked.mean(2) if self._fuse == "mean" else stacked.amax(2)


def explainable(model: nn.Module) -> nn.Module:
    """The module to hook; errors for what has no hooks or no gradients."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    model = layers.unwrap(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            "model is scripted or traced and calls no hooks; explain the nn.Module it was made from"
        )
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None:
            raise ValueError(
                f"{(name or type(module).__name__)!r} of the model was compiled in place "
                "(module.compile()), which may drop hooks; explain the model before that, or use "
                "torch.compile(model), which leaves the model inside as it is"
            )
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_inference():
            raise ValueError(
                f"{name!r} of the model was made under torch.inference_mode() and cannot take "
                "part in gradients; build or load the model outside of it"
            )
    return model


def arguments(images: Images) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the model, without inference tensors."""
    if isinstance(images, torch.Tensor):
        return (_usable(images),), {}
    if isinstance(images, Mapping):
        return (), {name: _usable(value) for name, value in images.items()}
    if isinstance(images, (tuple, list)):
        return tuple(map(_usable, images)), {}
    raise TypeError(
        "images must be a tensor, or a tuple or mapping of the model's arguments, got "
        f"{type(images).__name__}"
    )


def _usable(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) and value.is_inference() else value
