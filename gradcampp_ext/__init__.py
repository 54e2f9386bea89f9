"""Grad-CAM++ and its family for PyTorch: one fused native op, and all that stands around it.

Names are loaded when they are first used, so that ``gradcampp_ext.arrays`` works where torch is
not installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from gradcampp_ext.accelerate import accelerate as accelerate
    from gradcampp_ext.capture import CaptureError as CaptureError
    from gradcampp_ext.explainer import Explainer as Explainer
    from gradcampp_ext.explainer import Explanation as Explanation
    from gradcampp_ext.export import export_explainer as export_explainer
    from gradcampp_ext.imaging import overlay as overlay
    from gradcampp_ext.methods import METHODS as METHODS
    from gradcampp_ext.ops import cam as cam
    from gradcampp_ext.ops import channel_weights as channel_weights
    from gradcampp_ext.smooth import PowerSums as PowerSums
    from gradcampp_ext.variations import Augment as Augment
    from gradcampp_ext.variations import Smooth as Smooth

_HOMES = {
    "cam": "ops",
    "channel_weights": "ops",
    "overlay": "imaging",
    "Explainer": "explainer",
    "Explanation": "explainer",
    "METHODS": "methods",
    "CaptureError": "capture",
    "PowerSums": "smooth",
    "Smooth": "variations",
    "Augment": "variations",
    "export_explainer": "export",
    "accelerate": "accelerate",
}

_MODULES = (
    "arrays",
    "batch",
    "evaluation",
    "guided",
    "imaging",
    "layers",
    "metrics",
    "models",
    "reference",
    "targets",
)

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "__version__":
        from importlib import metadata

        return metadata.version(__name__)
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})
