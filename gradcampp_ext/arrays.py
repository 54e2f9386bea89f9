"""The op for NumPy arrays, without torch: explanations beside an ONNX Runtime or TensorFlow server.

Same formulas, same kernels, same bits as ``gradcampp_ext.cam`` on CPU tensors for the same number
of threads. NumPy has no bfloat16; float16, float32 and float64 are taken, with any strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcampp_ext import _numpy, checks, methods
from gradcampp_ext._environment import cores

Array = NDArray[np.floating[Any]]


def cam(
    activations: Array,
    gradients: Array,
    *,
    method: str = "gradcampp",
    size: Sequence[int] | None = None,
    normalize: str | None = "minmax",
    interpolation: str = "linear",
    relu: bool = True,
    rectify: bool | None = None,
    eps: float | None = None,
    temperature: float = 1.0,
    threads: int | None = None,
) -> Array:
    """Class activation maps of one layer from arrays; ``gradcampp_ext.cam`` describes the rest.

    Args:
        activations: [N, C, *S], float16, float32 or float64.
        gradients: [N, C, *S] or [N, K, C, *S], dtype of activations.
        threads: how many threads this call may use; None: one for each processor the process has.

    Returns:
        [N, *size] or [N, K, *size], float32, or float64 for float64 input.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or options do not fit.
    """
    row = methods.get(method)
    single, activations, gradients = _check_pair(activations, gradients)
    checks.options(normalize, interpolation)
    maps: Array = _numpy.cam(
        activations,
        gradients,
        method,
        checks.size(activations.shape[2:] if size is None else size, activations.ndim - 2),
        normalize or "none",
        interpolation,
        checks.flag("relu", relu),
        checks.rectify(row, rectify),
        checks.eps(row, eps),
        checks.temperature(temperature),
        _check_threads(threads),
    )
    return maps[:, 0] if single else maps


def channel_weights(
    activations: Array,
    gradients: Array,
    *,
    method: str = "gradcampp",
    rectify: bool | None = None,
    eps: float | None = None,
    temperature: float = 1.0,
    threads: int | None = None,
) -> Array:
    """Channel weights from arrays; ``gradcampp_ext.channel_weights`` describes the rest.

    Args:
        activations: [N, C, *S], float16, float32 or float64.
        gradients: [N, C, *S] or [N, K, C, *S], dtype of activations.
        threads: how many threads this call may use; None: one for each processor the process has.

    Returns:
        [N, C] or [N, K, C], float32, or float64 for float64 input.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or options do not fit, or the method has no channel weights.
    """
    row = checks.channelwise(method)
    single, activations, gradients = _check_pair(activations, gradients)
    weights: Array = _numpy.channel_weights(
        activations,
        gradients,
        method,
        checks.rectify(row, rectify),
        checks.eps(row, eps),
        checks.temperature(temperature),
        _check_threads(threads),
    )
    return weights[:, 0] if single else weights


_DTYPES = (np.float16, np.float32, np.float64)


def _check_pair(activations: Array, gradients: Array) -> tuple[bool, Array, Array]:
    """Whether there is no dimension for targets, and both arrays as the kernels take them."""
    for name, value in (("activations", activations), ("gradients", gradients)):
        if not isinstance(value, np.ndarray):
            raise TypeError(f"{name} must be a numpy.ndarray, got {type(value).__name__}")
    if activations.dtype.newbyteorder("=") not in _DTYPES:
        raise TypeError(f"activations must be float16, float32 or float64, got {activations.dtype}")
    if gradients.dtype != activations.dtype:
        raise TypeError(
            f"gradients must have the dtype of activations, {activations.dtype}, "
            f"got {gradients.dtype}"
        )
    single = checks.pair(activations.shape, gradients.shape)
    if single:
        gradients = gradients[:, np.newaxis]
    return single, _walkable(activations), _walkable(gradients)


def _walkable(array: Array) -> Array:
    """The array itself, or a copy where items lie at odd addresses or bytes in another order."""
    item = array.itemsize
    if array.flags.aligned and array.dtype.isnative and not any(s % item for s in array.strides):
        return array
    return np.array(array, array.dtype.newbyteorder("="), order="C")  # aligned, as a new one is


def _check_threads(threads: int | None) -> int:
    if threads is None:
        return cores()
    if not isinstance(threads, int | np.integer) or not 1 <= threads < 2**31:
        raise ValueError(f"threads must be at least 1 and an integer, got {threads!r}")
    return int(threads)
