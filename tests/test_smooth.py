"""Smooth Grad-CAM++ against the oracle, against Grad-CAM++, and through an explainer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import devices
from samples import DTYPES, LAYOUTS, TOLERANCE, error, make_pair
from torch import Tensor, nn

import gradcampp_ext as gx
from gradcampp_ext import reference


def copies_of(
    count: int, shape: tuple[int, ...], *, targets: int | None = None, **options
) -> tuple[Tensor, Tensor]:
    """Activations [N, C, *S], and gradients [M * N, C, *S] or [M * N, K, C, *S] that differ."""
    a, _ = make_pair(shape, **options)
    _, g = make_pair((count * shape[0], *shape[1:]), targets=targets, **options)
    return a, g


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_weights_and_maps_match_the_oracle(device, dtype, layout):
    for shape, targets in [
        ((2, 40, 7, 5), None),
        ((1, 130, 6, 6), 3),
        ((3, 5, 33), None),
        ((2, 17, 2, 3, 4), 2),
    ]:
        a, g = copies_of(5, shape, targets=targets, dtype=dtype, layout=layout, device=device)
        sums = gx.PowerSums(a)
        for part in (g[: 2 * shape[0]], g[2 * shape[0] :]):  # two copies, then three
            sums.add(part)
        assert sums.copies == 5
        for rectify, eps in [(True, 0.0), (False, 0.0), (True, 1e-8)]:
            expected = reference.smooth_weights(
                a, g.unflatten(0, (5, -1)), rectify=rectify, eps=eps
            )
            weights = sums.channel_weights(rectify=rectify, eps=eps)
            assert weights.shape == expected.shape
            assert error(weights, expected) <= (1e-12 if dtype == torch.float64 else 2e-7)
            spread = expected.reshape(*expected.shape, *[1] * (len(shape) - 2))
            maps = sums.cam(normalize=None, rectify=rectify, eps=eps)
            shown = a.double().relu() if targets is None else a.double().relu().unsqueeze(1)
            by_hand = (spread * shown).sum(-len(shape) + 1).relu()
            assert error(maps, by_hand) <= TOLERANCE[dtype]


@pytest.mark.parametrize("device", devices())
def test_copies_that_are_alike_give_gradcampp(device):
    a, g = make_pair((2, 24, 9, 9), targets=2, device=device)
    sums = gx.PowerSums(a)
    sums.add(torch.cat([g] * 3))
    options = {"size": (20, 30), "normalize": "max", "interpolation": "nearest"}
    assert error(sums.cam(**options), reference.cam(a, g, **options)) <= 2e-6
    assert error(sums.channel_weights(), reference.channel_weights(a, g)) <= 1e-6


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("exponent", [-30, -20, 0, 20, 30])
def test_gradients_of_any_scale(device, exponent):
    a, g = copies_of(4, (2, 30, 6, 6), device=device)
    g = g * 10.0**exponent
    sums = gx.PowerSums(a)
    sums.add(g)
    weights = sums.channel_weights()
    assert weights.isfinite().all()
    assert error(weights, reference.smooth_weights(a, g.unflatten(0, (4, 2)))) <= 1e-6
    assert sums.cam().isfinite().all()


def test_a_negative_third_power_has_no_pole_unless_asked_for():
    a = torch.ones(1, 1, 2, 2)  # S = 4
    values = torch.tensor([2.0, 2.0, 2.0, -4.5])  # M1 > 0, M3 < 0
    g = values.reshape(4, 1, 1, 1).expand(4, 1, 2, 2)
    sums = gx.PowerSums(a)
    sums.add(g)
    m1, m2, m3 = (values.pow(power).mean().item() for power in (1, 2, 3))
    assert sums.channel_weights().item() == pytest.approx(4 * m1 / 2)
    literal = sums.channel_weights(rectify=False).item()
    assert literal == pytest.approx(4 * m1 * m2 / (2 * m2 + 4 * m3), rel=1e-6)
    assert literal < 0
    assert sums.channel_weights(rectify=np.False_).item() == literal
    assert torch.equal(
        sums.cam(rectify=np.False_, relu=False, normalize=None),
        sums.cam(rectify=False, relu=False, normalize=None),
    )
    for call in (sums.channel_weights, sums.cam):
        with pytest.raises(TypeError, match="rectify must be True or False, got 0"):
            call(rectify=0)


@pytest.mark.parametrize("device", devices())
def test_expanded_gradients_are_kept_as_one_value(device):
    a, _ = make_pair((2, 20, 6, 5), device=device)
    values = torch.randn(3 * 2, 4, 20, 1, 1, device=device) / 30
    g = values.expand(-1, -1, -1, 6, 5)
    expected = reference.smooth_weights(a, g.unflatten(0, (3, 2)))
    sums = gx.PowerSums(a)
    sums.add(g)
    assert sums._sums.shape == (3, 2, 4, 20, 1, 1)
    assert error(sums.channel_weights(), expected) <= 1e-6
    for first, rest in [(g[:2], g[2:].contiguous()), (g[:2].contiguous(), g[2:])]:
        mixed = gx.PowerSums(a)
        mixed.add(first)
        mixed.add(rest)
        assert error(mixed.channel_weights(), expected) <= 1e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_value_spoils_its_own_map(bad):
    for place in ("activations", "gradients"):
        a, g = copies_of(3, (2, 20, 5, 5), targets=2)
        g[:, :, 7] = -g[:, :, 7].abs()  # a ReLU could hide it
        (a[1, 7, 2, 3] if place == "activations" else g[3, 0, 7, 2, 3]).fill_(bad)
        sums = gx.PowerSums(a)
        sums.add(g)
        maps = sums.cam()
        assert maps[1, 0].isnan().all()
        assert maps[1, 1].isnan().all() == (place == "activations")
        assert maps[0].isfinite().all()


def test_the_same_bits_whatever_the_threads_are():
    a, g = copies_of(4, (3, 64, 14, 14))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            sums = gx.PowerSums(a)
            sums.add(g)
            results.append(sums.channel_weights())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_empty_batch() -> None:
    sums = gx.PowerSums(torch.ones(0, 5, 4, 4))
    sums.add(torch.ones(0, 5, 4, 4))
    assert sums.cam(size=(8, 8)).shape == (0, 8, 8)


@pytest.mark.parametrize("device", devices())
def test_opcheck(device):
    a, g = copies_of(2, (2, 5, 4, 3), targets=2, device=device)
    sums = torch.zeros(3, 2, 2, 5, 4, 3, dtype=torch.float64, device=device)
    op = torch.ops.gradcampp_ext
    torch.library.opcheck(op.add_powers.default, (sums, g.unflatten(0, (2, 2))))
    torch.library.opcheck(op.power_weights.default, (a, sums, 2, True, 0.0))


@pytest.mark.parametrize(
    ("gradients", "kind", "words"),
    [
        (None, TypeError, "gradients must be a torch.Tensor, got NoneType"),
        (torch.ones(3, 5, 4, 4), ValueError, "whole copies of the 2 images"),
        (torch.ones(2, 5, 4, 3), ValueError, "did the layer run twice"),
        (torch.ones(2, 5, 4, 4).half(), TypeError, "dtype of activations"),
        (torch.ones(2, 3, 5, 4, 4), ValueError, "of 2 targets as those before, got 3"),
        (torch.ones(2, 5, 4, 4), ValueError, "of 2 targets as those before, got 1"),
    ],
)
def test_bad_gradients_are_explained(gradients, kind, words):
    sums = gx.PowerSums(torch.ones(2, 5, 4, 4))
    with pytest.raises(ValueError, match="no gradients were added"):
        sums.cam()
    sums.add(torch.ones(2, 2, 5, 4, 4))
    with pytest.raises(kind, match=words):
        sums.add(gradients)
    assert sums.copies == 1


@pytest.mark.parametrize(
    ("activations", "kind", "words"),
    [
        (None, TypeError, "activations must be a torch.Tensor, got NoneType"),
        (torch.ones(2, 5), ValueError, "one to three spatial sizes"),
    ],
)
def test_bad_activations_are_explained(activations, kind, words):
    with pytest.raises(kind, match=words):
        gx.PowerSums(activations)


class Network(nn.Module):
    """Two layers after ``conv``, so that its gradients change with the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.late, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)
        self.batches: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.batches.append(len(x))
        return self.head(self.late(self.conv(x).relu()).relu().mean((2, 3)))


IMAGES = torch.randn(3, 3, 10, 12, generator=torch.Generator().manual_seed(0))


def by_autograd(model: Network, images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Activations of ``conv`` and gradients [N, K, C, *S], by plain autograd."""
    a = model.conv(images).detach().requires_grad_()
    output = model.head(model.late(a.relu()).relu().mean((2, 3)))
    scores = output.gather(1, classes).sum(0)
    return a.detach(), torch.stack(
        [torch.autograd.grad(score, a, retain_graph=True)[0] for score in scores], 1
    )


@pytest.mark.parametrize("together", [1, 2, 5, 8])
def test_explainer_equals_the_oracle_on_the_same_noise(together):
    model = Network()
    noise = gx.Smooth(5, std=0.3, seed=3, together=together, powers=True)
    explanation = gx.Explainer(model, "conv", average=noise)(IMAGES, topk=2)
    counts = [min(together, 5 - first) for first in range(0, 5, together)]
    assert model.batches == [3, *(3 * count for count in counts)]

    plain = gx.Explainer(model, "conv")(IMAGES, topk=2)
    for name in ("targets", "scores", "probabilities", "predicted"):
        assert torch.equal(getattr(explanation, name), getattr(plain, name))
    assert not explanation.scores.requires_grad
    a, _ = by_autograd(model, IMAGES, plain.targets)
    gradients = torch.stack(
        [by_autograd(model, noise.apply(IMAGES, m), plain.targets)[1] for m in range(5)]
    )
    weights = reference.smooth_weights(a, gradients)
    raw = torch.einsum("nkc,nchw->nkhw", weights, a.double().relu())
    low, high = raw.amin((2, 3), keepdim=True), raw.amax((2, 3), keepdim=True)
    expected = nn.functional.interpolate((raw - low) / (high - low), (10, 12), mode="bilinear")
    torch.testing.assert_close(explanation.maps.double(), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(explanation.maps, plain.maps, atol=1e-3)


def test_without_noise_it_is_gradcampp():
    model = Network()
    noise = gx.Smooth(3, std=0.0, powers=True)
    for layer in ("conv", ["conv", "late"]):
        smooth = gx.Explainer(model, layer, average=noise, normalize=None)(IMAGES, topk=2)
        plain = gx.Explainer(model, layer, normalize=None)(IMAGES, topk=2)
        torch.testing.assert_close(smooth.maps, plain.maps, rtol=1e-5, atol=1e-9)


def test_the_seed_is_the_noise():
    model = Network()

    def maps(seed: int) -> Tensor:
        noise = gx.Smooth(2, seed=seed, powers=True)
        return gx.Explainer(model, "conv", average=noise)(IMAGES, 1).maps

    assert torch.equal(maps(1), maps(1))
    assert not torch.allclose(maps(1), maps(10), atol=1e-4)


def test_memory_does_not_grow_with_the_copies():
    a, g = copies_of(6, (2, 20, 6, 5))
    sums = gx.PowerSums(a)
    sums.add(g[:2])
    kept = sums._sums
    sums.add(g[2:])
    assert sums._sums is kept
    assert kept.untyped_storage().nbytes() == 3 * 8 * g[:2].numel()


def test_callable_targets():
    model = Network()
    noise = gx.Smooth(4, powers=True)
    explainer = gx.Explainer(model, "conv", average=noise)
    by_class = explainer(IMAGES, 2).maps
    torch.testing.assert_close(explainer(IMAGES, lambda output: output[:, 2]).maps, by_class)


def test_other_methods_are_refused():
    with pytest.raises(ValueError, match=r"needs method 'gradcampp', got 'layercam'"):
        gx.Explainer(Network(), "conv", "layercam", average=gx.Smooth(powers=True))


def test_one_target_may_be_given_with_and_without_its_dimension():
    activations, gradients = make_pair((2, 5, 4, 4), dtype=torch.float64)
    sums, whole = gx.PowerSums(activations), gx.PowerSums(activations)
    sums.add(gradients.unsqueeze(1))
    sums.add(gradients)
    whole.add(torch.cat([gradients, gradients]).unsqueeze(1))
    torch.testing.assert_close(sums.cam(), whole.cam())
