"""Guided backpropagation and deconvnet, and the product of the former with Grad-CAM++ maps.

These are gradients of a score by the input, with another rule for the way back through a ReLU:

- plain: g where x > 0
- deconvnet: relu(g), arXiv:1311.2901
- guided: relu(g) where x > 0, arXiv:1412.6806

The rule holds for every call of ReLU and ReLU6 in the forward pass, modules and functions alike,
since the calls themselves are intercepted; nothing in the model is replaced. Other activations
(GELU, SiLU, max, clamp) keep their gradients.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from gradcampp_ext import layers
from gradcampp_ext.capture import CaptureError, derivatives, inference
from gradcampp_ext.explainer import Explainer, Explanation, Images, arguments, explainable
from gradcampp_ext.targets import Output, Targets, resolve, select

if TYPE_CHECKING:
    from torch import Tensor, nn

Rule: TypeAlias = Literal["guided", "deconvnet", "plain"]


def explain(
    model: nn.Module,
    images: Images,
    targets: Targets = None,
    *,
    topk: int | None = None,
    rule: Rule = "guided",
    output: Output = None,
) -> Explanation:
    """Gradients of scores by the images, with a rule for the way back through ReLUs.

    Args: ``rule`` as above; the others as ``Explainer`` and its call take them.
    Returns: an Explanation whose maps are the gradients, [N, K, C, *S], signed, not normalized.
    Raises: ValueError, TypeError for arguments that do not fit; CaptureError if a score does not
        depend on the images, or the model calls no ReLU.
    """
    if rule not in ("guided", "deconvnet", "plain"):
        raise ValueError(f"rule must be 'guided', 'deconvnet' or 'plain', got {rule!r}")
    model = explainable(model)
    scripted = [n for n, part in model.named_modules() if isinstance(part, torch.jit.ScriptModule)]
    if scripted and rule != "plain":
        raise ValueError(
            f"{scripted[0]!r} of the model is scripted or traced, and the rule cannot reach the "
            "ReLUs in it; explain the model before torch.jit, or take rule='plain'"
        )
    with inference(model):
        args, kwargs = arguments(images)
        image = layers.image_of(args, kwargs)
        with torch.enable_grad(), _ReluRule(rule) as relus:
            leaf = image.detach().requires_grad_()
            given = leaf.clone()  # the model may change its input in place
            returned = model(
                *(given if value is image else value for value in args),
                **{name: given if value is image else value for name, value in kwargs.items()},
            )
            scores = resolve(select(returned, output), targets, batch=len(image), topk=topk)
        if not relus.count and rule != "plain":
            raise CaptureError(
                f"rule={rule!r} is one for ReLUs, and this model called none; rule='plain' takes "
                "the gradients as they are"
            )
        gradients = derivatives(scores.values, [leaf])[0]
    if gradients is None:
        raise CaptureError("the score does not depend on the images; does the model detach?")
    return Explanation(
        maps=gradients,
        targets=scores.targets,
        scores=scores.values.detach(),
        probabilities=scores.probabilities,
        predicted=scores.predicted,
        layer="input",
        method=rule,
    )


def cam(
    explainer: Explainer,
    images: Images,
    targets: Targets = None,
    *,
    topk: int | None = None,
    rule: Rule = "guided",
) -> Explanation:
    """Guided Grad-CAM++: an explainer's maps times the guided gradients by the images.

    Section 3.4 of arXiv:1610.02391, with the explainer's method. Arguments as above.
    Returns: an Explanation with maps [N, K, C, *S], signed.
    """
    explanation = explainer(images, targets, topk=topk)
    chosen = explanation.targets
    gradients = explain(
        explainer.model,
        images,
        chosen if isinstance(chosen, torch.Tensor) else list(chosen),
        rule=rule,
        output=explainer.output,
    ).maps
    if explanation.maps.dim() != gradients.dim() - 1:
        raise ValueError(
            f"maps of several layers, {list(explanation.maps.shape)}, must be fused for this "
            "product: give the explainer fuse='mean' or 'max'"
        )
    maps = explanation.maps.unsqueeze(2) * gradients
    return replace(explanation, maps=maps, method=f"{rule}_{explanation.method}")


class _ReluRule(TorchFunctionMode):
    """Changes the gradients of the ReLUs called within, and counts them."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule
        self.count = 0

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function not in _RELUS or not _starts_at_zero(function, args, kwargs):
            return function(*args, **kwargs)
        self.count += 1
        if self.rule == "plain":
            return function(*args, **kwargs)
        if self.rule == "deconvnet":
            result = self._without_mask(function, args, kwargs)
        else:
            result = function(*args, **kwargs)
        if result.requires_grad:
            result.register_hook(torch.relu)
        return result

    def _without_mask(self, function: Any, args: Any, kwargs: Any) -> Tensor:
        """The ReLU, in place if asked, with the identity's gradient."""
        (tensor, *rest), options = (args, kwargs) if args else ((kwargs["input"],), kwargs)
        options = {name: value for name, value in options.items() if name != "input"}
        with torch.no_grad():
            value = function(tensor.clone(), *rest, **options)
        result: Tensor = _Straight.apply(tensor, value)
        in_place = function in _IN_PLACE or options.get("inplace", False)
        return tensor.copy_(result) if in_place else result


class _Straight(torch.autograd.Function):
    """A given value, with the gradient of the tensor it was made from."""

    @staticmethod
    def forward(_: Any, __: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Any:
        return gradient, None


_IN_PLACE = {torch.relu_, torch.Tensor.relu_}
_RELUS = {
    torch.relu,
    torch.Tensor.relu,
    functional.relu,
    functional.relu6,
    functional.hardtanh,  # what nn.ReLU6 calls
    *_IN_PLACE,
}


def _starts_at_zero(function: Any, args: Any, kwargs: Any) -> bool:
    if function is not functional.hardtanh:
        return True
    low: float = args[1] if len(args) > 1 else kwargs.get("min_val", -1.0)
    return low == 0
