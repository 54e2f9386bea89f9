"""Forward passes that everybody shares: full batches, whoever asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from gradcampp_ext.capture import inference
from gradcampp_ext.targets import select

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Jobs:
    """Inputs to be scored, which are made when their batch comes.

    Attributes:
        classes: the class whose probability is wanted, [J].
        make: the inputs of jobs start to stop, [stop - start, C, H, W].
    """

    classes: Tensor
    make: Callable[[int, int], Tensor]

    def __len__(self) -> int:
        return len(self.classes)


class Scored(NamedTuple):
    """Of J jobs: the probability of the class, and whether it is the predicted one."""

    probability: Tensor  # float32 [J]
    predicted: Tensor  # bool [J]


def score(model: nn.Module, groups: Sequence[Jobs], batch_size: int) -> list[Scored]:
    """Scores of each group; the batches are full, whatever the groups' sizes, but for the last.

    Args:
        model: a classifier, run in evaluation mode and without a graph.
        groups: of jobs, in order.
        batch_size: inputs in one forward pass.
    """
    parts = []
    with inference(model):
        for pieces in _batches(list(map(len, groups)), batch_size):
            inputs = torch.cat([groups[g].make(start, stop) for g, start, stop in pieces])
            classes = torch.cat([groups[g].classes[start:stop] for g, start, stop in pieces])
            output = select(model(inputs), None).float()
            probability = output.softmax(1).gather(1, classes[:, None])[:, 0]
            parts.append(Scored(probability, output.argmax(1) == classes))
    if not parts:
        return []
    probability, predicted = map(torch.cat, zip(*parts, strict=True))
    sizes = list(map(len, groups))
    return [
        Scored(*pair) for pair in zip(probability.split(sizes), predicted.split(sizes), strict=True)
    ]


def _batches(sizes: Sequence[int], most: int) -> Iterator[list[tuple[int, int, int]]]:
    """Group, start and stop of the pieces of each batch."""
    pieces: list[tuple[int, int, int]] = []
    room = most
    for group, size in enumerate(sizes):
        start = 0
        while start < size:
            stop = min(size, start + room)
            pieces.append((group, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield pieces
                pieces, room = [], most
    if pieces:
        yield pieces
