"""The build backend: setuptools, compiling against the torch that is already installed.

A plain `requires = ["torch"]` would make an isolated build fetch the newest torch, several
gigabytes, whatever is installed. This backend asks for torch only where there is none.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from gradcampp_toolchain import TORCH_REQUIREMENT, find_torch
from setuptools import build_meta

build_sdist = build_meta.build_sdist
build_editable = build_meta.build_editable
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable


def build_wheel(
    wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None
) -> str:
    for leftovers in Path("build").glob("lib*"):  # setuptools would ship modules removed since
        shutil.rmtree(leftovers)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    requires = build_meta.get_requires_for_build_wheel(config_settings)
    return requires if find_torch() else [*requires, TORCH_REQUIREMENT]


get_requires_for_build_editable = get_requires_for_build_wheel
