"""What is explained: classes of a model's output, or any scalar computed from it.

A target is a class index, or a callable that takes the model's output (of the whole batch) and
returns one score a sample, [N]. The classes here are such callables for the usual cases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from gradcampp_ext import checks

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

Target: TypeAlias = "Callable[[Any], Tensor]"
Targets: TypeAlias = "int | Literal['all'] | Sequence[Any] | Tensor | Target | None"
Output: TypeAlias = "str | int | Callable[[Any], Any] | None"


@dataclass(frozen=True)
class Scores:
    """What one call explains.

    Attributes:
        targets: class indices [N, K], or K callables.
        values: [N, K], with the graph that made them.
        probabilities: of the explained classes, [N, K]; None for callables.
        predicted: index of the largest output, [N]; None if the output is not [N, classes].
    """

    targets: Tensor | tuple[Target, ...]
    values: Tensor
    probabilities: Tensor | None
    predicted: Tensor | None


@dataclass(frozen=True)
class LogProbability:
    """The logarithm of a class's probability: unlike the logit, it falls when rivals rise.

    ``multilabel`` takes each output as a yes or no of its own (sigmoid) instead of softmax.
    """

    index: int
    multilabel: bool = False

    def __call__(self, output: Tensor) -> Tensor:
        _check(output, self.index)
        if self.multilabel:
            return torch.nn.functional.logsigmoid(output[:, self.index])
        return output.log_softmax(1)[:, self.index]


@dataclass(frozen=True)
class Contrast:
    """Why this class and not others: its logit less ``weight`` times the others' mean.

    As in Finer-CAM, arXiv:2501.11309, where the others are the most similar classes.
    """

    index: int
    others: int | tuple[int, ...]
    weight: float = 1.0

    def __post_init__(self) -> None:
        others = self._others()
        if not others or self.index in others:
            raise ValueError(
                f"others must be at least one class, without the index {self.index} itself, got "
                f"{self.others!r}"
            )

    def __call__(self, output: Tensor) -> Tensor:
        others = self._others()
        _check(output, self.index, *others)
        return output[:, self.index] - self.weight * output[:, others].mean(1)

    def _others(self) -> list[int]:
        return [self.others] if isinstance(self.others, int) else list(self.others)


@dataclass(frozen=True)
class LabelSum:
    """The sum of several labels' logits, of a multi-label model."""

    indices: tuple[int, ...]

    def __call__(self, output: Tensor) -> Tensor:
        _check(output, *self.indices)
        return output[:, list(self.indices)].sum(1)


@dataclass(frozen=True, eq=False)
class Region:
    """A class over a region of a dense output [N, classes, *S]: the mean of its logit there.

    ``mask``, a tensor or an array, is [*S] or [N, *S], boolean or weights, and not zero everywhere;
    None means where the class is predicted (the whole output where it is so nowhere).
    """

    index: int
    mask: Tensor | NDArray[Any] | None = None

    def __call__(self, output: Tensor) -> Tensor:
        _check(output, self.index, dims=3)
        logits = output[:, self.index]
        mask = output.detach().argmax(1) == self.index if self.mask is None else self.mask
        mask = torch.as_tensor(mask)
        if mask.shape not in (logits.shape, logits.shape[1:]):
            raise ValueError(
                f"mask must be {tuple(logits.shape[1:])} or {tuple(logits.shape)}, as the model's "
                f"output is, got {tuple(mask.shape)}; resize it to the output"
            )
        weights = mask.to(logits).expand_as(logits).flatten(1)
        filled = weights.any(1, keepdim=True)
        if self.mask is None:
            weights = torch.where(filled, weights, 1.0)
        elif not filled.all():
            raise ValueError(
                "mask must not be zero everywhere, but is so for sample "
                f"{int(filled.int().argmin())}; None means where the class is predicted"
            )
        return (logits.flatten(1) * weights).sum(1) / weights.sum(1)


def _check(output: Any, *classes: int, dims: int = 2) -> None:
    """ValueError unless the output has these classes, and as many dimensions."""
    if not isinstance(output, torch.Tensor) or output.dim() < dims:
        raise ValueError(
            f"this target needs an output [N, classes{', *S' * (dims > 2)}], got "
            f"{_described(output)}; choose a part by output="
        )
    for index in classes:
        _check_class(index, output.shape[1])


def _check_class(index: int, count: int) -> None:
    if not 0 <= index < count:
        raise ValueError(
            f"targets must be classes from 0 to {count - 1}, as the output has {count}, got {index}"
        )


def select(returned: Any, output: Output) -> Any:
    """The part of what a model returned that targets are about.

    Args:
        returned: a tensor, or a tuple, mapping or object that holds one.
        output: key, attribute, index or callable; None takes a tensor as it is, what is called
            ``logits``, or the only tensor there is.
    Raises: ValueError if there is no such part, or ``output`` is None and several could be meant.
    """
    if callable(output):
        return output(returned)
    if output is None:
        return _only(returned)
    try:
        if isinstance(output, str) and not isinstance(returned, Mapping):
            return getattr(returned, output)
        return returned[output]
    except (KeyError, IndexError, AttributeError, TypeError):
        raise ValueError(
            f"output={output!r} is no part of what the model returned: {_described(returned)}"
        ) from None


def resolve(
    output: Any,
    targets: Targets,
    *,
    batch: int,
    topk: int | None = None,
    activation: Literal["softmax", "sigmoid"] = "softmax",
) -> Scores:
    """The scores to explain.

    Args:
        output: what ``select`` chose; classes need [N, classes] (or [N], one output a sample).
        targets: None for the predicted class, a class for all samples, "all" classes, classes [N]
            or [N, K], a callable, or K callables.
        batch: N.
        topk: the K classes of the largest outputs, instead of targets.
        activation: what turns outputs into probabilities.
    Raises: ValueError if targets, topk or a callable's result do not fit the output;
        TypeError if targets are something else.
    """
    table = _table(output, batch)
    predicted = None if table is None else table.detach().argmax(1)
    callables = _callables(targets)
    if callables and topk is None:
        values = torch.stack([_scored(target, output, batch) for target in callables], 1)
        return Scores(callables, values, None, predicted)
    if table is None:
        raise ValueError(
            f"class targets need an output of shape [{batch}, classes], got {_described(output)}; "
            "choose a part by output=, or give a callable, such as "
            "gradcampp_ext.targets.Region for a dense output"
        )
    classes = _classes(table, targets, topk)
    outputs = table.detach().float()
    probabilities = outputs.softmax(1) if activation == "softmax" else outputs.sigmoid()
    return Scores(classes, table.gather(1, classes), probabilities.gather(1, classes), predicted)


def check_topk(topk: int, count: int) -> None:
    if not 1 <= checks.integer("topk", topk) <= count:
        raise ValueError(f"topk must be from 1 to the {count} classes of the output, got {topk}")


def _classes(table: Tensor, targets: Targets, topk: int | None) -> Tensor:
    """Class indices [N, K] on the table's device."""
    batch, count = table.shape
    if topk is not None:
        if targets is not None:
            raise ValueError("targets and topk exclude each other: give one of them")
        check_topk(topk, count)
        return table.detach().topk(topk).indices
    if targets is None:
        return table.detach().argmax(1, keepdim=True)
    if isinstance(targets, str) and targets == "all":
        return torch.arange(count, device=table.device).expand(batch, -1)
    classes = _indices(targets)
    if classes.dim() == 0:
        classes = classes.expand(batch)
    if classes.dim() not in (1, 2) or len(classes) != batch:
        raise ValueError(
            f"targets must be one class for all, or [{batch}] or [{batch}, K] for this batch of "
            f"{batch}, got {list(classes.shape)}"
        )
    classes = classes if classes.dim() == 2 else classes.unsqueeze(1)
    if classes.shape[1] == 0:
        raise ValueError("targets must hold at least one class a sample, got none")
    wrong = classes[(classes < 0) | (classes >= count)]
    if len(wrong):
        _check_class(int(wrong[0]), count)
    if classes.shape == (batch, count) and count > 2 and batch and classes.max() <= 1:
        raise ValueError(
            f"targets must be classes, got only 0 and 1, {count} a sample, as many as the output "
            "has; are they one-hot? give targets.argmax(1), or LabelSum for several labels"
        )
    return classes.to(table.device)


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _indices(targets: Targets) -> Tensor:
    try:
        classes = torch.as_tensor(targets)
    except (TypeError, ValueError, RuntimeError):
        classes = torch.empty(0)
    if classes.dtype not in _INTEGERS:
        raise TypeError(
            "targets must be class indices (an int, [N] or [N, K]), callables, 'all' or None, got "
            f"{targets!r}"
        )
    return classes.long()


def _callables(targets: Targets) -> tuple[Target, ...]:
    if callable(targets):
        return (targets,)
    if isinstance(targets, (list, tuple)) and any(map(callable, targets)):
        strangers = [target for target in targets if not callable(target)]
        if strangers:
            raise TypeError(
                f"targets must be all callables or all classes, got {strangers[0]!r} too"
            )
        return tuple(targets)
    return ()


def _scored(target: Target, output: Any, batch: int) -> Tensor:
    score = target(output)
    if not isinstance(score, torch.Tensor) or score.shape != (batch,):
        raise ValueError(
            f"target {target!r} must return one score a sample, a tensor [{batch}], got "
            f"{_described(score)}"
        )
    return score


def _table(output: Any, batch: int) -> Tensor | None:
    """The output as [N, classes], or None if it has another shape."""
    if not isinstance(output, torch.Tensor) or output.shape[:1] != (batch,) or output.dim() > 2:
        return None
    return output if output.dim() == 2 else output.unsqueeze(1)


def _only(returned: Any) -> Any:
    if isinstance(returned, torch.Tensor):
        return returned
    if isinstance(returned, Mapping):
        parts = dict(returned)
    elif isinstance(returned, (tuple, list)):
        parts = dict(enumerate(returned))
    else:
        parts = dict(vars(returned)) if hasattr(returned, "__dict__") else {}
    tensors = {key: part for key, part in parts.items() if isinstance(part, torch.Tensor)}
    if "logits" in tensors:
        return tensors["logits"]
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    raise ValueError(
        f"the model returned {_described(returned)}; say by output= which part is explained"
    )


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)}"
    kind = type(value).__name__
    if isinstance(value, Mapping):
        return f"{kind} with keys {', '.join(map(repr, value))}"
    if hasattr(value, "_fields"):
        return f"{kind} with fields {', '.join(value._fields)}"
    if isinstance(value, (tuple, list)):
        return f"{kind} of {len(value)}"
    if hasattr(value, "__dict__"):
        return f"{kind} with attributes {', '.join(vars(value))}"
    return kind
