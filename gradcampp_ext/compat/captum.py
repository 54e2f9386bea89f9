"""Grad-CAM and Grad-CAM++ as captum's layer attributions, with sums from the fused op.

``docs/migration-captum.md`` shows the two with captum's metrics and visualisation and lists what
differs from captum 0.9.0.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradcampp_ext import methods
from gradcampp_ext.ops import cam, channel_weights

try:
    import captum.attr
    from captum._utils.common import _format_tensor_into_tuples
    from captum._utils.gradient import compute_layer_gradients_and_eval
    from captum.log import log_usage
except ImportError as error:
    raise ImportError(
        "gradcampp_ext.compat.captum needs captum, whose LayerAttribution it derives from: "
        f"pip install captum ({error})"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Callable

    from captum._utils.typing import TargetType
    from torch import Tensor

__all__ = ["LayerGradCam", "LayerGradCamPlusPlus"]


class _FusedLayerCam(captum.attr.LayerAttribution, captum.attr.GradientAttribution):
    """What the two share; captum selects targets and gathers layers' tensors."""

    _method: str

    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        layer: nn.Module,
        device_ids: list[int] | None = None,
    ) -> None:
        """
        Args:
            forward_func: the model, or any function of its inputs.
            layer: whose output (or input) is explained.
            device_ids: of a model in nn.DataParallel, where forward_func is not that model itself.
        """
        captum.attr.LayerAttribution.__init__(self, forward_func, layer, device_ids)
        captum.attr.GradientAttribution.__init__(self, forward_func)

    @log_usage()  # captum's NoiseTunnel asks for what this decorator wraps
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: object | None = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = False,
        attr_dim_summation: bool = True,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Maps of the layer, not normalised, at its resolution.

        The forward pass builds its graph from the layer on; nothing below is differentiated.

        Args:
            inputs: one or several tensors, [N, ...].
            target: index of the output that is explained: an int, a tuple of them for outputs of
                more than two dimensions, or a list or 1-D tensor with one a sample; None for one
                output a sample.
            additional_forward_args: passed to forward_func after the inputs.
            attribute_to_layer_input: explain what goes into the layer, not what comes out.
            relu_attributions: cut off negative values.
            attr_dim_summation: False keeps channels apart, w_k A_k.
            grad_kwargs: for ``torch.autograd.grad``.
        Returns: [N, 1, *S], or [N, C, *S] with channels apart; float32 (float64 for float64
            layers), detached. A tuple if the layer gives several tensors.
        Raises: as captum, AssertionError if a target's form does not fit the output, or the layer
            did not run; IndexError if there is no such output.
        """
        with ExitStack() as hooks:
            forward_func = self.forward_func
            if not isinstance(forward_func, nn.DataParallel):
                forward_func = self._graph_from_layer(hooks, attribute_to_layer_input)
            gradients, activations = compute_layer_gradients_and_eval(
                forward_func,
                self.layer,
                _format_tensor_into_tuples(inputs),
                target,
                additional_forward_args,
                device_ids=self.device_ids,
                attribute_to_layer_input=attribute_to_layer_input,
                grad_kwargs=grad_kwargs,
            )
        found = tuple(
            self._map(a, g, relu_attributions, attr_dim_summation)
            for a, g in zip(activations, gradients, strict=True)
        )
        return found if len(found) > 1 else found[0]

    def _graph_from_layer(self, hooks: ExitStack, at_input: bool) -> Callable[..., Tensor]:
        """forward_func without a graph until the layer, where captum makes a leaf."""

        def start(*_: Any) -> None:
            torch.set_grad_enabled(True)

        attach = (
            self.layer.register_forward_pre_hook if at_input else self.layer.register_forward_hook
        )
        hooks.callback(attach(start).remove)

        @wraps(self.forward_func, updated=())
        def forward(*args: Any) -> Tensor:
            with torch.no_grad():
                output: Tensor = self.forward_func(*args)
                return output

        return forward

    def _map(self, activations: Tensor, gradients: Tensor, relu: bool, summed: bool) -> Tensor:
        """[N, 1, *S] or [N, C, *S]; of [N, C] as of a map of one position."""
        activations, gradients = activations.detach(), gradients.detach()
        shape = activations.shape
        space = shape[2:]
        if not 1 <= len(space) <= 3:
            activations, gradients = (x.reshape(*shape[:2], -1) for x in (activations, gradients))
        if summed:
            maps = cam(activations, gradients, method=self._method, normalize=None, relu=relu)
            return maps.reshape(shape[0], 1, *space)
        weights = channel_weights(activations, gradients, method=self._method)
        if methods.get(self._method).rectify:
            activations = activations.relu()
        apart = weights.reshape(*weights.shape, *[1] * (activations.dim() - 2)) * activations
        return (apart.relu() if relu else apart).reshape(shape).detach()


class LayerGradCam(_FusedLayerCam, captum.attr.LayerGradCam):
    """Grad-CAM, arXiv:1610.02391: sum_k w_k A_k, w_k = mean of the gradients; signed by default."""

    _method = "gradcam"


class LayerGradCamPlusPlus(_FusedLayerCam):
    """Grad-CAM++, arXiv:1710.11063, eq. 7 and 19: w_k = sum over g > 0 of g / (2 + S_k g).

    Activations are rectified, so that maps are never negative; behind a ReLU that changes nothing.
    """

    _method = "gradcampp"
