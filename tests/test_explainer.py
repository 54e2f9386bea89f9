"""Explainer end to end: maps against the oracle on plain autograd's tensors, and its errors."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from conftest import devices
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradcampp_ext import cam, reference
from gradcampp_ext import explainer as module
from gradcampp_ext.capture import CaptureError
from gradcampp_ext.explainer import Explainer
from gradcampp_ext.targets import Contrast, LabelSum, LogProbability
from gradcampp_ext.variations import Augment, Smooth, Variations


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.act = nn.ReLU(inplace=True)
        self.late = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norm(self.stem(x)))
        return self.head(self.pool(self.late(x).relu()).flatten(1))


IMAGES = torch.randn(3, 3, 16, 20, generator=torch.Generator().manual_seed(0))


def by_autograd(model: nn.Module, name: str, category: int) -> tuple[torch.Tensor, torch.Tensor]:
    kept: list[torch.Tensor] = []

    def keep(*call: torch.Tensor) -> torch.Tensor:
        kept.append(call[-1])
        return call[-1].clone()

    handle = model.get_submodule(name).register_forward_hook(keep)
    score = model(IMAGES)[:, category].sum()
    handle.remove()
    return kept[0].detach(), torch.autograd.grad(score, kept)[0]


@pytest.mark.parametrize("method", ["gradcampp", "gradcam", "layercam"])
@pytest.mark.parametrize("layer", ["stem", "norm", "late"])
def test_maps_equal_the_oracle(layer: str, method: str) -> None:
    model = Network().eval()
    explanation = Explainer(model, layer, method)(IMAGES, [[0, 3]] * 3)
    assert explanation.maps.shape == (3, 2, 16, 20)
    assert explanation.maps.dtype == torch.float32
    for k, category in enumerate([0, 3]):
        expected = reference.cam(*by_autograd(model, layer, category), method=method, size=(16, 20))
        torch.testing.assert_close(
            explanation.maps[:, k].double(), expected, rtol=0, atol=2e-6 * float(expected.max())
        )
    assert (explanation.layer, explanation.method) == (layer, method)
    output = model(IMAGES)
    assert torch.equal(explanation.scores, output[:, [0, 3]])
    assert torch.equal(explanation.probabilities, output.softmax(1)[:, [0, 3]])
    assert torch.equal(explanation.predicted, output.argmax(1))
    assert not explanation.scores.requires_grad


@pytest.mark.parametrize(
    ("options", "count"),
    [({}, 1), ({"targets": 1}, 1), ({"targets": "all"}, 5), ({"topk": 2}, 2),
     ({"targets": torch.empty(0, 3, dtype=torch.long)}, 3), ({"targets": LabelSum((0,))}, 1)],
)  # fmt: skip
@pytest.mark.parametrize("average", [None, Smooth(3), Smooth(3, powers=True), Augment()], ids=str)
def test_empty_batch(average: Variations | None, options: dict[str, Any], count: int) -> None:
    explanation = Explainer(Network(), "late", average=average)(IMAGES[:0], **options)
    assert explanation.maps.shape == (0, count, 16, 20)
    assert explanation.scores.shape == (0, count)
    assert explanation.layer == "late"


def test_an_empty_batch_does_not_tell_how_gradients_are_found() -> None:
    model = Network()
    explainer = Explainer(model)
    explainer(IMAGES[:0])
    assert explainer._by_weights == {}
    explainer(IMAGES)
    assert list(explainer._by_weights.values()) == [True]


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("options", [{}, {"average": Smooth(3)}, {"average": Augment()}], ids=str)
def test_devices(device: str, options: dict[str, object]) -> None:
    model = Network().double()
    expected = Explainer(model, ["pool:input", "stem"], **options)(IMAGES.double(), [2, 0, 1])
    model.to(device)
    explanation = Explainer(model, ["pool:input", "stem"], **options)(
        IMAGES.double().to(device), [2, 0, 1]
    )
    assert explanation.maps.device.type == explanation.targets.device.type == device
    torch.testing.assert_close(explanation.maps.cpu(), expected.maps, rtol=1e-6, atol=1e-6)


def test_closed_form_of_average_pooling_and_linear() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    ).double()
    explainer = Explainer(model, "1", normalize=None)
    maps = explainer(IMAGES.double(), [[0, 1, 2, 3]] * 3, size="feature").maps
    activations = model[:2](IMAGES.double())
    weight = model[4].weight
    means = activations.mean((2, 3))[:, None]
    channel_weights = weight.relu() / (2 + means * weight)  # [N, K, C]
    expected = torch.einsum("nkc,nchw->nkhw", channel_weights, activations).relu()
    assert maps.dtype == torch.float64
    torch.testing.assert_close(maps, expected, rtol=1e-12, atol=1e-14)


def test_constant_score_gives_zero_maps() -> None:
    maps = Explainer(Network(), "late")(IMAGES, lambda output: output[:, 0] * 0 + 1).maps
    assert maps.shape == (3, 1, 16, 20)
    assert not maps.any()


@pytest.mark.parametrize(
    ("target", "score"),
    [
        (Contrast(1, (0, 3), 0.6), lambda z: z[:, 1] - 0.6 * (z[:, 0] + z[:, 3]) / 2),
        (LogProbability(2), lambda z: z[:, 2] - z.exp().sum(1).log()),
        (LogProbability(2, multilabel=True), lambda z: -(1 + (-z[:, 2]).exp()).log()),
        (LabelSum((0, 4)), lambda z: z[:, 0] + z[:, 4]),
    ],
    ids=["contrast", "log-probability", "label", "labels"],
)
def test_targets_that_are_no_logits(target, score) -> None:
    model = Network().double().eval()
    explanation = Explainer(model, "late", normalize=None)(IMAGES.double(), target, size="feature")
    activations = model.late(model.act(model.norm(model.stem(IMAGES.double())))).detach()
    activations.requires_grad_()
    scores = score(model.head(activations.relu().mean((2, 3))))
    [gradients] = torch.autograd.grad(scores.sum(), activations)
    torch.testing.assert_close(explanation.scores[:, 0], scores.detach())
    expected = reference.cam(activations.detach(), gradients, normalize=None)
    torch.testing.assert_close(explanation.maps[:, 0], expected, rtol=1e-10, atol=1e-12)
    assert explanation.maps.any()


def test_probabilities_of_labels() -> None:
    model = Network().eval()
    explanation = Explainer(model, "late", activation="sigmoid")(IMAGES, topk=2)
    torch.testing.assert_close(explanation.probabilities, explanation.scores.sigmoid())


def test_regression() -> None:
    model = Network().double()
    model.head = nn.Sequential(nn.Linear(8, 1), nn.Flatten(0)).double()  # [N]
    maps = Explainer(model, "late")(IMAGES.double()).maps
    torch.testing.assert_close(maps, Explainer(model, "late")(IMAGES.double(), lambda y: y).maps)
    less = Explainer(model, "late")(IMAGES.double(), lambda y: -y).maps
    assert not torch.allclose(maps, less)


def test_a_batch_equals_its_samples() -> None:
    explainer = Explainer(Network().double(), "norm")
    together = explainer(IMAGES.double(), [4, 0, 1])
    for n, category in enumerate([4, 0, 1]):
        alone = explainer(IMAGES[n : n + 1].double(), category)
        torch.testing.assert_close(alone.maps[0], together.maps[n], rtol=1e-12, atol=1e-12)


def test_options_reach_the_op() -> None:
    options = {"normalize": "max", "rectify": False, "eps": 1e-3, "relu": False}
    model = Network()
    maps = Explainer(model, "late", interpolation="nearest", **options)(IMAGES, 1).maps
    expected = reference.cam(
        *by_autograd(model.eval(), "late", 1), size=(16, 20), interpolation="nearest", **options
    )
    torch.testing.assert_close(maps[:, 0].double(), expected, rtol=1e-4, atol=1e-5)


def test_layer_is_found_once_and_said() -> None:
    model = Network()
    explainer = Explainer(model)
    explanation = explainer(IMAGES)
    assert explanation.layer == "pool:input"
    expected = Explainer(model, "pool:input")(IMAGES)
    assert torch.equal(explanation.maps, expected.maps)
    calls: list[int] = []
    model.stem.register_forward_hook(lambda *_: calls.append(1))
    explainer(IMAGES)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("size", "expected"),
    [(None, (16, 20)), ("feature", (4, 5)), ((7, 3), (7, 3)), ([8, 8], (8, 8))],
)
def test_size(size, expected) -> None:
    assert Explainer(Network(), "late")(IMAGES, size=size).maps.shape[2:] == expected


def test_several_layers() -> None:
    model = Network()
    single = [Explainer(model, name)(IMAGES, topk=2).maps for name in ("late", "stem")]
    apart = Explainer(model, ["late", model.stem])(IMAGES, topk=2)
    assert apart.layer == ("late", "stem")
    assert apart.maps.shape == (3, 2, 2, 16, 20)
    for index in range(2):
        torch.testing.assert_close(apart.maps[:, :, index], single[index])
    mean = Explainer(model, ["late", "stem"], fuse="mean")(IMAGES, topk=2).maps
    torch.testing.assert_close(mean, (single[0] + single[1]) / 2)
    largest = Explainer(model, ["late", "stem"], fuse="max")(IMAGES, topk=2).maps
    torch.testing.assert_close(largest, torch.maximum(*single))
    with pytest.raises(ValueError, match=r"one size .*got \[\(4, 5\), \(8, 10\)\]; give size="):
        Explainer(model, ["late", "stem"])(IMAGES, size="feature")


def test_many_targets_are_explained_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    explainer = Explainer(Network(), ["late", "stem"])
    expected = explainer(IMAGES, topk=5).maps
    held: list[int] = []
    original = module.Capture.gradients

    def gradients(self, scores, **options):
        held.append(scores.shape[1])
        return original(self, scores, **options)

    monkeypatch.setattr(module.Capture, "gradients", gradients)
    activations = 4 * 3 * (8 * 4 * 5 + 6 * 8 * 10)
    monkeypatch.setattr(module, "CHUNK_BYTES", 2 * activations + 1)
    assert torch.equal(explainer(IMAGES, topk=5).maps, expected)
    assert held == [2, 2, 1]


@pytest.mark.parametrize("chunk", [1, 2**27])
@pytest.mark.parametrize("layers", ["stem", "pool:input", ["late", "stem"]])
def test_captured_tensors_make_the_maps(layers, chunk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    explainer = Explainer(Network(), layers)
    explanation = explainer(IMAGES, topk=3, size=(16, 20))
    captured = explainer.capture(IMAGES, topk=3)
    maps = [
        cam(a, g, size=(16, 20))
        for a, g in zip(captured.activations, captured.gradients, strict=True)
    ]
    expected = torch.stack(maps, 2) if isinstance(layers, list) else maps[0]
    assert torch.equal(explanation.maps, expected)
    assert torch.equal(captured.scores.values, explanation.scores)
    assert not captured.scores.values.requires_grad


class Inputs(nn.Module):
    """Takes two inputs, gives several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Network()

    def forward(self, pixels: torch.Tensor, shift: torch.Tensor) -> dict[str, torch.Tensor]:
        output = self.network(pixels)
        return {"logits": output + shift, "other": -output}


def test_inputs_and_outputs() -> None:
    model = Inputs()
    shift = torch.randn(3, 1)
    expected = Explainer(model.network, "late")(IMAGES, 2)
    for images in ((IMAGES, shift), {"shift": shift, "pixels": IMAGES}):
        explanation = Explainer(model, "network.late")(images, 2)
        torch.testing.assert_close(explanation.maps, expected.maps)
        torch.testing.assert_close(explanation.scores, expected.scores + shift)
    other = Explainer(model, output="other")({"shift": shift, "pixels": IMAGES}, 2)
    torch.testing.assert_close(other.scores, -expected.scores)
    assert other.layer == "network.pool:input"


def snapshot(model: nn.Module) -> list[object]:
    return [
        (name, part.training, len(part._forward_hooks), len(part._forward_pre_hooks))
        for name, part in model.named_modules()
    ] + [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()]


@pytest.mark.parametrize("layer", [None, "late", "act"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_model_is_left_alone(layer, mode) -> None:
    model = Network().train()
    model.norm.eval()
    model.head.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = snapshot(model)
    expected = Explainer(model, layer)(IMAGES).maps
    with mode():
        images = IMAGES + 0  # an inference tensor under inference mode
        grad = torch.is_grad_enabled()
        explanation = Explainer(model, layer)(images)
        assert torch.is_grad_enabled() == grad
        with pytest.raises(ValueError, match="classes from 0 to 4"):
            Explainer(model, layer)(images, 99)
        assert torch.is_grad_enabled() == grad
    assert torch.equal(explanation.maps, expected)
    assert not explanation.maps.is_inference()
    assert snapshot(model) == before
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_input_changed_in_place_by_the_model() -> None:
    class Normalizing(Network):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.sub_(0.5))

    model = Normalizing()
    expected = Explainer(model, "late")(IMAGES.clone()).maps
    with torch.inference_mode():
        assert torch.equal(Explainer(model, "late")(IMAGES.clone()).maps, expected)


def test_autocast() -> None:
    model = Network()
    exact = Explainer(model, "late")(IMAGES, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        explanation = Explainer(model, "late")(IMAGES, 0)
    assert explanation.maps.dtype == torch.float32
    torch.testing.assert_close(explanation.maps, exact.maps, rtol=0, atol=0.1)
    assert not torch.equal(explanation.maps, exact.maps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_model_dtype(dtype: torch.dtype) -> None:
    explanation = Explainer(Network().to(dtype), "late")(IMAGES.to(dtype))
    assert explanation.maps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_wrapped_models() -> None:
    model = Network()
    expected = Explainer(model, "late")(IMAGES).maps
    for wrapped in (nn.DataParallel(model), torch.compile(model)):
        assert torch.equal(Explainer(wrapped, "late")(IMAGES).maps, expected)
        assert torch.equal(Explainer(wrapped, model.late)(IMAGES).maps, expected)


@pytest.mark.filterwarnings("ignore:Dynamo does not know")
def test_model_with_a_compiled_part() -> None:
    torch.compiler.reset()  # other tests count towards the limit of compilations
    model = Network().eval()
    expected = {name: Explainer(model, name)(IMAGES, 1).maps for name in ("norm", "late")}
    model.late = torch.compile(nn.Sequential(model.late), backend="aot_eager")
    model(IMAGES)
    for name, maps in expected.items():
        torch.testing.assert_close(Explainer(model, name)(IMAGES, 1).maps, maps)
    inside = Explainer(model, "late._orig_mod.0")
    with pytest.raises(CaptureError, match=r"did not run .*not inside a compiled graph"):
        inside(IMAGES, 1)


@pytest.mark.parametrize("part", ["", "late"])
def test_error_of_a_model_compiled_in_place(part: str) -> None:
    model = Network()
    model.get_submodule(part).compile(backend="eager")
    with pytest.raises(ValueError, match=f"'{part or 'Network'}' of the model was compiled in"):
        Explainer(model, "stem")


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_error_of_a_scripted_model() -> None:
    scripted = torch.jit.trace(Network().eval(), IMAGES)
    with pytest.raises(ValueError, match="model is scripted or traced"):
        Explainer(scripted, "late")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_error_of_a_quantized_model() -> None:
    quantized = torch.ao.quantization.quantize_dynamic(Network().eval(), {nn.Linear})
    with pytest.raises(CaptureError, match=r"does not depend on layer 'late'.*quantize"):
        Explainer(quantized, "late")(IMAGES)


def test_error_of_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = Network()
    with pytest.raises(ValueError, match=r"'stem.weight' .*made under torch.inference_mode\(\)"):
        Explainer(model, "late")


def test_size_in_an_array() -> None:
    explainer = Explainer(Network())
    assert explainer(IMAGES, size=np.array([5, 6])).maps.shape[2:] == (5, 6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": 3}, TypeError, "model must be a torch.nn.Module, got int"),
        ({"target_layer": []}, ValueError, "at least one layer, got an empty list"),
        ({"target_layer": "layer4"}, ValueError, "'layer4' is not the name of a module"),
        ({"method": "cam"}, ValueError, "method must be one of gradcampp.*got 'cam'"),
        ({"fuse": "sum"}, ValueError, "fuse must be 'mean', 'max' or None, got 'sum'"),
        ({"activation": "relu"}, ValueError, "activation must be 'softmax' or 'sigmoid'"),
        ({"normalize": "sum"}, ValueError, "normalize must be one of .*got 'sum'"),
        ({"average": True}, TypeError, r"average must be Smooth\(...\).*got True"),
        ({"average": Smooth}, TypeError, r"average must be Smooth\(...\).*got <class"),
        ({"tokens": 5}, TypeError, "tokens must be several integers, got 5"),
    ],
)
def test_errors_of_construction(options, error, message) -> None:
    options = {"model": Network(), **options}
    with pytest.raises(error, match=message):
        Explainer(**options)


@pytest.mark.parametrize(
    ("images", "options", "error", "message"),
    [
        ("cat.jpg", {}, TypeError, "images must be a tensor, or a tuple or mapping .*got str"),
        (IMAGES, {"targets": [0]}, ValueError, r"this batch of 3, got \[1\]"),
        (IMAGES, {"targets": 5}, ValueError, "classes from 0 to 4, as the output has 5, got 5"),
        (IMAGES, {"size": "full"}, ValueError, "size must be integers, 'feature' or None"),
        (IMAGES, {"size": (3,)}, ValueError, "size must be 2 positive integers"),
        (IMAGES, {"topk": 2.0}, TypeError, "topk must be an integer, got 2.0"),
        (IMAGES, {"targets": lambda output: output[:, 0].detach()}, CaptureError, "not depend"),
    ],
)
def test_errors_of_calls(images, options, error, message) -> None:
    model = Network()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        Explainer(model, "late")(images, **options)
    assert snapshot(model) == before


def test_repr() -> None:
    explanation = Explainer(Network(), "late")(IMAGES, topk=2)
    assert repr(explanation) == (
        "Explanation(maps=[3, 2, 16, 20], targets=[3, 2], scores=[3, 2], probabilities=[3, 2], "
        "predicted=[3], layer='late', method='gradcampp')"
    )
    explanation = Explainer(Network(), "late")(IMAGES, LogProbability(1))
    assert "targets=(LogProbability(index=1, multilabel=False),)" in repr(explanation)


@pytest.mark.parametrize("layers", ["late", ["late", "stem"]])
def test_overlay(layers) -> None:
    from gradcampp_ext import overlay

    explanation = Explainer(Network(), layers)(IMAGES, topk=2)
    images = torch.rand(3, 3, 16, 20)
    drawn = explanation.overlay(images, colormap="viridis", alpha=0.25)
    assert drawn.shape == (*explanation.maps.shape, 3)
    assert drawn.dtype == torch.uint8
    maps = explanation.maps[:, 1] if layers == "late" else explanation.maps[:, 1, 0]
    expected = overlay(images, maps, colormap="viridis", alpha=0.25)
    assert torch.equal(drawn[:, 1] if layers == "late" else drawn[:, 1, 0], expected)
    for same in (images.numpy(), images.tolist()):
        assert torch.equal(explanation.overlay(same, colormap="viridis", alpha=0.25), drawn)


@pytest.mark.parametrize(
    ("maps", "images", "error", "message"),
    [
        ((1, 2, 9), (1, 3, 9), ValueError, r"overlays are of 2-D maps .*maps \[1, 2, 9\] and im"),
        ((1, 1, 4, 8, 8), (1, 3, 4, 8, 8), ValueError, r"2-D maps .*images \[1, 3, 4, 8, 8\]"),
        ((1, 1, 8, 8), (3, 8, 8), ValueError, r"2-D maps .*images \[3, 8, 8\]"),
        ((1, 1, 8, 8), None, TypeError, "images must be a tensor or an array"),
    ],
)
def test_overlay_errors(maps, images, error, message) -> None:
    explanation = Explainer(Network())(IMAGES)
    explanation = dataclasses.replace(explanation, maps=torch.zeros(maps))
    with pytest.raises(error, match=message):
        explanation.overlay(images and torch.zeros(images))


class _LiveBytes(TorchDispatchMode):
    """The largest number of bytes that tensors made within held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.live = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor.untyped_storage())
        return result

    def note(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        known = self.storages.get(address)
        if known is None or known() is None:
            self.storages[address] = weakref.ref(storage, lambda _: self.release(size))
            self.live += size
            self.peak = max(self.peak, self.live)

    def release(self, size: int) -> None:
        self.live -= size


def test_peak_memory_is_that_of_inference() -> None:
    blocks = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(12)]
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 5),
    )  # fmt: skip
    images = torch.randn(2, 3, 32, 32)
    feature = 2 * 8 * 32 * 32 * 4

    def peak(run) -> float:
        with _LiveBytes() as memory:
            run()
        return memory.peak / feature

    def plain() -> torch.Tensor:
        with torch.no_grad():
            return model(images)

    explainer = Explainer(model, "12")
    explainer(images)
    inference = peak(plain)
    late = peak(lambda: explainer(images, size="feature"))
    backward = peak(lambda: model(images)[:, 0].sum().backward())
    assert backward > 12  # every layer's output
    assert late <= inference + 1  # the captured copy, where the pass itself does not need more


def test_the_default_layer_is_that_of_the_images_size():
    body = nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 4, 1), nn.ReLU()
    pool = nn.AdaptiveMaxPool2d(1), nn.Flatten()
    model = nn.Sequential(*body, *pool, nn.Linear(4, 3)).eval()
    explainer = Explainer(model)
    names = [explainer(torch.randn(2, 3, size, size)).layer for size in (8, 32, 8, 32)]
    fresh = [Explainer(model)(torch.randn(2, 3, size, size)).layer for size in (8, 32)]
    assert names == fresh * 2
    assert fresh[0] != fresh[1]


def test_the_first_tensor_of_a_mapping_is_explained():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Conv2d(3, 4, 3), nn.Conv2d(1, 4, 3)

        def forward(self, depth: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
            return self.one(colour).mean((2, 3)) + self.other(depth).mean((2, 3))

    depth, colour = torch.randn(2, 1, 12, 12), torch.randn(2, 3, 8, 10)
    explainer = Explainer(Two().eval())
    by_colour = explainer({"colour": colour, "depth": depth})
    assert (by_colour.layer, by_colour.maps.shape) == ("one", (2, 1, 8, 10))
    by_depth = explainer({"depth": depth, "colour": colour})
    assert (by_depth.layer, by_depth.maps.shape) == ("other", (2, 1, 12, 12))
