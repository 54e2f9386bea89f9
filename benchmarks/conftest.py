"""Options of the benchmarks."""

from __future__ import annotations


def pytest_benchmark_update_machine_info(machine_info: dict[str, object]) -> None:
    """Results are published: what the machine is matters, what it is called does not."""
    machine_info.pop("node", None)
