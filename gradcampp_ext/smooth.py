"""Smooth Grad-CAM++ for people who hold the gradients of noisy copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from gradcampp_ext import checks, methods, ops

if TYPE_CHECKING:
    from torch import Tensor


class PowerSums:
    """Smooth Grad-CAM++ (arXiv:1908.01224) from gradients that come a batch of copies at a time.

    The map is L = relu(sum_c w_c A_c) with w_c = sum over positions of
    relu(M1) M2 / (2 M2 + S_c M3): Grad-CAM++'s eq. 19 with the means M1, M2 and M3 of g, g^2 and
    g^3 over the copies in place of the derivatives, A being the activations of the images without
    noise and S_c their sum over space. Copies that are all alike give Grad-CAM++.

    The paper prints M1 where M2 stands in the numerator. That would not be Grad-CAM++ without
    noise and, for the small gradients of real networks, would weigh every channel with a positive
    gradient alike; it is taken for a slip, as in other implementations.

    Only three sums are kept, however many copies come: in float64, in which g^3 of a gradient of
    1e-20 is not lost, so 24 bytes for each element of one copy's gradients. Gradients expanded
    over space (stride 0) are kept as the one value that they are.

    Args:
        activations: of the images without noise, as for `gradcampp_ext.cam`.
    Raises: TypeError, ValueError as `gradcampp_ext.cam`.
    """

    def __init__(self, activations: Tensor) -> None:
        ops.check_pair(activations, activations)
        self._activations = activations.detach()
        self._sums: Tensor | None = None  # [3, N, K, C, *S], sizes of 1 where S is expanded
        self._single = False
        self.copies = 0

    def add(self, gradients: Tensor) -> None:
        """Adds the gradients of M more noisy copies.

        Args:
            gradients: [M * N, C, *S] or [M * N, K, C, *S] for K targets, copy by copy; dtype and
                device of the activations.
        Raises: TypeError, ValueError if they do not fit the activations or what came before.
        """
        batch = len(self._activations)
        is_tensor = isinstance(gradients, torch.Tensor)
        single, _ = ops.check_pair(self._activations, gradients[:batch] if is_tensor else gradients)
        copies = len(gradients) // batch if batch else 1
        if len(gradients) != copies * batch:
            raise ValueError(
                f"gradients must be of whole copies of the {batch} images, copy by copy, got "
                f"{len(gradients)} samples"
            )
        by_copy = gradients.detach().unflatten(0, (copies, batch))
        if single:
            by_copy = by_copy.unsqueeze(2)
        sums = self._room(by_copy, single)
        for dim in self._kept_as_one():
            by_copy = by_copy.narrow(dim, 0, 1)
        torch.ops.gradcampp_ext.add_powers(sums, by_copy)
        self.copies += copies

    def channel_weights(self, *, rectify: bool | None = None, eps: float | None = None) -> Tensor:
        """Channel weights w: [N, C], or [N, K, C]; float32, or float64 for float64 activations.

        Args:
            rectify: whether A is replaced by relu(A), and M3 by relu(M3), which noise can bring
                below 0 where M1 is positive; None is True. False is the formula above, whose
                denominator has poles.
            eps: what other implementations add to the denominator; None is 0.
        Raises: ValueError if no gradients were added, or eps is negative or not finite; TypeError
            if rectify is none of these.
        """
        if self._sums is None:
            raise ValueError("no gradients were added: there is nothing to make weights from")
        row, space = methods.get("gradcampp"), self._activations.shape[2:]
        weights: Tensor = torch.ops.gradcampp_ext.power_weights(
            self._activations,
            self._sums.expand(*self._sums.shape[:4], *space),
            self.copies,
            checks.rectify(row, rectify),
            checks.eps(row, eps),
        )
        return weights.squeeze(1) if self._single else weights

    def cam(
        self,
        *,
        size: Sequence[int] | None = None,
        normalize: str | None = "minmax",
        interpolation: str = "linear",
        relu: bool = True,
        rectify: bool | None = None,
        eps: float | None = None,
    ) -> Tensor:
        """Maps, [N, *size] or [N, K, *size]; options as for ``gradcampp_ext.cam`` and above."""
        weights = self.channel_weights(rectify=rectify, eps=eps)
        space = self._activations.shape[2:]
        # Grad-CAM of gradients that are the same everywhere: their mean is the weight.
        gradients = weights.reshape(*weights.shape, *[1] * len(space))
        return ops.cam(
            self._activations.to(weights.dtype),
            gradients.expand(*weights.shape, *space),
            method="gradcam",
            size=size,
            normalize=normalize,
            interpolation=interpolation,
            relu=relu,
            rectify=checks.rectify(methods.get("gradcampp"), rectify),
        )

    def _room(self, by_copy: Tensor, single: bool) -> Tensor:
        """The sums, with room for gradients [M, N, K, C, *S], in the order of their memory."""
        if self._sums is None:
            one = by_copy[0]
            for dim in range(3, one.dim()):
                if one.stride(dim) == 0:
                    one = one.narrow(dim, 0, 1)
            strides = torch.empty_like(one, device="meta").stride()
            memory = one.new_zeros(3 * one.numel(), dtype=torch.float64)
            self._sums = memory.as_strided((3, *one.shape), (one.numel(), *strides))
            self._single = single
        elif self._sums.shape[2] != by_copy.shape[2]:
            raise ValueError(
                f"gradients must be of {self._sums.shape[2]} targets as those before, got "
                f"{by_copy.shape[2]}"
            )
        elif any(by_copy.stride(dim) for dim in self._kept_as_one()):
            self._sums = self._sums.expand(3, *by_copy.shape[1:]).clone()
        return self._sums

    def _kept_as_one(self) -> list[int]:
        """Dimensions of [M, N, K, C, *S] that have one position in the sums and more in S."""
        if self._sums is None:
            return []
        sizes = zip(self._sums.shape[4:], self._activations.shape[2:], strict=True)
        return [dim for dim, (kept, length) in enumerate(sizes, start=4) if kept != length]
