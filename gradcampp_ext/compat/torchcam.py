"""torchcam's gradient-based extractors with maps from the fused op: another import, the same code.

The classes derive from torchcam's own, so that the constructor, the hooks, the checks and their
errors, ``fuse_cams``, ``torchcam.explain``, ``torchcam.metrics``, ``RefineCAM`` and ``isinstance``
are torchcam's. Two things are new: the maps, and a forward pass that keeps nothing in memory for
the layers below the target layer (``gradcampp_ext.recompute``).

``docs/migration-torchcam.md`` lists what differs from torchcam 0.5.0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gradcampp_ext import methods
from gradcampp_ext.ops import cam, channel_weights
from gradcampp_ext.recompute import Recompute, reached, replaying
from gradcampp_ext.smooth import PowerSums

try:
    import torchcam.methods
    from torchcam.methods import gradient as peer
except ImportError as error:
    raise ImportError(
        "gradcampp_ext.compat.torchcam needs torchcam 0.5 (Python 3.11 or newer), whose classes it "
        f"derives from: pip install torchcam==0.5.0 ({error})"
    ) from error

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torchcam.methods.core import OutputTarget

__all__ = ["GradCAM", "GradCAMpp", "LayerCAM", "SmoothGradCAMpp", "XGradCAM"]


def __getattr__(name: str) -> Any:
    """What is no gradient method, such as ScoreCAM, is torchcam's own."""
    if not name.startswith("_") and hasattr(torchcam.methods, name):
        return getattr(torchcam.methods, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Fused(peer._GradCAM):
    """What the extractors share: gradients as torchcam takes them, maps by ``gradcampp_ext.cam``.

    A subclass that overrides ``_get_weights`` gets torchcam's weighted sum of its own weights.
    """

    hook_a: list[Any]
    hook_g: list[Any]
    _method: str
    _overridden = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "_get_weights" in vars(cls) and cls.__module__ != __name__:
            cls._overridden = True

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.hook_handles += Recompute(model, self._listening).handles

    def _listening(self) -> bool:
        return bool(self._hooks_enabled)

    def _hook_a(self, *args: Any, **kwargs: Any) -> None:
        reached()
        if not replaying():
            super()._hook_a(*args, **kwargs)

    def _hook_g(self, *args: Any, **kwargs: Any) -> None:
        if not replaying():
            super()._hook_g(*args, **kwargs)

    def _get_weights(
        self, class_idx: int | list[int], scores: Any, eps: float | None = None, **kwargs: Any
    ) -> list[Tensor]:
        """Weights of each layer: [N, C], or [N, C, *S] for LayerCAM."""
        pairs = self._pairs(class_idx, scores, **kwargs)
        if not methods.get(self._method).channelwise:
            return [gradients.relu() for _, gradients in pairs]
        return [channel_weights(a, g, method=self._method, eps=eps) for a, g in pairs]

    def compute_cams(
        self,
        class_idx: int | list[int] | None = None,
        scores: Any = None,
        normalized: bool = True,
        *,
        targets: OutputTarget | list[OutputTarget] | None = None,
        eps: float | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """Maps of each target layer, at its resolution.

        Args:
            class_idx: a class for the batch, or a class for each of the N samples.
            scores: what the model returned in the forward pass to explain; [N, classes] for
                classes, anything that ``targets`` understand.
            normalized: (L - min) / (max - min) of each map; otherwise raw values, >= 0.
            targets: a callable from a sample's output to a scalar, or one for each sample, instead
                of ``class_idx``.
            eps: added to alpha's denominator (Grad-CAM++) or S (XGrad-CAM); None is the paper's
                formula, which has none.
            kwargs: ``retain_graph=True`` if the graph of ``scores`` is needed again.
        Returns: [N, *S] a layer, float32 (float64 for float64 activations), detached.
        Raises: RuntimeError if the score does not depend on a layer; ValueError if a layer gives
            no maps [N, C, *S] of one to three dimensions.
        """
        if targets is not None:
            kwargs["targets"] = targets
        if self._overridden:
            if eps is not None:
                kwargs["eps"] = eps
            maps: list[Tensor] = super().compute_cams(class_idx, scores, normalized, **kwargs)
            return maps
        options = {"normalize": "minmax" if normalized else None, "relu": self._relu, "eps": eps}
        return self._maps(class_idx, scores, options, **kwargs)

    def _maps(
        self, class_idx: Any, scores: Any, options: dict[str, Any], **kwargs: Any
    ) -> list[Tensor]:
        pairs = self._pairs(class_idx, scores, **kwargs)
        return [cam(a.detach(), g, method=self._method, **options) for a, g in pairs]

    def _pairs(self, class_idx: Any, scores: Any, **kwargs: Any) -> list[tuple[Tensor, Tensor]]:
        """Activations and gradients of each layer, after a backward pass from the scores."""
        with torch.enable_grad():
            self._backprop(scores, class_idx, **kwargs)
        return list(zip(self.hook_a, self.hook_g, strict=True))


class GradCAM(_Fused, peer.GradCAM):
    """Grad-CAM, arXiv:1610.02391: L = relu(sum_k w_k A_k), w_k = mean of the gradients.

    Args: as torchcam's: model, target_layer (module, name, list of these, or None for the last
        layer with maps), input_shape (to find it, without the batch), enable_hooks,
        reshape_transform (from tokens to maps).
    """

    _method = "gradcam"


class GradCAMpp(_Fused, peer.GradCAMpp):
    """Grad-CAM++, arXiv:1710.11063, eq. 7 and 19: w_k = sum over g > 0 of g / (2 + S_k g).

    torchcam 0.5.0 loses the denominator, and its weights are the sum of relu(g)^3. Activations
    are rectified, as everywhere in this package; behind a ReLU that changes nothing.

    Args: as `GradCAM`.
    """

    _method = "gradcampp"


class SmoothGradCAMpp(_Fused, peer.SmoothGradCAMpp):
    """Smooth Grad-CAM++, arXiv:1908.01224: Grad-CAM++ of moments of the gradients under noise.

    The moments are means of g, g^2 and g^3 over noisy copies of the input, the activations those of
    the input itself (``gradcampp_ext.smooth.PowerSums``). torchcam 0.5.0 takes the last copy's
    activations and gradient instead.

    Args: as `GradCAM`, and num_samples (copies) and std (of the noise, in units of the
        input). The noise comes from torch's global generator, as torchcam draws it.
    """

    _hook_outputs: list[Any]
    _ihook_enabled: bool

    def _get_weights(
        self, class_idx: Any, scores: Any = None, eps: float | None = None, **kwargs: Any
    ) -> list[Tensor]:
        return [sums.channel_weights(eps=eps) for sums in self._sums(class_idx, **kwargs)]

    def _maps(
        self, class_idx: Any, scores: Any, options: dict[str, Any], **kwargs: Any
    ) -> list[Tensor]:
        return [sums.cam(**options) for sums in self._sums(class_idx, **kwargs)]

    def _sums(self, class_idx: Any, **kwargs: Any) -> list[PowerSums]:
        """Power sums of each layer; what the hooks hold of the caller's forward pass is kept."""
        held = self.hook_a, self._hook_outputs, self._ihook_enabled
        self.hook_a, self._hook_outputs, self._ihook_enabled = list(held[0]), list(held[1]), False
        sums = [PowerSums(activations) for activations in held[0]]
        try:
            for _ in range(self.num_samples):
                noise = self._distrib.sample(self._input.size()).to(self._input)
                with torch.enable_grad():
                    scores = self.model((self._input + noise).requires_grad_())
                for each, (_, gradients) in zip(
                    sums, self._pairs(class_idx, scores, **kwargs), strict=True
                ):
                    each.add(gradients)
        finally:
            self.hook_a, self._hook_outputs, self._ihook_enabled = held
        return sums

    def _store_input(self, *args: Any) -> None:
        if self._hooks_enabled and not replaying():
            super()._store_input(*args)


class XGradCAM(_Fused, peer.XGradCAM):
    """XGrad-CAM, arXiv:2008.02312, eq. 9: w_k = sum(g A_k) / sum(A_k).

    Args: as `GradCAM`.
    """

    _method = "xgradcam"


class LayerCAM(_Fused, peer.LayerCAM):
    """LayerCAM, IEEE TIP 2021, eq. 5 and 6: L = relu(sum_k relu(g) A_k).

    Several layers are fused as in its eq. 9, tanh(2 L).

    Args: as `GradCAM`.
    """

    _method = "layercam"
