"""What the comparisons with other libraries share: photographs, the demo network, random ones."""

from __future__ import annotations

from functools import cache

import skimage.data
import torch
from PIL import Image
from torch import Tensor, nn

from gradcampp_ext import models

PICTURES = ("chelsea", "coffee", "rocket")


@cache
def demo() -> models.LoadedModel:
    return models.load("demo")


@cache
def photographs() -> Tensor:
    """[3, 3, 112, 112], normalized as the demo network expects it."""
    pictures = [
        demo().recipe.picture(Image.fromarray(getattr(skimage.data, p)())) for p in PICTURES
    ]
    pixels = torch.stack([torch.tensor(picture[::2, ::2]) for picture in pictures])
    return demo().recipe.normalize(pixels)


def distance(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


class Small(nn.Module):
    """Two convolutions and a linear head over one to three spatial dimensions."""

    def __init__(self, dims: int = 2, inplace: bool = False) -> None:
        super().__init__()
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.early = convolution(3, 6, 3, stride=2, padding=1)
        self.late = convolution(6, 8, 3, padding=1)
        self.relu = nn.ReLU(inplace=inplace)
        self.head = nn.Linear(8, 5)
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        x = self.relu(self.late(self.relu(self.early(x))))
        return self.head(x.flatten(2).mean(2))
