"""Write gradcampp_ext/data/colormaps.json from Matplotlib's tables."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import numpy as np

# fmt: off
NAMES = ("turbo", "jet", "viridis", "plasma", "inferno", "magma", "cividis", "hot", "afmhot",
         "gray", "bone", "cool", "coolwarm", "RdBu", "Spectral", "rainbow", "hsv")
# fmt: on

# Matplotlib's licence (BSD-compatible) covers its own tables; these have a source of their own.
CREDITS = {
    "viridis, plasma, inferno, magma": "Nathaniel J. Smith, Stefan van der Walt, Eric Firing; CC0",
    "cividis": "Jamie R. Nunez, Christopher R. Anderton, Ryan S. Renslow; CC0",
    "turbo": "Anton Mikhailov, Google LLC; Apache-2.0",
    "coolwarm": "Kenneth Moreland; public domain",
    "RdBu, Spectral": "Cynthia Brewer, ColorBrewer; Apache-2.0",
    "others": f"Matplotlib {matplotlib.__version__}; Matplotlib licence",
}


def table(name: str) -> str:
    """256 colours as hexadecimal RRGGBB, one after the other."""
    colours = matplotlib.colormaps[name](np.linspace(0, 1, 256))[:, :3]
    return (255 * colours).round().astype(np.uint8).tobytes().hex()


target = Path(__file__).parent.parent / "gradcampp_ext" / "data" / "colormaps.json"
content = {"credits": CREDITS, "tables": {name: table(name) for name in NAMES}}
target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
