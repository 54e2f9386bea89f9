"""captum's class and ours side by side, Grad-CAM++ against the oracle, captum around both."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from peers import Small, demo, distance, photographs
from torch import Tensor, nn

from gradcampp_ext import reference

captum_attr = pytest.importorskip("captum.attr")
torchvision = pytest.importorskip("torchvision")

from gradcampp_ext.compat.captum import LayerGradCam, LayerGradCamPlusPlus  # noqa: E402

OPTIONS: dict[str, dict[str, Any]] = {
    "signed": {},
    "relu": {"relu_attributions": True},
    "input": {"attribute_to_layer_input": True},
    "channels apart": {"attr_dim_summation": False},
    "channels apart, relu": {"attr_dim_summation": False, "relu_attributions": True},
}
IMAGES = torch.randn(3, 3, 16, 20, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return torchvision.models.resnet18(weights=None).eval()


def peer(model: Any, layer: nn.Module, inputs: Any, target: Any = None, **options: Any) -> Any:
    return captum_attr.LayerGradCam(model, layer).attribute(inputs, target, **options)


def ours(model: Any, layer: nn.Module, inputs: Any, target: Any = None, **options: Any) -> Any:
    return LayerGradCam(model, layer).attribute(inputs, target, **options)


@pytest.mark.parametrize(
    ("layer", "target"),
    [
        ("_blocks.10", 285),
        ("_blocks.15", torch.tensor([285, 504, 657])),
        ("_conv_head", [285, 504, 657]),
    ],
)
def test_demo_network_on_photographs(layer: str, target: Any) -> None:
    model, images = demo().model, photographs()
    module = model.get_submodule(layer)
    expected = peer(model, module, images, target)
    assert distance(ours(model, module, images, target), expected) < 1e-5


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_torchvision_network(resnet: nn.Module, options: dict[str, Any]) -> None:
    for name, batch in (("layer2", 3), ("avgpool", 1)):
        layer, images = resnet.get_submodule(name), photographs()[:batch]
        found = ours(resnet, layer, images, 7, **options)
        expected = peer(resnet, layer, images, 7, **options).detach()
        assert found.dtype == torch.float32
        assert distance(found, expected) < 1e-5


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_dimensions(dims: int, options: dict[str, Any]) -> None:
    model, images = Small(dims), torch.randn(2, 3, *[8, 6, 4][:dims])
    found = ours(model, model.late, images, 1, **options)
    torch.testing.assert_close(found, peer(model, model.late, images, 1, **options))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_layer_without_space(options: dict[str, Any]) -> None:
    """captum takes [N, C] as channels that are their own weights."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    inputs = torch.randn(5, 4)
    found = ours(model, model[0], inputs, 2, **options)
    torch.testing.assert_close(found, peer(model, model[0], inputs, 2, **options))


def test_layer_of_more_than_three_dimensions() -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fold = nn.Unflatten(2, (2, 2, 2))

        def forward(self, x: Tensor) -> Tensor:
            return (self.fold(x) ** 3).flatten(1)

    model, inputs = Folded(), torch.randn(2, 3, 8, 5)
    found = ours(model, model.fold, inputs, 4)
    assert found.shape == (2, 1, 2, 2, 2, 5)
    torch.testing.assert_close(found, peer(model, model.fold, inputs, 4))


class TwoStreams(nn.Module):
    """Two inputs and an argument; a layer that takes and gives two tensors."""

    class Pair(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return x.relu() + y, x * y

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.pair = TwoStreams.Pair()
        self.head = nn.Linear(4, 6)

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0, repeat: bool = False) -> Tensor:
        first, second = self.pair(self.left(x), self.right(y))
        if repeat:
            first, second = self.pair(first, second)
        return (self.head((first * scale + second).mean((2, 3))) ** 2).unflatten(1, (2, 3))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_several_tensors(options: dict[str, Any]) -> None:
    model = TwoStreams()
    arguments = {"additional_forward_args": (0.5,), **options}
    inputs = (IMAGES, IMAGES.flip(0))
    found = ours(model, model.pair, inputs, (1, 2), **arguments)
    expected = peer(model, model.pair, inputs, (1, 2), **arguments)
    assert isinstance(found, tuple)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "target", [(0, 1), [(0, 1), (1, 2), (1, 0)]], ids=["tuple", "list of tuples"]
)
def test_targets_of_more_dimensions(target: Any) -> None:
    model = TwoStreams()
    inputs = (IMAGES, IMAGES.flip(0))
    found = ours(model, model.left, inputs, target)
    torch.testing.assert_close(found, peer(model, model.left, inputs, target))


def test_a_layer_that_runs_twice_counts_once_as_with_captum() -> None:
    model = TwoStreams()
    arguments = {"additional_forward_args": (0.5, True)}
    inputs = (IMAGES, IMAGES.flip(0))
    found = ours(model, model.pair, inputs, (0, 1), **arguments)
    for one, other in zip(found, peer(model, model.pair, inputs, (0, 1), **arguments), strict=True):
        torch.testing.assert_close(one, other)


def test_any_function_of_the_inputs() -> None:
    model = Small()

    def score(images: Tensor) -> Tensor:
        return model(images)[:, :2].sum(1)

    torch.testing.assert_close(ours(score, model.late, IMAGES), peer(score, model.late, IMAGES))

    def constant() -> Tensor:
        return score(IMAGES)

    torch.testing.assert_close(ours(constant, model.late, ()), peer(constant, model.late, ()))


def test_data_parallel_is_run_as_captum_runs_it() -> None:
    model = Small()
    parallel = nn.DataParallel(model)
    torch.testing.assert_close(
        ours(parallel, model.late, IMAGES, 1), peer(model, model.late, IMAGES, 1)
    )


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_left_behind(inplace: bool, frozen: bool, training: bool) -> None:
    model = Small(inplace=inplace).requires_grad_(not frozen).train(training)
    expected = peer(model, model.late, IMAGES, 1)
    with torch.no_grad():
        found = ours(model, model.late, IMAGES, 1)
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(found, expected.detach())
    assert not found.requires_grad
    assert not IMAGES.requires_grad
    assert model.training is training
    assert all(p.grad is None and p.requires_grad is not frozen for p in model.parameters())
    assert not hooks(model)
    with pytest.raises(RuntimeError, match="size"):
        ours(model, model.late, torch.randn(1, 7, 8, 8), 1)
    assert torch.is_grad_enabled()
    assert not hooks(model)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_no_graph_below_the_layer() -> None:
    model = Small()
    seen = []
    model.early.register_forward_hook(lambda *args: seen.append(args[2].requires_grad))
    model.relu.register_forward_hook(lambda *args: seen.append(args[2].requires_grad))
    ours(model, model.late, IMAGES, 1)
    assert seen == [False, False, True]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (None, "Target not provided when necessary"),
        ([1], "Target list length does not match output"),
        (torch.zeros(2, 2).long(), "Tensor target dimension"),
        ((0, 1), "Cannot choose target column"),
    ],
)
def test_errors_of_targets_are_captums(target: Any, message: str) -> None:
    model = Small()
    for attribute in (peer, ours):
        with pytest.raises(AssertionError, match=message):
            attribute(model, model.late, IMAGES, target)


def test_an_output_that_is_missing_is_captums_error() -> None:
    model = Small()
    for attribute in (peer, ours):
        with pytest.raises(IndexError, match="index 99 is out of bounds"):
            attribute(model, model.late, IMAGES, 99)


def test_layer_that_does_not_run() -> None:
    model = Small()
    with pytest.raises(AssertionError, match="Forward hook did not obtain any outputs"):
        ours(model, nn.Conv2d(3, 3, 3), IMAGES, 1)


def test_grad_kwargs() -> None:
    model = Small()
    options = {"grad_kwargs": {"retain_graph": True, "allow_unused": True}}
    found = ours(model, model.late, IMAGES, 1, **options)
    torch.testing.assert_close(found, ours(model, model.late, IMAGES, 1))
    with pytest.raises(TypeError, match="unexpected keyword"):
        ours(model, model.late, IMAGES, 1, grad_kwargs={"no_such": True})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    model = Small().to(dtype)
    found = ours(model, model.late, IMAGES.to(dtype), 1)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-2
    assert distance(found, peer(model, model.late, IMAGES.to(dtype), 1).to(found)) < tolerance


# Grad-CAM++


def captured(model: nn.Module, layer: nn.Module, images: Tensor, target: int) -> tuple[Tensor, ...]:
    """Activations and gradients by plain autograd in float64."""
    kept = []
    handle = layer.register_forward_hook(lambda *args: kept.append(args[2]))
    scores = model(images)[:, target].sum()
    handle.remove()
    return kept[0].detach(), torch.autograd.grad(scores, kept)[0]


@pytest.mark.parametrize("layer", ["_blocks.10", "_conv_head"])
def test_gradcampp_on_photographs(layer: str) -> None:
    model, images = demo().model, photographs()
    module = model.get_submodule(layer)
    a, g = captured(model, module, images, 285)
    expected = reference.cam(a.double(), g.double(), normalize=None).unsqueeze(1)
    assert distance(LayerGradCamPlusPlus(model, module).attribute(images, 285), expected) < 1e-4


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_gradcampp_options(dims: int) -> None:
    model = Small(dims).double()
    images = torch.randn(2, 3, *[8, 6, 4][:dims]).double()
    a, g = captured(model, model.late, images, 3)
    attribute = LayerGradCamPlusPlus(model, model.late).attribute
    weights = reference.channel_weights(a, g)
    apart = weights.reshape(2, -1, *[1] * dims) * a.relu()
    torch.testing.assert_close(attribute(images, 3, attr_dim_summation=False), apart)
    torch.testing.assert_close(attribute(images, 3), apart.sum(1, keepdim=True))
    torch.testing.assert_close(
        attribute(images, 3, relu_attributions=True), apart.sum(1, keepdim=True)
    )


# captum around them


@pytest.mark.parametrize("kind", [LayerGradCam, LayerGradCamPlusPlus])
def test_metrics_interpolate_and_noise_tunnel(kind: type) -> None:
    from captum.metrics import infidelity, sensitivity_max

    model = Small()
    attribution = kind(model, model.late)
    assert isinstance(attribution, captum_attr.LayerAttribution)
    assert isinstance(LayerGradCam(model, model.late), captum_attr.LayerGradCam)
    assert not attribution.has_convergence_delta()
    maps = attribution.attribute(IMAGES, 1)
    upsampled = kind.interpolate(maps, (16, 20), interpolate_mode="bilinear")
    assert upsampled.shape == (3, 1, 16, 20)

    def perturb(images: Tensor) -> tuple[Tensor, Tensor]:
        noise = 0.1 * torch.randn_like(images)
        return noise, images - noise

    score = infidelity(model, perturb, IMAGES, upsampled.expand_as(IMAGES), target=1)
    assert score.shape == (3,)
    assert score.isfinite().all()

    def explain(images: Any, target: int) -> tuple[Tensor]:  # as this metric wants it
        return (attribution.attribute(images, target),)

    change = sensitivity_max(explain, IMAGES, target=1)
    assert change.shape == (3,)
    assert (change > 0).all()
    smoothed = captum_attr.NoiseTunnel(attribution).attribute(
        IMAGES, nt_type="smoothgrad", nt_samples=3, stdevs=0.01, target=1
    )
    assert distance(smoothed, maps) < 0.5


def test_visualisation() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    from captum.attr import visualization

    pyplot.switch_backend("Agg")
    model = Small()
    maps = LayerGradCamPlusPlus(model, model.late).attribute(IMAGES, 1)
    upsampled = LayerGradCamPlusPlus.interpolate(maps, (16, 20))[0].permute(1, 2, 0).numpy()
    picture = IMAGES[0].permute(1, 2, 0).sigmoid().numpy()
    figure, axes = visualization.visualize_image_attr(
        upsampled, picture, method="blended_heat_map", sign="positive", use_pyplot=False
    )
    assert axes.images
    pyplot.close(figure)


def test_captum_is_imported_here_alone() -> None:
    code = "import gradcampp_ext.compat, sys; from gradcampp_ext import cam; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert not {"captum", "torchcam", "pytorch_grad_cam"} & set(loaded.stdout.split())


def test_without_captum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "gradcampp_ext.compat.captum")
    monkeypatch.setitem(sys.modules, "captum", None)
    with pytest.raises(ImportError, match=r"needs captum, .*: pip install captum"):
        import gradcampp_ext.compat.captum  # noqa: F401
