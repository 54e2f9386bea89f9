"""Models that return maps beside logits, against the explainer, eagerly and exported."""

from __future__ import annotations

import io
import warnings
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from gradcampp_ext import Explainer
from gradcampp_ext.export import METHODS, export_explainer


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(inplace=True)
        self.last, self.head = nn.Conv2d(6, 8, 3), nn.Linear(8, 5)
        self.pool, self.drop = nn.AdaptiveAvgPool2d(1), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.act(self.conv(x)))
        return self.head(self.drop(self.pool(x).flatten(1)))


IMAGES = torch.randn(3, 3, 17, 21, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layer", [None, "last"])
@pytest.mark.parametrize("method", METHODS)
def test_equals_the_explainer(method: str, layer: str | None) -> None:
    model = Network()
    exported = export_explainer(model, layer, method, example=IMAGES[:1], topk=2, size=(17, 21))
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    logits, maps = exported(IMAGES)
    expected = Explainer(model, layer, method)(IMAGES, topk=2)
    assert torch.equal(logits, model.eval()(IMAGES))
    torch.testing.assert_close(maps, expected.maps, rtol=0, atol=1e-5)


def test_every_class() -> None:
    model = Network()
    _, maps = export_explainer(model, example=IMAGES, topk=None)(IMAGES)
    expected = Explainer(model).all_classes(IMAGES).maps
    torch.testing.assert_close(maps, expected, rtol=0, atol=1e-5)


def test_a_denominator_is_never_zero_where_the_weight_is_negative() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2)
    )
    with torch.no_grad():
        for parameter, value in zip(
            model.parameters(), (1.0, 0.0, [[-1.0], [1.0]], 0.0), strict=True
        ):
            parameter.copy_(torch.tensor(value))
    images = torch.tensor([[[[1.0, 3.0]]]])  # a mean of 2
    _, maps = export_explainer(model, "0", example=images, topk=None)(images)
    assert torch.equal(maps, Explainer(model, "0").all_classes(images).maps)


def test_channels_that_come_last() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.block = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 8)
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(self.embed(x).flatten(2).transpose(1, 2)).mean(1))

    model = Tokens()
    images = torch.randn(2, 3, 16, 24)
    _, maps = export_explainer(model, "block", example=images, topk=3)(images)
    expected = Explainer(model, "block")(images, topk=3, size="feature").maps
    assert maps.shape == (2, 3, 4, 6)
    torch.testing.assert_close(maps, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", [None, "last"])  # hooked before it runs, and after
def test_copies_and_files(layer: str | None) -> None:
    exported = export_explainer(Network(), layer, example=IMAGES)
    file = io.BytesIO()
    torch.save(exported, file)
    file.seek(0)
    _, expected = exported(IMAGES)
    for copy in (deepcopy(exported), torch.load(file, weights_only=False)):
        assert torch.equal(copy(IMAGES)[1], expected)
    assert torch.equal(exported(IMAGES)[1], expected)


def test_torch_export() -> None:
    exported = export_explainer(Network(), example=IMAGES, size=(17, 21))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(exported, (IMAGES,), dynamic_shapes=({0: batch},))
    for images in (IMAGES, torch.randn(5, 3, 17, 21)):
        torch.testing.assert_close(program.module()(images), exported(images))


def test_torch_compile_without_a_graph_break() -> None:
    exported = export_explainer(Network(), example=IMAGES, size=(17, 21))
    compiled = torch.compile(exported, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IMAGES), exported(IMAGES))
        torch.testing.assert_close(compiled(IMAGES + 1), exported(IMAGES + 1))


def test_onnx() -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = Network()
    exported = export_explainer(model, example=IMAGES, topk=2, size=(17, 21))
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(exported, (IMAGES,), dynamo=True, verbose=False).save(file)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    images = torch.randn(3, 3, 17, 21)
    logits, maps = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    expected = Explainer(model)(images, topk=2)
    torch.testing.assert_close(torch.from_numpy(logits), model.eval()(images), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(maps), expected.maps, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("layer", "method", "message"),
    [
        ("conv", "gradcampp", "between layer 'conv' and the output there is more than a mean"),
        (None, "gradcam_elementwise", "to need no gradients, got 'gradcam_elementwise'"),
        ("layer4", "gradcampp", "'layer4' is not the name of a module"),
    ],
)
def test_errors(layer, method, message) -> None:
    with pytest.raises(ValueError, match=message):
        export_explainer(Network(), layer, method, example=IMAGES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topk": 0}, "topk must be from 1 to the 5 classes of the output, got 0"),
        ({"topk": 9}, "topk must be from 1 to the 5 classes of the output, got 9"),
        ({"size": 224}, "size must be 2 positive integers, in pixels, got 224"),
        ({"size": (4, 17, 21)}, "size must be 2 positive integers, in pixels, got .4, 17, 21."),
        ({"size": (0, 21)}, "size must be 2 positive integers"),
    ],
)
def test_options_that_do_not_fit(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        export_explainer(Network(), example=IMAGES, **options)
