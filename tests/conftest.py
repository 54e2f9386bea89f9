"""Devices, seeds and the report's header. `from conftest import devices` works in every test."""

from __future__ import annotations

import os
import random

import hypothesis
import numpy as np
import pytest
import torch

from gradcampp_ext import _native

hypothesis.settings.register_profile("deterministic", derandomize=True, deadline=None)
hypothesis.settings.load_profile("deterministic")

CUDA_MISSING = _native.status().cuda_missing


def devices() -> list[str]:
    """The devices to run a test on, for `pytest.mark.parametrize("device", devices())`."""
    return ["cpu"] if CUDA_MISSING else ["cpu", "cuda"]


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test draw from the global generator
    torch.manual_seed(0)


def pytest_configure() -> None:
    if os.environ.get("REQUIRE_CUDA") == "1" and CUDA_MISSING:
        raise pytest.UsageError(f"REQUIRE_CUDA=1, but CUDA cannot be used: {CUDA_MISSING}")


def pytest_report_header() -> str:
    status = _native.status()
    cuda = f"without CUDA: {CUDA_MISSING}" if CUDA_MISSING else "with CUDA"
    return f"gradcampp_ext: torch {status.torch}, {status.cpu_capability}, {cuda}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The worst relative L2 error against the float64 oracle that the tests met, per dtype.

    And the figures of tests that have some to print: cases, seconds, memory.
    """
    worst: dict[str, float] = {}
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "relative_l2_error":
                dtype, error = value
                worst[dtype] = max(worst.get(dtype, 0.0), error)
            if name == "figures":
                terminalreporter.write_line(str(value))
    if worst:
        errors = ", ".join(f"{dtype} {error:.1e}" for dtype, error in worst.items())
        terminalreporter.write_line(f"worst relative L2 error of a raw map: {errors}")
