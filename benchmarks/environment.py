"""What a result was measured on and with: it stands in every JSON file of results."""

from __future__ import annotations

import json
import platform
import statistics
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from gradcampp_ext import _native
from gradcampp_ext._environment import cores, cpu, of_checkout

_PACKAGES = (
    "gradcampp_ext",
    "torch",
    "torchvision",
    "numpy",
    "opencv-python-headless",
    "grad-cam",
    "torchcam",
    "captum",
)


def about(device: str = "cpu") -> dict[str, Any]:
    """Machine, versions, commit and time (UTC), without the names of machine and user."""
    found: dict[str, Any] = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": cpu(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "instruction_set": _native.status().cpu_capability,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
    }
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        found["cuda"] = {
            "card": card.name,
            "memory_bytes": card.total_memory,
            "capability": f"{card.major}.{card.minor}",
            "toolkit": torch.version.cuda,
        }
    return found


def write(file: Path, report: Any) -> None:
    """As JSON, in a folder that is made if it is not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First, median, third: of these values themselves, so that none lies outside of them."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _commit() -> str | None:
    """The checkout's commit, with a + where its sources and programs differ from it.

    Of a source distribution, the commit that it was made of.
    """
    commit = (
        of_checkout(Path(__file__).parent.parent, "csrc", "*.py") or _native.build_info().commit
    )
    return commit and commit[:7] + ("+" if commit.endswith("+") else "")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
