"""The metrics against cases worked out by hand, and against other libraries."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from gradcampp_ext import Explainer, metrics
from gradcampp_ext.imaging import Recipe
from gradcampp_ext.metrics import (
    agreement,
    confidence,
    localization,
    perturbation,
    randomization,
    road,
    streaming,
)
from gradcampp_ext.metrics.road import impute


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(5, 3, 24, 24, generator=torch.Generator().manual_seed(1)) * 4 - 2


def scaled(network: nn.Module) -> nn.Module:
    """The same with logits far apart, so that what is masked matters."""
    scaled = copy.deepcopy(network)
    with torch.no_grad():
        scaled[6].weight *= 40
    return scaled


# Confidence


def test_masked_is_the_product_and_fades_to_the_baseline(images):
    maps = torch.rand(5, 24, 24)
    torch.testing.assert_close(confidence.masked(images, maps), images * maps[:, None])
    recipe = Recipe((24, 24), "stretch", (24, 24))
    pixels = torch.randint(0, 256, (5, 24, 24, 3), dtype=torch.uint8)
    black = recipe.normalize(torch.zeros(1, 24, 24, 3, dtype=torch.uint8))
    mean, std = torch.tensor(recipe.mean), torch.tensor(recipe.std)
    product = maps[..., None] * pixels / 255
    expected = ((product - mean) / std).permute(0, 3, 1, 2)
    behind = confidence.masked(recipe.normalize(pixels), maps, black)
    torch.testing.assert_close(behind, expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="was size given to the op"):
        confidence.masked(images, maps[:, ::2, ::2])


def test_drop_increase_and_wins_by_hand():
    full, behind = torch.tensor([0.8, 0.5, 0.0, 0.4]), torch.tensor([0.2, 0.6, 0.3, 0.4])
    assert confidence.drop(full, behind).tolist() == pytest.approx([0.75, 0, 0, 0])
    assert confidence.increase(full, behind).tolist() == [False, True, True, False]
    wins = confidence.wins(torch.tensor([[0.5, 0.2, 0.5 + 1e-6]]))
    assert wins.tolist() == [[[False, True, False], [False, False, False], [False, True, False]]]
    drop = metrics.AverageDrop()
    drop.update(full, behind)
    assert float(drop.compute()) == pytest.approx(100 * 0.75 / 4)
    rate = metrics.WinRate(2)
    rate.update(torch.tensor([[0.5, 0.2], [0.1, 0.3], [0.4, 0.1], [0.3, 0.3]]))
    assert rate.compute().tolist() == [[0, 50], [25, 0]]


def test_torchcam_finds_the_same_drop_and_increase(network, images):
    """It divides by Y + 1e-7, tells shares, not percent, and explains the probability.

    The last because what `logits_fn` gives is what it differentiates; here that is done too.
    """
    torchcam_metrics = pytest.importorskip("torchcam.metrics")
    from torchcam.methods import GradCAM

    network = scaled(network)
    with GradCAM(network, target_layer=network[3]) as extractor:
        peer = torchcam_metrics.ClassificationMetric(extractor, lambda x: x.softmax(-1))
        peer.update(images)
        theirs = peer.summary()
    explainer = Explainer(network, network[3], "gradcam")
    explanation = explainer(images, lambda output: output.softmax(1).amax(1))
    behind = confidence.masked(images, explanation.maps[:, 0])
    with torch.no_grad():
        probabilities = network(behind).softmax(1)
    found = probabilities.gather(1, explanation.predicted[:, None])[:, 0]
    drop, increase = metrics.AverageDrop(), metrics.IncreaseInConfidence()
    drop.update(explanation.scores[:, 0], found)
    increase.update(explanation.scores[:, 0], found)
    assert theirs["avg_drop"] > 0.01
    assert float(drop.compute()) == pytest.approx(100 * theirs["avg_drop"], rel=1e-4)
    assert float(increase.compute()) == pytest.approx(100 * theirs["conf_increase"], rel=1e-4)


# Insertion and deletion


def test_ranks_and_schedule():
    maps = torch.tensor([[[0.5, 0.9], [0.5, 0.1]]])
    assert perturbation.ranks(maps).tolist() == [[[1, 0], [2, 3]]]
    assert perturbation.schedule(10, 4) == [0, 2, 5, 8, 10]
    assert perturbation.schedule(224 * 224, 224)[1] == 224
    with pytest.raises(ValueError, match="steps must be from 1 to the 4 pixels, got 5"):
        perturbation.schedule(4, 5)


def test_curves_of_a_linear_model_by_hand():
    """The score is the share of four pixels that are there: the best map marks just these."""
    weights = torch.zeros(4, 4)
    weights[1:3, 1:3] = 0.25
    image = torch.ones(1, 1, 4, 4)
    points = perturbation.schedule(16, 16)

    def curve(map_: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        places = perturbation.ranks(map_[None]).expand(17, -1, -1)
        inputs = perturbation.changed(before, after, places, torch.tensor(points))
        return (inputs[:, 0] * weights).sum((1, 2))[None]

    nothing = torch.zeros_like(image)
    deletion = {name: curve(map_, image, nothing) for name, map_ in
                (("best", weights), ("worst", -weights))}  # fmt: skip
    # perfect: 1, 3/4, 1/2, 1/4, 0, ...: areas 7/8 + 5/8 + 3/8 + 1/8 = 2 of 16 steps
    assert float(perturbation.area(deletion["best"], points)) == pytest.approx(2 / 16)
    assert float(perturbation.area(deletion["worst"], points)) == pytest.approx(14 / 16)
    insertion = metrics.Insertion(points)
    insertion.update(curve(weights, nothing, image))
    assert float(insertion.compute()) == pytest.approx(14 / 16)
    assert insertion.curve().tolist()[:5] == [0, 0.25, 0.5, 0.75, 1]
    with pytest.raises(ValueError, match="a value for each of the 17 points"):
        perturbation.area(torch.zeros(1, 3), points)


def test_blur_is_torchvisions(images):
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    expected = functional.gaussian_blur(images, [11, 11], [5.0, 5.0])
    torch.testing.assert_close(perturbation.blurred(images), expected)


def test_baselines(images):
    assert perturbation.baseline(images, "zero").eq(0).all()
    mean = perturbation.baseline(images, "mean").expand_as(images)
    torch.testing.assert_close(mean.mean((2, 3)), images.mean((2, 3)))
    black = perturbation.baseline(images, "black", torch.tensor([-1.0, -2.0, -3.0]))
    assert black.expand_as(images)[2, :, 4, 5].tolist() == [-1, -2, -3]
    with pytest.raises(ValueError, match="baseline must be one of zero, black, mean, blur"):
        perturbation.baseline(images, "white")
    with pytest.raises(ValueError, match="black must be given"):
        perturbation.baseline(images, "black")


# ROAD


@pytest.mark.parametrize("share", [0.1, 0.6, 0.95])
def test_imputation_is_that_of_pytorch_grad_cam(images, share):
    theirs = pytest.importorskip("pytorch_grad_cam.metrics.road")
    maps = nn.functional.interpolate(torch.rand(2, 1, 4, 4), (24, 30), mode="bilinear")[:, 0]
    wide = torch.rand(2, 3, 24, 30) * 4 - 2
    removed = perturbation.removal(maps, share, "morf")
    found = impute(wide, removed, noise=0, tolerance=1e-6)
    peer = theirs.NoisyLinearImputer(noise=0.0)
    for image, gone, own in zip(wide, removed, found, strict=True):
        torch.testing.assert_close(own, peer(image, (~gone).float()), atol=1e-3, rtol=0)


def test_imputed_noise_and_what_stays(images):
    removed = perturbation.removal(torch.rand(5, 24, 24), 0.5, "lerf")
    assert removed.flatten(1).sum(1).tolist() == [288] * 5
    smooth, noisy = impute(images, removed, noise=0), impute(images, removed, noise=0.1)
    kept = ~removed[:, None].expand_as(images)
    assert torch.equal(noisy[kept], images[kept])
    assert (noisy - smooth)[~kept].std() == pytest.approx(0.1, rel=0.1)
    assert torch.equal(noisy[2:3], impute(images[2:3], removed[2:3], noise=0.1))
    flat = torch.full((1, 3, 24, 24), 2.5)
    torch.testing.assert_close(impute(flat, removed[:1], noise=0), flat)
    with pytest.raises(ValueError, match="at least one pixel"):
        impute(images, torch.ones(5, 24, 24, dtype=torch.bool))
    with pytest.raises(ValueError, match="removed must be boolean"):
        impute(images, torch.ones(5, 24, 24))


def test_a_large_hole_is_filled_in_few_steps(monkeypatch):
    """In 45; without the corrections of whole cells it takes 153."""
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    removed = torch.ones(1, 64, 64, dtype=torch.bool)
    removed[:, :4] = False
    expected = impute(images, removed)
    monkeypatch.setattr(road, "_LIMIT", 52)
    assert torch.equal(impute(images, removed), expected)


def test_removal_of_either_end():
    maps = torch.arange(4.0).reshape(1, 2, 2)
    assert perturbation.removal(maps, 0.25, "morf").tolist() == [[[False, False], [False, True]]]
    assert perturbation.removal(maps, 0.25, "lerf").tolist() == [[[True, False], [False, False]]]
    for share, order, message in ((1.0, "morf", "share must be"), (0.5, "most", "order must be")):
        with pytest.raises(ValueError, match=message):
            perturbation.removal(maps, share, order)


# Localisation


def test_a_map_that_is_the_mask_is_perfect():
    boxes = [[(4, 6, 10, 12)], [(0, 0, 24, 24)], [(1.4, 2.6, 9, 20), (15, 15, 20, 20)]]
    masks = torch.stack([localization.box_mask(each, (24, 24)) for each in boxes])
    assert masks.flatten(1).sum(1).tolist() == [36, 576, 8 * 17 + 25]
    maps = masks.float()
    assert localization.overlap(maps, masks).tolist() == [[1, 1, 1]] * 3
    assert localization.energy(maps, masks).tolist() == [1, 1, 1]
    assert localization.pointing(maps, masks).tolist() == [True] * 3
    assert localization.box_overlap(maps, boxes).tolist()[:2] == [1, 1]
    common = 7.6 * 17  # of the map's 8 x 17 with the true 7.6 x 17.4
    expected = common / (8 * 17 + 7.6 * 17.4 - common)
    assert float(localization.box_overlap(maps, boxes)[2]) == pytest.approx(expected)
    nothing = torch.zeros_like(maps)
    assert localization.energy(nothing, masks).tolist() == [0, 0, 0]
    assert localization.overlap(nothing, masks).tolist() == [[0, 0, 0]] * 3
    assert localization.box_overlap(nothing, boxes).tolist() == [0, 0, 0]


def test_localisation_by_hand():
    mask = localization.box_mask([(0, 0, 2, 2)], (4, 4))[None]
    maps = torch.tensor([[[0.6, 0.2, 0, 0], [0, 0, 0.3, 0], [0, 0, 0.9, 0], [0, 0, 0, 0.1]]])
    # above 0: 2 inside, 3 outside, 4 in the box; above 0.25: 1 and 2; above 0.5: 1 and 1
    assert localization.overlap(maps, mask)[0].tolist() == pytest.approx([2 / 7, 1 / 6, 1 / 5])
    assert float(localization.energy(maps, mask)) == pytest.approx(0.8 / 2.1)
    # the maximum lies at row 2, column 2; the nearest pixel of the box at 1, 1
    for tolerance, hit in ((1.4, False), (1.42, True), (15, True)):
        assert localization.pointing(maps, mask, tolerance=tolerance).tolist() == [hit]
    # above 20 % of 0.9 all of 0.6, 0.2, 0.3, 0.9 touch: their box is 3 x 3
    assert float(localization.box_overlap(maps, [[(0, 0, 2, 2)]])) == pytest.approx(4 / 9)
    with pytest.raises(ValueError, match="masks must be boolean"):
        localization.energy(maps, mask.float())
    with pytest.raises(ValueError, match="each of the 1 maps"):
        localization.box_overlap(maps, [])


# Maps beside maps


def test_coherency_complexity_and_adcc_by_hand():
    maps = torch.tensor([[[0.0, 1.0], [0.5, 0.5]]]).repeat(3, 1, 1)
    again = torch.stack([maps[0] * 0.5 + 0.1, 1 - maps[0], torch.zeros(2, 2)])
    assert agreement.coherency(maps, again).tolist() == pytest.approx([1, 0, 0])
    assert agreement.complexity(maps).tolist() == [0.5] * 3
    found = agreement.adcc(*map(torch.tensor, ([0.5, 0.0], [0.5, 0.5], [0.8, 0.1])))
    assert found.tolist() == pytest.approx([3 / (2 + 2 + 5), 0])


def test_rank_correlation_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    a, b = torch.randint(0, 5, (2, 3, 6, 7)).float()  # many ties
    found = agreement.rank_correlation(a, b)
    for n in range(3):
        expected = stats.spearmanr(a[n].flatten(), b[n].flatten()).statistic
        assert float(found[n]) == pytest.approx(expected, abs=1e-12)
    assert agreement.rank_correlation(torch.zeros(1, 2, 2), torch.rand(1, 2, 2)).tolist() == [0]


def test_sensitivity_is_captums(network, images):
    sensitivity_max = pytest.importorskip("captum.metrics").sensitivity_max
    noises = torch.rand(4, *images.shape) * 0.4 - 0.2
    classes = torch.tensor([0, 1, 2, 3, 0])
    explainer = Explainer(network, network[3])

    def explain(inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        one = inputs[0] if isinstance(inputs, tuple) else inputs
        return (explainer(one, classes.repeat_interleave(len(one) // 5)).maps[:, 0],)

    def perturb(inputs: tuple[torch.Tensor]) -> torch.Tensor:
        return inputs + noises.transpose(0, 1).flatten(0, 1)

    theirs = sensitivity_max(explain, images, perturb_func=perturb, n_perturb_samples=4)
    maps = explainer(images, classes).maps[:, 0]
    noisy = torch.stack([explainer(images + noise, classes).maps[:, 0] for noise in noises])
    torch.testing.assert_close(agreement.sensitivity(maps, noisy), theirs)


def test_sensitivity_of_faint_and_empty_maps():
    """Relative to the map, however faint it is; a map that is zero everywhere is of norm 1."""
    maps = torch.zeros(2, 2, 2)
    maps[0, 0, 0] = 0.1
    noisy = torch.stack([maps, maps + 0.2])
    assert agreement.sensitivity(maps, noisy).tolist() == pytest.approx([4, 0.4])


# Randomisation


def test_cascade_takes_the_weights_from_the_top_and_leaves_the_model_alone(network, images):
    before = copy.deepcopy(network.state_dict())
    state = torch.random.get_rng_state()
    changed = []
    for stage, copied in randomization.cascade(network, count=3):
        different = [
            name for name, value in copied.state_dict().items()
            if not torch.equal(value, before[name])
        ]  # fmt: skip
        changed.append((stage.name, different))
    assert changed == [
        ("6", ["6.weight", "6.bias"]),
        ("2", ["2.weight", "2.bias", "6.weight", "6.bias"]),
        ("0", ["0.weight", "0.bias", "2.weight", "2.bias", "6.weight", "6.bias"]),
    ]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())
    assert [stage.layers for stage in randomization.stages(network, 2)] == [("6", "2"), ("0",)]
    with pytest.raises(ValueError, match="count must be from 1 to the 3 layers"):
        randomization.stages(network, 4)
    with pytest.raises(ValueError, match="no weights"):
        randomization.stages(nn.ReLU())


def test_seeds_of_cascades_share_no_weights():
    alike = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))

    def weights(seed: int) -> list[torch.Tensor]:
        stages = randomization.cascade(alike, seed=seed)
        return [dict(copied.named_modules())[stage.name].weight.clone() for stage, copied in stages]

    made = [weight for seed in (0, 1, 4096) for weight in weights(seed)]
    assert len({tuple(weight.flatten().tolist()) for weight in made}) == 9
    torch.testing.assert_close(weights(1), made[3:6], rtol=0, atol=0)


def test_parameters_of_layers_that_cannot_reset_themselves():
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.randn(1000) * 3 + 5)

    ((_, copied),) = randomization.cascade(token := Token())
    assert not torch.equal(copied.token, token.token)
    assert float(copied.token.detach().mean()) == pytest.approx(5, abs=0.5)
    assert float(copied.token.detach().std()) == pytest.approx(3, abs=0.5)


# Streaming

MAPS, MASKS = torch.rand(8, 10, 12), torch.rand(8, 10, 12) > 0.6
CURVE = torch.rand(8, 5)
STREAMING = [
    (metrics.AverageDrop, (), (torch.rand(8), torch.rand(8))),
    (metrics.IncreaseInConfidence, (), (torch.rand(8), torch.rand(8))),
    (metrics.WinRate, (3,), (torch.rand(8, 3),)),
    (metrics.Insertion, ([0, 30, 60, 90, 120],), (CURVE,)),
    (metrics.Deletion, ([0, 30, 60, 90, 120],), (CURVE,)),
    (metrics.Road, (), (CURVE, CURVE**2)),
    (metrics.PointingGame, (1,), (MAPS, MASKS)),
    (metrics.EnergyPointingGame, (), (MAPS, MASKS)),
    (metrics.Overlap, (), (MAPS, MASKS)),
    (metrics.BoxOverlap, (), (MAPS, [[(1, 2, 7, 6)]] * 8)),
    (metrics.Complexity, (), (MAPS,)),
    (metrics.Coherency, (), (MAPS, MAPS**3)),
    (metrics.AverageDCC, (), (MAPS, MAPS**3, torch.rand(8), torch.rand(8))),
    (metrics.MaxSensitivity, (), (MAPS, torch.stack([MAPS + 0.1, MAPS * 0.5]))),
    (metrics.RandomizationCheck, (2,), (MAPS, torch.rand(2, 8, 10, 12))),
]


@pytest.mark.parametrize(("kind", "arguments", "values"), STREAMING, ids=lambda v: None)
def test_halves_merge_into_the_whole(kind, arguments, values):
    def part(value: torch.Tensor, rows: slice) -> torch.Tensor:
        batched = isinstance(value, list) or len(value) == 8
        return value[rows] if batched else value[:, rows]

    whole, first, second = kind(*arguments), kind(*arguments), kind(*arguments)
    for value in range(0, 8, 2):
        whole.update(*(part(each, slice(value, value + 2)) for each in values))
    first.update(*(part(each, slice(3)) for each in values))
    second.update(*(part(each, slice(3, 8)) for each in values))
    first.merge_state(second)
    assert first.count == whole.count == 8
    torch.testing.assert_close(first.compute(), whole.compute())
    assert whole.compute().isfinite().all()
    restored = kind(*arguments)
    assert restored.count == 0
    whole.reset()
    assert whole.count == 0


def test_streaming_metrics_say_which_way_is_good():
    lower = {kind.__name__ for kind, _, _ in STREAMING if not kind.higher_is_better}
    assert lower == {
        "AverageDrop",
        "Deletion",
        "Complexity",
        "MaxSensitivity",
        "RandomizationCheck",
    }


def test_streaming_metrics_lose_no_small_values():
    metric = metrics.Complexity()
    for value in (2.0**24, 1.0, 1.0):  # float32 has no 2**24 + 1
        metric.update(torch.full((1, 1, 1), value))
    assert float(metric.compute()) == (2**24 + 2) / 3


def test_all_streaming_metrics_are_tested_and_exported():
    assert sorted(kind.__name__ for kind, _, _ in STREAMING) == sorted(metrics.__all__)
    kinds = vars(streaming).values()
    public = [
        k.__name__ for k in kinds if isinstance(k, type) and k.__module__ == streaming.__name__
    ]
    assert sorted(name for name in public if not name.startswith("_")) == sorted(metrics.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Drop'"):
        metrics.Drop  # noqa: B018


def test_a_wrong_shape_is_told():
    with pytest.raises(ValueError, match=r"WinRate takes one value of shape \[3, 3\] a sample"):
        metrics.WinRate(3).update(torch.rand(4, 2))
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert np.isnan(float(metrics.Complexity().compute()))
