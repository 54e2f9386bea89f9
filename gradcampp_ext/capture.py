"""Activations and gradients of layers, for the price of a forward pass and the head's backward.

The forward pass runs without a graph up to the earliest of the layers, where a hook starts one.
Gradients are asked for down to the layers and no further: nothing below is kept or computed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

if TYPE_CHECKING:
    from types import TracebackType

    from torch import Tensor


class CaptureError(RuntimeError):
    """The model ran, but a layer gave no activations or no gradients; the message says why."""


@dataclass(frozen=True)
class Site:
    """A place in a model where tensors are captured: the output of a module, or its input.

    A module that takes or gives several tensors (a tuple, a mapping) is captured at the first.
    The gradient at an input is that of the path through the module, not of a skip around it.
    """

    name: str
    module: nn.Module
    reads_input: bool = False


class Capture:
    """Hooks on sites, from entering the context to leaving it.

    Run the model once inside; then ``activations`` has one tensor a site, in the given order, and
    ``gradients`` the derivatives of scores. Only the thread that made the object is listened to.

    Without ``copy``, activations are what later in-place operations leave in that memory.
    """

    def __init__(self, sites: Iterable[Site], *, copy: bool = True) -> None:
        self.sites = tuple(sites)
        self._copy = copy
        self._taps: dict[int, tuple[Tensor, GradientEdge]] = {}
        self._thread = threading.get_ident()
        self._hooks = ExitStack()

    def __enter__(self) -> Capture:
        with ExitStack() as hooks:
            for index in range(len(self.sites)):
                hooks.callback(self._attach(index).remove)
            self._hooks = hooks.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hooks.close()

    @property
    def activations(self) -> list[Tensor]:
        """What the model computed at each site."""
        return [activations for activations, _ in self._all_taps()]

    @property
    def edges(self) -> list[GradientEdge]:
        """Where each site's activations enter the graph."""
        return [edge for _, edge in self._all_taps()]

    def gradients(self, scores: Tensor, *, keep_graph: bool = False) -> list[Tensor]:
        """Derivatives of scores at each site.

        Args:
            scores: [N, K], row n computed from sample n alone.
            keep_graph: whether the graph is needed again.
        Returns: [N, K, *activations.shape[1:]] a site, in the dtype of its activations.
        Raises: CaptureError if a score does not depend on a site.
        """
        found = derivatives(scores, self.edges, keep_graph=keep_graph)
        for site, gradients in zip(self.sites, found, strict=True):
            if gradients is None:
                raise CaptureError(
                    f"the score does not depend on layer {site.name!r}: there is no path of "
                    "gradients between them; is the layer on the way to this output, and does the "
                    "model detach, quantize or run under torch.no_grad() after it?"
                )
        return [gradients for gradients in found if gradients is not None]

    def _attach(self, index: int) -> torch.utils.hooks.RemovableHandle:
        site = self.sites[index]

        def before(_: nn.Module, args: tuple[Any, ...], *rest: dict[str, Any]) -> Any:
            if threading.get_ident() != self._thread:
                return None  # and without kwargs perhaps, if the hook is just being registered
            (kwargs,) = rest
            if args:
                return self._tap(index, args), kwargs
            return args, self._tap(index, kwargs)

        def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            return self._tap(index, output) if threading.get_ident() == self._thread else None

        if site.reads_input:
            return site.module.register_forward_pre_hook(before, with_kwargs=True)
        return site.module.register_forward_hook(after)

    def _tap(self, index: int, value: Any) -> Any:
        """Copies the first tensor in a value and starts, or marks, the graph there."""
        site = self.sites[index]
        if index in self._taps:
            raise CaptureError(
                f"layer {site.name!r} ran twice in one forward pass, so that its activations are "
                "not one tensor; name a layer that runs once, or 'NAME:input' for what goes into "
                "the layer after it"
            )
        key, tensor = first_tensor(value)
        if tensor is None:
            raise CaptureError(
                f"layer {site.name!r} gives no tensor but {type(value).__name__}; "
                "name a layer inside it"
            )
        if not tensor.is_floating_point() or tensor.is_quantized:
            raise CaptureError(
                f"layer {site.name!r} gives {tensor.dtype}, which has no gradient; "
                "name a layer of floating-point values (of the float model, if it is quantized)"
            )
        if torch.is_inference_mode_enabled():
            raise CaptureError(
                f"layer {site.name!r} runs under torch.inference_mode() inside the model, "
                "where no graph can start; name a layer after it, or use torch.no_grad() there"
            )
        activations = tensor.detach()
        if self._copy:
            activations = activations.clone()
        torch.set_grad_enabled(True)
        marked = _Mark.apply(tensor, torch.empty(0, requires_grad=True))
        self._taps[index] = activations, get_gradient_edge(marked)
        return _replaced(value, key, marked)

    def _all_taps(self) -> list[tuple[Tensor, GradientEdge]]:
        for index, site in enumerate(self.sites):
            if index not in self._taps:
                raise CaptureError(
                    f"layer {site.name!r} did not run in the forward pass; is it used by this "
                    "model's forward, and called as a module (not inside a compiled graph, and "
                    "not by its weights)?"
                )
        return [self._taps[index] for index in range(len(self.sites))]


def derivatives(
    scores: Tensor, inputs: Sequence[Tensor] | Sequence[GradientEdge], *, keep_graph: bool = False
) -> list[Tensor | None]:
    """Derivatives [N, K, ...] of scores [N, K] by inputs [N, ...]; None where there is no path."""
    if not scores.requires_grad:
        return [None] * len(inputs)
    with torch.enable_grad():
        columns = scores.sum(0).unbind()
    parts = []
    with torch.autocast(scores.device.type, enabled=False):
        for k, column in enumerate(columns, start=1):
            retain = keep_graph or k < len(columns)
            parts.append(
                torch.autograd.grad(column, inputs, retain_graph=retain, allow_unused=True)
            )
    return [_stacked(of_input) for of_input in zip(*parts, strict=True)]


class _Mark(torch.autograd.Function):
    """Identity on the same memory; the gradient is read where its output leaves.

    A leaf would do for reading gradients, but not for what models do next: an in-place operation
    on a leaf that requires grad is an error, on this output it is not.
    """

    @staticmethod
    def forward(_: Any, tensor: Tensor, __: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Any:
        return gradient, None


def _stacked(gradients: Sequence[Tensor | None]) -> Tensor | None:
    """K gradients [N, C, *S] as one [N, K, C, *S], channels last in memory if they are."""
    found = [gradient for gradient in gradients if gradient is not None]
    if len(found) < len(gradients):
        return None
    if len(found) == 1:
        return found[0].unsqueeze(1)
    if found[0].is_contiguous():
        return torch.stack(found, 1)
    return torch.stack([each.movedim(1, -1) for each in found], 1).movedim(-1, 2)


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no graph, whatever the caller's mode; all as before on the way out.

    Training flags are set module by module, not through ``model.train``, which a model may
    override. Autocast stays as the caller has it, but leaves no weights in its cache: torch 2.10
    would give those cast here, without a graph, to a training step around this call.
    """
    training = [module for module in model.modules() if module.training]
    caching = torch.is_autocast_cache_enabled()
    with torch.inference_mode(False), torch.no_grad():
        try:
            torch.set_autocast_cache_enabled(False)
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True
            torch.set_autocast_cache_enabled(caching)


def first_tensor(value: Any) -> tuple[Any, Tensor | None]:
    """The first tensor in a tensor, tuple, list or mapping, and its index or key."""
    if isinstance(value, torch.Tensor):
        return None, value
    pairs: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, (tuple, list)):
        pairs = enumerate(value)
    elif isinstance(value, Mapping):
        pairs = value.items()
    return next(((k, v) for k, v in pairs if isinstance(v, torch.Tensor)), (None, None))


def _replaced(value: Any, key: Any, tensor: Tensor) -> Any:
    if key is None:
        return tensor
    if isinstance(value, tuple):
        items = (*value[:key], tensor, *value[key + 1 :])
        return type(value)(*items) if hasattr(value, "_fields") else items
    value = copy(value)
    value[key] = tensor
    return value
