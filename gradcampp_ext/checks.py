"""Argument checks that the torch and the NumPy door share; no torch here."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from gradcampp_ext import methods

NORMALIZE = ("minmax", "max", None)
INTERPOLATION = ("linear", "nearest")
_MOST_PIXELS = 2**48  # of a map; a petabyte


def pair(activations: tuple[int, ...], gradients: tuple[int, ...]) -> bool:
    """Whether the gradients' shape has no dimension for targets; ValueError if shapes disagree."""
    if not 3 <= len(activations) <= 5:
        raise ValueError(
            f"activations must be [N, C, *S] with one to three spatial sizes, got {activations}; "
            "a token layer's output is viewed as a map first, see gradcampp_ext.layers"
        )
    single = len(gradients) == len(activations)
    if (gradients if single else gradients[:1] + gradients[2:]) != activations:
        with_targets = "({})".format(", ".join(map(str, (activations[0], "K", *activations[1:]))))
        raise ValueError(
            f"gradients must have the shape of activations, {activations}, or {with_targets} "
            f"for K targets, got {gradients}; did the layer run twice in one forward?"
        )
    if 0 in activations[1:]:
        raise ValueError(
            f"activations must have at least one channel and one position, got {activations}; "
            "is the input smaller than the network's stride?"
        )
    return single


def size(value: Sequence[int], dims: int) -> list[int]:
    """The size as integers; ValueError unless there is a positive one for each dimension."""
    message = f"size must be {dims} positive integers, in pixels, got {value!r}"
    try:
        lengths = [operator.index(length) for length in value]
    except TypeError:
        raise ValueError(message) from None
    if len(lengths) != dims or any(length < 1 for length in lengths):
        raise ValueError(message)
    if math.prod(lengths) > _MOST_PIXELS:
        raise ValueError(f"size must be of a map that memory can hold, got {value!r}, in pixels")
    return lengths


def options(normalize: str | None, interpolation: str) -> None:
    if not isinstance(normalize, str | None) or normalize not in NORMALIZE:
        raise ValueError(f"normalize must be one of {NORMALIZE}; got {normalize!r}")
    if not isinstance(interpolation, str) or interpolation not in INTERPOLATION:
        raise ValueError(f"interpolation must be one of {INTERPOLATION}; got {interpolation!r}")


def channelwise(name: str) -> methods.Method:
    """The method of that name; ValueError if it has no channel weights."""
    row = methods.get(name)
    if not row.channelwise:
        names = ", ".join(m.name for m in methods.METHODS.values() if m.channelwise)
        raise ValueError(f"method {name!r} weighs elements, not channels; use one of {names}")
    return row


def eps(row: methods.Method, value: float | None) -> float:
    """The method's epsilon, or the caller's."""
    if value is None:
        return row.eps or 0.0
    number = as_number(value)
    if row.eps is None and number != 0:
        raise ValueError(f"eps must be None or 0: method {row.name!r} has no epsilon; got {value}")
    if not 0 <= number < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {value!r}")
    return number


def rectify(row: methods.Method, value: bool | None) -> bool:
    """The method's own, or the caller's."""
    return row.rectify if value is None else flag("rectify", value)


def temperature(value: float) -> float:
    number = as_number(value)
    if not 0 < number < math.inf:
        raise ValueError(f"temperature must be finite and positive, got {value!r}")
    return number


def flag(name: str, value: bool) -> bool:
    """The value; TypeError unless it is true or false."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def integer(name: str, value: int) -> int:
    """The value; TypeError unless it is an integer."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def integers(name: str, values: Sequence[int]) -> tuple[int, ...]:
    """The values; TypeError unless they are integers, one after the other."""
    try:
        return tuple(map(operator.index, values))
    except TypeError:
        raise TypeError(f"{name} must be several integers, got {values!r}") from None


def as_number(value: Any) -> float:
    """NaN for what is no number."""
    if isinstance(value, str | bytes):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last: a tensor of several
        return math.nan
