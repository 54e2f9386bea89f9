"""A model that returns its maps beside its output: explanations where no autograd exists.

Where the head is a mean over space and one linear layer, the gradients are its weights, so that
logits and maps are one plain forward pass: for torch.export, torch.compile, ONNX.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from gradcampp_ext import checks, head, layers, methods
from gradcampp_ext.capture import Capture, Site, inference
from gradcampp_ext.explainer import Explainer
from gradcampp_ext.targets import Output, check_topk, select

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

METHODS = ("gradcampp", "gradcampp_normalized", "gradcam", "xgradcam", "layercam", "hirescam")


class ExplainedModel(nn.Module):
    """Returns (logits [N, classes], maps [N, K, *size]); made by ``export_explainer``.

    Maps are those of the K largest logits, in that order, or of every class in the classes'.
    """

    weight: Tensor

    def __init__(
        self,
        model: nn.Module,
        site: Site,
        layout: layers.Layout,
        weight: Tensor,
        *,
        method: str,
        output: Output,
        topk: int | None,
        size: tuple[int, ...] | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("weight", weight.clone())
        self.layout, self.method, self.output = layout, method, output
        self.topk, self.size = topk, size
        self._captured: list[Tensor] = []
        if site.reads_input:
            site.module.register_forward_pre_hook(self._before)  # a method: copies have their own
        else:
            site.module.register_forward_hook(self._after)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self._captured.clear()
        logits: Tensor = select(self.model(images), self.output)
        activations = self.layout(self._captured.pop())
        weight = self.weight if self.topk is None else self.weight[logits.topk(self.topk).indices]
        maps = self._maps(activations, weight).relu()
        low = maps.flatten(2).amin(2)
        range_ = maps.flatten(2).amax(2) - low
        space = (...,) + (None,) * (activations.dim() - 2)
        maps = (maps - low[space]) / torch.where(range_ == 0, 1.0, range_)[space]
        if self.size is not None:
            mode = ("linear", "bilinear", "trilinear")[len(self.size) - 1]
            maps = functional.interpolate(maps, self.size, mode=mode)
        return logits, maps

    def _before(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._captured.append(args[0].clone())

    def _after(self, _: nn.Module, __: tuple[Tensor, ...], activations: Tensor) -> None:
        self._captured.append(activations.clone())

    def _maps(self, activations: Tensor, weight: Tensor) -> Tensor:
        """The method's maps up to a factor, for gradients that are weight / positions."""
        if methods.get(self.method).rectify:
            activations = activations.relu()
        if self.method == "gradcampp":
            mean = activations.flatten(2).mean(2).unsqueeze(1)
            weight = weight.relu()
            weight = weight / (2 + mean * weight)  # 2 at least, since the mean is of a ReLU
        elif self.method in ("gradcampp_normalized", "layercam"):
            weight = weight.relu()
        maps: Tensor = weight @ activations.flatten(2)
        return maps.reshape(*maps.shape[:2], *activations.shape[2:])


def export_explainer(
    model: nn.Module,
    target_layer: str | None = None,
    method: str = "gradcampp",
    *,
    example: Tensor,
    output: Output = None,
    topk: int | None = 1,
    size: Sequence[int] | None = None,
) -> ExplainedModel:
    """A copy of a model, in evaluation mode, that returns (logits, maps) and needs no gradients.

    Args:
        model: with a head that is a mean over space of the target layer and one linear layer.
        target_layer: its name; None finds it, as ``Explainer`` does.
        method: one of ``gradcampp_ext.export.METHODS``: those whose maps are channel weights
            times activations for such a head.
        example: images [N, C, *S] to recognise the head by.
        output: the part of the model's output that is the logits, as for ``Explainer``.
        topk: maps of the K largest logits; None for every class.
        size: of the maps; None keeps that of the layer.
    Raises: ValueError if the head or the method is another, or topk or size does not fit; errors
        of ``Explainer``.
    """
    if method not in METHODS:
        raise ValueError(
            f"method must be one of {', '.join(METHODS)} to need no gradients, got {method!r}"
        )
    layer = Explainer(model, target_layer, output=output)(example).layer
    model = deepcopy(layers.unwrap(model)).eval()
    site = layers.find(model, str(layer))
    with inference(model):
        with Capture([site]) as capture:
            logits = select(model(example), output)
        shape = capture.activations[0].shape
        found = head.linear_of_mean(logits, capture.edges[0], shape)
        if found is None:
            raise ValueError(
                f"between layer {layer!r} and the output there is more than a mean over space and "
                "one linear layer, so that gradients are needed; name the layer before the "
                "pooling, or use gradcampp_ext.Explainer"
            )
        layout = layers.layout(model, site, shape, (example,), {})
        maps = layout(capture.activations[0])
    if topk is not None:
        check_topk(topk, logits.shape[1])
    return ExplainedModel(
        model,
        site,
        layout,
        found[1],
        method=method,
        output=output,
        topk=topk,
        size=None if size is None else tuple(checks.size(size, maps.dim() - 2)),
    )
