"""int8 weights times a few rows: the linear layers of a decode step.

A single row is bound by reading each weight once. Several go through int8 tensor cores, their
activations split into two int8 digits, which keep 15 bits.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llama.buffers import BLOCK_N, MAX_PARTS, MOST_ROWS, Pair
from llama.kernels.launch import dependent

# Columns of a weight row that 128 threads request at once. With it the linears of 13B at batch 1 in
# a graph read at 0.77 of a plain reduction's rate; with five tiles of a row ahead of the wait, not
# all: 0.75; 512: 0.76, 2048: 0.67, a whole row in one load: 0.65 (H200, 2026-11-23).
TILE = 1024
# Steps requested ahead for several rows. With BLOCK_N = 64 and 2 parts (4 where outputs are few) 8
# and 32 rows read at 0.67 and 0.54 of that rate; 6 ahead: 0.54, 0.44; 128 outputs: 0.64, 0.54; 32:
# 0.43, 0.30; twice the parts: 0.59, 0.51; fp16 activations: 0.26 at best (H200, 2026-11-23).
STAGES = 4
GROUP = 128  # columns that share a scale where activations are split into two int8 digits
DIGITS = 32512  # the largest value of two digits: 256 x 127
Norm = tuple[Tensor, float] | None  # of an RMSNorm: its weight (D,) fp16 and epsilon


def linear_torch(x, weights, out, then: str, buffers=None, norm=None) -> None:
    CB, SCB = weights
    y = normalized(x, norm) @ (CB.float() * (SCB / 127)[:, None]).T
    if then == "swiglu":
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    out.copy_(y + out if then == "add" else y)


def normalized(x: Tensor, norm: Norm) -> Tensor:
    x = x.float()
    return F.rms_norm(x, x.shape[-1:], norm[0].float(), norm[1]) if norm else x


@triton.jit
def requested(row, D: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr):
    """A row of weights as a tuple of tiles, all requested at once; each byte is read once."""
    columns = tl.arange(0, TILE)
    tiles = ()
    for i in tl.static_range(TILES):
        inside = columns + i * TILE < D
        tiles += (tl.load(row + i * TILE + columns, inside, 0, eviction_policy="evict_first"),)
    return tiles


@triton.jit
def rms(x, D: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, eps):
    squares = tl.zeros((TILE,), tl.float32)
    for i in tl.static_range(TILES):
        d = i * TILE + tl.arange(0, TILE)
        value = tl.load(x + d, mask=d < D, other=0).to(tl.float32)
        squares += value * value
    return tl.sqrt(tl.sum(squares, 0) / D + eps)


@triton.jit
def normalize_kernel(
    x, gain, eps, out, D: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, PDL: tl.constexpr
):
    """Each program normalizes a tile of the row, and reads all of it for its rms."""
    columns = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = columns < D
    if PDL:
        gdc_launch_dependents()
    weight = tl.load(gain + columns, mask=inside, other=0).to(tl.float32)
    if PDL:
        gdc_wait()
    value = tl.load(x + columns, mask=inside, other=0) / rms(x, D, TILE, TILES, eps)
    tl.store(out + columns, (value * weight).to(tl.float16), mask=inside)


@triton.jit
def matvec_kernel(
    x, CB, SCB, out, N, D: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
    THEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each program computes one output; it requests its whole row of weights before the wait."""
    n = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
    row = CB + n.to(tl.int64) * D
    tiles = requested(row, D, TILE, TILES)
    y = tl.zeros((TILE,), tl.float32)
    if THEN == "swiglu":
        up_tiles = requested(row + N.to(tl.int64) * D, D, TILE, TILES)
        up = tl.zeros((TILE,), tl.float32)
    if PDL:
        gdc_wait()
    for i in tl.static_range(TILES):
        columns = i * TILE + tl.arange(0, TILE)
        value = tl.load(x + columns, mask=columns < D, other=0).to(tl.float32)
        y += tiles[i].to(tl.float32) * value
        if THEN == "swiglu":
            up += up_tiles[i].to(tl.float32) * value
    y = tl.sum(y, 0) * (tl.load(SCB + n) / 127)
    if THEN == "swiglu":
        y = y * tl.sigmoid(y) * (tl.sum(up, 0) * (tl.load(SCB + N + n) / 127))
    if THEN == "add":
        y += tl.load(out + n)
    tl.store(out + n, y.to(out.dtype.element_ty))


def split_torch(x: Tensor, norm: Norm = None) -> Pair:
    groups = F.pad(normalized(x, norm), (0, -x.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    scales = groups.abs().amax(-1) / DIGITS
    whole = (groups / scales.clamp(min=1e-30)[..., None]).round().int().flatten(1)
    high = (whole + 128) >> 8
    digits = torch.stack([high, whole - (high << 8)])[..., : x.shape[1]]
    return digits.to(torch.int8), scales


@triton.jit
def split_kernel(
    x, gain, eps, digits, scales, B, D: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
    GROUP: tl.constexpr, DIGITS: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each program splits a tile of a row; to normalize, it reads all of the row."""
    b, tile = tl.program_id(0), tl.program_id(1)
    columns = tile * TILE + tl.arange(0, TILE)
    inside = columns < D
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    value = tl.load(x + b * D + columns, mask=inside, other=0).to(tl.float32)
    if NORM:
        value /= rms(x + b * D, D, TILE, TILES, eps)
        value *= tl.load(gain + columns, mask=inside, other=0).to(tl.float32)
    value = tl.reshape(value, (TILE // GROUP, GROUP))
    scale = tl.max(tl.abs(value), 1) / DIGITS
    ratio = value / tl.maximum(scale, 1e-30)[:, None]
    whole = tl.reshape(tl.where(ratio < 0, ratio - 0.5, ratio + 0.5).to(tl.int32), (TILE,))
    high = (whole + 128) >> 8
    tl.store(digits + b * D + columns, high.to(tl.int8), mask=inside)
    tl.store(digits + (B + b) * D + columns, (whole - (high << 8)).to(tl.int8), mask=inside)
    GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP
    g = tile * (TILE // GROUP) + tl.arange(0, TILE // GROUP)
    tl.store(scales + b * GROUPS + g, scale, mask=g < GROUPS)


def split(x: Tensor, norm: Norm = None) -> Pair:
    """x (B, D), normalized as in linear(), as two int8 digits and a float32 scale for each GROUP
    columns: x = (256 * digits[0] + digits[1]) * scale, digits (2, B, D), scales (B, D / GROUP). Its
    error is at most 1 / 64,000 of the group's largest magnitude."""
    B, D = x.shape
    digits = torch.empty(2, B, D, dtype=torch.int8, device=x.device)
    scales = torch.empty(B, triton.cdiv(D, GROUP), device=x.device)
    tiles = triton.cdiv(D, TILE)
    split_kernel[(B, tiles)](
        x, *(norm or (None, 0.0)), digits, scales, B, D, TILE, tiles, GROUP, DIGITS,
        norm is not None, **dependent(x), num_warps=4,
    )  # fmt: skip
    return digits, scales


@triton.jit
def few_rows_kernel(
    digits, scales, CB, SCB, out, partial, arrivals, B, N,
    D: tl.constexpr, GROUP: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr, THEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each program computes BLOCK_N outputs of all rows from a part of the columns."""
    tile, part = tl.program_id(0), tl.program_id(1)
    outputs = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    batch = tl.arange(0, BLOCK_B)
    GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP
    SHARE: tl.constexpr = (GROUPS + SPLITS - 1) // SPLITS
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    weights = CB + outputs[:, None].to(tl.int64) * D
    y, y_up = tl.zeros((BLOCK_N, BLOCK_B), tl.float32), tl.zeros((BLOCK_N, BLOCK_B), tl.float32)
    for i in range(0, SHARE):
        g = part * SHARE + i  # past the last group there are no columns
        columns = g * GROUP + tl.arange(0, GROUP)
        there = (outputs < N)[:, None] & (columns < D)[None, :]
        known = (batch < B)[None, :] & (columns < D)[:, None]
        value = digits + batch[None, :] * D + columns[:, None]
        high = tl.load(value, mask=known, other=0)
        low = tl.load(value + B * D, mask=known, other=0)
        scale = tl.load(scales + batch * GROUPS + tl.minimum(g, GROUPS - 1), batch < B, other=0)
        w = tl.load(weights + columns[None, :], mask=there, other=0)
        whole = tl.dot(w, high, out_dtype=tl.int32) * 256 + tl.dot(w, low, out_dtype=tl.int32)
        y += whole.to(tl.float32) * scale[None, :]
        if THEN == "swiglu":
            w = tl.load(weights + N.to(tl.int64) * D + columns[None, :], mask=there, other=0)
            whole = tl.dot(w, high, out_dtype=tl.int32) * 256 + tl.dot(w, low, out_dtype=tl.int32)
            y_up += whole.to(tl.float32) * scale[None, :]

    # Each program stores its partial sum; the last to arrive adds them in the order of the parts.
    SIZE: tl.constexpr = BLOCK_N * BLOCK_B
    spot = tl.arange(0, BLOCK_N)[:, None] * BLOCK_B + batch[None, :]
    mine = partial + (tile * SPLITS + part) * 2 * SIZE + spot
    tl.store(mine, y)
    if THEN == "swiglu":
        tl.store(mine + SIZE, y_up)
    tl.debug_barrier()
    if tl.atomic_add(arrivals + tile, 1) == SPLITS - 1:
        tl.store(arrivals + tile, 0)
        y, y_up = tl.zeros_like(y), tl.zeros_like(y)
        for s in tl.static_range(SPLITS):
            theirs = partial + (tile * SPLITS + s) * 2 * SIZE + spot
            y += tl.load(theirs, cache_modifier=".cg")
            if THEN == "swiglu":
                y_up += tl.load(theirs + SIZE, cache_modifier=".cg")
        y *= (tl.load(SCB + outputs, mask=outputs < N, other=0) / 127)[:, None]
        if THEN == "swiglu":
            y_up *= (tl.load(SCB + N + outputs, mask=outputs < N, other=0) / 127)[:, None]
            y = y * tl.sigmoid(y) * y_up
        there = (outputs < N)[:, None] & (batch < B)[None, :]
        target = out + batch[None, :] * N + outputs[:, None]
        if THEN == "add":
            y += tl.load(target, mask=there, other=0)
        tl.store(target, y.to(out.dtype.element_ty), mask=there)


def linear(
    x: Tensor, weights: Pair, out: Tensor, then: str, buffers: Pair, norm: Norm = None
) -> None:
    """x (B, D), fp16, or float32 and first normalized, times int8 weights CB (N, D) with scales SCB
    (N,), accumulated in float32; beyond 32 rows the weights are read again for each 32. `then` says
    what becomes of the product y (B, N): "store" puts it into out, "add" adds it, "swiglu" puts
    silu(y's first half) * its second half into out (B, N / 2). `buffers` are linear_buffers()."""
    (B, D), N = x.shape, out.shape[1]
    if B > MOST_ROWS:
        for some, into in zip(x.split(MOST_ROWS), out.split(MOST_ROWS)):
            linear(some, weights, into, then, buffers, norm)
        return
    options = {**dependent(x), "num_warps": 4}
    if B == 1:
        tiles = triton.cdiv(D, TILE)
        if norm:
            raw, x = x, torch.empty(1, D, dtype=torch.float16, device=x.device)
            normalize_kernel[(tiles,)](raw, *norm, x, D, TILE, tiles, **options)
        matvec_kernel[(N,)](x, *weights, out, N, D, TILE, tiles, then, **options)
        return
    splits = MAX_PARTS if N < 8192 else 2
    few_rows_kernel[(triton.cdiv(N, BLOCK_N), splits)](
        *split(x, norm), *weights, out, *buffers, B, N, D, GROUP,
        max(16, triton.next_power_of_2(B)), BLOCK_N, splits, then, **options, num_stages=STAGES,
    )  # fmt: skip
