"""Finding and naming target layers, and reading their tensors as maps."""

from __future__ import annotations

import difflib
import math
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd

from gradcampp_ext.capture import (
    Capture,
    CaptureError,
    Site,
    derivatives,
    first_tensor,
    inference,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

MAX_PREFIX = 8  # class, distillation and register tokens before the patches; DINOv2 has five


@dataclass(frozen=True)
class Call:
    """A module that ran in a forward pass: what went in and what came out, as shapes.

    Attributes:
        mark: a number that another output hardly has, where it was asked for.
    """

    name: str
    module: nn.Module
    taken: tuple[int, ...]
    shape: tuple[int, ...]
    mark: float | None = None


@dataclass(frozen=True)
class Candidate:
    """A layer whose maps can be asked for; ``name`` is what ``target_layer`` takes."""

    name: str
    type: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """How a layer's tensors are read as maps [..., C, *S]: as views, whatever stands in front.

    Attributes:
        grid: None where channels come first already. Else the map's size, where channels come
            last: [..., *grid, C] as in Swin, or tokens [..., prefix + positions, C] as in ViT.
        prefix: tokens before the patches (class, distillation, registers); None in the first of
            these two cases.
    """

    grid: tuple[int, ...] | None = None
    prefix: int | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        if self.grid is None:
            return tensor
        if self.prefix is not None:
            tensor = tensor[..., self.prefix :, :].unflatten(-2, self.grid)
        return tensor.movedim(-1, -1 - len(self.grid))


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside nn.DataParallel, DistributedDataParallel or torch.compile."""
    inside = getattr(model, "_orig_mod", None)
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inside = model.module
    return unwrap(inside) if isinstance(inside, nn.Module) else model


def find(model: nn.Module, layer: str | nn.Module) -> Site:
    """The site that a module, its name, or 'NAME:input' means; ValueError where there is none."""
    modules = dict(model.named_modules())
    if isinstance(layer, nn.Module):
        name = next((name for name, module in modules.items() if module is layer), None)
        if name is None:
            raise ValueError(
                f"target_layer must be a module of the model; this {type(layer).__name__} is "
                "none of its modules (of a copy, perhaps?)"
            )
        return _hookable(Site(name, layer))
    name, colon, side = layer.partition(":")
    if colon and side != "input":
        raise ValueError(f"target_layer may end in ':input' and nothing else, got {layer!r}")
    while name not in modules and name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    if name not in modules:
        close = difflib.get_close_matches(name, modules, n=3)
        hint = (
            f"did you mean {' or '.join(map(repr, close))}?"
            if close
            else "gradcampp_ext.layers.candidates, or gradcampp layers MODEL, lists them"
        )
        raise ValueError(f"target_layer {name!r} is not the name of a module of the model; {hint}")
    return _hookable(Site(layer, modules[name], reads_input=bool(colon)))


_WRAPPERS = ("module.", "_orig_mod.")  # of a layer's name in what ``unwrap`` takes off


def _hookable(site: Site) -> Site:
    if isinstance(site.module, torch.jit.ScriptModule):
        raise ValueError(
            f"target_layer {site.name!r} is scripted or traced and calls no hooks; name a layer "
            "around it or behind it, or explain the model before torch.jit"
        )
    return site


def candidates(model: nn.Module, *args: Any, **kwargs: Any) -> list[Candidate]:
    """The layers with maps, in the order in which they finish, from one forward pass.

    Args: what the model takes. A module that runs more than once is left out.
    """
    model = unwrap(model)
    return [
        Candidate(site.name, type(site.module).__name__, shape)
        for site, shape in _sites(trace(model, args, kwargs), image_of(args, kwargs))
    ]


def default(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    score: Callable[[Any], Tensor],
    tokens: Sequence[int] | None = None,
) -> Site:
    """The input of the global pooling, or else the last layer with maps, before the last weights.

    Behind those, maps are the classes' own: what a fully convolutional head gives. Where a class
    token alone decides after the last attention, it is the last normalization at which the
    patches still count. What the image does not change, such as the layers of a text beside it,
    is left out.

    Args:
        score: takes what the model returns to one score a sample, [N, 1].
        tokens: as for `layout`; then it is a layer that gives such tokens.
    """
    image = image_of(args, kwargs)
    calls = _of_the_image(model, args, kwargs)
    learned = [index for index, call in enumerate(calls) if call.module._parameters]
    sites = _sites(calls[: max(learned, default=0)], image) or _sites(calls, image)
    sites.sort(key=lambda pair: _lies_over(pair[1], image))  # attention's [N, heads, T, T] first
    for site, shape in reversed(sites):
        if tokens is not None:
            found = _told(shape, tokens)
        elif len(shape) < image.dim():
            found = _patches(shape, image, calls)
        else:
            found = Layout()
        if found is None:
            continue
        if found.prefix is None:
            return site
        norms = [
            Site(call.name, call.module)
            for call in reversed(calls)
            if call.shape == shape and "Norm" in type(call.module).__name__
        ]
        with inference(model), Capture([site, *norms]) as capture:
            gradients = derivatives(score(model(*args, **kwargs)), capture.edges)
        for used, gradient in zip(capture.sites, gradients, strict=True):
            if gradient is not None and found(gradient).any():
                return used
        if any(gradient is not None for gradient in gradients):
            raise CaptureError(
                "target_layer=None found no layer whose patches the predicted class depends on "
                "(are the weights of the head zero, as before training? is the batch empty?); "
                "name one"
            )
    raise CaptureError(
        f"target_layer=None found no layer with maps in this model for images {list(image.shape)}; "
        "name one (gradcampp_ext.layers.candidates lists them), with tokens=(prefix, height, "
        "width) if it gives tokens. Modules that run more than once are left out"
    )


def _of_the_image(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Call]:
    """`trace`, without what another image leaves as it is."""
    if len(args) + len(kwargs) == 1:
        return trace(model, args, kwargs)
    image = image_of(args, kwargs)
    other = 1 - image

    def changed(value: Any) -> Any:
        return other if value is image else value

    beside = tuple(map(changed, args)), {name: changed(kwargs[name]) for name in kwargs}
    marks = {call.name: call.mark for call in trace(model, *beside, mark=_mark)}
    calls = trace(model, args, kwargs, mark=_mark)
    return [call for call in calls if call.mark != marks.get(call.name)]


def _mark(tensor: Tensor) -> float:
    """A weighted sum: a permutation of values has another one."""
    values = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).double().flatten()
    weights = torch.linspace(1, 2, values.numel(), dtype=values.dtype, device=values.device)
    return float(values @ weights)


def trace(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    mark: Callable[[Tensor], float] | None = None,
) -> list[Call]:
    """The modules that ran exactly once in one forward pass and gave a tensor, as they finished."""
    calls: list[Call] = []
    times: dict[str, int] = {}
    thread = threading.get_ident()

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, *rest: Any) -> None:
            if threading.get_ident() != thread:
                return  # and without kwargs perhaps, if the hook is just being registered
            kwargs, output = rest
            times[name] = times.get(name, 0) + 1
            _, tensor = first_tensor(args or kwargs)
            if isinstance(output, torch.Tensor):
                taken = () if tensor is None else tuple(tensor.shape)
                seen = None if mark is None else mark(output)
                calls.append(Call(name, module, taken, tuple(output.shape), seen))

        return hook

    with inference(model), ExitStack() as hooks:
        for name, module in model.named_modules():
            if name and not isinstance(module, torch.jit.ScriptModule):
                handle = module.register_forward_hook(record(name), with_kwargs=True)
                hooks.callback(handle.remove)
        model(*args, **kwargs)
    return [call for call in calls if times[call.name] == 1]


def image_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Among a model's inputs the one that maps lie over: the first float tensor [N, C, *S]."""
    found = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    for value in found:
        if value.is_floating_point() and value.dim() >= 3:
            return value
    kinds = ", ".join(f"{value.dtype} {list(value.shape)}" for value in found)
    raise ValueError(
        "images must hold a floating-point tensor of shape [N, C, *S], got "
        f"{kinds or 'no tensor'}; pixels of 0 to 255 need .float() / 255 and the network's "
        "normalisation, a single picture or sound its batch and channel dimensions (unsqueeze)"
    )


def image_size(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[int]:
    """The sizes *S that maps lie over.

    Those of the image [N, C, *S]. Models that take video [N, T, C, H, W] or sequences [N, T, C]
    turn them around before their first convolution, which tells; one without convolutions takes
    sequences. The model is run once more for videos and signals.
    """
    image = image_of(args, kwargs)
    if _takes_sequences(model, image):
        return [image.shape[1]]
    if image.dim() in (3, 5):
        for call in trace(model, args, kwargs):
            if _convolves(call.module) and len(call.taken) == image.dim():
                turned = image.transpose(1, 2).shape
                return list(turned[2:] if call.taken == turned else image.shape[2:])
    return list(image.shape[2:])


def layout(
    model: nn.Module,
    site: Site,
    shape: Sequence[int],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    tokens: Sequence[int] | None = None,
) -> Layout:
    """How activations of this shape are read as maps.

    Args:
        model, args, kwargs: run once more if the grid of tokens must be found.
        tokens: (prefix, *grid) as the user says; None finds it.
    Raises: ValueError if ``tokens`` does not fit the shape; CaptureError if nothing does.
    """
    image = image_of(args, kwargs)
    if tokens is not None:
        told = _told(shape, tokens)
        if told is None:
            raise ValueError(
                f"tokens={tuple(tokens)} does not fit layer {site.name!r}, which gives "
                f"{list(shape)}; expected (prefix, height, width) with [N, prefix + height * "
                "width, C], or (0, height, width) with [N, height, width, C]"
            )
        return told
    if shape[0] == image.shape[0]:
        if _takes_sequences(model, image) and len(shape) == 3:
            return Layout((shape[1],))
        if len(shape) == image.dim():
            return _spatial(shape, site.module, image)
        found = _patches(shape, image, trace(model, args, kwargs)) if len(shape) == 3 else None
        if found:
            return found
        if image.dim() == 3 and len(shape) == 4 and any(map(_convolves, model.modules())):
            return Layout()  # of a spectrogram that the model makes of a signal
    raise CaptureError(
        f"layer {site.name!r} gives {list(shape)} for images {list(image.shape)}, which is neither "
        "maps [N, C, *S] or [N, *S, C], nor tokens [N, T, C] of a grid that a convolution of this "
        "model gives; name another layer, or say tokens=(prefix, height, width)"
    )


def check_patches(site: Site, layout: Layout, gradients: Tensor) -> None:
    """CaptureError if a score sees only the tokens before the patches: its maps would be empty."""
    if layout.prefix and not layout(gradients).any() and gradients.any():
        raise CaptureError(
            f"every gradient at the patches of layer {site.name!r} is zero: after the last "
            "attention only the class token counts; take a layer before it, such as the first "
            "normalization of the last block (target_layer=None finds it)"
        )


def _told(shape: Sequence[int], tokens: Sequence[int]) -> Layout | None:
    prefix, *sizes = tokens
    grid = tuple(sizes)
    if len(shape) == 3 and shape[1] == prefix + math.prod(grid):
        return Layout(grid, prefix)
    if prefix == 0 and tuple(shape[1:-1]) == grid:
        return Layout(grid)
    return None


def _convolves(module: nn.Module) -> bool:
    return type(module).__name__.startswith("Conv")


def _takes_sequences(model: nn.Module, image: Tensor) -> bool:
    """Whether a 3-dimensional input is [N, T, C], not [N, C, S]: the model has no convolution."""
    return image.dim() == 3 and not any(map(_convolves, model.modules()))


def _spatial(shape: Sequence[int], module: nn.Module, image: Tensor) -> Layout:
    """Whether channels come first or last in a map: the image's proportions tell, or the module.

    A module with layer normalization and no convolution keeps channels last.
    """
    first, last = (_proportional(size, image) for size in (shape[2:], shape[1:-1]))
    kinds = [type(part).__name__ for part in module.modules()]
    like_swin = "LayerNorm" in kinds and not any(kind.startswith("Conv") for kind in kinds)
    return Layout(tuple(shape[1:-1])) if last and (like_swin or not first) else Layout()


def _patches(shape: Sequence[int], image: Tensor, calls: Sequence[Call]) -> Layout | None:
    """Prefix and grid of tokens [N, T, C]; None where no grid makes T tokens.

    The grid is one that a convolution gave (the patch embedding), or one that patch merging made
    of it by halving.
    """
    grids = [
        call.shape[2:]
        for call in reversed(calls)
        if len(call.shape) == image.dim() and _convolves(call.module)
    ]
    for stride in (1, 2, 4, 8):
        for grid in grids:
            merged = tuple(math.ceil(size / stride) for size in grid)
            prefix = shape[1] - math.prod(merged)
            if 0 <= prefix <= (MAX_PREFIX if stride == 1 else 0):
                return Layout(merged, prefix)
    return None


def _sites(calls: Sequence[Call], image: Tensor) -> list[tuple[Site, tuple[int, ...]]]:
    """Outputs that are maps or tokens; behind them the input of the pooling that ends them.

    What has T rows inside a module that gives T tokens is left out: attention [N, heads, T, T],
    queries and keys.
    """
    found = []
    pooling = None
    tokens = [(f"{call.name}.", call.shape[1]) for call in calls if len(call.shape) == 3]
    for call in calls:
        rows = call.shape[2] if len(call.shape) == 4 else None
        if any(call.name.startswith(name) and rows == count for name, count in tokens):
            continue
        if _pools(call, image):
            pooling = Site(f"{call.name}:input", call.module, reads_input=True), call.taken
        elif _is_map(call.shape, image):
            found.append((Site(call.name, call.module), call.shape))
            pooling = None
    return [*found, pooling] if pooling else found


def _is_map(shape: Sequence[int], image: Tensor) -> bool:
    """Whether it can be [N, C, *S] or [N, *S, C] of more than one position, or tokens."""
    if len(shape) not in (3, image.dim()) or shape[0] != image.shape[0]:
        return False
    return math.prod(shape[1:-1] if len(shape) < image.dim() else shape[2:]) > 1


def _pools(call: Call, image: Tensor) -> bool:
    """Whether a module pools maps: adaptively, or down to one value a channel."""
    taken, shape = call.taken, call.shape
    if len(taken) != image.dim() or not _is_map(taken, image):
        return False
    if isinstance(call.module, (_AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd)):
        return True
    learns = any(True for _ in call.module.parameters())
    per_channel = len(shape) > 1 and math.prod(shape[1:]) == shape[1]
    return not learns and per_channel and shape[1] in (taken[1], taken[-1])


def _lies_over(shape: Sequence[int], image: Tensor) -> bool:
    """Whether tokens, or a map that has the image's proportions, channels first or last."""
    if len(shape) != image.dim():
        return True
    return _proportional(shape[2:], image) or _proportional(shape[1:-1], image)


def _proportional(size: Sequence[int], image: Tensor) -> bool:
    """Whether a map lies over an image with one stride along every dimension, up to padding."""
    pixels = image.shape[2:]
    return all(
        abs(size[i] * pixels[0] - size[0] * pixels[i]) <= 2 * max(pixels[0], pixels[i])
        for i in range(len(size))
    )
