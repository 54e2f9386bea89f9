"""The CUDA kernels, run on the host under AddressSanitizer and UndefinedBehaviorSanitizer.

Threads and blocks run in an order drawn from a seed; tests/emulation/emulator.h says what counts
as an error. Nothing here needs a GPU, and nothing here measures one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from emulation.emulation import Device, EmulationError, Emulator, build, build_changed, compiler
from samples import (
    DTYPES,
    GRADIENT_TOLERANCE,
    LAYOUTS,
    TOLERANCE,
    accumulator,
    derivatives,
    error,
    make_pair,
)

from gradcampp_ext import methods, reference

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")

CHANNELWISE = [row.name for row in methods.METHODS.values() if row.channelwise]
CANCELS = ("gradcam", "xgradcam", "hirescam", "attention")  # sums of signed terms: less accurate

FEW = Device(processors=1)  # one slice of the channels for each sample
MANY = Device(processors=80)  # as many slices as there are tiles
TINY = Device(shared_per_block=2048, shared_per_processor=4096)  # no tile fits: the second path
CLUSTER = Device(processors=16, clusters=True)  # a cluster of blocks for each sample
# Several clusters for a sample of 64 KB and more: tiles are so small that one would take too many
# rounds.
CLUSTERS = Device(40, 16 * 1024, 16 * 1024, clusters=True)
DEVICES = {
    "default": Device(),
    "few": FEW,
    "many": MANY,
    "cluster": CLUSTER,
    "clusters": CLUSTERS,
    "second path": TINY,
}


@pytest.fixture(scope="session")
def program(pytestconfig: pytest.Config) -> Path:
    return build(pytestconfig.rootpath / "build" / "emulation")


@pytest.fixture(scope="session")
def emulator(program: Path) -> Iterator[Emulator]:
    emulator = Emulator(program)
    yield emulator
    emulator.close()


def tolerance(dtype: torch.dtype, method: str) -> float:
    return TOLERANCE[dtype] * (20 if method in CANCELS else 1)


def name(value: object) -> str:
    return str(value).removeprefix("torch.").replace(" ", "")


# Whether a map is float or double makes a difference to how blocks work together, half does not.
@pytest.mark.parametrize(
    ("dtype", "device"),
    [
        (dtype, device)
        for dtype in DTYPES
        for device in DEVICES
        if dtype.itemsize >= 4 or device in ("default", "second path")
    ],
    ids=name,
)
@pytest.mark.parametrize("method", methods.METHODS)
def test_raw_map_matches_the_oracle(emulator, dtype, method, device):
    for seed, (shape, targets) in enumerate(
        [((3, 7, 1, 1), None), ((1, 70, 7, 7), None), ((2, 24, 5, 3), 5), ((1, 9, 20, 17), 2)]
    ):
        a, g = make_pair(shape, targets=targets, dtype=dtype, seed=seed)
        expected = reference.cam(a, g, method=method, normalize=None)
        actual = emulator.cam(
            a, g, method=method, normalize=None, seed=seed, device=DEVICES[device]
        )
        assert error(actual, expected) <= tolerance(dtype, method), (shape, targets)


@pytest.mark.parametrize("device", ["default", "many", "cluster", "second path"])
@pytest.mark.parametrize("gradient_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(emulator, layout, gradient_layout, device):
    cases = itertools.cycle(itertools.product(("gradcampp", "xgradcam", "layercam"), DTYPES[1:]))
    for seed, (method, dtype) in enumerate(itertools.islice(cases, 4)):
        shape = [(2, 40, 5, 7), (1, 37, 4, 6)][seed % 2]
        a, g = make_pair(
            shape,
            targets=(None, 3)[seed // 2],
            dtype=dtype,
            layout=layout,
            gradient_layout=gradient_layout,
            seed=seed,
        )
        expected = reference.cam(a, g, method=method, normalize=None)
        actual = emulator.cam(
            a, g, method=method, normalize=None, seed=seed, device=DEVICES[device]
        )
        assert error(actual, expected) <= tolerance(dtype, method), (shape, dtype, method)


@pytest.mark.parametrize("device", ["default", "second path"])
@pytest.mark.parametrize("normalize", [None, "minmax", "max"])
@pytest.mark.parametrize("interpolation", ["linear", "nearest"])
def test_output_sizes(emulator, interpolation, normalize, device):
    for seed, (space, size) in enumerate(
        [
            ((7,), (33,)),
            ((9,), (4,)),
            ((1, 1), (5, 2)),
            ((7, 7), (40, 35)),
            ((5, 6), (5, 6)),
            ((4, 3), (70, 1)),
            ((3, 4, 5), (6, 9, 7)),
            ((2, 5, 3), (3, 5, 40)),
        ]
    ):
        for relu in (True, False):
            a, g = make_pair((2, 6, *space), targets=(None, 2)[seed % 2], signed=True, seed=seed)
            options = {
                "size": size,
                "normalize": normalize,
                "interpolation": interpolation,
                "relu": relu,
                "method": ("gradcampp", "layercam")[seed % 2],
            }
            actual = emulator.cam(a, g, seed=seed, device=DEVICES[device], **options)
            expected = reference.cam(a, g, **options)
            # A pixel is never farther off than the map's largest value times the rounding.
            torch.testing.assert_close(
                actual.double(), expected, rtol=0, atol=4e-6 * expected.abs().max().item()
            )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", methods.METHODS)
def test_options_of_the_methods(emulator, method, device):
    for rectify, eps in itertools.product((True, False), (0.0, 1e-3)):
        # Sums of signed activations come close to 0, where the formulas have poles.
        a, g = make_pair((2, 33, 6, 5), layout="channels_last", signed=rectify, scale=1.0)
        options = {"method": method, "rectify": rectify, "eps": eps, "temperature": 3.0}
        actual = emulator.cam(a, g, normalize=None, device=DEVICES[device], **options)
        expected = reference.cam(a, g, normalize=None, **options)
        assert error(actual, expected) <= tolerance(a.dtype, method)


@pytest.mark.parametrize("device", ["default", "second path"])
def test_literal_formula_on_signed_activations(emulator, device):
    a, g = make_pair((2, 12, 4, 4), dtype=torch.float64, signed=True, scale=1.0)
    for method in ("gradcampp", "gradcampp_normalized"):
        options = {"method": method, "rectify": False, "normalize": None}
        actual = emulator.cam(a, g, device=DEVICES[device], **options)
        assert error(actual, reference.cam(a, g, **options)) <= 1e-10  # near the poles


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("method", CHANNELWISE)
def test_channel_weights(emulator, method, dtype):
    for seed, layout in enumerate(LAYOUTS):
        a, g = make_pair((2, 40, 6, 7), targets=3, dtype=dtype, layout=layout, seed=seed)
        actual = emulator.channel_weights(a, g, method=method, seed=seed)
        expected = reference.channel_weights(a, g, method=method)
        if method == "attention":  # what the map is made with: the pooled attention
            row = methods.get(method)
            response = torch.einsum("nkc,nchw->nkhw", expected, a.double())
            attention = response.flatten(2).softmax(-1) + row.eps
            expected = torch.einsum("nkp,ncp->nkc", attention, a.double().flatten(2)) / 42
        assert error(actual, expected) <= tolerance(dtype, method)


@pytest.mark.parametrize("device", DEVICES)
def test_expanded_gradients(emulator, device):
    a, _ = make_pair((2, 36, 6, 5), layout="channels_last")
    values = torch.rand(2, 36, dtype=a.dtype) * 1e-3
    for g in (
        values[:, :, None, None].expand(a.shape),
        values[:, :1, None, None].expand(a.shape),
        values[:, None, :, None, None].expand(2, 3, *a.shape[1:]),
        torch.rand(2, 1, 6, 5).expand(a.shape),
        torch.rand(2, 36, 6, 1).expand(a.shape),
    ):
        for method in ("gradcampp", "layercam"):
            actual = emulator.cam(a, g, method=method, normalize=None, device=DEVICES[device])
            expected = reference.cam(a, g, method=method, normalize=None)
            assert error(actual, expected) <= TOLERANCE[a.dtype]


@pytest.mark.parametrize("targets", [1, 5, 11])
def test_targets_share_a_block_or_not(emulator, targets):
    a, g = make_pair((2, 24, 9, 9), targets=targets)
    expected = reference.cam(a, g, normalize=None)
    for shared in (16, 32, 64, 200):  # kilobytes of a processor
        device = Device(4, shared * 512, shared * 1024)
        actual = emulator.cam(a, g, normalize=None, device=device)
        assert error(actual, expected) <= TOLERANCE[a.dtype]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_clusters_of_blocks(emulator, dtype, layout):
    for seed, (method, targets, size) in enumerate(
        [("gradcampp", 2, (20, 33)), ("layercam", None, None), ("attention", None, None)]
    ):
        shape = (1, 704 // dtype.itemsize, 7, 7)  # 69 KB
        a, g = make_pair(shape, targets=targets, dtype=dtype, layout=layout, seed=seed)
        options = {"method": method, "size": size, "normalize": None}
        expected = reference.cam(a, g, **options)
        attention = 49 * max(4, dtype.itemsize) + 15 if method == "attention" else 0
        for device, several in ((CLUSTER, False), (CLUSTERS, True)):
            actual = emulator.cam(a, g, seed=seed, device=device, **options)
            assert error(actual, expected) <= tolerance(dtype, method)
            # One cluster needs neither partial maps nor counters.
            assert (emulator.workspace > attention) == several


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["gradcampp", "gradcam", "layercam", "attention"])
def test_the_order_of_threads_changes_no_bit(emulator, method, device):
    a, g = make_pair((2, 130, 7, 7), targets=2, dtype=torch.float16)
    options = {"method": method, "size": (20, 20), "device": DEVICES[device]}
    first = emulator.cam(a, g, seed=0, **options)
    for seed in range(1, 6):
        assert torch.equal(emulator.cam(a, g, seed=seed, **options), first)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", methods.METHODS)
def test_a_bad_value_spoils_its_own_map(emulator, method, device, bad):
    for place in ("activations", "gradients"):
        a, g = make_pair((3, 20, 5, 5), targets=2)
        (a[1, 7, 2, 3] if place == "activations" else g[1, 0, 7, 2, 3]).fill_(bad)
        expected = reference.cam(a, g, method=method)
        maps = emulator.cam(a, g, method=method, device=DEVICES[device])
        assert torch.equal(maps.isnan(), expected.isnan())
        assert maps[0].isfinite().all()
        assert maps[2].isfinite().all()


@pytest.mark.parametrize("device", ["default", "second path"])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_scaled_gradients(emulator, scale, device):
    for method in ("gradcampp", "gradcampp_normalized", "layercam"):
        a, g = make_pair((2, 30, 6, 6), scale=scale)
        actual = emulator.cam(a, g, method=method, device=DEVICES[device])
        assert error(actual, reference.cam(a, g, method=method)) <= 4e-6


def test_reciprocals_are_as_inexact_as_on_a_gpu(emulator):
    a, g = torch.full((1, 1, 1, 1), 3.0), torch.ones(1, 1, 1, 1)
    fifth = torch.tensor(0.2)
    upwards = torch.nextafter(fifth, torch.tensor(1.0))
    assert emulator.channel_weights(a, g).item() == upwards.item()
    # 2 + S g up to 2^126, beyond which the instruction gives 0.
    a = torch.full((1, 1, 2, 2), 1.0)
    for exponent in (-126, -60, 0, 60, 123):
        g = torch.full((1, 1, 2, 2), 2.0**exponent)
        for device in (Device(), TINY):
            actual = emulator.cam(a, g, normalize=None, device=device)
            assert error(actual, reference.cam(a, g, normalize=None)) <= TOLERANCE[a.dtype]
    assert emulator.channel_weights(a, torch.full((1, 1, 2, 2), 2.0**125)).item() == 0


def test_offsets_beyond_32_bits(emulator):
    # Two samples, and two channels, more than 2^31 elements apart; only what is used is mapped.
    shape, far = (2, 2, 3, 3), 2**31 + 64
    small = make_pair(shape, dtype=torch.float16)
    for strides in [(far, 9, 3, 1), (9, far, 3, 1), (18, 1, 2 * 3, 2)]:
        pair = []
        for x in small:
            storage = torch.empty(
                1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)),
                dtype=torch.float16,
            )
            pair.append(storage.as_strided(shape, strides).copy_(x))
        for device in (Device(), CLUSTER, TINY):
            actual = emulator.cam(*pair, normalize=None, device=device)
            assert error(actual, reference.cam(*small, normalize=None)) <= TOLERANCE[torch.float16]


def test_number_of_launches(emulator):
    a, g = make_pair((2, 64, 7, 7))
    for device, method, launches in [
        (Device(), "gradcampp", 1),
        (Device(), "layercam", 1),
        (MANY, "gradcampp", 1),
        (CLUSTER, "gradcampp", 1),
        (Device(), "attention", 2),
        (TINY, "gradcampp", 4),
        (TINY, "layercam", 3),
        (TINY, "attention", 8),
    ]:
        emulator.cam(a, g, method=method, size=(14, 14), device=device)
        assert emulator.launches == launches, (device, method)
    emulator.channel_weights(a, g)
    assert emulator.launches == 1


@pytest.mark.parametrize("kind", ["bytes", "floats", "channels first"])
def test_overlay(emulator, kind):
    images = torch.randint(0, 256, (2, 9, 31, 3), dtype=torch.uint8)
    if kind == "channels first":
        images = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    maps = torch.rand(2, 9, 33)[:, :, 1:32]
    maps[0, 0, :6] = torch.tensor([0.0, 1.0, 2.0, -1.0, float("nan"), float("inf")])
    table = torch.randint(0, 256, (256, 3), dtype=torch.uint8)
    given = images if kind != "floats" else images.float() / 255
    actual = emulator.overlay(given, maps, table, 0.3)
    index = (maps.double() * 255 + 0.5).nan_to_num(0).clamp(0, 255).long()
    blended = 0.7 * images.double() + 0.3 * table[index].double()
    difference = (actual.double() - blended).abs()
    assert difference.max() <= 0.5 + 1e-3  # the nearest byte
    index_of_nan = table[0].double() * 0.3 + images[0, 0, 4].double() * 0.7
    assert (actual[0, 0, 4].double() - index_of_nan).abs().max() <= 0.5 + 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_smooth_gradcampp(emulator, dtype, layout):
    for seed, (shape, targets) in enumerate(
        [((2, 21, 5, 7), 2), ((1, 40, 33), 1), ((2, 9, 2, 3, 4), 3), ((1, 3, 20, 20), 1)]
    ):
        a, _ = make_pair(shape, dtype=dtype, layout=layout, seed=seed)
        _, g = make_pair(
            (5 * shape[0], *shape[1:]), targets=targets, dtype=dtype, layout=layout, seed=seed
        )
        copies = g.unflatten(0, (5, shape[0]))
        one = copies[0].double()  # without gaps, in one of the orders of memory
        sums = torch.stack([torch.zeros_like(one)] * 3)
        for part in (copies[:3], copies[3:]):
            sums = emulator.add_powers(sums, part, seed=seed)
        expected = torch.stack([copies.double().pow(power).sum(0) for power in (1, 2, 3)])
        torch.testing.assert_close(sums, expected, rtol=1e-12, atol=1e-15)
        for rectify, eps in ((True, 0.0), (False, 1e-6)):
            options = {"rectify": rectify, "eps": eps}
            actual = emulator.power_weights(a, sums, 5, seed=seed, **options)
            weights = reference.smooth_weights(a, copies, **options)
            assert error(actual, weights) <= (1e-12 if dtype == torch.float64 else 2e-7)


def test_smooth_gradcampp_of_expanded_sums_and_bad_values(emulator):
    a, _ = make_pair((2, 20, 6, 5))
    g = torch.randn(3, 2, 4, 20, 1, 1) / 30
    sums = emulator.add_powers(torch.zeros(3, *g.shape[1:], dtype=torch.float64), g)
    spread = g.expand(-1, -1, -1, -1, 6, 5)
    actual = emulator.power_weights(a, sums.expand(3, *spread.shape[1:]), 3)
    assert error(actual, reference.smooth_weights(a, spread)) <= 2e-7
    for bad in (float("nan"), float("inf"), -float("inf")):
        spoilt = g.clone()
        spoilt[1, 1, 2, 7] = bad
        sums = emulator.add_powers(torch.zeros(3, *g.shape[1:], dtype=torch.float64), spoilt)
        weights = emulator.power_weights(a, sums.expand(3, *spread.shape[1:]), 3)
        assert weights.isnan().nonzero().tolist() == [[1, 2, 7]]
        other = a.clone()
        other[0, 3, 1, 1] = bad
        weights = emulator.power_weights(other, sums.expand(3, *spread.shape[1:]), 3)
        assert weights[0, :, 3].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("method", [m for m in methods.METHODS if m != "attention"])
def test_backward(emulator, method, dtype):
    # a warp to a channel, a block to a channel, neighbouring channels: also ragged ones
    for seed, (shape, targets, layout) in enumerate(
        [
            ((2, 37, 5, 5), 2, "contiguous"),
            ((1, 3, 20, 17), 1, "sliced"),
            ((2, 35, 4, 6), 3, "channels_last"),
            ((1, 8, 3, 3), 2, "transposed"),
        ]
    ):
        signed = method != "xgradcam"  # which divides by the sum of the activations
        a, g = make_pair(
            shape, targets=targets, dtype=dtype, layout=layout, signed=signed, scale=1.0
        )
        by_maps = torch.randn(*g.shape[:2], *a.shape[2:], dtype=accumulator(dtype))
        row = methods.get(method)
        arguments = (method, row.rectify, row.eps or 0.0)
        expected = derivatives(by_maps, a, g, method=method, normalize=None, relu=False)
        found = emulator.cam_backward(by_maps, a, g, *arguments, seed=seed)
        for actual, truth in zip(found, expected, strict=True):
            assert error(actual, truth) <= GRADIENT_TOLERANCE[dtype]
        only_g = emulator.cam_backward(by_maps, a, g, *arguments, by_activations=False, seed=seed)
        assert only_g[0].numel() == 0
        assert torch.equal(only_g[1], found[1])


FUSED, BLOCK, FINISH = "cuda/fused.cuh", "cuda/block.cuh", "cuda/finish.cuh"
# One change to the kernels each, that a GPU might let pass: the tests above have to notice.
CHANGES = {
    "no barrier when a tile has come": (FUSED, "__syncthreads();  // this round", "// this round"),
    "no wait for copies": (FUSED, "__pipeline_wait_prior(0);", ""),
    "both tiles in one place": (FUSED, "parity ^= 1)", "parity ^= 0)"),
    "no barrier after the totals": (
        FUSED,
        "totals[row.channel] = sum[0];\n          __syncthreads();",
        "totals[row.channel] = sum[0];",
    ),
    "barrier in a branch": (
        FUSED,
        "if (row.lane == 0) totals[row.channel] = sum[0];\n          __syncthreads();",
        "if (row.lane == 0) {\n totals[row.channel] = sum[0];\n __syncthreads(); }",
    ),
    "no barrier after the weights": (
        FUSED,
        "        __syncthreads();\n        add_tile_to_map",
        "        add_tile_to_map",
    ),
    "no barrier before the maps are gathered": (
        FUSED,
        "  __syncthreads();\n  add_sources(0, cells",
        "  add_sources(0, cells",
    ),
    "no barrier between crews": (
        FUSED,
        "    scratch[thread] = sum;\n  }\n  __syncthreads();",
        "    scratch[thread] = sum;\n  }",
    ),
    "no meeting before other blocks' maps are read": (
        FUSED,
        "    meet(blocks);\n    add_sources(first",
        "    __syncthreads();\n    add_sources(first",
    ),
    "no meeting before a cluster is counted": (
        FUSED,
        "    meet(blocks);\n    if (share.rank == 0",
        "    __syncthreads();\n    if (share.rank == 0",
    ),
    "no meeting before the last cluster is known": (
        FUSED,
        "    meet(blocks);\n    last =",
        "    last =",
    ),
    "no meeting before sums are exchanged": (
        FUSED,
        "    meet(blocks);\n    for (int i = thread; i < cells",
        "    __syncthreads();\n    for (int i = thread; i < cells",
    ),
    "a block ends while another reads its memory": (
        FUSED,
        "  meet(blocks);  // no block ends",
        "  __syncthreads();  // no block ends",
    ),
    "only a barrier of the block where clusters meet": (
        "cuda/cluster.cuh",
        "    __cluster_barrier_arrive();\n    __cluster_barrier_wait();\n    return;\n",
        "",
    ),
    "no fence before a cluster is counted": (FUSED, "__threadfence();  // the cluster's", "//"),
    "no fence after a cluster is counted": (FUSED, "__threadfence();  // the others'", "//"),
    "no barrier between warps of a channel": (
        BLOCK,
        "    }\n  }\n  __syncthreads();",
        "    }\n  }",
    ),
    "no barrier between warps of a block": (
        BLOCK,
        "= value;\n  __syncthreads();\n  value",
        "= value;\n  value",
    ),
    "scratch used again too early": (
        BLOCK,
        "  __syncthreads();\n  return value;",
        "  return value;",
    ),
    "no barrier before the map is resized": (
        FINISH,
        "  __syncthreads();\n  resize_map",
        "  resize_map",
    ),
    "output one past its end": (FINISH, "pixel[j * width] =", "pixel[j * width + 1] ="),
    "workspace one past its end": (
        FUSED,
        "group_cells + i, maps[i]",
        "group_cells + i + 1, maps[i]",
    ),
    "another block's memory one past its end": (
        FUSED,
        "in_block(maps, rank)[i]",
        "in_block(maps, rank)[i + args.shared.bytes / sizeof(Acc)]",
    ),
    "a share of the output too few": (
        FINISH,
        "part * kWarps + thread / kWarp",
        "(part + 1) * kWarps + thread / kWarp",
    ),
    "shared memory one past its end": (
        FUSED,
        "reinterpret_cast<int*>(shared + args.shared.flag)",
        "reinterpret_cast<int*>(shared + args.shared.bytes)",
    ),
    "input one past its end": (
        "cuda/operand.cuh",
        "tile[tail + thread] = source[tail",
        "tile[tail + thread] = source[tail + 1",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_broken_kernel_is_noticed(program, tmp_path, change):
    file, old, new = CHANGES[change]
    emulator = Emulator(build_changed(tmp_path, program, {file: (old, new)}))
    try:
        for seed in range(12):
            for layout, shape in [
                ("contiguous", (2, 50, 5, 5)),
                ("channels_last", (1, 64, 12, 12)),
                ("contiguous", (1, 96, 11, 11)),
                ("offset", (1, 5, 30, 30)),
            ]:
                a, g = make_pair(shape, targets=2, layout=layout, seed=seed)
                device = (FEW, MANY, CLUSTER, CLUSTERS)[seed % 4]
                actual = emulator.cam(a, g, size=(33, 33), seed=seed, device=device)
                expected = reference.cam(a, g, size=(33, 33))
                assert not actual.isnan().any()
                assert error(actual, expected) <= 1e-5
    except (EmulationError, AssertionError):
        return
    finally:
        emulator.close()
    pytest.fail("all runs passed")
