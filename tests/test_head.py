"""Gradients without a backward pass: autograd's own where they are given, None elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradcampp_ext import head
from gradcampp_ext.capture import Capture, Site, inference
from gradcampp_ext.explainer import Explainer


class Headed(nn.Module):
    """A convolution and any head behind it."""

    def __init__(self, rest: Callable[[Headed, Tensor], Tensor], bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.rest = rest
        self.pool, self.drop = nn.AdaptiveAvgPool2d(1), nn.Dropout(0.5)
        self.linear = nn.Linear(6, 5, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self, self.conv(x))


IMAGES = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([[3, 0, 0], [1, 2, 4]])


def both(model: Headed, images: Tensor, classes: Tensor) -> tuple[Tensor | None, Tensor]:
    with inference(model), Capture([Site("conv", model.conv)]) as capture:
        output = model(images)
        closed = head.gradients(output, capture.edges[0], capture.activations[0].shape, classes)
        return closed, capture.gradients(output.gather(1, classes))[0]


HEADS = {
    "modules": lambda m, x: m.linear(m.drop(m.pool(x).flatten(1))),
    "mean": lambda m, x: m.linear(x.mean((2, 3))),
    "negative dims": lambda m, x: m.linear(x.mean((-1, -2), keepdim=True)[..., 0, 0]),
    "reshape": lambda m, x: m.linear(functional.adaptive_avg_pool2d(x, 1).reshape(len(x), -1)),
    "squeeze": lambda m, x: m.linear(m.pool(x).squeeze(3).squeeze(2)),
    "matmul": lambda m, x: x.mean((2, 3)) @ m.linear.weight.t(),
}


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", [name for name in HEADS if name != "negative dims"])
def test_equals_autograd_to_the_bit(name: str, memory: torch.memory_format) -> None:
    model = Headed(HEADS[name]).to(memory_format=memory)
    closed, expected = both(model, IMAGES.to(memory_format=memory), CLASSES)
    assert torch.equal(closed, expected)
    assert closed.stride()[3:] == (0, 0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_bias_and_frozen_weights(bias: bool, frozen: bool) -> None:
    model = Headed(HEADS["modules"], bias).requires_grad_(not frozen)
    closed, expected = both(model, IMAGES, CLASSES)
    assert torch.equal(closed, expected)
    assert not closed.requires_grad


def test_classes_alike_for_all_samples_stay_expanded() -> None:
    classes = torch.arange(5).expand(2, -1)
    closed, expected = both(Headed(HEADS["mean"]), IMAGES, classes)
    assert torch.equal(closed, expected)
    assert closed.stride(0) == 0


def test_other_layouts() -> None:
    class Tokens(nn.Module):
        def __init__(self, dims: int | tuple[int, int]) -> None:
            super().__init__()
            self.dims, self.conv, self.linear = dims, nn.Linear(3, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.conv(x).mean(self.dims))

    for dims, images in ((1, torch.randn(2, 7, 3)), ((1, 2), torch.randn(2, 4, 5, 3))):
        closed, expected = both(Tokens(dims), images, CLASSES)
        assert torch.equal(closed, expected)


@pytest.mark.parametrize(
    "rest",
    [
        lambda m, x: m.linear(x.relu().mean((2, 3))),
        lambda m, x: m.linear(m.pool(functional.relu(x, inplace=True)).flatten(1)),
        lambda m, x: m.linear(x.mean((2, 3)).relu()),
        lambda m, x: m.linear(m.linear.weight.t().mean(1) * x.mean((2, 3))),
        lambda m, x: m.linear(x.amax((2, 3))),
        lambda m, x: m.linear(x.mean((2, 3)) + x.mean((2, 3))),
        lambda m, x: m.linear(x.mean((2, 3)).t().reshape(2, 6)),
        lambda m, x: m.linear(x[:, :, 1:].mean((2, 3))),
        lambda m, x: m.linear(x.mean(3)[:, :, 0]),
        lambda m, x: functional.linear(x.mean((1, 2, 3)).view(2, 1), m.linear.weight[:, :1]),
        lambda m, x: m.linear(x.mean((2, 3))).log_softmax(1),
        lambda m, x: m.linear(x.mean((2, 3))) * 2,
        lambda m, x: torch.addmm(m.linear.bias, x.mean((2, 3)), m.linear.weight.t(), alpha=2),
        lambda m, x: functional.conv2d(m.pool(x), m.linear.weight[..., None, None]).flatten(1),
        lambda m, x: m.linear(x.flatten(1)[:, :6]),
        lambda m, x: m.linear(x.mean((2, 3)).as_strided((2, 6), (1, 2))),
        HEADS["negative dims"],  # a selection, not only another shape
    ],
)
def test_other_heads_are_left_to_autograd(rest: Callable[[Headed, Tensor], Tensor]) -> None:
    closed, _ = both(Headed(rest), IMAGES, CLASSES)
    assert closed is None


def test_reshaped_into_other_channels() -> None:
    model = Headed(
        lambda m, x: functional.linear(x.mean((2, 3)).reshape(4, 3), m.linear.weight[:, :3])
    )
    closed = None
    with inference(model), Capture([Site("conv", model.conv)]) as capture:
        output = model(IMAGES)
        closed = head.gradients(output, capture.edges[0], (2, 6, 4, 6), CLASSES)
    assert closed is None


@pytest.mark.parametrize("method", ["gradcampp", "gradcam", "layercam"])
def test_explainer_runs_no_backward(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Headed(HEADS["modules"])
    explainer = Explainer(model, "conv", method)
    expected = explainer(IMAGES, [lambda output, k=k: output[:, k] for k in range(5)]).maps
    explainer(IMAGES, topk=2)  # compares the first gradients with autograd's
    monkeypatch.setattr(torch.autograd, "grad", None)
    explanation = explainer.all_classes(IMAGES, size=(4, 6))
    assert explanation.targets.tolist() == [[0, 1, 2, 3, 4]] * 2
    torch.testing.assert_close(explanation.maps, expected, rtol=1e-5, atol=1e-6)
    some = explainer(IMAGES, CLASSES, size="feature").maps
    torch.testing.assert_close(
        some, torch.stack([expected[n, CLASSES[n]] for n in range(2)]), rtol=1e-5, atol=1e-6
    )


def test_callables_after_classes_are_differentiated() -> None:
    explainer = Explainer(Headed(HEADS["modules"]), "conv")
    expected = explainer(IMAGES, 1).maps
    maps = explainer(IMAGES, lambda output: output[:, 1]).maps
    torch.testing.assert_close(maps, expected, rtol=1e-5, atol=1e-6)


def test_all_classes_of_any_head() -> None:
    model = Headed(lambda m, x: m.linear(x.relu().mean((2, 3))))
    explanation = Explainer(model, "conv").all_classes(IMAGES)
    assert explanation.maps.shape == (2, 5, 4, 6)
    one = Explainer(model, "conv")(IMAGES, 3, size="feature")
    torch.testing.assert_close(explanation.maps[:, 3:4], one.maps)


def test_autograd_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Headed(HEADS["modules"])
    explainer = Explainer(model, "conv", head="autograd")
    expected = Explainer(model, "conv")(IMAGES, topk=2).maps
    torch.testing.assert_close(explainer(IMAGES, topk=2).maps, expected, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(head, "gradients", None)
    explainer(IMAGES)
    with pytest.raises(ValueError, match="head must be 'auto' or 'autograd', got 'weights'"):
        Explainer(model, "conv", head="weights")


def test_a_hook_that_changes_gradients_is_honoured() -> None:
    def rest(model: Headed, x: Tensor) -> Tensor:
        mean = x.mean((2, 3))
        if mean.requires_grad:
            mean.register_hook(lambda g: g * torch.arange(-2.0, 4.0))
        return model.linear(mean)

    model = Headed(rest)
    closed, hooked = both(model, IMAGES, CLASSES)
    assert closed is not None
    assert not torch.allclose(closed, hooked)
    explainer = Explainer(model, "conv")
    for _ in range(2):
        captured = explainer.capture(IMAGES, CLASSES)
        assert torch.equal(captured.gradients[0], hooked)


def test_all_classes_cost_one_forward() -> None:
    calls = []
    model = Headed(HEADS["modules"])
    model.conv.register_forward_hook(lambda *_: calls.append(1))
    explainer = Explainer(model, "conv")
    explainer(IMAGES)
    calls.clear()
    explainer.all_classes(IMAGES)
    assert len(calls) == 1
