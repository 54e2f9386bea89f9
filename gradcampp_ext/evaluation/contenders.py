"""What is compared: methods with options, and maps that know nothing, as controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.nn.functional import interpolate

from gradcampp_ext import methods
from gradcampp_ext.ops import cam

if TYPE_CHECKING:
    from torch import Tensor

Size: TypeAlias = "tuple[int, int]"


@dataclass(frozen=True)
class Contender:
    """A way to make maps.

    Attributes:
        label: as the user wrote it: a method, perhaps with options, or a control.
        method: its name, or that of the control.
        options: of `gradcampp_ext.cam`.
    """

    label: str
    method: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def maps(
        self, activations: Tensor, gradients: Tensor, seeds: Sequence[int], size: Size | None
    ) -> Tensor:
        """Maps [N, *size] in [0, 1], at the layer's size if None.

        Args:
            activations, gradients: [N, C, h, w].
            seeds: one a picture, for controls.
        """
        if self.method not in CONTROLS:
            return cam(
                activations, gradients, method=self.method, size=size, **self.options
            ).float()
        height, width = activations.shape[2:]
        made = CONTROLS[self.method]((height, width), seeds)
        low, high = made.amin((1, 2), keepdim=True), made.amax((1, 2), keepdim=True)
        made = torch.where(high > low, (made - low) / (high - low), 0.0).to(activations.device)
        if size is not None:
            made = interpolate(made[:, None], size, mode="bilinear")[:, 0]
        return made


def _random(shape: Size, seeds: Sequence[int]) -> Tensor:
    generator = torch.Generator()
    return torch.stack([torch.rand(shape, generator=generator.manual_seed(s)) for s in seeds])


def _center(shape: Size, seeds: Sequence[int]) -> Tensor:
    y, x = (torch.linspace(-1 + 1 / side, 1 - 1 / side, side) for side in shape)
    bell = torch.exp(-2 * (y[:, None] ** 2 + x**2))  # a quarter of the side is one deviation
    return bell.expand(len(seeds), *shape)


CONTROLS: dict[str, Callable[[Size, Sequence[int]], Tensor]] = {
    "random": _random,  # uniform noise in the cells of the layer, another for each picture
    "center": _center,  # the same bell in the middle of every picture
}


def parse(label: str) -> Contender:
    """A contender from its label: NAME or NAME:OPTION=VALUE, ... of the op's options.

    Raises: ValueError for an unknown method, control or option.
    """
    name, *texts = label.split(":")
    if name in CONTROLS:
        if texts:
            raise ValueError(f"the control {name!r} takes no options, got {label!r}")
        return Contender(label, name)
    if name not in methods.METHODS:
        known = ", ".join([*methods.METHODS, *CONTROLS])
        raise ValueError(f"method must be one of {known}; got {name!r}")
    options = dict(_option(label, text) for text in texts)
    made = Contender(label, name, options)
    made.maps(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), [0], None)  # the op checks options
    return made


def _option(label: str, text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    if name in ("rectify", "relu") and value in ("true", "false"):
        return name, value == "true"
    if name in ("eps", "temperature"):
        try:
            return name, float(value)
        except ValueError:
            pass
    raise ValueError(
        "options of a method are rectify=true, rectify=false, relu=true, relu=false, eps=NUMBER "
        f"and temperature=NUMBER, after colons; got {text!r} in {label!r}"
    )
