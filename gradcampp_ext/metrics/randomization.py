"""The sanity check of arXiv:1810.03292: a map of a network without weights must look different."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from gradcampp_ext.variations import mixed


@dataclass(frozen=True)
class Stage:
    """Layers that lose their weights together: names, from the output to the input."""

    layers: tuple[str, ...]

    @property
    def name(self) -> str:
        first, last = self.layers[0], self.layers[-1]
        return first if first == last else f"{first} to {last}"


def stages(model: nn.Module, count: int | None = None) -> list[Stage]:
    """The layers with weights of their own, from the last to the first, in groups.

    Layers come in the order in which the model registers them, which is that of use in all but a
    few networks.

    Args:
        count: of groups of nearly equal size; None for one a layer.
    """
    names = [
        name
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ][::-1]
    if not names:
        raise ValueError("model has no weights that could be randomised")
    count = len(names) if count is None else count
    if not 1 <= count <= len(names):
        raise ValueError(
            f"count must be from 1 to the {len(names)} layers with weights, got {count}"
        )
    bounds = [round(group * len(names) / count) for group in range(count + 1)]
    return [Stage(tuple(names[a:b])) for a, b in itertools.pairwise(bounds)]


def cascade(
    model: nn.Module, *, count: int | None = None, seed: int = 0
) -> Iterator[tuple[Stage, nn.Module]]:
    """A copy of the model that loses its weights stage by stage, from the output to the input.

    The model itself is left alone. It is always the same copy that is given, with one more stage
    randomised: use it before asking for the next.

    Args:
        count: see `stages`.
        seed: of the weights; the global generators are left as they were.
    """
    groups = stages(model, count)
    randomised = copy.deepcopy(model)
    modules = dict(randomised.named_modules())
    for number, stage in enumerate(groups):
        devices = {p.device for p in randomised.parameters() if p.is_cuda}
        with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
            torch.manual_seed(mixed(seed, number))
            for name in stage.layers:
                _forget(modules[name])
        yield stage, randomised


def _forget(module: nn.Module) -> None:
    """New weights as the layer was initialised; others get noise of their own mean and spread."""
    if callable(reset := getattr(module, "reset_parameters", None)):
        reset()
        return
    for parameter in module.parameters(recurse=False):
        spread = parameter.std() if parameter.numel() > 1 else parameter.abs().mean()
        noise = torch.randn(parameter.shape, dtype=torch.float32)
        parameter.copy_(parameter.mean() + spread * noise.to(parameter))
