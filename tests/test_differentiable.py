"""Maps inside a loss: derivatives against autograd through the float64 oracle."""

from __future__ import annotations

import pytest
import torch
from conftest import devices
from samples import (
    DTYPES,
    GRADIENT_TOLERANCE,
    LAYOUTS,
    accumulator,
    arrange,
    derivatives,
    error,
    make_pair,
)

import gradcampp_ext as gx
from gradcampp_ext import methods


def found(by_maps, a, g, **options):
    a, g = a.detach().requires_grad_(), g.detach().requires_grad_()
    return torch.autograd.grad(gx.cam(a, g, **options), (a, g), by_maps)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", methods.METHODS)
def test_derivatives_match_the_oracle(device, method, dtype):
    for shape, targets, size in [((2, 19, 7, 5), None, (20, 17)), ((1, 33, 14), 3, (9,))]:
        for layout in LAYOUTS:
            a, g = make_pair(
                shape, targets=targets, dtype=dtype, layout=layout, device=device, scale=0.5
            )
            options = {"method": method, "size": size}
            lead = g.shape[:1] if targets is None else g.shape[:2]
            by_maps = torch.randn(*lead, *size, dtype=accumulator(dtype), device=device)
            expected = derivatives(by_maps, a, g, **options)
            for actual, truth, like in zip(
                found(by_maps, a, g, **options), expected, (a, g), strict=True
            ):
                assert actual.dtype == like.dtype
                assert error(actual, truth) <= GRADIENT_TOLERANCE[dtype], layout


@pytest.mark.parametrize("normalize", ["minmax", "max", None])
@pytest.mark.parametrize("method", methods.METHODS)
def test_gradcheck(method, normalize):
    eps = None if methods.get(method).eps is None else 0.05
    for shape, size, rectify in [
        ((1, 3, 3, 2), (4, 5), None),
        ((1, 2, 3), None, False),
        ((1, 3, 4), None, True),
    ]:
        a = torch.rand(shape, dtype=torch.float64) + (0.1 if rectify is False else -0.3)
        g = torch.randn(shape[0], 2, *shape[1:], dtype=torch.float64)

        def maps(a, g, size=size, rectify=rectify):
            return gx.cam(
                a,
                g,
                method=method,
                size=size,
                normalize=normalize,
                rectify=rectify,
                relu=normalize != "max",
                eps=eps,
                temperature=0.7,
            )

        assert torch.autograd.gradcheck(maps, (a.requires_grad_(), g.requires_grad_()))


@pytest.mark.parametrize("interpolation", ["linear", "nearest"])
@pytest.mark.parametrize("shape", [(1, 2, 3), (1, 2, 3, 2), (1, 2, 2, 3, 2)])
def test_gradcheck_of_resizing(shape, interpolation):
    a = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    g = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    size = tuple(2 * n + 1 for n in shape[2:])
    assert torch.autograd.gradcheck(
        lambda a, g: gx.cam(a, g, size=size, interpolation=interpolation), (a, g)
    )


def test_cells_that_share_an_extreme_share_its_derivative():
    a = torch.tensor([[[1.0, 2.0, 2.0, 1.0, 1.5]]], dtype=torch.float64)
    g = torch.ones_like(a)
    by_maps = torch.randn(1, 5, dtype=torch.float64)
    expected = derivatives(by_maps, a, g)
    for actual, truth in zip(found(by_maps, a, g), expected, strict=True):
        torch.testing.assert_close(actual, truth)


def test_a_flat_map_has_no_derivatives():
    by_a, by_g = found(torch.ones(1, 4), torch.ones(1, 3, 4), torch.ones(1, 3, 4))
    assert not by_a.any()
    assert not by_g.any()


def test_expanded_derivatives_by_raw_maps():
    """Those of a sum over the maps, which need not be contiguous."""
    a, g = (x.requires_grad_() for x in make_pair((2, 12, 4, 4)))
    for size in (None, (8, 8)):
        options = {"normalize": None, "relu": False, "size": size}
        by_maps = torch.ones(2, *(size or (4, 4)))
        expected = derivatives(by_maps, a.detach(), g.detach(), **options)
        actual = torch.autograd.grad(gx.cam(a, g, **options).sum(), (a, g))
        for one, truth in zip(actual, expected, strict=True):
            assert error(one, truth) <= GRADIENT_TOLERANCE[torch.float32]


def test_expanded_gradients():
    a, _ = make_pair((2, 12, 4, 4))
    g = torch.rand(2, 12, 1, 1).expand(a.shape)
    by_maps = torch.randn(2, 4, 4)
    for actual, truth in zip(found(by_maps, a, g), derivatives(by_maps, a, g), strict=True):
        assert error(actual, truth) <= GRADIENT_TOLERANCE[torch.float32]


def test_only_what_is_wanted_is_made():
    a, g = make_pair((1, 8, 5, 5))
    by_maps = torch.randn(1, 5, 5)
    expected = derivatives(by_maps, a, g)
    for index in (0, 1):
        pair = [a, g]
        pair[index] = pair[index].clone().requires_grad_()
        (actual,) = torch.autograd.grad(gx.cam(*pair), pair[index], by_maps)
        assert error(actual, expected[index]) <= GRADIENT_TOLERANCE[torch.float32]
        assert not gx.cam(*(x.detach() for x in pair)).requires_grad
        with torch.no_grad():
            assert not gx.cam(*pair).requires_grad


def test_memory_layouts_are_kept():
    a, g = make_pair((2, 16, 6, 6), layout="channels_last")
    by_a, by_g = found(torch.randn(2, 6, 6), a, g)
    assert by_a.stride() == a.stride()
    assert by_g.stride() == g.stride()


def test_a_second_derivative_is_refused():
    a, g = (x.requires_grad_() for x in make_pair((1, 4, 3, 3)))
    loss = gx.cam(a, g).square().sum()
    by_a, _ = torch.autograd.grad(loss, (a, g), create_graph=True)
    with pytest.raises(NotImplementedError, match="once, not twice"):
        by_a.sum().backward()


def test_a_loss_on_the_map_reaches_the_network():
    """Through the activations, and through the gradients by them, down to the first weights."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 2)
    ).double()
    model.append(torch.nn.Tanh())

    def loss(cam) -> torch.Tensor:
        a = model[:2](images)
        score = model[2:](a)[:, 1].sum()
        (g,) = torch.autograd.grad(score, a, create_graph=True)
        return (cam(a, g) * mask).mean()

    from gradcampp_ext import reference

    images, mask = torch.rand(3, 1, 8, 8).double(), torch.rand(6, 6).double()
    parameters = list(model.parameters())
    ours = torch.autograd.grad(loss(gx.cam), parameters)
    plain = torch.autograd.grad(loss(reference.cam), parameters)
    for actual, truth in zip(ours, plain, strict=True):
        torch.testing.assert_close(actual, truth)


def test_compiled():
    a, g = (x.requires_grad_() for x in make_pair((2, 8, 6, 6)))

    def loss(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return gx.cam(a, g, size=(12, 12)).square().mean()

    expected = torch.autograd.grad(loss(a, g), (a, g))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for actual, truth in zip(torch.autograd.grad(compiled(a, g), (a, g)), expected, strict=True):
        torch.testing.assert_close(actual, truth)


def test_the_operator_is_well_behaved():
    a, g = make_pair((2, 6, 4, 4), targets=2)
    by_maps = torch.randn(2, 2, 4, 4)
    for wanted in [(True, True), (False, True)]:
        arguments = (by_maps, a, g, "gradcampp", True, 0.0, *wanted)
        torch.library.opcheck(torch.ops.gradcampp_ext.cam_backward.default, arguments)


def test_wrong_map_gradients_are_refused():
    a, g = make_pair((2, 6, 4, 4), targets=2)
    for wrong in (torch.randn(2, 2, 4, 5), torch.randn(2, 2, 4, 4).double(), torch.randn(2, 4, 4)):
        with pytest.raises(RuntimeError, match="map_gradients must be"):
            torch.ops.gradcampp_ext.cam_backward(wrong, a, g, "gradcampp", True, 0.0, True, True)


def test_halves_are_rounded_to_the_nearest():
    """The derivative of HiResCAM by g is a, so any value can be sent through the narrowing."""
    values = torch.cat(
        [
            torch.arange(-2.0, 2.0, 1e-3),
            torch.tensor([0.0, 65504.0, 65519.0, 65520.0, 1e-7, 5.96e-8, 2.98e-8, 3e-8, 6.1e-5]),
        ]
    )
    for dtype in (torch.float16, torch.bfloat16):
        a = torch.ones(1, 1, len(values), dtype=dtype)
        g = arrange(torch.ones_like(a)[:, None], "contiguous", 2)
        _, by_g = torch.ops.gradcampp_ext.cam_backward(
            values[None, None], a, g, "hirescam", False, 0.0, False, True
        )
        assert torch.equal(by_g.flatten(), values.to(dtype))
