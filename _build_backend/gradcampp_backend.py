"""The build backend: setuptools, compiling against the torch that is already installed.

A plain `requires = ["torch"]` would make an isolated build fetch the newest torch, several
gigabytes, whatever is installed. This backend asks for torch only where there is none.
"""

from __future__ import annotations

from typing import Any

from gradcampp_toolchain import TORCH_REQUIREMENT, find_torch
from setuptools import build_meta

build_sdist = build_meta.build_sdist
build_wheel = build_meta.build_wheel
build_editable = build_meta.build_editable
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    requires = build_meta.get_requires_for_build_wheel(config_settings)
    return requires if find_torch() else [*requires, TORCH_REQUIREMENT]


get_requires_for_build_editable = get_requires_for_build_wheel
