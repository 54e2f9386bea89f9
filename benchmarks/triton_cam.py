"""Grad-CAM++ in Triton, as one would write it: what the CUDA kernel is measured beside.

One program takes some channels of a sample at a time, sums S and the weights over the positions in
registers and adds its part of the map to memory with atomic additions, so that A and G are read
once. A second kernel normalises and resizes. Equal to ``gradcampp_ext.cam`` up to the order of
additions, which differs from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements of A, and of G, that a program holds at a time
PIXELS = 1024


@triton.jit
def add_channels(
    a_start,
    g_start,
    maps,  # [rows, positions], zero
    channels,
    per_program,
    width,
    a_sample,
    a_channel,
    a_row,
    a_column,
    g_sample,
    g_channel,
    g_row,
    g_column,
    targets,  # of each sample
    positions: tl.constexpr,
    at_once: tl.constexpr,
    padded: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)  # a sample and target
    p = tl.arange(0, padded)[None, :]
    inside = p < positions
    y, x = p // width, p % width
    map_part = tl.zeros([padded], tl.float32)
    first = tl.program_id(0) * per_program
    for start in range(first, tl.minimum(first + per_program, channels), at_once):
        c = (start + tl.arange(0, at_once))[:, None].to(tl.int64)
        mask = inside & (c < channels)
        a_at = a_start + row // targets * a_sample + c * a_channel + y * a_row + x * a_column
        g_at = g_start + row * g_sample + c * g_channel + y * g_row + x * g_column
        a = tl.load(a_at, mask, 0).to(tl.float32)
        g = tl.load(g_at, mask, 0).to(tl.float32)
        a = tl.maximum(a, 0)
        total = tl.sum(a, 1)[:, None]
        weight = tl.sum(tl.where(g > 0, g / (2 + total * g), 0), 1)[:, None]
        map_part += tl.sum(weight * a, 0)
    out = tl.arange(0, padded)
    tl.atomic_add(maps + row * positions + out, map_part, out < positions)


@triton.jit
def normalise_and_resize(
    maps,  # [rows, positions]
    output,  # [rows, out_height, out_width]
    height,
    width,
    out_height,
    out_width,
    positions: tl.constexpr,
    padded: tl.constexpr,
    pixels: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    maps += row * positions
    p = tl.arange(0, padded)
    cells = tl.maximum(tl.load(maps + p, p < positions, 0), 0)
    high = tl.max(cells, 0)
    low = tl.min(tl.where(p < positions, cells, high), 0)
    spread = tl.where(high > low, high - low, 1)

    pixel = tl.program_id(0) * pixels + tl.arange(0, pixels)
    inside = pixel < out_height * out_width
    y = ((pixel // out_width) + 0.5) * height / out_height - 0.5
    x = ((pixel % out_width) + 0.5) * width / out_width - 0.5
    y = tl.minimum(tl.maximum(y, 0), height - 1)
    x = tl.minimum(tl.maximum(x, 0), width - 1)
    top, left = y.to(tl.int32), x.to(tl.int32)
    bottom, right = tl.minimum(top + 1, height - 1), tl.minimum(left + 1, width - 1)
    from_top, from_left = y - top, x - left
    top_left = tl.maximum(tl.load(maps + top * width + left, inside, 0), 0)
    top_right = tl.maximum(tl.load(maps + top * width + right, inside, 0), 0)
    bottom_left = tl.maximum(tl.load(maps + bottom * width + left, inside, 0), 0)
    bottom_right = tl.maximum(tl.load(maps + bottom * width + right, inside, 0), 0)
    above = top_left + from_left * (top_right - top_left)
    below = bottom_left + from_left * (bottom_right - bottom_left)
    value = above + from_top * (below - above)
    tl.store(output + row * out_height * out_width + pixel, (value - low) / spread, inside)


def cam(a: Tensor, g: Tensor, size: tuple[int, int], processors: int) -> Tensor:
    """Grad-CAM++ maps, rectified, min-max, bilinear.

    [N, *size] from two [N, C, H, W], or [N, K, *size] from g [N, K, C, H, W].
    """
    channels, height, width = a.shape[1:]
    leading = g.shape[:-3]
    g = g.flatten(0, -4)
    rows, positions = g.shape[0], height * width
    padded = triton.next_power_of_2(positions)
    at_once = max(1, TILE // padded)
    programs = max(1, min(triton.cdiv(channels, at_once), 4 * processors // rows))
    per_program = triton.cdiv(triton.cdiv(channels, programs), at_once) * at_once
    maps = a.new_zeros((rows, positions), dtype=torch.float32)
    add_channels[(triton.cdiv(channels, per_program), rows)](
        a,
        g,
        maps,
        channels,
        per_program,
        width,
        *a.stride(),
        *g.stride(),
        rows // a.shape[0],
        positions=positions,
        at_once=at_once,
        padded=padded,
        num_warps=8,
    )
    output = a.new_empty((rows, *size), dtype=torch.float32)
    normalise_and_resize[(triton.cdiv(size[0] * size[1], PIXELS), rows)](
        maps,
        output,
        height,
        width,
        *size,
        positions=positions,
        padded=padded,
        pixels=PIXELS,
    )
    return output.unflatten(0, leading)
