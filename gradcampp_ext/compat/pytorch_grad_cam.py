"""The gradient methods of pytorch-grad-cam 1.5.7, under their names and with their calls.

    from gradcampp_ext.compat.pytorch_grad_cam import GradCAMPlusPlus

gives the same maps by one forward pass and the backward pass of what stands above the layer.
``exact=True`` gives this package's own maps instead, ``device_output=True`` a tensor on the
model's device. docs/migration-pytorch-grad-cam.md lists every difference.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradcampp_ext import head, ops
from gradcampp_ext.capture import Capture, CaptureError, Site, derivatives, inference
from gradcampp_ext.explainer import explainable

if TYPE_CHECKING:
    from types import TracebackType
    from typing import TypeAlias

    Array: TypeAlias = np.ndarray[Any, Any]
    Maps: TypeAlias = Array | Tensor

__all__ = [
    "ActivationsAndGradients",
    "BaseCAM",
    "GradCAM",
    "GradCAMElementWise",
    "GradCAMPlusPlus",
    "HiResCAM",
    "LayerCAM",
    "XGradCAM",
]


def __getattr__(name: str) -> Any:
    """What is no gradient method, such as ScoreCAM, is pytorch-grad-cam's own, if installed."""
    if not name.startswith("_"):
        try:
            peer = import_module("pytorch_grad_cam")
        except ImportError as error:
            raise ImportError(
                f"{name} is none of {', '.join(__all__)}, and pytorch-grad-cam, which may have it, "
                f"cannot be imported: {error}"
            ) from error
        if hasattr(peer, name):
            return getattr(peer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class BaseCAM:
    """What the methods share; subclass it, or one of them, to make another.

    Of the peer's methods those that subclasses override are called as the peer calls them, with
    NumPy arrays on the CPU: ``get_cam_weights``, ``get_cam_image``, ``compute_cam_per_layer``,
    ``aggregate_multi_layers``, ``get_target_width_height``, ``forward``. Where none of them is
    overridden the native op takes the tensors as they are.

    Args:
        model: any nn.Module; nothing of the object stays on it between calls.
        target_layers: modules of the model; their maps are averaged.
        reshape_transform: makes [N, C, *S] of a layer's activations and gradients.
        compute_input_gradient: whether subclasses find ``input_tensor.grad``.
        uses_gradients: whether the method needs gradients.
        tta_transforms: for ``aug_smooth``: objects with ``augment_image`` and ``deaugment_mask``,
            as of ttach. None: flips times intensities of 0.9, 1 and 1.1.
        detach: False leaves activations and gradients in their graph, for second derivatives.
        exact: this package's maps: the paper's formula without an epsilon, rectified where it
            needs that, normalized once, at the layer's resolution.
        device_output: whether maps are a float32 tensor on the device of the model, not an array.
    Raises: TypeError, ValueError for a model or layers that cannot be explained.
    """

    _method: ClassVar[str | None] = None  # of gradcampp_ext.methods
    _epsilon: ClassVar[float | None] = None  # the peer's

    def __init__(
        self,
        model: nn.Module,
        target_layers: Iterable[nn.Module],
        reshape_transform: Callable[[Any], Tensor] | None = None,
        compute_input_gradient: bool = False,
        uses_gradients: bool = True,
        tta_transforms: Iterable[Any] | None = None,
        detach: bool = True,
        *,
        exact: bool = False,
        device_output: bool = False,
    ) -> None:
        self.model = model
        self.target_layers = target_layers
        self.reshape_transform = reshape_transform
        self.compute_input_gradient = compute_input_gradient
        self.uses_gradients = uses_gradients
        self.tta_transforms = _AUGMENTATIONS if tta_transforms is None else tta_transforms
        self.detach = detach
        self.exact = exact
        self.device_output = device_output
        self.outputs: Any = None
        self.activations_and_grads = ActivationsAndGradients(
            model,
            target_layers,
            reshape_transform,
            detach,
            uses_gradients=uses_gradients,
            exact=exact,
        )
        weights = chain(model.parameters(), model.buffers())
        self.device = next((weight.device for weight in weights), torch.device("cpu"))

    def __call__(
        self,
        input_tensor: Tensor,
        targets: Sequence[Callable[[Any], Tensor]] | None = None,
        aug_smooth: bool = False,
        eigen_smooth: bool = False,
    ) -> Maps:
        """Maps of a batch.

        Args:
            input_tensor: [N, C, *S].
            targets: a callable for each of the N images, from its part of the model's output to
                one number; None explains the predicted classes.
            aug_smooth: the mean over ``tta_transforms``.
            eigen_smooth: the first principal component of the weighted activations, not their sum.
        Returns: float32 [N, *S] in [0, 1].
        Raises: ValueError, TypeError for arguments that do not fit; CaptureError if a layer did
            not run once, or the score does not depend on it.
        """
        if aug_smooth is True:
            return self.forward_augmentation_smoothing(input_tensor, targets, eigen_smooth)
        return self.forward(input_tensor, targets, eigen_smooth)

    def forward(
        self,
        input_tensor: Tensor,
        targets: Sequence[Callable[[Any], Tensor]] | None,
        eigen_smooth: bool = False,
    ) -> Maps:
        """Maps of a batch, without ``aug_smooth``."""
        record = self.activations_and_grads
        with inference(self.model):
            input_tensor = input_tensor.to(self.device)
            if input_tensor.is_inference():
                input_tensor = input_tensor.clone()
            if self.compute_input_gradient:
                input_tensor = input_tensor.detach().requires_grad_()
            outputs = record(input_tensor)
            chosen = _predicted(outputs) if targets is None else list(targets)
            if self.uses_gradients:
                record.differentiate(outputs, chosen, input_tensor)
            self.outputs = outputs.detach() if isinstance(outputs, Tensor) else outputs
            with torch.enable_grad() if not self._native(eigen_smooth) else nullcontext():
                cams = self.compute_cam_per_layer(input_tensor, chosen, eigen_smooth)
            return self.aggregate_multi_layers(cams)

    def forward_augmentation_smoothing(
        self,
        input_tensor: Tensor,
        targets: Sequence[Callable[[Any], Tensor]] | None,
        eigen_smooth: bool = False,
    ) -> Maps:
        """The mean of the maps of ``tta_transforms``, each as it lies over the images."""
        parts = []
        for transform in self.tta_transforms:
            maps = self.forward(transform.augment_image(input_tensor), targets, eigen_smooth)
            parts.append(transform.deaugment_mask(torch.as_tensor(maps)[:, None])[:, 0])
        return self._returned(torch.stack(parts).mean(0))

    def get_cam_weights(
        self,
        input_tensor: Tensor,
        target_layer: nn.Module,
        targets: Sequence[Any],
        activations: Maps,
        grads: Maps,
    ) -> Array:
        """Channel weights [N, C]; for subclasses to define or to build on."""
        raise NotImplementedError(
            f"{type(self).__name__} must define get_cam_weights or get_cam_image"
        )

    def get_cam_image(
        self,
        input_tensor: Tensor,
        target_layer: nn.Module,
        targets: Sequence[Any],
        activations: Maps,
        grads: Maps,
        eigen_smooth: bool = False,
    ) -> Array:
        """Maps [N, *S] at the layer's resolution, with negative values."""
        weights = self.get_cam_weights(input_tensor, target_layer, targets, activations, grads)
        activations = _array(activations)
        weights = np.broadcast_to(_array(weights), activations.shape[:2])
        if eigen_smooth:
            spread = (...,) + (None,) * (activations.ndim - 2)
            return _principal(weights[spread] * activations, oriented=self.exact)
        flat = activations.reshape(*activations.shape[:2], -1)
        summed: Array = (weights[:, None] @ flat).reshape(len(flat), *activations.shape[2:])
        return summed

    def get_target_width_height(self, input_tensor: Tensor) -> tuple[int, ...]:
        """The maps' size, the last dimension first."""
        if not 3 <= input_tensor.dim() <= 5:
            raise ValueError(
                "input_tensor must be [N, C, *S] with one to three spatial sizes, got "
                f"{list(input_tensor.shape)}"
            )
        return tuple(input_tensor.shape[:1:-1])

    def compute_cam_per_layer(
        self, input_tensor: Tensor, targets: Sequence[Any], eigen_smooth: bool
    ) -> list[Maps]:
        """Maps [N, 1, *size] of each layer."""
        size = self.get_target_width_height(input_tensor)[::-1]
        record = self.activations_and_grads
        pairs = record.pairs()
        if self._native(eigen_smooth):
            for (activations, _), site in zip(pairs, record.sites, strict=True):
                _check_map(activations, site, input_tensor)
            if self.exact:
                cams = [ops.cam(*pair, size=size, **self._rule()) for pair in pairs]
            else:
                raw = (ops.cam(*pair, normalize=None, **self._rule()) for pair in pairs)
                cams = [_resized(_scaled(maps), size) for maps in raw]
        else:
            cams = []
            for layer, pair in zip(self.target_layers, pairs, strict=True):
                a, g = map(_array, pair) if self.detach else pair
                found = self.get_cam_image(input_tensor, layer, targets, a, g, eigen_smooth)
                maps = torch.as_tensor(found, device=self.device).detach().relu()
                cams.append(_resized(_scaled(maps), size))
        return [self._returned(maps[:, None]) for maps in cams]

    def aggregate_multi_layers(self, cam_per_target_layer: Sequence[Maps]) -> Maps:
        """The layers' mean, [N, *size], stretched to [0, 1] once more unless ``exact``."""
        maps = torch.cat([torch.as_tensor(cam) for cam in cam_per_target_layer], 1)
        maps = maps.mean(1) if self.exact else _scaled(maps.relu_().mean(1))
        return self._returned(maps)

    def __enter__(self) -> BaseCAM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.activations_and_grads.release()

    def _rule(self) -> dict[str, Any]:
        if self.exact:
            return {"method": self._method}
        return {"method": self._method, "eps": self._epsilon, "rectify": False}

    def _native(self, eigen_smooth: bool) -> bool:
        """Whether the op can take the tensors: the method is its own, nothing is overridden."""
        rules = (self.get_cam_weights, self.get_cam_image)
        own = all(getattr(rule, "__module__", None) == __name__ for rule in rules)
        return self._method is not None and own and self.detach and not eigen_smooth

    def _returned(self, maps: Tensor) -> Maps:
        maps = maps.float()
        return maps if self.device_output else maps.cpu().numpy()


class _GradientCAM(BaseCAM):
    """A method of the op; only the layers, and how their tensors are read, are the caller's."""

    def __init__(
        self,
        model: nn.Module,
        target_layers: Iterable[nn.Module],
        reshape_transform: Callable[[Any], Tensor] | None = None,
        *,
        exact: bool = False,
        device_output: bool = False,
    ) -> None:
        super().__init__(
            model, target_layers, reshape_transform, exact=exact, device_output=device_output
        )


def _weighing(parts: Callable[[Array, Array], Any]) -> Callable[..., Array]:
    """A method's ``get_cam_weights``; as the peer's, it can be called without an object, on None.

    ``parts`` gives [N, C, *S], to be summed over space, in the peer's order of operations: the
    signs of principal components hang on the last bits of weights near zero.
    """

    def get_cam_weights(
        self: BaseCAM | None,
        input_tensor: Tensor,
        target_layer: nn.Module,
        targets: Sequence[Any],
        activations: Maps,
        grads: Maps,
    ) -> Array:
        """Channel weights [N, C] of arrays or tensors [N, C, *S]."""
        if self is not None and self.exact:
            pair = (torch.as_tensor(activations), torch.as_tensor(grads))
            exact: Array = ops.channel_weights(*pair, **self._rule()).cpu().numpy()
            return exact
        found = parts(_array(activations), _array(grads))
        weights: Array = found.sum(axis=_space(found))
        return weights

    return get_cam_weights


def _mean(activations: Array, grads: Array) -> Any:
    return grads.mean(axis=_space(grads), keepdims=True)


def _second_order(activations: Array, grads: Array) -> Any:
    square = grads**2
    total = activations.sum(axis=_space(activations), keepdims=True)
    alpha = square / (2 * square + total * (square * grads) + GradCAMPlusPlus._epsilon)
    return np.maximum(grads, 0) * alpha


def _shares(activations: Array, grads: Array) -> Any:
    total = activations.sum(axis=_space(activations), keepdims=True)
    return grads * activations / (total + XGradCAM._epsilon)


def _space(values: Array) -> tuple[int, ...]:
    return tuple(range(2, values.ndim))


class GradCAM(_GradientCAM):
    """Grad-CAM, arXiv:1610.02391: channels weighted by the mean of their gradients."""

    _method = "gradcam"
    get_cam_weights = _weighing(_mean)


class GradCAMPlusPlus(_GradientCAM):
    """Grad-CAM++, arXiv:1710.11063, eq. 19 with 1e-6 added to alpha's denominator."""

    _method = "gradcampp"
    _epsilon = 1e-6
    get_cam_weights = _weighing(_second_order)


class XGradCAM(_GradientCAM):
    """XGrad-CAM, arXiv:2008.02312, with 1e-7 added to the sum of the activations."""

    _method = "xgradcam"
    _epsilon = 1e-7
    get_cam_weights = _weighing(_shares)


class _ElementWise(_GradientCAM):
    """Weighs elements, not channels."""

    def _elements(self, activations: Array, grads: Array) -> Any:
        raise NotImplementedError

    def get_cam_image(
        self,
        input_tensor: Tensor,
        target_layer: nn.Module,
        targets: Sequence[Any],
        activations: Maps,
        grads: Maps,
        eigen_smooth: bool = False,
    ) -> Array:
        elements = self._elements(_array(activations), _array(grads))
        if eigen_smooth:
            return _principal(elements, oriented=self.exact)
        summed: Array = elements.sum(axis=1)
        return summed


class LayerCAM(_ElementWise):
    """LayerCAM, IEEE TIP 2021: activations times their positive gradients."""

    _method = "layercam"

    def _elements(self, activations: Array, grads: Array) -> Any:
        return np.maximum(grads, 0) * activations


class HiResCAM(_ElementWise):
    """HiResCAM, arXiv:2011.08891: activations times their gradients."""

    _method = "hirescam"

    def _elements(self, activations: Array, grads: Array) -> Any:
        return grads * activations

    def get_cam_image(self, *arguments: Any, **options: Any) -> Array:
        if options.get("eigen_smooth", arguments[5:6] == (True,)):
            warnings.warn(
                "HiResCAM is not faithful to the model any more if smoothed", stacklevel=2
            )
        return super().get_cam_image(*arguments, **options)


class GradCAMElementWise(_ElementWise):
    """Grad-CAM with the ReLU on every product of gradient and activation, before their sum."""

    _method = "gradcam_elementwise"

    def _elements(self, activations: Array, grads: Array) -> Any:
        return np.maximum(grads * activations, 0)


class ActivationsAndGradients:
    """Runs the model and keeps what the layers gave, until the next run.

    Hooks are on the model during a run only, so ``handles`` is always empty. Whoever calls the
    object finds the layers' ``gradients`` after a backward pass of their own, as in the peer.
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Iterable[nn.Module],
        reshape_transform: Callable[[Any], Tensor] | None,
        detach: bool = True,
        *,
        uses_gradients: bool = True,
        exact: bool = False,
    ) -> None:
        self.model = model
        self.reshape_transform = reshape_transform
        self.detach = detach
        self.handles: list[Any] = []
        self._network = explainable(model)
        self.sites = _sites(self._network, target_layers)
        self._uses_gradients = uses_gradients
        self._exact = exact
        self._by_weights: bool | None = None  # whether the head's weights are gradients: not known
        self._capture: Capture | None = None
        self._activations: list[Any] = []
        self._gradients: list[Any] = []

    def __call__(self, x: Tensor) -> Any:
        """The model's output; its graph starts at the earliest layer, or at x if that asks for it.

        The model runs in evaluation mode, which ends with the call.
        """
        self.clear()
        with inference(self._network):
            if not (self.detach and self._uses_gradients):
                return self._watched(x)
            # The peer keeps activations without a copy on the CPU, so that its maps show what an
            # in-place ReLU made of them later; on other devices it copies them at once.
            copy = self._exact or x.device.type != "cpu"
            graph = torch.set_grad_enabled(x.requires_grad)
            with graph, Capture(self.sites, copy=copy) as capture:
                outputs = self._network(x)
        self._capture = capture
        self._activations = [self._reshaped(each) for each in capture.activations]
        self._gradients = [None] * len(self.sites)
        for index, edge in enumerate(capture.edges):
            edge.node.register_prehook(_Arrival(self, index))
        return outputs

    @property
    def activations(self) -> list[Tensor]:
        """[N, C, *S] a layer, in the order in which the layers were given; on the CPU."""
        return [each.cpu() if self.detach else each for each in self._activations]

    @property
    def gradients(self) -> list[Tensor]:
        """The same, once a backward pass has come by."""
        found = [each for each in self._gradients if each is not None]
        return [each.cpu() if self.detach else each for each in found]

    def clear(self) -> None:
        """Forgets the last run."""
        self._capture = None
        self._activations = []
        self._gradients = []

    def release(self) -> None:
        """The same; there are no hooks to remove."""
        self.clear()

    def pairs(self) -> list[tuple[Any, Any]]:
        """Activations and gradients of each layer, on their device; None where there are none."""
        return list(zip(self._activations, self._gradients, strict=True))

    def differentiate(
        self, outputs: Any, targets: Sequence[Callable[[Any], Tensor]], x: Tensor
    ) -> None:
        """Gradients of the targets' scores, also ``x.grad`` if x requires one; the graph is gone.

        Raises: ValueError, TypeError for targets that do not fit; CaptureError.
        """
        capture = self._capture
        if capture is None:
            scores = _scores(outputs, targets, len(x))
            graph = torch.autograd.grad(
                scores, self._activations, torch.ones_like(scores), create_graph=True
            )
            self._gradients = list(graph)
            return
        closed = None
        if self._by_weights is not False and not x.requires_grad:
            closed = self._closed_form(capture, outputs, targets, len(x))
        if closed is None or self._by_weights is None:
            scores = _scores(outputs, targets, len(x))
            keep = x.requires_grad
            autograd = [each[:, 0] for each in capture.gradients(scores, keep_graph=keep)]
            if keep:
                (gradient,) = derivatives(scores, [x])
                x.grad = None if gradient is None else gradient[:, 0]
            if closed is not None:
                pairs = zip(closed, autograd, strict=True)
                self._by_weights = all(torch.allclose(a, b, rtol=1e-2, atol=0) for a, b in pairs)
        found = closed if closed is not None and self._by_weights else autograd
        self._gradients = [self._reshaped(gradient) for gradient in found]

    def _closed_form(
        self,
        capture: Capture,
        outputs: Any,
        targets: Sequence[Callable[[Any], Tensor]],
        batch: int,
    ) -> list[Tensor] | None:
        """Gradients without a backward pass, where a mean and a linear layer are all there is."""
        if not isinstance(outputs, Tensor):
            return None
        leaf = outputs.detach().requires_grad_()
        by_output = None
        found = []
        for edge, activations in zip(capture.edges, capture.activations, strict=True):
            shape = activations.shape
            linear = head.linear_of_mean(outputs, edge, shape)
            if linear is None:
                return None
            if by_output is None:
                (by_output,) = derivatives(_scores(leaf, targets, batch), [leaf])
            if by_output is None:
                return None
            channel, weight = linear
            found.append(head.spread(by_output[:, 0] @ weight, channel, shape))
        return found

    def _watched(self, x: Tensor) -> Any:
        """A run whose layers are only looked at; with its graph unless ``detach``."""
        kept: dict[int, Any] = {}

        def keeper(index: int) -> Callable[..., Any]:
            def hook(_: nn.Module, __: Any, output: Any) -> Any:
                if self.detach:
                    kept.setdefault(index, self._reshaped(output).detach())
                    return None
                kept.setdefault(index, output)
                return output.clone()  # an in-place operation may follow

            return hook

        with torch.set_grad_enabled(not self.detach), ExitStack() as hooks:
            for index, site in enumerate(self.sites):
                hooks.callback(site.module.register_forward_hook(keeper(index)).remove)
            outputs = self._network(x)
        for index, site in enumerate(self.sites):
            if index not in kept:
                raise CaptureError(f"layer {site.name!r} did not run in the forward pass")
        self._activations = [kept[index] for index in range(len(self.sites))]
        self._gradients = [None] * len(self.sites)
        return outputs

    def _reshaped(self, value: Any) -> Any:
        return value if self.reshape_transform is None else self.reshape_transform(value)


@dataclass(frozen=True)
class _Arrival:
    """Takes a layer's gradient when a backward pass of the caller's arrives there."""

    record: ActivationsAndGradients
    index: int

    def __call__(self, gradients: tuple[Tensor, ...]) -> None:
        if self.record._gradients:
            self.record._gradients[self.index] = self.record._reshaped(gradients[0].detach())


@dataclass(frozen=True)
class _Augmentation:
    """A flip, or none, and a factor on the images; ttach's calls."""

    flip: bool
    factor: float

    def augment_image(self, images: Tensor) -> Tensor:
        return self.deaugment_mask(images) * self.factor

    def deaugment_mask(self, maps: Tensor) -> Tensor:
        return maps.flip(min(3, maps.dim() - 1)) if self.flip else maps


_AUGMENTATIONS = tuple(
    _Augmentation(flip, factor) for flip in (False, True) for factor in (0.9, 1.0, 1.1)
)


@dataclass(frozen=True)
class _Category:
    """A predicted class as a target."""

    category: int

    def __call__(self, output: Tensor) -> Tensor:
        return output[..., self.category]


def _predicted(outputs: Any) -> list[_Category]:
    if not isinstance(outputs, Tensor) or outputs.dim() != 2:
        got = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            "targets=None explains the predicted classes of an output [N, classes], but the model "
            f"returned {got}; give a callable for each image"
        )
    return [_Category(int(category)) for category in outputs.detach().argmax(1)]


def _scores(outputs: Any, targets: Sequence[Callable[[Any], Tensor]], batch: int) -> Tensor:
    """What each target makes of its image's part of the output, [N, 1], with its graph."""
    count = len(outputs) if isinstance(outputs, Tensor) else min(len(outputs), batch)
    if len(targets) != count:
        raise ValueError(
            f"targets must hold one callable for each of the {count} outputs, got {len(targets)}; "
            f"for the same class of all, repeat it: [target] * {count}"
        )
    scores = []
    with torch.enable_grad():
        for target, output in zip(targets, outputs, strict=False):
            if not callable(target):
                raise TypeError(
                    "targets must be callables on a model's output, such as "
                    f"ClassifierOutputTarget(281), got {target!r}"
                )
            score = target(output)
            if not isinstance(score, Tensor) or score.numel() != 1:
                got = list(score.shape) if isinstance(score, Tensor) else type(score).__name__
                raise ValueError(f"target {target!r} must return one number, got {got}")
            scores.append(score.reshape(()))
        return torch.stack(scores)[:, None]


def _sites(network: nn.Module, target_layers: Iterable[nn.Module]) -> tuple[Site, ...]:
    if isinstance(target_layers, nn.Module) and not isinstance(target_layers, Iterable):
        raise TypeError(
            f"target_layers must be a list of modules, got {type(target_layers).__name__}; put it "
            "in a list"
        )
    names = {module: name for name, module in network.named_modules()}
    found = []
    for layer in target_layers:
        if not isinstance(layer, nn.Module):
            raise TypeError(f"target_layers must be modules of the model, got {layer!r} among them")
        found.append(Site(names.get(layer, type(layer).__name__), layer))
    if not found:
        raise ValueError("target_layers must hold at least one module, got none")
    return tuple(found)


def _check_map(activations: Tensor, site: Site, images: Tensor) -> None:
    if activations.dim() != images.dim() or len(activations) != len(images):
        raise ValueError(
            f"layer {site.name!r} gives {list(activations.shape)} for images "
            f"{list(images.shape)}, which is no map [N, C, *S]; reshape_transform must make one"
        )


def _array(value: Any) -> Any:
    """A tensor as an array on the CPU, float32 where NumPy has no such type or a coarse one."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()


def _principal(elements: Array, *, oriented: bool) -> Array:
    """First principal component over positions of [N, C, *S]: [N, *S].

    Its sign is the decomposition's, which is the peer's too; or where ``oriented``, that of the
    sum over channels.
    """
    found = []
    for each in np.nan_to_num(elements, nan=0.0, posinf=np.inf, neginf=-np.inf):
        positions = each.reshape(len(each), -1).T
        positions = positions - positions.mean(axis=0)
        _, _, components = np.linalg.svd(positions, full_matrices=False)
        projected = positions @ components[0]
        if oriented and projected @ positions.sum(axis=1) < 0:
            projected = -projected
        found.append(projected.reshape(each.shape[1:]))
    return np.stack(found).astype(np.float32)


def _scaled(maps: Tensor) -> Tensor:
    """Each map from 0 to 1, or a little below, as the peer divides."""
    space = tuple(range(1, maps.dim()))
    maps = maps - maps.amin(space, keepdim=True)
    return maps.div_(maps.amax(space, keepdim=True) + 1e-7)


def _resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """[N, *S] as [N, *size]: linear in one and two dimensions, cubic splines in three."""
    maps = maps.float()
    if len(size) != maps.dim() - 1:
        raise ValueError(
            f"maps are {list(maps.shape)} for images of size {list(size)}; reshape_transform must "
            "give the layer's tensors as many dimensions as the images have"
        )
    if len(size) < 3:
        mode = "linear" if len(size) == 1 else "bilinear"
        return functional.interpolate(maps[:, None], tuple(size), mode=mode)[:, 0]
    for length in size:  # the first dimension of space becomes the last each time
        maps = torch.tensordot(maps, _spline(maps.shape[1], length).to(maps), ([1], [1]))
    return maps


def _spline(length: int, count: int) -> Tensor:
    """[count, length] that interpolates by cubic B-splines between the first and last sample.

    Samples are mirrored at the ends, as scipy.ndimage.zoom has it, which the peer uses in 3-D.
    """
    if length == 1:
        return torch.ones(count, 1)

    def basis(at: Tensor) -> Tensor:
        base = at.floor()
        rows = torch.zeros(len(at), length, dtype=torch.float64)
        for tap in range(-1, 3):
            distance = (at - base - tap).abs()
            near = 2 / 3 - distance**2 * (1 - distance / 2)
            weight = torch.where(distance < 1, near, (2 - distance).clamp(min=0) ** 3 / 6)
            index = (base.long() + tap).abs() % (2 * (length - 1))
            index = torch.minimum(index, 2 * (length - 1) - index)
            rows.scatter_add_(1, index[:, None], weight[:, None])
        return rows

    knots = basis(torch.arange(length, dtype=torch.float64))
    return basis(torch.linspace(0, length - 1, count, dtype=torch.float64)) @ knots.inverse()
