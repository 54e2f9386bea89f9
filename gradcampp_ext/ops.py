"""The native op: schemas, fake implementations, argument checks.

``cam`` and ``channel_weights`` are what users holding tensors call. The native libraries register
their implementations under the schemas defined here, one library for each device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradcampp_ext import _native, checks, methods
from gradcampp_ext.differentiable import Cam, Options

_LIBRARY = torch.library.Library("gradcampp_ext", "DEF")
_LIBRARY.define(
    "cam(Tensor activations, Tensor gradients, str method, SymInt[]? size, str normalize, "
    "str interpolation, bool relu, bool rectify, float eps, float temperature) -> Tensor"
)
_LIBRARY.define(
    "channel_weights(Tensor activations, Tensor gradients, str method, bool rectify, float eps, "
    "float temperature) -> Tensor"
)
_LIBRARY.define(
    "cam_backward(Tensor map_gradients, Tensor activations, Tensor gradients, str method, "
    "bool rectify, float eps, bool by_activations, bool by_gradients) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "overlay(Tensor images, Tensor maps, Tensor table, float image_weight, "
    "float heatmap_weight) -> Tensor"
)
_LIBRARY.define("add_powers(Tensor(a!) sums, Tensor gradients) -> ()")
_LIBRARY.define(
    "power_weights(Tensor activations, Tensor sums, SymInt copies, bool rectify, float eps) "
    "-> Tensor"
)
_LIBRARY.define("cpu_capability() -> str")
_LIBRARY.define("cpu_capabilities() -> str")
_native.load()


@torch.library.register_fake("gradcampp_ext::cam")
def _cam_fake(
    activations: Tensor,
    gradients: Tensor,
    method: str,
    size: Sequence[int] | None,
    normalize: str,
    interpolation: str,
    relu: bool,
    rectify: bool,
    eps: float,
    temperature: float,
) -> Tensor:
    pixels = activations.shape[2:] if size is None else size
    shape = (*gradients.shape[:2], *pixels)
    return activations.new_empty(shape, dtype=_map_dtype(activations))


@torch.library.register_fake("gradcampp_ext::channel_weights")
def _channel_weights_fake(
    activations: Tensor,
    gradients: Tensor,
    method: str,
    rectify: bool,
    eps: float,
    temperature: float,
) -> Tensor:
    return activations.new_empty(gradients.shape[:3], dtype=_map_dtype(activations))


@torch.library.register_fake("gradcampp_ext::cam_backward")
def _cam_backward_fake(
    map_gradients: Tensor,
    activations: Tensor,
    gradients: Tensor,
    method: str,
    rectify: bool,
    eps: float,
    by_activations: bool,
    by_gradients: bool,
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(activations) if by_activations else activations.new_empty(0),
        torch.empty_like(gradients) if by_gradients else gradients.new_empty(0),
    )


@torch.library.register_fake("gradcampp_ext::overlay")
def _overlay_fake(
    images: Tensor, maps: Tensor, table: Tensor, image_weight: float, heatmap_weight: float
) -> Tensor:
    return images.new_empty((*maps.shape, 3), dtype=torch.uint8)


@torch.library.register_fake("gradcampp_ext::add_powers")
def _add_powers_fake(sums: Tensor, gradients: Tensor) -> None:
    return None


@torch.library.register_fake("gradcampp_ext::power_weights")
def _power_weights_fake(
    activations: Tensor, sums: Tensor, copies: int, rectify: bool, eps: float
) -> Tensor:
    return activations.new_empty(sums.shape[1:4], dtype=_map_dtype(activations))


def cam(
    activations: Tensor,
    gradients: Tensor,
    *,
    method: str = "gradcampp",
    size: Sequence[int] | None = None,
    normalize: str | None = "minmax",
    interpolation: str = "linear",
    relu: bool = True,
    rectify: bool | None = None,
    eps: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Class activation maps of one layer, from its activations and gradients, in one fused pass.

    The default method is Grad-CAM++ (arXiv:1710.11063, eq. 7 and 19, with Y = exp(score)):
    L = relu(sum_c w_c A_c) with w_c = sum over positions with g > 0 of g / (2 + S_c g), where S_c
    is the sum of A_c over space. That is eq. 19 with g^2 cancelled, so it needs no epsilon and
    gradients of any size keep their digits. Grad-CAM++ is not invariant to the scale of the
    gradients: a scaled loss must be unscaled first.

    Nothing is copied to make it contiguous; contiguous and channels-last tensors and token
    sequences viewed as maps are read at full speed.

    Args:
        activations: [N, C, *S], float16 to float64, S being one to three spatial sizes; what the
            target layer put out.
        gradients: d score / d activations, [N, C, *S], or [N, K, C, *S] for K targets of each
            sample; dtype and device of activations.
        method: a name from ``gradcampp_ext.methods.METHODS``, which gives the sources.
        size: the map's size in pixels, one entry for each spatial dimension; None keeps feature
            resolution. Pixels have half-pixel centres (``align_corners=False``).
        normalize: "minmax", (L - min) / (max - min) of each map, zeros where max = min; "max",
            L / max, zeros where max <= 0; None, raw values. Done before upsampling.
        interpolation: "linear" (bilinear in 2-D, trilinear in 3-D) or "nearest".
        relu: whether negative evidence is cut off before normalising.
        rectify: whether A is replaced by relu(A). None: as the method has it, which is True for
            the Grad-CAM++ methods: eq. 19 is derived for maps behind a ReLU and has poles
            elsewhere. False is the literal formula.
        eps: what other libraries add to alpha's denominator 2 g^2 + S g^3 (1e-6 or so), to S in
            XGrad-CAM, and to the attention in "attention". None: as the method has it; the
            paper's formula has none.
        temperature: of the softmax in "attention"; greater is flatter.

    Returns:
        [N, *size] for gradients [N, C, *S], [N, K, *size] for [N, K, C, *S]; float32, or float64
        for float64 input; in [0, 1] if normalised and ``relu``. A sample and target with a
        non-finite activation or gradient gives NaN throughout its map, and no other. The maps can
        be differentiated by activations and gradients, once, for a loss that guides them.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, devices or options do not fit; the message names the likely cause.
    """
    row = methods.get(method)
    single, gradients = check_pair(activations, gradients)
    checks.options(normalize, interpolation)
    options = Options(
        method,
        None if size is None else checks.size(size, activations.dim() - 2),
        normalize or "none",
        interpolation,
        checks.flag("relu", relu),
        checks.rectify(row, rectify),
        checks.eps(row, eps),
        checks.temperature(temperature),
    )
    if torch.is_grad_enabled() and (activations.requires_grad or gradients.requires_grad):
        maps: Tensor = Cam.apply(activations, gradients, options)
    else:
        maps = torch.ops.gradcampp_ext.cam(activations, gradients, *options)
    return maps.squeeze(1) if single else maps


def channel_weights(
    activations: Tensor,
    gradients: Tensor,
    *,
    method: str = "gradcampp",
    rectify: bool | None = None,
    eps: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Channel weights w of a method, with L = relu(sum_c w_c A_c).

    Arguments as for `cam`. "layercam", "hirescam" and "gradcam_elementwise" have no
    channel weights.

    Returns:
        [N, C] for gradients [N, C, *S], [N, K, C] for [N, K, C, *S]; float32, or float64 for
        float64 input. Detached: unlike the maps of `cam` they cannot be differentiated.

    Raises:
        TypeError, ValueError: as `cam`; ValueError for a method without channel weights.
    """
    row = checks.channelwise(method)
    single, gradients = check_pair(activations, gradients)
    weights: Tensor = torch.ops.gradcampp_ext.channel_weights(
        activations.detach(),
        gradients.detach(),
        method,
        checks.rectify(row, rectify),
        checks.eps(row, eps),
        checks.temperature(temperature),
    )
    return weights.squeeze(1) if single else weights


def _map_dtype(activations: Tensor) -> torch.dtype:
    return torch.float64 if activations.dtype == torch.float64 else torch.float32


_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_pair(activations: Tensor, gradients: Tensor) -> tuple[bool, Tensor]:
    """Whether there is no dimension for targets, and the gradients with one."""
    for name, value in (("activations", activations), ("gradients", gradients)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        if value.is_nested or value.layout != torch.strided:
            kind = "nested" if value.is_nested else value.layout
            raise TypeError(f"{name} must be a dense tensor, got a {kind} one; call .to_dense()")
    if activations.dtype not in _DTYPES:
        raise TypeError(
            "activations must be float16, bfloat16, float32 or float64, "
            f"got {str(activations.dtype).removeprefix('torch.')}"
        )
    if gradients.dtype != activations.dtype:
        raise TypeError(
            f"gradients must have the dtype of activations, {activations.dtype}, "
            f"got {gradients.dtype}; were the gradients taken under another autocast setting?"
        )
    if gradients.device != activations.device:
        raise ValueError(
            f"gradients must be on the device of activations, {activations.device}, "
            f"got {gradients.device}"
        )
    single = checks.pair(tuple(activations.shape), tuple(gradients.shape))
    return single, gradients.unsqueeze(1) if single else gradients
