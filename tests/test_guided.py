"""Guided backpropagation and deconvnet against ReLUs with these backward rules written out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradcampp_ext import guided
from gradcampp_ext.capture import CaptureError
from gradcampp_ext.explainer import Explainer


def written_out(rule: str) -> type[torch.autograd.Function]:
    class Relu(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, high: float) -> Tensor:
            ctx.save_for_backward(x)
            ctx.high = high
            return x.clamp(0, high)

        @staticmethod
        def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
            (x,) = ctx.saved_tensors
            inside = (x > 0) & (x < ctx.high)
            return {
                "guided": g * (g > 0) * inside,
                "deconvnet": g * (g > 0),
                "plain": g * inside,
            }[rule], None

    return Relu


class Module(nn.Module):
    """A ReLU of the rule written out."""

    def __init__(self, rule: str, high: float) -> None:
        super().__init__()
        self.function, self.high = written_out(rule), high

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x, self.high)


class Network(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 5, 3, padding=1)
        self.act, self.head = act, nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.a(x))
        x = self.act(self.b(x) - 0.1) + 0.5 * x
        return self.head(x.mean((2, 3)))


class Called(nn.Module):
    """Any function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def ignoring_the_result(x: Tensor) -> Tensor:
    functional.relu(x, inplace=True)
    return x


IMAGES = torch.randn(2, 3, 8, 9, generator=torch.Generator().manual_seed(0))
RELUS = {
    "module": (nn.ReLU(), 1e9),
    "in place": (nn.ReLU(inplace=True), 1e9),
    "relu6": (nn.ReLU6(), 6.0),
    "relu6 in place": (nn.ReLU6(inplace=True), 6.0),
    "functional relu6": (Called(functional.relu6), 6.0),
    "functional": (Called(functional.relu), 1e9),
    "keyword": (Called(lambda x: functional.relu(input=x)), 1e9),
    "torch": (Called(torch.relu), 1e9),
    "method": (Called(Tensor.relu), 1e9),
    "method in place": (Called(Tensor.relu_), 1e9),
    "torch in place": (Called(torch.relu_), 1e9),
    "functional in place": (Called(functional.relu_), 1e9),
    "result ignored": (Called(ignoring_the_result), 1e9),
}


@pytest.mark.parametrize("rule", ["guided", "deconvnet", "plain"])
@pytest.mark.parametrize("name", RELUS)
def test_equals_the_rule_written_out(name: str, rule: str) -> None:
    act, high = RELUS[name]
    model = Network(act)
    model.a.weight.data *= 5  # some values beyond 6
    other = copy.deepcopy(model)
    other.act = Module(rule, high)
    images = IMAGES.clone().requires_grad_()
    output = other(images)
    explanation = guided.explain(model, IMAGES, [[3, 0], [1, 2]], rule=rule)
    torch.testing.assert_close(explanation.scores, output.gather(1, explanation.targets))
    assert explanation.maps.shape == (2, 2, 3, 8, 9)
    assert (explanation.layer, explanation.method) == ("input", rule)
    for k in range(2):
        score = output.gather(1, explanation.targets[:, k : k + 1]).sum()
        [expected] = torch.autograd.grad(score, images, retain_graph=True)
        torch.testing.assert_close(explanation.maps[:, k], expected)
    if name == "module":
        plain = guided.explain(model, IMAGES, [[3, 0], [1, 2]], rule="plain").maps
        assert torch.allclose(explanation.maps, plain) == (rule == "plain")


def test_the_model_is_left_alone() -> None:
    model = Network(nn.ReLU()).train()
    modules = dict(model.named_modules())
    with torch.inference_mode():
        explanation = guided.explain(model, IMAGES * 1, topk=2)
    assert not explanation.maps.is_inference()
    assert dict(model.named_modules()) == modules
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    images = IMAGES.clone().requires_grad_()
    [expected] = torch.autograd.grad(model(images).sum(), images)
    torch.testing.assert_close(
        guided.explain(model, IMAGES, lambda output: output.sum(1), rule="plain").maps[:, 0],
        expected,
    )


def test_model_that_changes_its_input() -> None:
    class Shifting(Network):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sub_(0.25))

    model = Shifting(nn.ReLU())
    images = IMAGES.clone()
    maps = guided.explain(model, images, 0).maps
    assert torch.equal(images, IMAGES)
    torch.testing.assert_close(maps, guided.explain(model, {"x": images}, 0).maps)


@pytest.mark.parametrize("targets", [None, [2, 0], lambda output: output[:, 1]])
def test_guided_cam_is_the_product(targets) -> None:
    model = Network(nn.ReLU())
    explainer = Explainer(model, "b")
    product = guided.cam(explainer, IMAGES, targets)
    maps = explainer(IMAGES, targets).maps
    gradients = guided.explain(model, IMAGES, targets).maps
    torch.testing.assert_close(product.maps, maps[:, :, None] * gradients)
    assert product.method == "guided_gradcampp"


def test_guided_cam_of_several_layers() -> None:
    model = Network(nn.ReLU())
    fused = guided.cam(Explainer(model, ["a", "b"], fuse="mean"), IMAGES, topk=2)
    assert fused.maps.shape == (2, 2, 3, 8, 9)
    with pytest.raises(ValueError, match=r"several layers, \[2, 1, 2, 8, 9\], must be fused"):
        guided.cam(Explainer(model, ["a", "b"]), IMAGES)


def test_compiled_parts_keep_the_rule() -> None:
    model = Network(nn.ReLU())
    expected = guided.explain(model, IMAGES, 1).maps
    plain = guided.explain(model, IMAGES, 1, rule="plain").maps
    assert not torch.allclose(expected, plain)
    model.act = torch.compile(model.act, backend="aot_eager")
    model(IMAGES)
    torch.testing.assert_close(guided.explain(model, IMAGES, 1).maps, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripted_models_are_refused() -> None:
    model = Network(nn.ReLU())
    with pytest.raises(ValueError, match="model is scripted or traced"):
        guided.explain(torch.jit.trace(model, IMAGES), IMAGES)
    expected = guided.explain(model, IMAGES, rule="plain").maps
    model.act = torch.jit.script(model.act)
    with pytest.raises(
        ValueError, match=r"'act' of the model is scripted .* the rule cannot reach"
    ):
        guided.explain(model, IMAGES)
    torch.testing.assert_close(guided.explain(model, IMAGES, rule="plain").maps, expected)


def test_errors() -> None:
    model = Network(nn.GELU())
    with pytest.raises(CaptureError, match=r"rule='guided' is one for ReLUs, .* called none"):
        guided.explain(model, IMAGES)
    assert guided.explain(model, IMAGES, rule="plain").maps.any()
    with pytest.raises(CaptureError, match="called none"):
        guided.explain(Network(nn.Hardtanh()), IMAGES)
    with pytest.raises(ValueError, match="rule must be 'guided', 'deconvnet' or 'plain'"):
        guided.explain(model, IMAGES, rule="relu")
    with pytest.raises(CaptureError, match="score does not depend on the images"):
        guided.explain(model, IMAGES, lambda output: output[:, 0].detach(), rule="plain")
