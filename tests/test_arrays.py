"""The NumPy door: same results as the torch door, and no torch needed."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from samples import make_pair

import gradcampp_ext as gx
from gradcampp_ext import _environment, arrays


@pytest.mark.parametrize("method", sorted(gx.METHODS))
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "transposed"])
def test_same_bits_as_the_torch_door(method, dtype, layout):
    for shape, size in [((3, 40, 7, 5), (20, 11)), ((2, 9, 12), (30,)), ((1, 8, 3, 4, 5), None)]:
        for targets in (None, 3):
            a, g = make_pair(shape, targets=targets, dtype=dtype, layout=layout)
            expected = gx.cam(a, g, method=method, size=size).numpy()
            threads = torch.get_num_threads()
            actual = arrays.cam(a.numpy(), g.numpy(), method=method, size=size, threads=threads)
            assert actual.dtype == expected.dtype
            np.testing.assert_array_equal(actual, expected)
            if gx.METHODS[method].channelwise:
                np.testing.assert_array_equal(
                    arrays.channel_weights(a.numpy(), g.numpy(), method=method, threads=threads),
                    gx.channel_weights(a, g, method=method).numpy(),
                )


def test_strides_that_only_numpy_has():
    a, g = (x.numpy() for x in make_pair((2, 20, 9, 8)))
    expected = arrays.cam(a[:, :, ::-1, ::-2].copy(), g[:, :, ::-1, ::-2].copy())
    np.testing.assert_allclose(
        arrays.cam(a[:, :, ::-1, ::-2], g[:, :, ::-1, ::-2]), expected, rtol=1e-5, atol=1e-6
    )
    swapped = arrays.cam(a.astype(">f4"), g.astype(">f4"))
    np.testing.assert_array_equal(swapped, arrays.cam(a, g))
    packed = np.zeros(a.shape, dtype=[("tag", "i1"), ("value", "f4")])
    packed["value"] = a
    np.testing.assert_allclose(arrays.cam(packed["value"], g), arrays.cam(a, g))


def test_addresses_between_items_do_not_reach_the_kernels(monkeypatch):
    a, g = (x.double().numpy() for x in make_pair((2, 3, 4, 5)))
    odd = np.frombuffer(b"\0" + a.tobytes(), np.uint8)[1:].view(a.dtype).reshape(a.shape)
    assert not odd.flags.aligned
    native = arrays._numpy.cam
    seen = []

    def cam(*arguments):
        seen.extend(arguments[:2])
        return native(*arguments)

    monkeypatch.setattr(arrays._numpy, "cam", cam)
    np.testing.assert_array_equal(arrays.cam(odd, g), arrays.cam(a, g))
    assert all(each.flags.aligned for each in seen)


def test_read_only_input_is_read():
    a, g = (x.numpy() for x in make_pair((1, 4, 3, 3)))
    a.setflags(write=False)
    assert arrays.cam(a, g).shape == (1, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([1.0], np.ones((1, 2, 3))), TypeError, "activations must be a numpy.ndarray, got list"),
        ((np.ones((1, 2, 3), int), np.ones((1, 2, 3), int)), TypeError, "float16, float32"),
        ((np.ones((1, 2, 3)), np.ones((1, 2, 3), "f4")), TypeError, "dtype of activations"),
        ((np.ones((1, 2, 3)), np.ones((1, 2, 4))), ValueError, "did the layer run twice"),
    ],
)
def test_bad_arguments_are_explained(arguments, error, words):
    with pytest.raises(error, match=words):
        arrays.cam(*arguments)


def test_usable_cores_are_counted_everywhere(monkeypatch):
    if hasattr(os, "sched_getaffinity"):
        assert _environment.cores() == len(os.sched_getaffinity(0))
        monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS and Windows
    assert _environment.cores() == os.cpu_count()
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert _environment.cores() == 1


def test_threads_must_be_positive():
    a, g = (x.numpy() for x in make_pair((1, 4, 3, 3)))
    with pytest.raises(ValueError, match="threads must be at least 1"):
        arrays.cam(a, g, threads=0)


def test_works_where_torch_cannot_be_imported():
    program = """
import sys
sys.modules["torch"] = None
import numpy as np
from gradcampp_ext import arrays
a = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
print(arrays.cam(a, np.ones_like(a)).max(), [m for m in sys.modules if m.startswith("torch.")])
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert run.stdout.split() == ["1.0", "[]"], run.stderr
