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

from llama import model
from llama.buffers import MOST_ROWS, Pair
from llama.kernels.launch import dependent

TILE = 512  # columns that a program of split() takes; with 1,024 a step of 13B took 0.5 % longer
GROUP = 128  # columns that share a scale, or those of an attention head
DIGITS = 32512  # the largest value of two digits: 256 x 127
WARPS = 4
Norm = tuple[Tensor, float] | None  # of an RMSNorm: its weight (D,) fp16 and epsilon
Heads = tuple[Pair, Tensor, Tensor]  # caches, positions and angles of linear()


def linear_torch(x: Pair, weights: Pair, out: Tensor, then: str, heads=None) -> None:
    CB, SCB = weights
    y = joined(x).double() @ (CB.double() * (SCB / 127)[:, None]).T
    if then == "swiglu":
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    if then == "rotate":
        y = store_rotated_torch(y, heads)
    out.copy_(y + out if then == "add" else y)


def store_rotated_torch(y: Tensor, heads: Heads) -> Tensor:
    caches, positions, angles = heads
    slots, _, Hkv, K = caches[0].shape
    rows = torch.arange(len(y), device=y.device) // (len(y) // slots)
    q, k, v = y.view(len(y), 1, -1, K).split([y.shape[1] // K - 2 * Hkv, Hkv, Hkv], 2)
    q, k = (model.rotate(x, angles[:, None]) for x in (q, k))
    for cache, new in zip(caches, (k, v)):
        cache[rows, positions] = new[:, 0].to(cache.dtype)
    return q.flatten(1) * K**-0.5


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
    """The groups of a weight row, as a tuple of the i-th of each quarter: all requested at once."""
    tiles = ()
    for i in tl.static_range(TILES):
        word = words + i * STEP
        inside = (word < END) | (4 * TILES * STEP == END)  # the latter is known when it compiles
        tiles += (tl.load(row + word, inside, 0, eviction_policy="evict_first"),)
    return tiles


@triton.jit
def group_product(w, high, low, scale, DP4A: tl.constexpr):
    """w (4, words) times a group of each quarter: (4,)."""
    whole = dot4(w, high, tl.zeros_like(w), DP4A) * 256
    return tl.sum(dot4(w, low, whole, DP4A), 1).to(tl.float32) * scale


@triton.jit
def sum_of_quarters(y):
    """The sum of y (4, N, B) over its quarters: (N, B)."""
    y = tl.reshape(y, (2, 2, y.shape[1], y.shape[2]))
    a, b = tl.split(tl.permute(y, (2, 3, 0, 1)))
    a, b = tl.split(a + b)
    return a + b


@triton.jit
def one_row_kernel(
    digits, scales, CB, SCB, out, k_cache, v_cache, positions, angles, N,
    D: tl.constexpr, GROUP: tl.constexpr, HKV: tl.constexpr, K: tl.constexpr,
    THEN: tl.constexpr, DP4A: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each program computes two outputs and requests all their weights before the wait. A tile (4,
    words) has a quarter of the columns for each warp and a word for each thread, as they are
    multiplied. With both outputs in one tile, Triton converted its layout, which waited for the
    weights before gdc_wait: a step of 13B took 5.21 ms instead of 5.10 (H100, 2026-11-27). digits
    and CB are words of four."""
    END: tl.constexpr = D // 4
    STEP: tl.constexpr = GROUP // 4
    GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP
    QUARTER: tl.constexpr = (GROUPS + 3) // 4
    quarter, words = tl.arange(0, 4), tl.arange(0, STEP)
    words = quarter[:, None] * (QUARTER * STEP) + words[None, :]
    first = 2 * tl.program_id(0)
    n = first + tl.arange(0, 2)
    there = n < N
    row_0 = CB + first.to(tl.int64) * END
    row_1 = row_0 + tl.where(first + 1 < N, END, 0)
    w_0 = requested(row_0, words, STEP, QUARTER, END)
    w_1 = requested(row_1, words, STEP, QUARTER, END)
    if THEN == "swiglu":
        to_up = tl.cast(N, tl.int64) * END
        up_0 = requested(row_0 + to_up, words, STEP, QUARTER, END)
        up_1 = requested(row_1 + to_up, words, STEP, QUARTER, END)
        up = tl.zeros((4, 2), tl.float32)
        up_unit = tl.load(SCB + N + n, there, 0)[:, None] / 127
    unit = tl.load(SCB + n, there, 0)[:, None] / 127
    if THEN == "rotate":
        b = tl.arange(0, 1)
        position = tl.load(positions + b)
        cos, sin = turn(angles, n, 2, b, b == 0, K)
    if PDL:
        gdc_wait()
    x = ()
    for i in tl.static_range(QUARTER):
        word, g = words + i * STEP, quarter * QUARTER + i
        inside = (word < END) | (4 * QUARTER * STEP == END)
        high = tl.load(digits + word, inside, 0)
        low = tl.load(digits + END + word, inside, 0)
        x += ((high, low, tl.load(scales + g, g < GROUPS, 0)),)
    y = tl.zeros((4, 2), tl.float32)
    for i in tl.static_range(QUARTER):
        y += tl.join(group_product(w_0[i], *x[i], DP4A), group_product(w_1[i], *x[i], DP4A))
        if THEN == "swiglu":
            up += tl.join(group_product(up_0[i], *x[i], DP4A), group_product(up_1[i], *x[i], DP4A))
    if PDL:
        gdc_launch_dependents()  # right after the requests: 0.5 % of a step slower
    if THEN == "swiglu":
        y, up = tl.split(sum_of_quarters(tl.join(y, up)))
        y, up = y[:, None] * unit, up[:, None] * up_unit
        y = y * tl.sigmoid(y) * up
    else:
        y = sum_of_quarters(y[:, :, None]) * unit
    if THEN == "rotate":
        place = position * HKV * K
        store_rotated(y, n, b, place, cos, sin, out, k_cache, v_cache, N, b == 0, HKV, K)
        return
    target, there = out + n[:, None], there[:, None]
    if THEN == "add":
        y += tl.load(target, there)
    tl.store(target, y, there)


@triton.jit
def turn(angles, n, SIZE: tl.constexpr, b, there, K: tl.constexpr):
    """cos and sin (SIZE / 2, B) that rotate each two of outputs n (SIZE,) of rows b (B,)."""
    pair, _ = tl.split(tl.reshape(n % K, (SIZE // 2, 2)))
    at = angles + b[None, :] * K + pair[:, None]
    return tl.load(at, there[None, :], 0), tl.load(at + 1, there[None, :], 0)


@triton.jit
def store_rotated(
    y, n, b, place, cos, sin, q, k_cache, v_cache, N, there, HKV: tl.constexpr, K: tl.constexpr
):
    """Rotates outputs n of queries and keys y (n, b), and stores them: queries scaled, keys and
    values at their place (b,) in the caches."""
    SIZE: tl.constexpr = y.shape[0]
    B: tl.constexpr = y.shape[1]
    even, odd = tl.split(tl.permute(tl.reshape(y, (SIZE // 2, 2, B)), (0, 2, 1)))
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)  # (SIZE / 2, B, 2)
    turned = tl.reshape(tl.permute(turned, (0, 2, 1)), (SIZE, B))
    queries = N - 2 * HKV * K
    n, there = n[:, None], (n < N)[:, None] & there[None, :]
    tl.store(q + b[None, :] * queries + n, turned * K**-0.5, there & (n < queries))
    at = place[None, :] + n - queries
    tl.store(k_cache + at, turned, there & (n >= queries) & (n < queries + HKV * K))
    tl.store(v_cache + at - HKV * K, y, there & (n >= queries + HKV * K))


@triton.jit
def group_products(w, x, scale):
    """w (4, N, GROUP) times the two rows of digits that x (4, 2 B, GROUP) has for each group of
    columns: (4, N, B)."""
    whole = tl.dot(w, tl.permute(x, (0, 2, 1)), out_dtype=tl.int32)
    high, low = tl.split(tl.reshape(whole, (4, whole.shape[1], whole.shape[2] // 2, 2)))
    return (high * 256 + low).to(tl.float32) * scale[:, None, :]


@triton.jit
def few_rows_kernel(
    digits, scales, CB, SCB, out, k_cache, v_cache, positions, angles, S, EACH, B, N,
    D: tl.constexpr, GROUP: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
    HKV: tl.constexpr, K: tl.constexpr, THEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each program multiplies BLOCK_N rows of weights by all rows of digits; each warp takes a
    quarter of the columns, if there are four. Triton loads ahead only the operands of a dot, so the
    scales are loaded a group ahead here: a step of 13B with 8 rows took 5.91 ms, with all that is
    loaded early 5.80 (H100, 2026-11-28)."""
    OUTPUTS: tl.constexpr = BLOCK_N // 2 if THEN == "swiglu" else BLOCK_N
    GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP
    QUARTER: tl.constexpr = (GROUPS + 3) // 4
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    b, pairs, quarter = tl.arange(0, BLOCK_B), tl.arange(0, 2 * BLOCK_B), tl.arange(0, 4)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if THEN == "swiglu":  # rows of w1 and w3 alternate
        row = tl.minimum(row, 2 * N - 1)
        row = row // 2 + row % 2 * N
    else:
        row = tl.minimum(row, N - 1)
    columns = (quarter[:, None] * (QUARTER * GROUP) + tl.arange(0, GROUP)[None, :])[:, None, :]
    weights = CB + row[None, :, None].to(tl.int64) * D + columns
    x = digits + pairs[None, :, None] * D + columns
    known, there = (pairs < 2 * B)[None, :, None], (n < N)[:, None] & (b < B)[None, :]
    y = tl.zeros((4, BLOCK_N, BLOCK_B), tl.float32)
    if THEN == "rotate":
        position = tl.load(positions + b, b < B, 0)
        cos, sin = turn(angles, n, BLOCK_N, b, b < B, K)
    if PDL:
        if D % 16 == 0 and D - 3 * QUARTER * GROUP >= 256:
            prefetch(CB + row[:, None].to(tl.int64) * D + quarter[None, :] * (QUARTER * GROUP))
        gdc_wait()
        gdc_launch_dependents()  # before the wait: 16 and 32 rows 1 % of a step slower
    unit = tl.load(SCB + row)[:, None] / 127
    target = out + b[None, :] * N + n[:, None]
    if THEN == "add":
        before = tl.load(target, there, 0)
    g = b[None, :] * GROUPS + quarter[:, None] * QUARTER
    end = tl.where(b < B, (b + 1) * GROUPS, 0)[None, :]
    scale = tl.load(scales + g, g < end, 0)
    for i in range(0, QUARTER):
        at = i * GROUP
        inside = (columns + at < D) | (4 * QUARTER * GROUP == D)
        some = tl.load(x + at, known & inside, 0)
        next_scale = tl.load(scales + g + i + 1, g + i + 1 < end, 0)
        y += group_products(tl.load(weights + at, inside, 0), some, scale)
        scale = next_scale

    y = sum_of_quarters(y) * unit
    if THEN == "rotate":
        place = (b // EACH * S + position) * HKV * K
        store_rotated(y, n, b, place, cos, sin, out, k_cache, v_cache, N, b < B, HKV, K)
        return
    if THEN == "swiglu":
        gate, up = tl.split(tl.permute(tl.reshape(y, (OUTPUTS, 2, BLOCK_B)), (0, 2, 1)))
        y = gate * tl.sigmoid(gate) * up
    if THEN == "add":
        y += before
    tl.store(target, y, mask=there)


@triton.jit
def prefetch(rows):
    """Requests 256 bytes from each of some addresses into L2. For 8 rows a step of 13B took 6.00
    ms, and 6.09 without (H100, 2026-11-27)."""
    tl.inline_asm_elementwise(
        "{ .reg .u64 a; cvta.to.global.u64 a, $1;"
        " cp.async.bulk.prefetch.L2.global [a], 256; mov.u32 $0, 0; }",
        "=r,l", [rows], tl.int32, False, 1,
    )  # fmt: skip


def linear(x: Pair, weights: Pair, out: Tensor, then: str, heads: Heads | None = None) -> None:
    """Multiplies x, from split() or attend(), by int8 weights CB (N, D) with scales SCB (N,); more
    than 32 rows read the weights again for each 32. `then` says what becomes of the product y:
    "store" puts it into out (B, N), "add" adds it, "swiglu" puts silu(y's first half) * its second
    half into out (B, N / 2) float32. "rotate" is for queries, keys and values side by side, N =
    (H + 2 Hkv) K: queries are rotated and go, times K^-1/2, into out (B, H K) fp16, rotated keys
    and values into caches (slots, S, Hkv, K) fp16 at `positions` (B,), by whose `angles` (B, K/2,
    2) float32 they are rotated; B / slots rows, at most 32, share a slot. A row's result is the
    same bit for bit whatever the number of rows is."""
    (digits, scales), (CB, SCB) = x, weights
    (B, _, D), N = digits.shape, len(CB) // (2 if then == "swiglu" else 1)
    caches, positions, angles = heads or ((None, None), None, None)
    slots, S, Hkv, K = caches[0].shape if heads else (1, 0, 0, 0)
    if B > MOST_ROWS:
        each = B // slots if heads else 1
        most = MOST_ROWS // each * each  # whole slots
        for first in range(0, B, most):
            rows, some = slice(first, first + most), heads
            if heads:
                of = slice(first // each, (first + most) // each)
                some = [cache[of] for cache in caches], positions[rows], angles[rows]
            linear((digits[rows], scales[rows]), weights, out[rows], then, some)
        return
    group = triton.next_power_of_2(triton.cdiv(D, scales.shape[1]))
    options = {**dependent(out), "enable_fp_fusion": False, "num_warps": WARPS}
    target = out, *caches, positions, angles
    if B == 1:
        words = digits.view(torch.int32), scales, CB.view(torch.int32), SCB
        one_row_kernel[(triton.cdiv(N, 2),)](
            *words, *target, N, D, group, Hkv, K, then, out.is_cuda, **options
        )
        return
    block_n, stages = tile_of(B)
    few_rows_kernel[(triton.cdiv(len(CB), block_n),)](
        digits, scales, CB, SCB, *target, S, B // slots, B, N, D, group,
        max(8, triton.next_power_of_2(B)), block_n, Hkv, K, then, **options, num_stages=stages,
    )  # fmt: skip


def tile_of(B: int) -> tuple[int, int]:
    """Rows of weights a program, and stages of its loads. With 8, 16 and 32 rows a step of 13B took
    5.72, 6.32 and 7.85 ms after 128 tokens, with 3 stages 5.89 for 8 and 6.73 for 16 rows, with 16
    in "swiglu" 6.53 for 16 and 8.49 for 32 (H100, 2026-11-28). The stages must fit in 99 KiB of
    shared memory."""
    return 16 if B <= 8 else 32, 3 if B > 16 else 4
