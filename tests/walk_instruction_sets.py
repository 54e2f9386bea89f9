"""Compares the kernels of the instruction set that GRADCAMPP_EXT_CPU names with the oracle.

Prints JSON: the instruction set in use, how many cases ran, and the worst error in tolerances.
"""

from __future__ import annotations

import itertools
import json

import torch
from samples import DTYPES, TOLERANCE, error, make_pair

import gradcampp_ext as gx
from gradcampp_ext import imaging, reference

worst, cases = 0.0, 0
for dtype, method, layout, shape in itertools.product(
    DTYPES,
    gx.METHODS,
    ("contiguous", "channels_last", "sliced", "transposed"),
    ((2, 70, 9, 7), (1, 33, 30, 30), (2, 24, 3, 4, 5), (1, 2048, 7, 7)),
):
    a, g = make_pair(shape, dtype=dtype, layout=layout, targets=2)
    options = {"method": method, "size": [2 * s + 1 for s in shape[2:]]}
    # 10 tolerances: the cancelling methods and the normalisation are among the cases.
    allowed = 10 * TOLERANCE[dtype]
    worst = max(worst, error(gx.cam(a, g, **options), reference.cam(a, g, **options)) / allowed)
    cases += 1

images = torch.randint(0, 256, (2, 33, 21, 3), dtype=torch.uint8)
index = torch.randint(0, 256, (2, 33, 21))
maps = index / 255  # away from where rounding would choose between two colours
table = torch.from_numpy(imaging.colormap("turbo").copy())
expected = 0.5 * images + 0.5 * table[index]
assert (gx.overlay(images, maps).double() - expected).abs().max() <= 1

print(
    json.dumps(
        {
            "capability": torch.ops.gradcampp_ext.cpu_capability(),
            "cases": cases,
            "worst": worst,
        }
    )
)
