"""Forward passes that keep nothing for a backward pass below a layer, and run again if one comes.

An explanation differentiates a score down to its layer and no further, but a forward pass that the
caller runs, with a graph, keeps what a backward pass through the whole network would need: most of
its memory, and on a CPU a good part of its time. With these hooks the graph is whole and what it
saved below the layer is not kept. Should anyone differentiate below, by parameters or the input,
the model runs once more up to the layer and the gradients are the same.
"""

from __future__ import annotations

import sys
import threading
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import get_device_states, set_device_states

from gradcampp_ext import layers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

_thread = threading.local()  # .run: of the forward pass, or replay, in progress in this thread


class Recompute:
    """Hooks on a model for forward passes of that kind.

    They act where a second run does the same as the first: in evaluation mode, with a graph, and
    not inside torch.compile, torch.func or nn.DataParallel. Elsewhere passes are as without them.
    Below the layer is what runs before somebody calls ``reached``, from a hook on the layer.

    Args:
        model: whose forward passes are changed.
        enabled: asked at the start of every pass.
    """

    def __init__(self, model: nn.Module, enabled: Callable[[], bool]) -> None:
        self._enabled = enabled
        self.handles: list[RemovableHandle] = []
        if layers.unwrap(model) is not model:
            return
        self.handles += [
            model.register_forward_pre_hook(self._start, with_kwargs=True),
            model.register_forward_hook(self._finish, always_call=True),
        ]

    def _start(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run = _current()
        if run is not None and not run.replaying and not run.in_progress():
            run.close()  # its pass was interrupted from the keyboard, which calls no hooks
        if _current() is None and self._enabled() and _repeatable(model):
            _thread.run = _Run(self, model, args, kwargs, sys._getframe(1))
            _thread.run.hooks.__enter__()

    def _finish(self, *_: Any) -> None:
        run = _current()
        if run is not None and run.owner is self and not run.replaying:
            run.close()


def reached() -> None:
    """The pass in progress in this thread, if there is one, has come to the layer."""
    run = _current()
    if run is not None:
        run.below = False


def replaying() -> bool:
    """Whether this thread runs a model once more, so that hooks have seen it already."""
    run = _current()
    return run is not None and run.replaying


class _Run:
    """One forward pass: what it saved, kept above the layer, counted below."""

    def __init__(
        self,
        owner: Recompute,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        frame: FrameType,
    ) -> None:
        self.owner, self.replaying, self.below = owner, False, True
        self.hooks = saved_tensors_hooks(self._pack, self._unpack)
        self._model, self._args, self._kwargs = model, args, kwargs
        self._frame: FrameType | None = frame
        self._counted: list[tuple[torch.Size, torch.dtype]] = []
        self._saved: list[tuple[Tensor, int]] = []
        self._versions = [tensor._version for tensor in self._given()]
        self._random = torch.get_rng_state(), get_device_states(*args, *kwargs.values())
        self._autocast = [
            torch.autocast(
                kind,
                dtype=torch.get_autocast_dtype(kind),
                enabled=torch.is_autocast_enabled(kind),
                cache_enabled=False,
            )
            for kind in {"cpu", *(tensor.device.type for tensor in self._given())} - {"meta"}
        ]
        self._lock = threading.Lock()

    def in_progress(self) -> bool:
        """Whether the pass is among the callers."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return frame is not None

    def close(self) -> None:
        self.hooks.__exit__()
        self._frame = _thread.run = None

    def _pack(self, tensor: Tensor) -> Any:
        if self.below and self.in_progress():
            self._counted.append((tensor.shape, tensor.dtype))
            return len(self._counted) - 1
        return _kept(tensor)

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, int):
            with self._lock:
                if not self._saved:
                    self._saved = self._replay()
            packed = self._saved[packed]
        tensor: Tensor = packed[0]
        if tensor._version != packed[1]:
            raise RuntimeError(
                "a tensor that the backward pass needs was changed by an in-place operation after "
                f"it was saved: {list(tensor.shape)}, at version {tensor._version}, expected "
                f"{packed[1]}"
            )
        return tensor

    def _replay(self) -> list[tuple[Tensor, int]]:
        """What the pass saved below the layer, from a second one."""
        if [tensor._version for tensor in self._given()] != self._versions:
            raise RuntimeError(
                "the model must run once more for gradients below the target layer, but a "
                "parameter, a buffer or the input was changed in place since the forward pass; "
                "differentiate before such a change, or with the extractor's hooks disabled"
            )
        saved: list[tuple[Tensor, int]] = []

        def collect(tensor: Tensor) -> None:
            saved.append(_kept(tensor))
            if len(saved) == len(self._counted):
                raise _Enough

        before = _current()
        with ExitStack() as stack:
            stack.callback(setattr, _thread, "run", before)
            stack.enter_context(torch.random.fork_rng(self._random[1][0]))
            torch.set_rng_state(self._random[0])
            set_device_states(*self._random[1])
            for autocast in self._autocast:
                stack.enter_context(autocast)
            stack.enter_context(torch.enable_grad())
            stack.enter_context(saved_tensors_hooks(collect, _refuse))
            _thread.run, self.replaying = self, True
            stack.callback(setattr, self, "replaying", False)
            with suppress(_Enough):
                self._model(*self._args, **self._kwargs)
        if [(tensor.shape, tensor.dtype) for tensor, _ in saved] != self._counted:
            raise RuntimeError(
                "the model must run once more for gradients below the target layer, but the second "
                "run saved other tensors than the first; does it depend on state that changed, or "
                "was requires_grad changed? Run the forward pass with the extractor's hooks "
                "disabled for such gradients"
            )
        return saved

    def _given(self) -> Iterator[Tensor]:
        yield from self._model.parameters()
        yield from self._model.buffers()
        for value in (*self._args, *self._kwargs.values()):
            if isinstance(value, torch.Tensor):
                yield value


class _Enough(BaseException):
    """Ends a second run that has saved what the first one did."""


def _current() -> _Run | None:
    run: _Run | None = getattr(_thread, "run", None)
    return run


def _kept(tensor: Tensor) -> tuple[Tensor, int]:
    return tensor.detach(), tensor._version


def _refuse(_: Any) -> Tensor:
    raise RuntimeError("the graph of a second run is not for differentiating")


def _repeatable(model: nn.Module) -> bool:
    """Whether a second run would do the same as the first, and saved tensors can be intercepted."""
    return (
        torch.is_grad_enabled()
        and not torch.is_inference_mode_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not any(
            module.training
            or module._compiled_call_impl is not None
            or hasattr(module, "_orig_mod")
            for module in model.modules()
        )
    )
