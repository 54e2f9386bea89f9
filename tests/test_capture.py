"""What Capture records against plain autograd, and what it leaves behind: nothing."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional

from gradcampp_ext import layers
from gradcampp_ext.capture import Capture, CaptureError, Site, inference


class Network(nn.Module):
    """Convolutions, in-place ReLUs, a skip with +=, batch normalization, a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.block = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 6, 3, stride=2)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 5)
        self.norm.running_mean.uniform_(-1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.norm(self.stem(x)), inplace=True)
        x = self.block(x)
        x += 0.5
        x = self.last(self.relu(x))
        x = functional.relu(x, inplace=True)
        return self.head(self.drop(x.mean((2, 3))))


LAYERS = ["stem", "norm", "block", "relu", "last", "last:input", "relu:input", "drop:input"]


def site(model: nn.Module, name: str) -> Site:
    module, _, side = name.partition(":")
    return Site(name, model.get_submodule(module), bool(side))


def images() -> torch.Tensor:
    return torch.randn(3, 3, 9, 8, generator=torch.Generator().manual_seed(1))


def captured(
    model: nn.Module, names: list[str], classes: list[int], x: torch.Tensor | None = None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    with inference(model), Capture(site(model, name) for name in names) as capture:
        output = model(images() if x is None else x)
        return capture.activations, capture.gradients(output[:, classes])


def plain(model: nn.Module, name: str, category: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations and gradients by a forward and backward pass of the whole network.

    An identity at the layer keeps them from in-place operations; nothing is detached.
    """
    kept: list[torch.Tensor] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        x.retain_grad()
        kept.append(x)
        return x.clone()

    module, _, side = name.partition(":")
    hooked = model.get_submodule(module)
    handle = (
        hooked.register_forward_pre_hook(lambda _, args: (keep(args[0]),))
        if side
        else hooked.register_forward_hook(lambda *call: keep(call[-1]))
    )
    training = model.training
    with torch.inference_mode(False), torch.enable_grad():
        model.eval()(images().requires_grad_())[:, category].sum().backward()
    handle.remove()
    model.train(training)
    model.zero_grad()
    return kept[0].detach(), kept[0].grad


@pytest.mark.parametrize("name", LAYERS)
def test_equals_plain_autograd_exactly(name: str) -> None:
    model = Network().eval()
    [activations], [gradients] = captured(model, [name], [1, 4])
    for k, category in enumerate([1, 4]):
        expected_activations, expected_gradients = plain(model, name, category)
        assert torch.equal(activations, expected_activations)
        assert torch.equal(gradients[:, k], expected_gradients)
        assert gradients[:, k].any()


@pytest.mark.parametrize("order", [["last", "stem", "relu:input"], ["stem", "last", "drop:input"]])
def test_several_layers_in_any_order(order: list[str]) -> None:
    model = Network().eval()
    for name, activations, gradients in zip(order, *captured(model, order, [2]), strict=True):
        expected_activations, expected_gradients = plain(model, name, 2)
        assert torch.equal(activations, expected_activations)
        assert torch.equal(gradients[:, 0], expected_gradients)


def test_several_calls_share_one_graph() -> None:
    model = Network().eval()
    with inference(model), Capture([site(model, "block")]) as capture:
        output = model(images())
        first = capture.gradients(output[:, :2], keep_graph=True)[0]
        second = capture.gradients(output[:, 2:])[0]
    expected = captured(model, ["block"], [0, 1, 2, 3, 4])[1][0]
    assert torch.equal(torch.cat([first, second], 1), expected)


def test_output_is_that_of_the_model_also_with_aliases() -> None:
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x)
            self.relu(x)  # what it returns is not used
            return x.mean((2, 3))

    torch.manual_seed(0)
    model = Aliased().eval()
    for name in ("conv", "relu:input"):
        with inference(model), Capture([site(model, name)]) as capture:
            output = model(images())
            assert (capture.activations[0] < 0).any()
        assert torch.equal(output, model(images()))


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_caller_grad_mode(grad_mode: type) -> None:
    model = Network().eval()
    expected = captured(model, ["last"], [0])
    with grad_mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        [activations], [gradients] = captured(model, ["last"], [0])
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    assert torch.equal(activations, expected[0][0])
    assert torch.equal(gradients, expected[1][0])
    assert not activations.is_inference()
    assert not gradients.requires_grad


def test_frozen_parameters() -> None:
    model = Network().eval()
    expected = captured(model, ["block"], [3])
    model.requires_grad_(False)
    activations, gradients = captured(model, ["block"], [3])
    assert torch.equal(activations[0], expected[0][0])
    assert torch.equal(gradients[0], expected[1][0])
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_no_gradient_is_left_anywhere() -> None:
    model = Network().eval()
    model.head.weight.grad = kept = torch.ones_like(model.head.weight)
    x = images().requires_grad_()
    captured(model, ["last"], [0, 1], x)
    assert x.grad is None
    assert model.head.weight.grad is kept
    assert (kept == 1).all()
    assert all(p.grad is None for n, p in model.named_parameters() if n != "head.weight")


def test_nothing_is_kept_below_the_layer() -> None:
    model = Network().eval()
    saved: list[tuple[int, ...]] = []
    below = images().shape[2] * images().shape[3]  # only the first layers have so many positions

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        inference(model),
        Capture([site(model, "last")]) as capture,
    ):
        capture.gradients(model(images())[:, :1])
        late = list(saved)
        saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(images())
    positions = [shape[2] * shape[3] for shape in late if len(shape) == 4]
    assert below not in positions
    assert below in [shape[2] * shape[3] for shape in saved if len(shape) == 4]


class Note(nn.Module):
    """Identity that notes each backward pass through it, and whether autocast was on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Noted.apply(x, self.seen)


class Noted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seen):
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.seen.append(torch.is_autocast_enabled("cpu"))
        return gradient, None


def test_backward_stops_at_the_layer() -> None:
    below, above = Note(), Note()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), below, nn.Conv2d(4, 4, 3), above, nn.Flatten())
    captured(model, ["2"], [0])
    assert (len(below.seen), len(above.seen)) == (0, 1)


def test_train_mode_is_off_inside_and_restored_module_by_module() -> None:
    model = Network().train()
    model.norm.eval()
    flags = {name: module.training for name, module in model.named_modules()}
    statistics = model.norm.running_mean.clone()
    [activations], [gradients] = captured(model, ["last"], [0])
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert torch.equal(model.norm.running_mean, statistics)
    expected_activations, expected_gradients = plain(model, "last", 0)
    assert torch.equal(activations, expected_activations)
    assert torch.equal(gradients[:, 0], expected_gradients)


def hook_count(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


@pytest.mark.parametrize("where", ["stem", "head", None])
def test_everything_is_restored_after_an_exception(where: str | None) -> None:
    model = Network().train()
    model.drop.eval()

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    def run() -> None:
        with inference(model), Capture([site(model, "last")]):
            model(images())
            assert torch.is_grad_enabled()
            fail()

    handle = model.get_submodule(where).register_forward_hook(fail) if where else None
    flags = [module.training for module in model.modules()]
    hooks = hook_count(model)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        with pytest.raises(KeyboardInterrupt):
            run()
        assert torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_cache_enabled()
    assert [module.training for module in model.modules()] == flags
    assert hook_count(model) == hooks
    if handle:
        handle.remove()


def test_hooks_are_removed_when_attaching_fails() -> None:
    model = Network()
    with pytest.raises(AttributeError), Capture([site(model, "stem"), Site("x", None)]):
        pass
    assert hook_count(model) == 0


def test_autocast() -> None:
    model = Network().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        [activations], [gradients] = captured(model, ["last"], [0])
        assert torch.is_autocast_enabled("cpu")
    assert activations.dtype == gradients.dtype == torch.bfloat16
    [exact_activations], [exact_gradients] = captured(model, ["last"], [0])
    torch.testing.assert_close(activations.float(), exact_activations, rtol=0.02, atol=0.02)
    torch.testing.assert_close(gradients.float(), exact_gradients, rtol=0.02, atol=1e-4)


def test_backward_is_not_autocast() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Note(), nn.Flatten())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        captured(model, ["0"], [0])
    assert model[1].seen == [False]


@pytest.mark.parametrize("name", ["stem", "last", "drop:input"])
def test_training_step_around_a_call_under_autocast(name: str) -> None:
    """Weights that autocast casts are cached, and those cast without a graph would stay so."""
    model = Network()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with inference(model):
            assert not torch.is_autocast_cache_enabled()  # newer releases of torch need it not
        captured(model, [name], [0])
        loss = model(images()).square().sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_other_threads_are_not_captured() -> None:
    model = Network().eval()
    with inference(model), Capture([site(model, "last")]) as capture:
        thread = threading.Thread(target=model, args=(images(),))
        thread.start()
        thread.join()
        model(images()[:2])
        assert len(capture.activations[0]) == 2


def test_other_threads_meet_hooks_that_are_just_registered() -> None:
    """torch lists a hook first and then notes that it takes keyword arguments."""
    model = Network().eval()
    called: list[int] = []
    errors: list[BaseException] = []

    def call_hooks() -> None:
        try:
            for hook in model.last._forward_pre_hooks.values():
                hook(model.last, ())
            for hook in model.last._forward_hooks.values():
                hook(model.last, (), None)
        except BaseException as error:
            errors.append(error)

    def elsewhere(*_: object) -> None:
        called.append(hook_count(model))
        thread = threading.Thread(target=call_hooks)
        thread.start()
        thread.join()

    with inference(model), Capture([site(model, "last:input")]):
        elsewhere()
    handle = model.relu.register_forward_hook(elsewhere)
    layers.trace(model, (images(),), {})
    handle.remove()
    assert not errors
    assert min(called) > 0
    assert hook_count(model) == 0


def test_threads_on_one_model() -> None:
    model = Network().eval()
    expected = [captured(model, ["last"], [k])[1][0] for k in range(5)]
    errors: list[BaseException] = []

    def work(k: int) -> None:
        try:
            for _ in range(20):
                assert torch.equal(captured(model, ["last"], [k])[1][0], expected[k])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert hook_count(model) == 0


class Wrapped(nn.Module):
    """A layer whose output is not a tensor but holds one."""

    def __init__(self, wrap) -> None:
        super().__init__()
        self.conv, self.wrap = nn.Conv2d(3, 4, 3), wrap

    def forward(self, x: torch.Tensor):
        return self.wrap(self.conv(x))


class Pair(NamedTuple):
    first: torch.Tensor | None
    second: torch.Tensor


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda x: (x, None), lambda value: value[0]),
        (lambda x: ["name", x], lambda value: value[1]),
        (lambda x: Pair(None, x), lambda value: value.second),
        (lambda x: OrderedDict(kind="map", out=x), lambda value: value["out"]),
    ],
)
def test_first_tensor_of_a_container(wrap, unwrap) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = Wrapped(wrap)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return unwrap(self.layer(x)).square().mean((2, 3))

    model = Model().eval()
    [activations], [gradients] = captured(model, ["layer"], [2])
    assert torch.equal(activations, model.layer.conv(images()))
    expected = torch.zeros_like(activations)
    expected[:, 2] = 2 * activations[:, 2] / activations[0, 0].numel()
    torch.testing.assert_close(gradients[:, 0], expected)


def test_input_given_by_keyword() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(input=x).mean((2, 3))

    [activations], [gradients] = captured(Model(), ["layer:input"], [0])
    assert torch.equal(activations, images())
    assert gradients.any()


@pytest.mark.parametrize("classes", [[0], [0, 1, 2]])
def test_channels_last_stays(classes: list[int]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardtanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    model.to(memory_format=torch.channels_last)
    x = images().to(memory_format=torch.channels_last)
    [activations], [gradients] = captured(model, ["0"], classes, x)
    assert activations.is_contiguous(memory_format=torch.channels_last)
    assert gradients.movedim(2, -1).is_contiguous()
    assert torch.equal(gradients, captured(model, ["0"], classes, x.contiguous())[1][0])


class Odd(nn.Module):
    """Forwards that break one expectation each."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv, self.kind, self.idle = nn.Conv2d(3, 3, 1), kind, nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "twice":
            return self.conv(self.conv(x)).mean((2, 3))
        if self.kind == "detached":
            return self.conv(x).detach().mean((2, 3))
        if self.kind == "aside":
            self.idle(x)
            return self.conv(x).mean((2, 3))
        if self.kind == "no_grad":
            with torch.no_grad():
                x = self.conv(x)
            return x.mean((2, 3))
        with torch.inference_mode():
            return self.conv(x).mean((2, 3))


@pytest.mark.parametrize(
    ("kind", "names", "message"),
    [
        ("twice", ["conv"], "'conv' ran twice in one forward pass.*'NAME:input'"),
        ("aside", ["idle"], "score does not depend on layer 'idle'"),
        ("aside", ["conv", "idle"], "score does not depend on layer 'idle'"),
        ("never", ["idle"], "'idle' did not run in the forward pass"),
        ("detached", ["conv"], "does not depend on layer 'conv'.*detach"),
        ("no_grad", ["conv"], "does not depend on layer 'conv'.*no_grad"),
        ("inference", ["conv"], r"'conv' runs under torch\.inference_mode\(\) inside the model"),
    ],
)
def test_errors_of_models(kind: str, names: list[str], message: str) -> None:
    model = Odd("aside" if kind == "never" else kind)
    if kind == "never":
        model.forward = lambda x: model.conv(x).mean((2, 3))
    with pytest.raises(CaptureError, match=message):
        captured(model, names, [0])
    assert hook_count(model) == 0


def test_error_of_a_layer_without_floating_point() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2, return_indices=True))
    model[1].forward = lambda x: x.argmax(1)
    with pytest.raises(CaptureError, match=r"layer '1' gives torch\.int64, which has no gradient"):
        captured(model, ["1"], [0])


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_error_of_a_quantized_layer() -> None:
    class Quantize(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)

    with pytest.raises(CaptureError, match=r"gives torch\.quint8.*float model, if it is quantized"):
        captured(nn.Sequential(Quantize()), ["0"], [0])


def test_error_of_a_layer_without_tensor() -> None:
    class Text(nn.Module):
        def forward(self, x: torch.Tensor) -> str:
            return "cat"

    with pytest.raises(CaptureError, match="layer '0' gives no tensor but str"):
        captured(nn.Sequential(Text()), ["0"], [0])
