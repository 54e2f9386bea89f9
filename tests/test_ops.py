"""The op against the float64 oracle, its properties, and its place in torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import devices
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import DTYPES, LAYOUTS, TOLERANCE, error, make_pair

import gradcampp_ext as gx
from gradcampp_ext import reference

SHAPES = [
    (2, 3, 1, 1),
    (2, 1, 5, 3),
    (3, 5, 7, 7),
    (1, 70, 14, 9),
    (4, 24, 28, 28),
    (1, 33, 56, 56),
    (1, 16, 112, 112),
    (2, 2048, 7, 7),
    (1, 67, 4, 5),  # rows of 20 to 79: maps in registers, tails that overlap, and one pack more
    (1, 37, 6, 10),
    (1, 18, 8, 8),
    (1, 21, 11, 7),
]
METHODS = sorted(gx.METHODS)


def case(value: object) -> str:
    return str(value).removeprefix("torch.").replace(" ", "")


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("shape", SHAPES, ids=case)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=case)
def test_raw_map_matches_the_oracle(device, dtype, method, shape, record_property):
    a, g = make_pair(shape, dtype=dtype, device=device)
    expected = reference.cam(a, g, method=method, normalize=None)
    relative = error(gx.cam(a, g, method=method, normalize=None), expected)
    record_property("relative_l2_error", (case(dtype), relative))
    # Means of signed gradients cancel: their error is relative to what was added, not to the sum.
    cancels = method in ("gradcam", "xgradcam", "hirescam", "attention")
    assert relative <= TOLERANCE[dtype] * (20 if cancels else 1)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gradient_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, layout, gradient_layout, method):
    for shape in [(2, 37, 9, 7), (1, 130, 6, 6)]:
        for dtype in (torch.float32, torch.bfloat16):
            for targets in (None, 3):
                for signed in (False, True):
                    a, g = make_pair(
                        shape,
                        targets=targets,
                        dtype=dtype,
                        layout=layout,
                        gradient_layout=gradient_layout,
                        device=device,
                        signed=signed,
                    )
                    options = {"method": method, "rectify": signed or None, "normalize": None}
                    expected = reference.cam(a, g, **options)
                    assert error(gx.cam(a, g, **options), expected) <= 1e-5


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("method", METHODS)
def test_uniform_gradients_need_no_memory_of_their_own(device, method):
    a, _ = make_pair((2, 40, 6, 5), device=device)
    row = torch.randn(2, 4, 40, 1, 1, generator=torch.Generator().manual_seed(1)).to(device) / 30
    g = row.expand(2, 4, 40, 6, 5)
    assert g.stride(-1) == 0
    expected = reference.cam(a, g, method=method)
    assert error(gx.cam(a, g, method=method), expected) <= 1e-5


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("targets", [1, 2, 5, 9])
@pytest.mark.parametrize("method", METHODS)
def test_targets_are_independent(device, method, targets):
    a, g = make_pair((2, 20, 8, 6), targets=targets, device=device)
    maps = gx.cam(a, g, method=method, size=(16, 12))
    assert maps.shape == (2, targets, 16, 12)
    for k in range(targets):
        single = gx.cam(a, g[:, k], method=method, size=(16, 12))
        torch.testing.assert_close(maps[:, k], single, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("interpolation", ["linear", "nearest"])
@pytest.mark.parametrize("normalize", ["minmax", "max", None])
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((2, 6, 7, 7), (224, 224)),
        ((2, 6, 9, 14), (5, 40)),
        ((2, 6, 19, 37), (40, 41)),
        ((2, 6, 7, 7), (7, 7)),
        ((1, 6, 1, 1), (5, 4)),
        ((2, 6, 5, 6), (1, 1)),
        ((3, 8, 10), (33,)),
        ((3, 8, 33), (10,)),
        ((2, 8, 3, 5, 7), (9, 20, 13)),
        ((2, 8, 4, 4, 4), (4, 8, 3)),
    ],
    ids=case,
)
def test_resize_and_normalize(device, shape, size, normalize, interpolation):
    for dtype in (torch.float32, torch.float64):
        a, g = make_pair(shape, dtype=dtype, device=device)
        options = {"size": size, "normalize": normalize, "interpolation": interpolation}
        actual = gx.cam(a, g, **options)
        assert actual.shape == (shape[0], *size)
        assert actual.dtype == dtype
        assert actual.is_contiguous()
        assert error(actual, reference.cam(a, g, **options)) <= 2 * TOLERANCE[dtype]


def test_bilinear_equals_opencv():
    cv2 = pytest.importorskip("cv2")
    a, g = make_pair((1, 12, 7, 9))
    small = gx.cam(a, g)[0].numpy()
    large = gx.cam(a, g, size=(224, 288))[0].numpy()
    assert abs(cv2.resize(small, (288, 224), interpolation=cv2.INTER_LINEAR) - large).max() < 1e-5


def test_relu_can_be_left_out():
    a, g = make_pair((2, 6, 5, 5))
    raw = gx.cam(a, g, method="gradcam", relu=False, normalize=None)
    assert (raw < 0).any()
    torch.testing.assert_close(raw.relu(), gx.cam(a, g, method="gradcam", normalize=None))


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("rectify", [None, True, False])
@pytest.mark.parametrize("eps", [None, 1e-7])
@pytest.mark.parametrize("method", [m for m in METHODS if gx.METHODS[m].channelwise])
def test_channel_weights(device, method, eps, rectify):
    if eps and gx.METHODS[method].eps is None:
        pytest.skip("the method has no epsilon")
    a, g = make_pair((2, 50, 7, 6), targets=2, dtype=torch.float64, device=device, signed=True)
    options = {"method": method, "eps": eps, "rectify": rectify}
    weights = gx.channel_weights(a, g, **options)
    assert weights.shape == (2, 2, 50)
    if method != "attention":  # whose oracle gives the weights of its first step
        assert error(weights, reference.channel_weights(a, g, **options)) <= 1e-12
    rectified = gx.METHODS[method].rectify if rectify is None else rectify
    shown = a.relu() if rectified else a
    from_weights = torch.einsum("nkc,nchw->nkhw", weights, shown).relu()
    maps = gx.cam(a, g, normalize=None, **options)
    torch.testing.assert_close(from_weights, maps, rtol=1e-9, atol=1e-12)


def test_the_two_forms_of_equation_19_agree():
    a, g = make_pair((3, 16, 9, 9), dtype=torch.float64, scale=1.0)
    for eps in (0.0, 1e-6):
        cancelled = reference.cam(a, g, eps=eps, normalize=None)
        literal = reference.cam(a, g, eps=eps, normalize=None, alpha=reference.alpha_literal)
        torch.testing.assert_close(cancelled, literal, rtol=1e-11, atol=0)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("exponent", [-30, -20, -8, 0, 8, 20, 30])
def test_gradients_of_any_scale(device, method, exponent):
    a, g = make_pair((2, 64, 14, 14), device=device)
    g = g * 10.0**exponent
    for normalize in ("minmax", None):
        actual = gx.cam(a, g, method=method, normalize=normalize)
        assert actual.isfinite().all()
        assert error(actual, reference.cam(a, g, method=method, normalize=normalize)) <= 2e-5


@pytest.mark.parametrize("method", ["gradcampp", "gradcampp_normalized"])
def test_literal_formula_has_an_exact_zero_in_its_denominator(method):
    a = torch.tensor([[[[-4.0, 2.0]]]])  # S = -2
    g = torch.tensor([[[[1.0, 0.5]]]])  # 2 + S g = 0 and 1
    weights = gx.channel_weights(a, g, method=method, rectify=False)
    torch.testing.assert_close(weights, torch.tensor([[0.5]]))


# Without gradients "attention" attends everywhere alike.
@pytest.mark.parametrize("method", [m for m in METHODS if m != "attention"])
@pytest.mark.parametrize("normalize", ["minmax", "max", None])
def test_no_gradient_no_map(method, normalize):
    a, g = make_pair((2, 8, 5, 5))
    for nothing in (torch.zeros_like(g), -torch.zeros_like(g)):
        assert (gx.cam(a, nothing, method=method, normalize=normalize, size=(9, 9)) == 0).all()


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["activations", "gradients"])
@pytest.mark.parametrize("method", METHODS)
def test_non_finite_input_spoils_its_own_map_alone(device, method, where, value, layout):
    for rectify in (None, True, False):
        a, g = make_pair((3, 20, 6, 6), targets=2, layout=layout, device=device)
        # Were the channel's gradients positive, a wrong weight could show what a ReLU hides.
        g[1, :, 4] = -g[1, :, 4].abs() - 1e-3
        if where == "activations":
            a[1, 4, 2, 3] = value
            spoilt = [(1, 0), (1, 1)]
        else:
            g[1, 1, 4, 2, 3] = value
            spoilt = [(1, 1)]
        for normalize in ("minmax", None):
            maps = gx.cam(a, g, method=method, rectify=rectify, normalize=normalize, size=(9, 9))
            for n in range(3):
                for k in range(2):
                    whole = (
                        maps[n, k].isnan().all()
                        if (n, k) in spoilt
                        else maps[n, k].isfinite().all()
                    )
                    assert whole, (n, k)


@pytest.mark.parametrize("device", devices())
def test_empty_batch_and_no_targets(device):
    a, g = make_pair((0, 5, 4, 4), device=device)
    assert gx.cam(a, g, size=(8, 8)).shape == (0, 8, 8)
    assert gx.channel_weights(a, g).shape == (0, 5)
    a, g = make_pair((2, 5, 4, 4), targets=0, device=device)
    assert gx.cam(a, g).shape == (2, 0, 4, 4)


@pytest.mark.parametrize("device", devices())
def test_same_input_same_bits(device):
    a, g = make_pair((3, 256, 14, 14), targets=2, device=device)
    first = gx.cam(a, g, size=(56, 56))
    for _ in range(5):
        assert torch.equal(gx.cam(a, g, size=(56, 56)), first)


def test_thread_counts_agree():
    a, g = make_pair((3, 256, 14, 14))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(gx.cam(a, g, size=(56, 56)))
            assert torch.equal(gx.cam(a, g, size=(56, 56)), results[-1])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 12), st.integers(1, 12)),
    method=st.sampled_from(METHODS),
    seed=st.integers(0, 10_000),
    layout=st.sampled_from(LAYOUTS),
)
def test_properties(shape, method, seed, layout):
    a, g = make_pair(shape, layout=layout, seed=seed)
    maps = gx.cam(a, g, method=method, normalize=None)
    spread = maps.abs().max().item() + 1e-12

    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(seed))
    permuted = gx.cam(a[:, order], g[:, order], method=method, normalize=None)
    torch.testing.assert_close(permuted, maps, rtol=1e-4, atol=1e-5 * spread)

    for n in range(shape[0]):
        alone = gx.cam(a[n : n + 1], g[n : n + 1], method=method, normalize=None)
        torch.testing.assert_close(alone, maps[n : n + 1], rtol=1e-4, atol=1e-5 * spread)

    shown = gx.cam(a, g, method=method)
    assert ((shown >= 0) & (shown <= 1)).all()
    if method == "gradcam":  # invariant to the scale of both, which Grad-CAM++ is not
        torch.testing.assert_close(gx.cam(a * 8, g, method=method), shown)
        torch.testing.assert_close(gx.cam(a, g * 8, method=method), shown)


@pytest.mark.parametrize("device", devices())
def test_opcheck(device):
    a, g = make_pair((2, 5, 4, 3), targets=2, device=device)
    op = torch.ops.gradcampp_ext
    for size in (None, [9, 8]):
        arguments = (a, g, "gradcampp", size, "minmax", "linear", True, True, 0.0, 1.0)
        torch.library.opcheck(op.cam.default, arguments)
    torch.library.opcheck(op.channel_weights.default, (a, g, "gradcam", False, 0.0, 1.0))
    images = torch.randint(0, 256, (2, 6, 5, 3), dtype=torch.uint8, device=device)
    table = torch.randint(0, 256, (256, 3), dtype=torch.uint8, device=device)
    maps = torch.rand(2, 6, 5, device=device)
    for pictures in (images, images / 255):
        torch.library.opcheck(op.overlay.default, (pictures, maps, table, 0.5, 0.5))


@pytest.mark.parametrize("device", devices())
def test_compiles_without_graph_break(device):
    def explain(a, g):
        return gx.cam(a * 2, g, size=(20, 20)) * 3

    a, g = make_pair((2, 5, 4, 4), device=device)
    compiled = torch.compile(explain, fullgraph=True, dynamic=True)
    for batch in (2, 1):
        torch.testing.assert_close(compiled(a[:batch], g[:batch]), explain(a[:batch], g[:batch]))


def test_channel_weights_are_detached():
    a, g = make_pair((1, 4, 3, 3))
    a.requires_grad_()
    assert not gx.channel_weights(a, g).requires_grad


@pytest.mark.parametrize(
    ("change", "error_type", "words"),
    [
        ({"method": "gradcam++"}, ValueError, "method must be one of gradcampp"),
        ({"normalize": "l2"}, ValueError, "normalize must be one of"),
        ({"interpolation": "bicubic"}, ValueError, "interpolation must be one of"),
        ({"size": (8,)}, ValueError, "size must be 2 positive integers"),
        ({"size": 8}, ValueError, "size must be 2 positive integers"),
        ({"size": (8, 0)}, ValueError, "size must be 2 positive integers"),
        ({"size": (8, 2.5)}, ValueError, "size must be 2 positive integers"),
        ({"eps": -1.0}, ValueError, "eps must be finite and not negative"),
        ({"eps": 1e-6, "method": "gradcam"}, ValueError, "method 'gradcam' has no epsilon"),
        ({"temperature": 0.0}, ValueError, "temperature must be finite and positive"),
        ({"gradients": torch.ones(2, 4, 4, 4)}, ValueError, "did the layer run twice"),
        ({"gradients": torch.ones(2, 5, 4)}, ValueError, "did the layer run twice"),
        ({"gradients": torch.ones(2, 5, 4, 4).double()}, TypeError, "dtype of activations"),
        ({"gradients": torch.ones(2, 5, 4, 4, device="meta")}, ValueError, "on the device of"),
        ({"gradients": None}, TypeError, "gradients must be a torch.Tensor, got NoneType"),
        ({"activations": [1.0]}, TypeError, "activations must be a torch.Tensor, got list"),
        ({"activations": torch.ones(2, 5)}, ValueError, "one to three spatial sizes"),
        ({"activations": torch.ones(2, 5, 4, 4, dtype=torch.int32)}, TypeError, "float16"),
    ],
    ids=lambda value: None if not isinstance(value, dict) else case(list(value.items())[-1])[:40],
)
def test_bad_arguments_are_explained(change, error_type, words):
    arguments = {"activations": torch.ones(2, 5, 4, 4), "gradients": torch.ones(2, 5, 4, 4)}
    arguments.update(change)
    with pytest.raises(error_type, match=words.replace("(", r"\(").replace("+", r"\+")):
        gx.cam(arguments.pop("activations"), arguments.pop("gradients"), **arguments)


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_tensors_that_are_not_dense_are_told():
    dense = torch.ones(2, 5, 4, 4)
    others = {
        "nested": torch.nested.nested_tensor(list(dense)),
        "torch.sparse_coo": dense.to_sparse(),
    }
    for kind, other in others.items():
        with pytest.raises(TypeError, match=f"gradients must be a dense tensor, got a {kind} one"):
            gx.cam(dense, other)


def test_elementwise_methods_have_no_channel_weights():
    with pytest.raises(ValueError, match="weighs elements, not channels"):
        gx.channel_weights(*make_pair((1, 2, 3, 3)), method="layercam")


def test_nothing_between_channels_and_space():
    with pytest.raises(ValueError, match="at least one channel and one position"):
        gx.cam(torch.ones(2, 3, 0, 4), torch.ones(2, 3, 0, 4))


def test_threads_of_the_caller():
    a, g = make_pair((4, 128, 14, 14))
    expected = gx.cam(a, g)
    results: list[bool] = []

    def work() -> None:
        results.extend(torch.equal(gx.cam(a, g), expected) for _ in range(50))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 200
    assert all(results)


THREADS_OF_TORCH = """
import os
import torch
import gradcampp_ext as gx

a = torch.rand(2, 512, 28, 28)
counts = []
for threads in (1, 2):
    torch.set_num_threads(threads)
    gx.cam(a, a)
    counts.append(len(os.listdir("/proc/self/task")))
print(counts[1] - counts[0])
"""

FORK = """
import os
import torch
import gradcampp_ext as gx
from gradcampp_ext import arrays

a = torch.rand(2, 512, 28, 28)
torch.set_num_threads(1)
expected = gx.cam(a, a)
torch.set_num_threads(2)
gx.cam(a, a)
two = arrays.cam(a.numpy(), a.numpy(), threads=2)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # OpenMP's other threads stayed behind
    same = torch.equal(gx.cam(a, a), expected)
    same &= (arrays.cam(a.numpy(), a.numpy(), threads=2) == two).all()
    os._exit(0 if same else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts and forks as Linux does")
@pytest.mark.parametrize(
    ("program", "printed"), [(THREADS_OF_TORCH, "1"), (FORK, "0")], ids=["set_num_threads", "fork"]
)
def test_threads_of_a_process(program, printed):
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120
    )
    assert run.stdout.strip() == printed, run.stderr


class _CamDataset(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return gx.cam(*make_pair((1, 64, 14, 14), seed=index))[0]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_in_data_loader_workers(context):
    dataset = _CamDataset()
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=2, num_workers=2, multiprocessing_context=context
    )
    maps = torch.cat(list(loader))
    torch.testing.assert_close(maps, torch.stack([dataset[i] for i in range(8)]))


WALK = Path(__file__).with_name("walk_instruction_sets.py")


def test_every_instruction_set_of_this_machine():
    names = torch.ops.gradcampp_ext.cpu_capabilities().split(", ")
    assert names[-1] == "baseline"
    for name in names:
        run = subprocess.run(
            [sys.executable, WALK],
            env={**os.environ, "GRADCAMPP_EXT_CPU": name},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        report = json.loads(run.stdout)
        assert report["capability"] == name
        assert report["cases"] > 400
        assert report["worst"] <= 1.0, report


@pytest.mark.parametrize("name", ["avx1024", "AVX2", "avx2,baseline"])
def test_an_instruction_set_that_is_not_there(name):
    run = subprocess.run(
        [sys.executable, WALK],
        env={**os.environ, "GRADCAMPP_EXT_CPU": name},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert "GRADCAMPP_EXT_CPU must name an instruction set that this machine has" in run.stderr
    assert f"got '{name}'" in run.stderr
