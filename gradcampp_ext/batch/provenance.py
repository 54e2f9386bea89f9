"""What made an output: software, machine and settings, and how outputs say so.

run.json is the record of a folder. Every output has the record's id; those that are likely to be
found alone (overlays, data sets) also say the rest.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from PIL.ExifTags import Base

from gradcampp_ext import _native
from gradcampp_ext._environment import cpu

if TYPE_CHECKING:
    from gradcampp_ext.batch.engine import Row

KEY = "gradcampp_ext"  # under which the metadata of data sets have it
_OF_THE_MAP = ("method", "layer", "rank", "target", "target_name", "pixels_sha256")


def software(device: torch.device) -> dict[str, Any]:
    """What outputs say of the software, and of the device, that made them."""
    status = _native.status()
    return {
        "gradcampp_ext": status.version,
        "commit": status.commit,
        "torch": status.torch,
        "device": torch.cuda.get_device_name(device) if _usable(device) else device.type,
    }


def environment(device: torch.device, threads: int) -> dict[str, Any]:
    """Whatever may change the bits of outputs besides the settings: versions and machine.

    Args:
        threads: that explain on a CPU.
    """
    status = _native.status()
    found = {
        **software(device),
        "numpy": metadata.version("numpy"),
        "pillow": metadata.version("pillow"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu(),
        "instruction_set": status.cpu_capability,
        "threads": threads,
    }
    if _usable(device):
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()
    return found


def conditions(
    device: torch.device, threads: int, batch_size: int, command: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What run.json has of each run beside the settings; see `Record`.

    Args:
        command: what a program was asked for; None where only it can be asked again.
    """
    return {
        "batch_size": batch_size,
        "command": command,
        "environment": environment(device, threads),
    }


def identity(settings: Mapping[str, Any]) -> str:
    """The id of a record: the beginning of the SHA-256 of its settings."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def about(settings: Mapping[str, Any], made_by: Mapping[str, Any]) -> dict[str, Any]:
    """What an output says of itself: id of the record, software, and all settings."""
    named = {name: made_by.get(name) for name in ("gradcampp_ext", "commit", "torch", "device")}
    return {"record": identity(settings), **named, **settings}


def parquet(told: Mapping[str, Any]) -> dict[str, str]:
    """The same as metadata of a Parquet file, as JSON under `KEY`."""
    return {KEY: json.dumps(told)}


def exif(told: Mapping[str, Any], row: Row | None = None) -> Image.Exif:
    """The metadata of a picture: Software, and ImageDescription, which is JSON.

    Args:
        told: of `about`.
        row: of results, of a picture of one map, which then is described under "map".
    """
    if row is not None:
        told = {**told, "map": {name: row[name] for name in _OF_THE_MAP if name in row}}
    found = Image.Exif()
    found[Base.Software] = f"gradcampp_ext {told['gradcampp_ext']}, commit {told['commit']}"
    found[Base.ImageDescription] = json.dumps(told)
    return found


def _usable(device: torch.device) -> bool:
    """A GPU of this process, and not one that the workers of a cluster have."""
    return device.type == "cuda" and torch.cuda.is_available()
