"""What only a GPU can show: graphs, streams, several devices, the host left alone.

The op's results on CUDA are compared with the oracle by the tests that run on every device
(test_ops.py, test_imaging.py) and, without a GPU, by test_cuda_emulation.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from conftest import CUDA_MISSING
from samples import DTYPES, TOLERANCE, error, make_pair
from torch import Tensor

import gradcampp_ext as gx
from gradcampp_ext import reference

pytestmark = pytest.mark.skipif(CUDA_MISSING is not None, reason=f"needs CUDA: {CUDA_MISSING}")
several_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

# One launch with and without several blocks for a sample, the softmax between two launches, and a
# map that does not fit on chip.
CASES = {
    "few channels": ((2, 5, 4, 3), "gradcampp"),
    "one sample": ((1, 2048, 7, 7), "gradcampp"),
    "one large sample": ((1, 256, 56, 56), "gradcampp"),
    "many samples": ((64, 512, 14, 14), "gradcampp_normalized"),
    "two passes": ((2, 130, 9, 9), "attention"),
    "elementwise": ((3, 70, 14, 14), "layercam"),
    "large maps": ((1, 3, 300, 300), "gradcampp"),
}


def explain(case: str, a: Tensor, g: Tensor) -> Tensor:
    return gx.cam(a, g, method=CASES[case][1], size=(50, 40))


def expected(case: str, a: Tensor, g: Tensor) -> Tensor:
    return reference.cam(a, g, method=CASES[case][1], size=(50, 40))


@contextmanager
def no_synchronisation() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def keep_busy() -> None:
    """Some tenths of a second of work on the current stream."""
    torch.cuda._sleep(500_000_000)


@pytest.mark.parametrize("targets", [None, 3])
@pytest.mark.parametrize("case", CASES)
def test_graph_replays_on_new_input(case, targets):
    a, g = make_pair(CASES[case][0], targets=targets, device="cuda")
    explain(case, a, g)  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        maps = explain(case, a, g)
    for seed in (1, 2, 3):
        new_a, new_g = make_pair(CASES[case][0], targets=targets, device="cuda", seed=seed)
        a.copy_(new_a)
        g.copy_(new_g)
        maps.fill_(-1)
        graph.replay()
        assert error(maps, expected(case, new_a, new_g)) <= 1e-5
        assert torch.equal(maps, explain(case, new_a, new_g))


def test_overlay_and_weights_in_a_graph():
    a, g = make_pair((2, 40, 9, 7), device="cuda")
    images = torch.rand(2, 9, 7, 3, device="cuda")

    def both() -> tuple[Tensor, Tensor]:
        return gx.channel_weights(a, g), gx.overlay(images, gx.cam(a, g))

    want = both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = both()
    for x in got:
        x.zero_()
    graph.replay()
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("case", CASES)
def test_the_current_stream_is_used(case):
    a, g = make_pair(CASES[case][0], device="cuda")
    want = explain(case, a, g)
    late_a, late_g = torch.zeros_like(a), torch.zeros_like(g)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        keep_busy()
        late_a.copy_(a)  # a launch on any other stream would find zeros
        late_g.copy_(g)
        maps = explain(case, late_a, late_g)
        keep_busy()
        done = side.record_event()
    assert not done.query(), "the call waited for the device"
    side.synchronize()
    assert torch.equal(maps, want)


@pytest.mark.parametrize("case", CASES)
def test_streams_side_by_side(case):
    pairs = [make_pair(CASES[case][0], device="cuda", seed=seed) for seed in range(4)]
    wanted = [explain(case, *pair) for pair in pairs]
    streams = [torch.cuda.Stream() for _ in pairs]
    torch.cuda.synchronize()
    for _ in range(10):
        maps = []
        for stream, pair in zip(streams, pairs, strict=True):
            with torch.cuda.stream(stream):
                maps.append(explain(case, *pair))
        torch.cuda.synchronize()
        for actual, want in zip(maps, wanted, strict=True):
            assert torch.equal(actual, want)


@pytest.mark.parametrize("case", CASES)
def test_the_host_never_waits(case):
    a, g = make_pair(CASES[case][0], targets=2, device="cuda")
    explain(case, a, g)
    torch.cuda.synchronize()
    with no_synchronisation():
        explain(case, a, g)
    # What torch cannot see: calls return while the device is still busy with something else.
    keep_busy()
    explain(case, a, g)
    done = torch.cuda.current_stream().record_event()
    assert not done.query()
    torch.cuda.synchronize()


@pytest.mark.parametrize("case", CASES)
def test_only_the_output_and_a_small_workspace_are_allocated(case):
    a, g = make_pair(CASES[case][0], device="cuda")
    explain(case, a, g)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    maps = explain(case, a, g)
    peak = torch.cuda.max_memory_allocated() - before
    cells = a.shape[0] * a.shape[2] * a.shape[3]
    # At most 64 partial maps, one map more, and what allocations are rounded up to.
    assert peak <= maps.numel() * 4 + 66 * cells * 4 + a.shape[0] * a.shape[1] * 4 + 4096
    assert torch.cuda.memory_allocated() - before <= maps.numel() * 4 + 512


def kernels(run: Callable[[], object]) -> list[str]:
    """Names of the kernels that run() launches."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("Memset", "Memcpy"))
    ]


@pytest.mark.parametrize("case", ["few channels", "one sample", "many samples", "elementwise"])
def test_one_launch(case):
    a, g = make_pair(CASES[case][0], device="cuda")
    names = kernels(lambda: explain(case, a, g))
    assert len(names) == 1, names
    assert "fused_kernel" in names[0]


@pytest.mark.parametrize("case", CASES)
def test_same_bits_every_time(case):
    a, g = make_pair(CASES[case][0], targets=2, dtype=torch.bfloat16, device="cuda")
    first = explain(case, a, g)
    for _ in range(20):
        assert torch.equal(explain(case, a, g), first)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_more_than_two_to_the_31_elements(dtype):
    samples = 2**23 + 1  # of 256 elements, all in the same place
    a, g = make_pair((1, 4, 8, 8), dtype=dtype, device="cuda")
    many = [x.expand(samples, 4, 8, 8) for x in (a, g)]
    assert many[0].numel() > 2**31
    maps = gx.cam(*many, normalize=None, size=(1, 1))
    assert error(maps[:1], reference.cam(a, g, normalize=None, size=(1, 1))) <= TOLERANCE[dtype]
    assert torch.equal(maps, maps[:1].expand_as(maps))
    weights = gx.channel_weights(*many)
    assert error(weights[:1], reference.channel_weights(a, g)) <= TOLERANCE[dtype]
    assert torch.equal(weights, weights[:1].expand_as(weights))


def test_a_tensor_of_more_than_two_to_the_31_elements():
    free, _ = torch.cuda.mem_get_info()
    if free < 12 << 30:
        pytest.skip("needs 12 GB of free device memory")
    n, c = 2**15 + 1, 2**10
    a = torch.ones(n, c, 8, 8, device="cuda", dtype=torch.bfloat16)
    assert a.numel() > 2**31
    a[-1] = make_pair((1, c, 8, 8), dtype=a.dtype, device="cuda")[0]
    g = make_pair((1, c, 8, 8), dtype=a.dtype, device="cuda", seed=1)[1].expand_as(a)
    maps = gx.cam(a, g, normalize=None)
    for sample in (0, n // 2, n - 1):
        want = reference.cam(a[sample : sample + 1], g[:1], normalize=None)
        assert error(maps[sample : sample + 1], want) <= TOLERANCE[a.dtype]


def test_a_failed_call_leaves_the_device_usable():
    a, g = make_pair((2, 5, 4, 4), device="cuda")
    with pytest.raises(ValueError, match="on the device of"):
        gx.cam(a, g.cpu())
    with pytest.raises(RuntimeError, match="on the device of"):
        torch.ops.gradcampp_ext.channel_weights(a, g.unsqueeze(1).cpu(), "gradcam", False, 0.0, 1.0)
    assert error(gx.cam(a, g), reference.cam(a, g)) <= 1e-5


@several_devices
@pytest.mark.parametrize("case", CASES)
def test_the_tensors_device_is_used(case):
    assert torch.cuda.current_device() == 0
    a, g = make_pair(CASES[case][0], device="cuda:1")
    maps = explain(case, a, g)
    assert maps.device == a.device
    assert torch.cuda.current_device() == 0
    assert error(maps, expected(case, a, g)) <= 1e-5
    # Back and forth: what is known of one device must not be taken for the other's.
    here = explain(case, a.to("cuda:0"), g.to("cuda:0"))
    assert error(here, expected(case, a, g)) <= 1e-5
    assert torch.equal(explain(case, a, g), maps)


@several_devices
def test_tensors_on_two_devices_are_refused():
    a, g = make_pair((2, 5, 4, 4), device="cuda:0")
    with pytest.raises(ValueError, match="on the device of"):
        gx.cam(a, g.to("cuda:1"))
