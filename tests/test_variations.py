"""Averages over noise, flips and intensities, against the same done by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gradcampp_ext.explainer import Explainer
from gradcampp_ext.targets import Region
from gradcampp_ext.variations import Augment, Smooth


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.late = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)
        self.batches: list[int] = []

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        self.batches.append(len(x))
        x = self.late(self.conv(x).relu()).relu().mean((2, 3))
        return self.head(x) if shift is None else self.head(x) + shift


class Dense(Network):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate(self.late(self.conv(x).relu()), x.shape[2:])


IMAGES = torch.randn(3, 3, 10, 12, generator=torch.Generator().manual_seed(0))


def plain(model: nn.Module, images: Tensor, targets) -> Tensor:
    return Explainer(model, "conv")(images, targets).maps


def test_augment() -> None:
    model = Network()
    explanation = Explainer(model, "conv", average=Augment((-1, -2), (0.5, 1.0)))(IMAGES, topk=2)
    expected = Explainer(model, "conv")(IMAGES, topk=2)
    maps = [
        plain(model, IMAGES.flip(dims) * intensity, expected.targets).flip(dims)
        for dims in ((), (-1,), (-2,), (-1, -2))
        for intensity in (0.5, 1.0)
    ]
    torch.testing.assert_close(explanation.maps, torch.stack(maps).mean(0))
    for name in ("targets", "scores", "probabilities", "predicted"):
        assert torch.equal(getattr(explanation, name), getattr(expected, name))
    assert explanation.layer == "conv"


def test_smooth() -> None:
    model = Network()
    noise = Smooth(samples=3, std=0.2, seed=5)
    explanation = Explainer(model, "conv", average=noise)(IMAGES)
    expected = Explainer(model, "conv")(IMAGES)
    assert torch.equal(explanation.targets, expected.targets)
    noisy = [noise.apply(IMAGES, number) for number in range(3)]
    maps = [plain(model, images, expected.targets) for images in noisy]
    torch.testing.assert_close(explanation.maps, torch.stack(maps).mean(0))
    assert not torch.allclose(explanation.maps, expected.maps, atol=1e-3)


def test_noise() -> None:
    images = torch.rand(2, 3, 100, 100) * torch.tensor([1.0, 10.0]).reshape(2, 1, 1, 1)
    noise = Smooth(std=0.2).apply(images, 0) - images
    torch.testing.assert_close(noise.std((1, 2, 3)), torch.tensor([0.2, 2.0]), rtol=0.02, atol=0)
    torch.testing.assert_close(noise[0] * 10, noise[1], rtol=1e-2, atol=1e-2)  # alike for all
    assert not torch.equal(Smooth().apply(images, 0), Smooth().apply(images, 1))
    seeds = (0, 1, 2, 4096, 2**32, 2**44, -1)
    made = [Smooth(seed=seed).apply(images, number) for seed in seeds for number in range(3)]
    assert len({tuple(each[0, 0, 0].tolist()) for each in made}) == len(made)
    assert torch.equal(Smooth(seed=1).apply(images, 2), made[5])


def test_noise_is_a_share_of_the_range_of_all_channels() -> None:
    images = torch.rand(1, 2, 100, 100) * torch.tensor([1.0, 10.0]).reshape(1, 2, 1, 1)
    noise = Smooth(std=0.2).apply(images, 0) - images
    torch.testing.assert_close(noise.std((0, 2, 3)), torch.full((2,), 2.0), rtol=0.03, atol=0)


def test_channels_have_noise_of_their_own() -> None:
    noise = Smooth().apply(IMAGES, 0) - IMAGES
    assert not torch.allclose(noise[:, 0], noise[:, 1], atol=0.1)


def test_random_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    Explainer(Network(), "conv", average=Smooth(2))
    before = torch.get_rng_state()
    assert not torch.equal(state, before)  # the network's weights
    Smooth(2).apply(IMAGES, 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("together", [1, 2, 5, 8])
def test_together_changes_the_batches_alone(together: int) -> None:
    model = Network()
    expected = Explainer(model, "conv", average=Smooth(5, together=3))(IMAGES, topk=2).maps
    model.batches.clear()
    maps = Explainer(model, "conv", average=Smooth(5, together=together))(IMAGES, topk=2).maps
    torch.testing.assert_close(maps, expected)
    counts = [min(together, 5 - first) for first in range(0, 5, together)]
    assert model.batches == [3, *(3 * count for count in counts)]
    model.batches.clear()
    Explainer(model, "conv", average=Smooth(5, together=together))({"x": IMAGES, "shift": None})
    assert model.batches == [3, *(3 * count for count in counts)]


def test_further_inputs_are_left_as_they_are() -> None:
    model = Network()
    images = {"shift": torch.randn(3, 5), "x": IMAGES}
    explainer = Explainer(model, "conv", average=Augment(intensities=(1.0,)))
    expected = (plain(model, IMAGES, 1) + plain(model, IMAGES.flip(-1), 1).flip(-1)) / 2
    torch.testing.assert_close(explainer(images, 1).maps, expected)
    torch.testing.assert_close(explainer((IMAGES, images["shift"]), 1).maps, expected)


def test_further_inputs_of_as_many_rows_as_images_need_not_be_the_samples() -> None:
    class Similarity(Network):
        def forward(self, x: Tensor, text: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(x) @ text.T * scale

    model, text = Similarity(), torch.randn(3, 5, generator=torch.Generator().manual_seed(1))

    def second(output: Tensor) -> Tensor:
        return output.softmax(1)[:, 1]

    expected = Explainer(model, "conv")((IMAGES, text), second).maps
    model.batches.clear()
    maps = Explainer(model, "conv", average=Smooth(3, std=0.0))((IMAGES, text), second).maps
    torch.testing.assert_close(maps, expected)
    assert model.batches == [3, 3, 3, 3]  # one copy at a time


def test_several_layers() -> None:
    model = Network()
    average = Augment(intensities=(1.0,))
    apart = Explainer(model, ["conv", "late"], average=average)(IMAGES, topk=2).maps
    assert apart.shape == (3, 2, 2, 10, 12)
    expected = Explainer(model, "conv", average=average)(IMAGES, topk=2).maps
    torch.testing.assert_close(apart[:, :, 0], expected)


def test_callables_see_one_variation_as_it_lies_over_the_images() -> None:
    model = Dense()
    mask = torch.zeros(3, 10, 12)
    mask[0, :4, :3] = mask[1, 2:, 5:] = mask[2, 5, :2] = 1
    target = Region(1, mask)
    maps = Explainer(model, "conv", average=Augment(intensities=(1.0,)))(IMAGES, target).maps
    flipped = plain(model, IMAGES.flip(-1), Region(1, mask.flip(-1))).flip(-1)
    torch.testing.assert_close(maps, (plain(model, IMAGES, target) + flipped) / 2)


def test_callables_need_a_tensor() -> None:
    class Record(Network):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"a": super().forward(x), "b": x}

    explainer = Explainer(Record(), "conv", output=lambda r: r, average=Smooth(2))
    with pytest.raises(ValueError, match=r"need a model output that is one tensor, got dict"):
        explainer(IMAGES, lambda record: record["a"][:, 0])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Smooth(0), "samples and together must be at least 1, got 0 and 4"),
        (lambda: Smooth(together=0), "samples and together must be at least 1, got 16 and 0"),
        (lambda: Smooth(std=-1), "std must be a share of the image's range, 0 or more, got -1"),
        (lambda: Smooth(std=float("nan")), "std must be .*got nan"),
        (lambda: Augment(intensities=()), "intensities must hold at least one factor"),
        (lambda: Augment(flips=(3,)), "flips must be spatial dimensions, from -1 to -3, got"),
    ],
)
def test_errors(build, message) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Smooth(samples=2.5), "samples must be an integer, got 2.5"),
        (lambda: Smooth(together="4"), "together must be an integer, got '4'"),
        (lambda: Augment(together=None), "together must be an integer, got None"),
        (lambda: Augment(flips=-1), "flips must be several integers, got -1"),
    ],
)
def test_errors_of_types(build, message) -> None:
    with pytest.raises(TypeError, match=message):
        build()


def test_channels_are_not_flipped() -> None:
    explainer = Explainer(Network(), "conv", average=Augment(flips=(-3,)))
    with pytest.raises(ValueError, match=r"from -1 to -2 for images \[3, 3, 10, 12\], got \(-3,\)"):
        explainer(IMAGES)
    video = torch.rand(1, 3, 2, 4, 4)
    assert torch.equal(Augment(flips=(-3,), intensities=(1.0,)).apply(video, 1), video.flip(-3))
