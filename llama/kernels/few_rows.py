"""int8 weights times the rows of a decode step, with the same bits whatever the number of rows.

An activation is two int8 digits, 256 high + low, times a scale that a group of columns shares; it
keeps 15 bits. Products of digits and codes add up to whole numbers, exact in any order and on any
unit: dp4a for one row, tensor cores for several. The float32 sums have one order: the groups of a
quarter of the columns, one after the other, then (q0 + q1) + (q2 + q3).
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llama.buffers import BLOCK_N, MOST_ROWS, Pair
from llama.kernels.launch import dependent

TILE = 1024  # columns that a program of split() takes
GROUP = 128  # columns that share a scale, or those of an attention head
DIGITS = 32512  # the largest value of two digits: 256 x 127
# Outputs a program for one row. The four matrices of a layer of 13B took 111 us, where a plain sum
# takes 104; 1 row and 2 warps: 114, 4 rows: 141 (H100, 2026-11-26).
ROWS = 2
# For 8 and 32 rows they took 132 and 151 us; 3 stages: 133 and 150, 6: 131 and 155; twice as many
# outputs a program: 133 and 161. Weights requested before the wait, here, brought nothing.
STAGES = 4
WARPS = 4
Norm = tuple[Tensor, float] | None  # of an RMSNorm: its weight (D,) fp16 and epsilon


def linear_torch(x: Pair, weights: Pair, out: Tensor, then: str, buffers=None) -> None:
    CB, SCB = weights
    y = joined(x).double() @ (CB.double() * (SCB / 127)[:, None]).T
    if then == "swiglu":
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    out.copy_(y + out if then == "add" else y)


def joined(x: Pair) -> Tensor:
    """The rows that split() split: (B, D) float32."""
    digits, scales = x
    whole = digits[:, 0].float() * 256 + digits[:, 1]
    group = triton.next_power_of_2(triton.cdiv(whole.shape[1], scales.shape[1]))
    return whole * scales.repeat_interleave(group, 1)[:, : whole.shape[1]]


def normalized(x: Tensor, norm: Norm) -> Tensor:
    x = x.float()
    return F.rms_norm(x, x.shape[-1:], norm[0].float(), norm[1]) if norm else x


def split_torch(x: Tensor, norm: Norm = None, group: int = GROUP) -> Pair:
    x = normalized(x, norm)
    groups = F.pad(x, (0, -x.shape[1] % group)).unflatten(1, (-1, group))
    scales = groups.abs().amax(-1) / DIGITS
    whole = (groups / scales.clamp(min=1e-30)[..., None]).round().int().flatten(1)
    high = (whole + 128) >> 8
    digits = torch.stack([high, whole - (high << 8)], 1)[..., : x.shape[1]]
    return digits.to(torch.int8), scales


@triton.jit
def digits_of(groups, DIGITS: tl.constexpr):
    """The high and low digits of groups (G, GROUP), and the scale (G,) of each."""
    scale = tl.max(tl.abs(groups), 1) / DIGITS
    ratio = groups / tl.maximum(scale, 1e-30)[:, None]
    whole = tl.where(ratio < 0, ratio - 0.5, ratio + 0.5).to(tl.int32)
    high = (whole + 128) >> 8
    return high.to(tl.int8), (whole - (high << 8)).to(tl.int8), scale


@triton.jit
def split_kernel(
    x, gain, eps, digits, scales, D: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
    GROUP: tl.constexpr, DIGITS: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each program splits a tile of a row; to normalize, it reads all of the row."""
    b, tile = tl.program_id(0), tl.program_id(1)
    G: tl.constexpr = TILE // GROUP
    columns = tile * TILE + tl.arange(0, G)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x += b * D
    if PDL:
        gdc_launch_dependents()
    if NORM:
        weight = tl.load(gain + columns, mask=columns < D, other=0).to(tl.float32)
    if PDL:
        gdc_wait()
    value = tl.load(x + columns, mask=columns < D, other=0)
    if NORM:
        squares = tl.zeros((TILE,), tl.float32)
        for i in tl.static_range(TILES):
            d = i * TILE + tl.arange(0, TILE)
            one = tl.load(x + d, mask=d < D, other=0)
            squares += one * one
        value = value / tl.sqrt(tl.sum(squares, 0) / D + eps) * weight
    high, low, scale = digits_of(value, DIGITS)
    digits += 2 * b * D + columns
    tl.store(digits, high, mask=columns < D)
    tl.store(digits + D, low, mask=columns < D)
    GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP
    g = tile * G + tl.arange(0, G)
    tl.store(scales + b * GROUPS + g, scale, mask=g < GROUPS)


def split(x: Tensor, norm: Norm = None) -> Pair:
    """x (B, D) float32, first normalized if a norm is given, as two int8 digits and a float32 scale
    for each GROUP columns: x = (256 * digits[:, 0] + digits[:, 1]) * scale, digits (B, 2, D),
    scales (B, D / GROUP). Its error is at most 1 / 64,000 of the group's largest magnitude."""
    B, D = x.shape
    digits = torch.empty(B, 2, D, dtype=torch.int8, device=x.device)
    scales = torch.empty(B, triton.cdiv(D, GROUP), device=x.device)
    tiles = triton.cdiv(D, TILE)
    split_kernel[(B, tiles)](
        x, *(norm or (None, 0.0)), digits, scales, D, TILE, tiles, GROUP, DIGITS,
        norm is not None, **dependent(x), num_warps=4,
    )  # fmt: skip
    return digits, scales


@triton.jit
def dot4(a, b, c, DP4A: tl.constexpr):
    """c + the product of four int8 in a word of a and four in one of b."""
    if DP4A:
        c = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], tl.int32, True, 1
        )
    else:
        for left in tl.static_range(0, 32, 8):
            c += ((a << left) >> 24) * ((b << left) >> 24)
    return c


@triton.jit
def requested(row, words, STEP: tl.constexpr, TILES: tl.constexpr, END: tl.constexpr):
    """The groups of weight rows, as a tuple of the i-th of each quarter: all requested at once."""
    tiles = ()
    for i in tl.static_range(TILES):
        word = words + i * STEP
        inside = (word < END) | (4 * TILES * STEP == END)  # the latter is known when it compiles
        tiles += (tl.load(row + word, inside, 0, eviction_policy="evict_first"),)
    return tiles


@triton.jit
def group_product(w, high, low, scale, DP4A: tl.constexpr):
    """w (R, 4, words) times a group of each quarter: (R, 4)."""
    whole = dot4(w, tl.broadcast_to(high, w.shape), tl.zeros_like(w), DP4A) * 256
    whole = dot4(w, tl.broadcast_to(low, w.shape), whole, DP4A)
    return tl.sum(whole, 2).to(tl.float32) * scale[None, :]


@triton.jit
def quarters(y, R: tl.constexpr):
    """The sum of y (R, 4) over its quarters."""
    a, b = tl.split(tl.reshape(y, (R, 2, 2)))
    a, b = tl.split(a + b)
    return a + b


@triton.jit
def one_row_kernel(
    digits, scales, CB, SCB, out, N, D: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    THEN: tl.constexpr, DP4A: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each program computes ROWS outputs; it requests their weights, all of them, before the wait.
    digits and CB are words of four."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    END: tl.constexpr = D // 4
    STEP: tl.constexpr = GROUP // 4
    GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP
    QUARTER: tl.constexpr = (GROUPS + 3) // 4
    if PDL:
        gdc_launch_dependents()
    quarter, words = tl.arange(0, 4), tl.arange(0, STEP)
    words = (quarter[:, None] * (QUARTER * STEP) + words[None, :])[None]
    row = CB + (tl.minimum(n, N - 1).to(tl.int64) * END)[:, None, None]
    tiles = requested(row, words, STEP, QUARTER, END)
    y = tl.zeros((ROWS, 4), tl.float32)
    if THEN == "swiglu":
        up_tiles = requested(row + tl.cast(N, tl.int64) * END, words, STEP, QUARTER, END)
        up = tl.zeros((ROWS, 4), tl.float32)
    if PDL:
        gdc_wait()
    for i in tl.static_range(QUARTER):
        word = words + i * STEP
        inside = (word < END) | (4 * QUARTER * STEP == END)
        high = tl.load(digits + word, inside, 0)
        low = tl.load(digits + END + word, inside, 0)
        g = quarter * QUARTER + i
        scale = tl.load(scales + g, g < GROUPS, 0)
        y += group_product(tiles[i], high, low, scale, DP4A)
        if THEN == "swiglu":
            up += group_product(up_tiles[i], high, low, scale, DP4A)
    there = n < N
    y = quarters(y, ROWS) * (tl.load(SCB + n, there, 0) / 127)
    if THEN == "swiglu":
        up = quarters(up, ROWS) * (tl.load(SCB + N + n, there, 0) / 127)
        y = y * tl.sigmoid(y) * up
    if THEN == "add":
        y += tl.load(out + n, there)
    tl.store(out + n, y, there)


@triton.jit
def group_products(w, x, scale):
    """w (N, GROUP) times the two rows of digits that x (2 B, GROUP) has for each: (N, B)."""
    whole = tl.dot(w, tl.trans(x), out_dtype=tl.int32)
    high, low = tl.split(tl.reshape(whole, (whole.shape[0], whole.shape[1] // 2, 2)))
    return (high * 256 + low).to(tl.float32) * scale[None, :]


@triton.jit
def few_rows_kernel(
    digits, scales, CB, SCB, out, partial, arrivals, B, N,
    D: tl.constexpr, GROUP: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
    THEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each program sums a quarter of the columns for BLOCK_N outputs of all rows."""
    tile, quarter = tl.program_id(0), tl.program_id(1)
    outputs = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    batch, pairs = tl.arange(0, BLOCK_B), tl.arange(0, 2 * BLOCK_B)
    GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP
    QUARTER: tl.constexpr = (GROUPS + 3) // 4
    SIZE: tl.constexpr = BLOCK_N * BLOCK_B
    if PDL:
        gdc_launch_dependents()
    first = quarter * QUARTER
    columns = (first * GROUP + tl.arange(0, GROUP))[None, :]
    weights = CB + tl.minimum(outputs, N - 1)[:, None].to(tl.int64) * D + columns
    x = digits + pairs[:, None] * D + columns
    known = (pairs < 2 * B)[:, None]
    y = tl.zeros((BLOCK_N, BLOCK_B), tl.float32)
    up = tl.zeros_like(y)
    if PDL:
        gdc_wait()
    for i in range(0, QUARTER):
        at = i * GROUP
        inside = (columns + at < D) | (4 * QUARTER * GROUP == D)
        some = tl.load(x + at, known & inside, 0)
        g = tl.where(batch < B, first + i, GROUPS)
        scale = tl.load(scales + batch * GROUPS + g, g < GROUPS, 0)
        y += group_products(tl.load(weights + at, inside, 0), some, scale)
        if THEN == "swiglu":
            up_tile = tl.load(weights + tl.cast(N, tl.int64) * D + at, inside, 0)
            up += group_products(up_tile, some, scale)

    # Four quarters, each of both halves of "swiglu"; the last program to arrive adds them.
    parts = partial + tile * 8 * SIZE + tl.arange(0, BLOCK_N)[:, None] * BLOCK_B + batch[None, :]
    tl.store(parts + quarter * 2 * SIZE, y)
    if THEN == "swiglu":
        tl.store(parts + quarter * 2 * SIZE + SIZE, up)
    tl.debug_barrier()
    if tl.atomic_add(arrivals + tile, 1) == 3:
        tl.store(arrivals + tile, 0)
        there = outputs < N
        y = sum_of_quarters(parts, SIZE) * (tl.load(SCB + outputs, there, 0) / 127)[:, None]
        if THEN == "swiglu":
            up_scale = tl.load(SCB + N + outputs, there, 0) / 127
            up = sum_of_quarters(parts + SIZE, SIZE) * up_scale[:, None]
            y = y * tl.sigmoid(y) * up
        there = there[:, None] & (batch < B)[None, :]
        target = out + batch[None, :] * N + outputs[:, None]
        if THEN == "add":
            y += tl.load(target, mask=there, other=0)
        tl.store(target, y, mask=there)


@triton.jit
def sum_of_quarters(first, SIZE: tl.constexpr):
    a = tl.load(first, cache_modifier=".cg") + tl.load(first + 2 * SIZE, cache_modifier=".cg")
    third = tl.load(first + 4 * SIZE, cache_modifier=".cg")
    return a + (third + tl.load(first + 6 * SIZE, cache_modifier=".cg"))


def linear(x: Pair, weights: Pair, out: Tensor, then: str, buffers: Pair) -> None:
    """Multiplies x, from split() or attend(), by int8 weights CB (N, D) with scales SCB (N,); more
    than 32 rows read the weights again for each 32. `then` says what becomes of the product y:
    "store" puts it into out (B, N), "add" adds it, "swiglu" puts silu(y's first half) * its second
    half into out (B, N / 2) float32. `buffers` are linear_buffers(). A row's result is the same bit
    for bit whatever the number of rows is."""
    (digits, scales), (CB, SCB) = x, weights
    (B, _, D), N = digits.shape, out.shape[1]
    if B > MOST_ROWS:
        rows = zip(*(tensor.split(MOST_ROWS) for tensor in x), strict=True)
        for some, into in zip(rows, out.split(MOST_ROWS)):
            linear(some, weights, into, then, buffers)
        return
    group = triton.next_power_of_2(triton.cdiv(D, scales.shape[1]))
    options = {**dependent(out), "enable_fp_fusion": False}
    if B == 1:
        words = digits.view(torch.int32), scales, CB.view(torch.int32), SCB
        one_row_kernel[(triton.cdiv(N, ROWS),)](
            *words, out, N, D, group, ROWS, then, out.is_cuda, **options, num_warps=WARPS
        )
        return
    few_rows_kernel[(triton.cdiv(N, BLOCK_N), 4)](
        digits, scales, CB, SCB, out, *buffers, B, N, D, group,
        max(8, triton.next_power_of_2(B)), BLOCK_N, then, **options, num_warps=WARPS,
        num_stages=STAGES,
    )  # fmt: skip
