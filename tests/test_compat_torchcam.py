"""torchcam's classes and ours side by side, Grad-CAM++ against the oracle, torchcam's manners."""

from __future__ import annotations

import logging
import weakref
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from operator import itemgetter
from typing import Any

import pytest
import torch
from peers import Small, demo, distance, photographs
from torch import Tensor, nn

from gradcampp_ext import recompute, reference

peer = pytest.importorskip("torchcam.methods")
torchvision = pytest.importorskip("torchvision")

from gradcampp_ext.compat import torchcam as ours  # noqa: E402

SAME = ("GradCAM", "XGradCAM", "LayerCAM")  # where the peer is right
ALL = (*SAME, "GradCAMpp", "SmoothGradCAMpp")
IMAGES = torch.randn(3, 3, 16, 20, generator=torch.Generator().manual_seed(0))


def maps(library: Any, name: str, model: nn.Module, layer: Any, images: Tensor, **call: Any) -> Any:
    options = call.pop("options", {})
    if "targets" not in call:
        call.setdefault("class_idx", 1)
    with getattr(library, name)(model, layer, **options) as extractor:
        return extractor(scores=model(images), **call)


def both(*args: Any, **kwargs: Any) -> list[tuple[Tensor, Tensor]]:
    """Maps of each layer, ours and the peer's."""
    return list(zip(maps(ours, *args, **kwargs), maps(peer, *args, **kwargs), strict=True))


def captured(model: nn.Module, layer: str, images: Tensor, target: int) -> tuple[Tensor, Tensor]:
    """Activations and gradients by plain autograd."""
    kept: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda *args: kept.append(args[2]))
    scores = model(images)[:, target].sum()
    handle.remove()
    return kept[0].detach(), torch.autograd.grad(scores, kept)[0]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# maps


@pytest.mark.parametrize("name", SAME)
def test_demo_network_on_photographs(name: str) -> None:
    layers = ["_blocks.4", "_conv_head"]
    for found, expected in both(
        name, demo().model, layers, photographs(), class_idx=[285, 504, 657]
    ):
        assert distance(found, expected) < 1e-4


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return torchvision.models.resnet18(weights=None).eval()


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("normalized", [True, False])
def test_torchvision_network(resnet: nn.Module, name: str, normalized: bool) -> None:
    layers, images = [resnet.layer2, "layer4"], photographs()[:2]
    pairs = both(name, resnet, layers, images, class_idx=7, normalized=normalized)
    for found, expected in pairs:
        assert found.dtype == torch.float32
        assert distance(found, expected) < 1e-4


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 4])
def test_dimensions_and_batches(name: str, dims: int, batch: int) -> None:
    model, images = Small(dims).eval(), torch.randn(batch, 3, *[8, 6, 4][:dims])
    for found, expected in both(name, model, ["early", "late"], images, normalized=False):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", SAME)
def test_tokens(name: str) -> None:
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 24, num_classes=5).eval()
    nn.init.normal_(model.heads.head.weight)

    def grid(tokens: Tensor) -> Tensor:
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4)) * 1.5

    layer = "encoder.layers.encoder_layer_1.ln_1"
    images = torch.randn(2, 3, 32, 32)
    options = {"reshape_transform": grid}
    for found, expected in both(name, model, layer, images, options=options):
        assert found.shape == (2, 4, 4)
        assert distance(found, expected) < 1e-4


@pytest.mark.parametrize("name", SAME)
def test_in_place_operations_behind_the_layer(name: str) -> None:
    """What an in-place ReLU makes of the layer's output is explained, as torchcam does."""
    model = Small(inplace=True).eval()
    found, expected = both(name, model, "late", IMAGES, normalized=False)[0]
    torch.testing.assert_close(found, expected)
    separate = Small().eval()
    separate.load_state_dict(model.state_dict())
    torch.testing.assert_close(
        found, maps(ours, name, separate, "relu", IMAGES, class_idx=1, normalized=False)[0]
    )


@pytest.mark.parametrize("layer", ["_blocks.10", "_conv_head"])
def test_gradcampp_is_the_papers_on_photographs(layer: str) -> None:
    model, images = demo().model, photographs()
    a, g = captured(model, layer, images, 285)
    expected = reference.cam(a.double(), g.double())
    assert (
        distance(maps(ours, "GradCAMpp", model, layer, images, class_idx=285)[0], expected) < 1e-4
    )


def test_released_torchcam_loses_the_denominator() -> None:
    """Its weights are the sum of relu(g)^3: alpha is divided in a copy that is thrown away."""
    model = Small().double().eval()
    images = IMAGES.double()
    with peer.GradCAMpp(model, "late") as extractor:
        theirs = extractor._get_weights(1, model(images))[0]
    a, g = captured(model, "late", images, 1)
    torch.testing.assert_close(theirs, (g.relu() ** 3).sum((2, 3)))
    with ours.GradCAMpp(model, "late") as extractor:
        weights = extractor._get_weights(1, model(images))[0]
    torch.testing.assert_close(weights, reference.channel_weights(a, g))
    cosine = torch.nn.functional.cosine_similarity(theirs, weights)
    assert (cosine < 0.99).all()


def test_eps() -> None:
    model = Small().double().eval()
    a, g = captured(model, "late", IMAGES.double(), 1)
    found = maps(ours, "GradCAMpp", model, "late", IMAGES.double(), class_idx=1, eps=1e-3)[0]
    torch.testing.assert_close(found, reference.cam(a, g, eps=1e-3))
    with pytest.raises(ValueError, match="'gradcam' has no epsilon"):
        maps(ours, "GradCAM", model, "late", IMAGES.double(), class_idx=1, eps=1e-3)


@pytest.mark.parametrize("normalized", [True, False])
def test_smooth_gradcampp(normalized: bool) -> None:
    """Moments over copies with the noise that torchcam would draw, activations without noise."""
    model = Small().double().eval()
    images = IMAGES.double()
    with ours.SmoothGradCAMpp(model, "late", num_samples=3, std=0.5) as extractor:
        model(images)
        kept = extractor.hook_a[0], extractor._hook_outputs[0]
        torch.manual_seed(1)
        found = extractor(1, normalized=normalized)[0]
        assert kept[0] is extractor.hook_a[0]
        assert kept[1] is extractor._hook_outputs[0]
    torch.manual_seed(1)
    a = captured(model, "late", images, 1)[0]
    noise = [
        torch.normal(torch.zeros(images.shape), 0.5 * torch.ones(images.shape)) for _ in range(3)
    ]
    g = torch.stack([captured(model, "late", images + n.double(), 1)[1] for n in noise])
    weights = reference.smooth_weights(a, g)
    expected = (weights[:, :, None, None] * a.relu()).sum(1)
    if normalized:
        low, high = (getattr(expected, f)((1, 2), keepdim=True) for f in ("amin", "amax"))
        expected = (expected - low) / (high - low)
    torch.testing.assert_close(found, expected)


def test_smooth_gradcampp_keeps_its_state_after_an_error() -> None:
    model = Small().eval()
    with ours.SmoothGradCAMpp(model, "late") as extractor:
        model(IMAGES)
        kept = extractor.hook_a[0]
        with extractor._hooks_off():
            model(torch.zeros(1, 3, 8, 8))
        assert torch.equal(extractor._input, IMAGES)
        with pytest.raises(RuntimeError, match="not connected"):
            extractor(targets=lambda scores: scores[0].detach())
        assert extractor.hook_a[0] is kept
        assert extractor._ihook_enabled
        with torch.no_grad():
            assert extractor(1)[0].shape == (3, 8, 10)


@pytest.mark.parametrize("name", SAME)
def test_samples_that_are_not_finite(name: str) -> None:
    model, images = Small().eval(), IMAGES.clone()
    expected = maps(ours, name, model, "late", images)[0]
    images[1, 0, 3, 3] = float("nan")
    found = maps(ours, name, model, "late", images)[0]
    assert found[1].isnan().all()
    assert torch.equal(found[::2], expected[::2])


# manners


@pytest.mark.parametrize("name", ALL)
def test_as_many_hooks_on_layers_as_torchcam_has(name: str) -> None:
    model = Small().eval()
    counts = []
    for module in (ours, peer):
        with getattr(module, name)(model, ["early", "late"]):
            counts.append([len(layer._forward_hooks) for layer in (model.early, model.late)])
    assert counts[0] == counts[1] == [2, 2]


@pytest.mark.parametrize("name", ALL)
def test_hooks_and_context(name: str) -> None:
    model = Small().eval()
    with getattr(ours, name)(model, "late") as extractor:
        assert hooks(model)
        with pytest.raises(AssertionError, match="Inputs need to be forwarded"):
            extractor(1, torch.zeros(1, 5))
        extractor.disable_hooks()
        model(IMAGES)
        assert extractor.hook_a == [None]
        extractor.enable_hooks()
        scores = model(IMAGES)
        extractor(1, scores)
        extractor.reset_hooks()
        assert extractor.hook_a == extractor.hook_g == [None]
        with pytest.raises(RuntimeError, match="size"):
            model(torch.zeros(1, 9, 8, 8))
        assert recompute._current() is None
    assert hooks(model) == 0
    assert extractor.hook_handles == []
    with pytest.raises(ZeroDivisionError), getattr(ours, name)(model, "late"):
        _ = 1 // 0
    assert hooks(model) == 0
    for layer in ("lat", 3, [3], nn.ReLU()):
        with pytest.raises((TypeError, ValueError)):
            getattr(ours, name)(model, layer)
    assert hooks(model) == 0


def test_constructor_errors_name_close_layers() -> None:
    with pytest.raises(ValueError, match=r"unknown `target_layer` names: \['lat'\].*'late'"):
        ours.GradCAM(Small(), "lat")


@pytest.mark.parametrize("name", ALL)
def test_layer_found_and_repr(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = Small()
    with (
        caplog.at_level(logging.WARNING),
        getattr(ours, name)(model, input_shape=(3, 16, 16)) as found,
        getattr(peer, name)(model, input_shape=(3, 16, 16)) as expected,
    ):
        assert repr(found) == repr(expected)
        assert found.target_names == expected.target_names == ["relu"]
    assert "no value was provided for `target_layer`" in caplog.text
    assert all(module.training for module in model.modules())
    with getattr(ours, name)(model, [model.early, "late"]) as found:
        assert found.target_names == ["early", "late"]
        assert "target_layer=['early', 'late']" in repr(found)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ({"class_idx": -1}, ValueError),
        ({"class_idx": [0, -1, 0]}, ValueError),
        ({"class_idx": [0, 1]}, ValueError),
        ({"class_idx": "cat"}, ValueError),
        ({}, ValueError),
        ({"class_idx": 1, "scores": None}, ValueError),
        ({"class_idx": 1, "scores": "scores"}, TypeError),
        ({"class_idx": 1, "targets": itemgetter(1)}, ValueError),
        ({"targets": [itemgetter(1)]}, ValueError),
        ({"targets": [1, 2, 3]}, TypeError),
        ({"class_idx": 1, "scores": torch.zeros(3, 5)}, RuntimeError),
        ({"class_idx": 9}, IndexError),
    ],
)
def test_call_errors_are_torchcams(call: dict[str, Any], error: type[Exception]) -> None:
    model = Small().eval()
    messages = []
    for library in (ours, peer):
        with library.GradCAM(model, "late") as extractor:
            scores = model(IMAGES)
            with pytest.raises(error) as raised:
                extractor(**{"scores": scores, **call})
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("name", SAME)
def test_targets(name: str) -> None:
    model = Small().eval()
    by_class = maps(ours, name, model, "late", IMAGES, class_idx=[1, 2, 0])[0]
    getters = [itemgetter(1), itemgetter(2), itemgetter(0)]
    found, expected = both(name, model, "late", IMAGES, targets=getters)[0]
    torch.testing.assert_close(found, by_class)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_call_forms_and_retained_graph() -> None:
    model = Small().eval()
    with ours.GradCAMpp(model, ["early", "late"]) as extractor:
        scores = model(IMAGES)
        first = extractor(1, scores, retain_graph=True)
        again = extractor(class_idx=[1, 1, 1], scores=scores, normalized=True, retain_graph=True)
        raw = extractor(1, scores, False)
        assert [one.shape for one in first] == [(3, 8, 10)] * 2
        for one, two, three in zip(first, again, raw, strict=True):
            assert torch.equal(one, two)
            assert not one.requires_grad
            assert one.amax() == 1
            assert three.amax() != 1
        with pytest.raises(RuntimeError, match="target score is not connected"):
            extractor(1, scores)
        assert torch.equal(extractor(1, model(IMAGES))[0], first[0])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ALL)
def test_frozen_and_training_models(name: str) -> None:
    model = Small().requires_grad_(False)
    images = IMAGES.clone().requires_grad_()
    for training in (True, False):
        found = maps(ours, name, model.train(training), "late", images, class_idx=1)[0]
        assert found.isfinite().all()
        assert model.training is training
        assert images.grad is None
    with ours.GradCAM(model, "late") as extractor:
        scores = model(IMAGES)
        assert not scores.requires_grad
        with pytest.raises(RuntimeError, match="not connected to every target layer"):
            extractor(1, scores)


def test_fuse_cams() -> None:
    cams = [torch.rand(2, 4, 6), torch.rand(2, 8, 12)]
    for name in ALL:
        mine, theirs = getattr(ours, name), getattr(peer, name)
        assert mine.fuse_cams(cams[:1]) is cams[0]
        assert torch.equal(mine.fuse_cams(cams), theirs.fuse_cams(cams))
        assert torch.equal(mine.fuse_cams(cams, (3, 5)), theirs.fuse_cams(cams, (3, 5)))
        with pytest.raises(TypeError):
            mine.fuse_cams(cams[0])
        with pytest.raises(ValueError, match="empty"):
            mine.fuse_cams([])


def test_subclasses_with_weights_of_their_own() -> None:
    class Signs(ours.GradCAM):
        def _get_weights(self, class_idx: Any, scores: Any, **kwargs: Any) -> list[Tensor]:
            self._backprop(scores, class_idx, **kwargs)
            return [g.sign().mean((2, 3)) for g in self.hook_g]

    class Further(Signs):
        pass

    model = Small().eval()
    a, g = captured(model, "late", IMAGES, 1)
    expected = (g.sign().mean((2, 3), keepdim=True) * a).sum(1).relu()
    for kind in (Signs, Further):
        with kind(model, "late") as extractor:
            found = extractor(1, model(IMAGES), normalized=False)[0]
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ALL)
def test_torchcam_around_them(name: str) -> None:
    from torchcam.explain import explain
    from torchcam.metrics import ClassificationMetric, DeletionInsertionMetric

    kind, model = getattr(ours, name), Small().eval()
    assert issubclass(kind, getattr(peer, name))
    explanation = explain(model, IMAGES[:1], method=kind, target_layer="late", expected_class_idx=3)
    assert set(explanation.cams) == {3, explanation.predicted_class_idx}
    with peer.RefineCAM(model, ["early", "late"], base_method=kind) as extractor:
        assert extractor(1, model(IMAGES))[0].shape == (3, 8, 10)
    softmax = partial(torch.softmax, dim=-1)
    with kind(model, "late") as extractor:
        for metric in (ClassificationMetric, DeletionInsertionMetric):
            measured = metric(extractor, softmax)
            measured.update(IMAGES)
            assert len(measured.summary()) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    model = Small().to(dtype).eval()
    for name in ALL:
        found = maps(ours, name, model, "late", IMAGES.to(dtype), class_idx=1)[0]
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert found.isfinite().all()


def test_layers_without_space() -> None:
    with pytest.raises(ValueError, match="activations must be"):
        maps(ours, "GradCAM", Small().eval(), "head", IMAGES, class_idx=1)


# forward passes that keep nothing below the layer


class Deep(nn.Module):
    """Convolutions with what can go wrong: in-place operations, a skip, noise, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.second, self.third = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(6, 5)
        self.runs = 0

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        self.runs += 1
        x = self.relu(self.norm(self.first(x))) * torch.rand(x.shape[-1]).exp()
        y = self.relu(self.second(x).tanh() * scale)
        y = self.third(nn.functional.dropout(y, 0.3))
        y += x
        return self.head(self.relu(y).mean((2, 3)))


def gradients(model: nn.Module, images: Tensor, layer: Any, after_exit: bool) -> list[Tensor]:
    """Of a loss by parameters and images, with an extractor's hooks or (layer None) without."""
    torch.manual_seed(3)
    inputs = [*model.parameters(), images]
    with ExitStack() as hooked:
        if layer is not None:
            extractor = hooked.enter_context(ours.GradCAMpp(model, layer))
        scores = model(images, scale=0.7)
        if layer is not None:
            extractor(1, scores, retain_graph=True)
        if after_exit:
            hooked.close()
        return list(torch.autograd.grad(scores.square().sum(), inputs))


@pytest.mark.parametrize("layer", ["first", "relu", "second", ["third", "norm"]])
@pytest.mark.parametrize("after_exit", [False, True])
def test_other_gradients_are_exact(layer: Any, after_exit: bool) -> None:
    model, images = Deep().eval(), IMAGES.clone().requires_grad_()
    expected = gradients(model, images, None, after_exit)
    found = gradients(model, images, layer, after_exit)
    assert all(map(torch.equal, found, expected))
    assert model.runs == 3


def test_second_run_under_the_autocast_of_the_first() -> None:
    model, images = Small().eval(), IMAGES.clone().requires_grad_()

    def slope(extractor: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            scores = model(images)
            assert scores.dtype == torch.bfloat16
            if extractor:
                assert extractor(1, scores, retain_graph=True)[0].dtype == torch.float32
        return torch.autograd.grad(scores.float().sum(), images)[0]

    expected = slope(None)
    with ours.GradCAM(model, "late") as extractor:
        assert torch.equal(slope(extractor), expected)
    assert model.runs == 3


def test_second_run_only_where_needed() -> None:
    model = Deep().eval()
    with ours.GradCAM(model, "third") as extractor:
        scores = model(IMAGES)
        extractor(1, scores, retain_graph=True)
        assert model.runs == 1
        head = torch.autograd.grad(scores.sum(), model.head.weight, retain_graph=True)
        assert head[0].isfinite().all()
        assert model.runs == 1
        kept = extractor.hook_a[0]
        scores.sum().backward(retain_graph=True)
        scores.sum().backward()
        assert model.runs == 2
        assert extractor.hook_a[0] is kept
    plain = deepcopy(model).train()
    plain.runs = 0
    with ours.GradCAM(plain, "third"):
        plain(IMAGES).sum().backward()
    assert plain.runs == 1


def test_second_runs_are_not_heard_by_other_extractors() -> None:
    model = Deep().eval()
    with ours.GradCAM(model, "third"):
        scores = model(IMAGES)
    with ours.SmoothGradCAMpp(model, "first") as other:
        model(torch.zeros_like(IMAGES))
        kept = other.hook_a[0], other._hook_outputs[0], other._input
        scores.sum().backward()
        assert model.runs == 3
        found = other.hook_a[0], other._hook_outputs[0], other._input
        assert all(one is two for one, two in zip(found, kept, strict=True))


def test_nothing_is_kept_below_the_layer() -> None:
    kept: list[weakref.ref[Tensor]] = []

    class Watched(Small):
        def forward(self, x: Tensor) -> Tensor:
            y = x + 1
            kept.append(weakref.ref(y))
            return super().forward(y.sin())  # whose graph keeps y

    model, images = Watched().eval(), IMAGES.clone().requires_grad_()
    scores = model(images)
    assert kept[-1]() is not None
    with ours.GradCAM(model, "late"):
        scores = model(images)
        assert kept[-1]() is None
        scores.sum().backward()


def test_changes_in_between_are_errors() -> None:
    model = Deep().eval()
    with ours.GradCAM(model, "third"):
        scores = model(IMAGES)
        with torch.no_grad():
            model.first.weight.add_(1)
        with pytest.raises(RuntimeError, match="a parameter, a buffer or the input was changed"):
            scores.sum().backward()
    assert recompute._current() is None

    class Fickle(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[..., self.runs :] if self.runs else x)

    fickle = Fickle().eval()
    with ours.GradCAM(fickle, "late"):
        scores = fickle(IMAGES)
        with pytest.raises(RuntimeError, match="saved other tensors than the first"):
            scores.sum().backward()
    assert recompute._current() is None

    class Wrong(Small):
        def forward(self, x: Tensor) -> Tensor:
            y = self.late(self.early(x)).exp()
            scores = y.mean((2, 3))
            y.add_(1)
            return scores

    model = Wrong().eval()
    with ours.GradCAM(model, "late") as extractor:
        scores = model(IMAGES)
        with pytest.raises(RuntimeError) as raised:
            extractor(1, scores)
    assert "in-place operation" in str(raised.value.__cause__)


def test_interrupted_passes_leave_nothing() -> None:
    model = Small().eval()
    extractor = ours.GradCAM(model, "late")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.late.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(IMAGES)
    handle.remove()
    other = Small()
    other(IMAGES).sum().backward()  # not this model's business
    expected = [p.grad for p in other.parameters()]
    extractor(1, model(IMAGES))
    extractor.remove_hooks()
    assert recompute._current() is None
    other.zero_grad()
    other(IMAGES).sum().backward()
    assert all(map(torch.equal, expected, (p.grad for p in other.parameters())))


def test_two_extractors_on_one_model() -> None:
    model = Small().eval()
    with ours.GradCAM(model, "late") as late, ours.GradCAM(model, "early") as early:
        scores = model(IMAGES)
        found = [early(1, scores, retain_graph=True)[0], late(1, scores)[0]]
        assert model.runs == 1
    for layer, one in zip(("early", "late"), found, strict=True):
        assert torch.equal(one, maps(ours, "GradCAM", model, layer, IMAGES)[0])


def test_higher_derivatives_and_functional_transforms() -> None:
    model, images = Deep().eval(), IMAGES.clone().requires_grad_()

    def penalty() -> Tensor:
        torch.manual_seed(0)
        slope = torch.autograd.grad(model(images).sum(), images, create_graph=True)[0]
        return torch.autograd.grad(slope.square().sum(), model.first.weight)[0]

    expected = penalty()
    with ours.GradCAM(model, "third"):
        torch.testing.assert_close(penalty(), expected)
        torch.manual_seed(0)
        slope = torch.func.grad(lambda x: model(x).sum())(IMAGES)
    torch.manual_seed(0)
    torch.testing.assert_close(slope, torch.autograd.grad(model(images).sum(), images)[0])


def test_what_is_no_gradient_method_is_torchcams() -> None:
    from gradcampp_ext.compat.torchcam import CAM, ScoreCAM

    assert (CAM, ScoreCAM) == (peer.CAM, peer.ScoreCAM)
    with pytest.raises(ImportError, match="cannot import name 'NoCAM'"):
        from gradcampp_ext.compat.torchcam import NoCAM  # noqa: F401
