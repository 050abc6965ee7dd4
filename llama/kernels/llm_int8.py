"""LLM.int8() for many rows: the linear layers of a prompt, each row by itself.

The method of Dettmers et al. 2022 (arXiv 2208.07339, section 3): activations are rounded to int8
row by row, those that reach the threshold are kept in more bits, and int8 tensor cores multiply the
codes. bitsandbytes keeps whole columns in fp16; here a row keeps its own large entries alone, as
whole multiples of the same step: 65536 top + 256 middle + low, three int8 digits. The small entries
have a low digit only, so the product of the low digits is dense, and that of the others is over the
few groups of columns where a block of rows keeps something, which are listed on the device. All
sums are exact in int32, in whatever order: a row's result has the same bits in any company.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from llama.buffers import LIST_COLUMNS, LIST_ROWS, Pair
from llama.int8 import OUTLIER_THRESHOLD
from llama.kernels.few_rows import Norm, normalized
from llama.kernels.launch import launch

SMS = 132  # of an H200
# Rows and outputs of a program, stages of its loads, programs that share an SM, and microseconds
# that they take with 5,120 columns. The linears of a layer of 13B take 295 us for 512 rows and 988
# for 1,900. The peak of int8 is 164 and 609; float8 in the same loop, where Triton does not wait
# for each product, took 286 and 946. With TMA descriptors they took 2 % less time, which is not
# worth their code, with tiles of 128 x 256 20 % more (H200, 2026-11-28).
TILES = (
    (128, 128, 3, 2, 38),
    (64, 128, 3, 3, 35),
    (64, 128, 4, 2, 27),
    (64, 64, 4, 3, 23),
    (64, 64, 6, 2, 19),
)
BLOCK_K = 128  # columns a step; 64: 15 % slower
WARPS = 4
# Blocks of rows that share weights in the cache; 8: 1,900 rows took 5 % longer, 4: 2 % (H200).
NEIGHBOURS = 16
TWO_DIGITS = 32000.0  # what 256 middle + low can say, in steps
# Int32 holds codes up to 127 times whole numbers that add up to 2^22, which kept entries do, and D
# products of two codes (D < 65,000). What wraps around on the way there does no harm.
MOST_STEPS = 2.0**22
ROUND = 1.5 * 2.0**23  # added to a float32 below 2^22, it leaves no bits for a fraction
Buffers = tuple[Tensor, ...]


def vectorwise_quant_torch(x, buffers, before="nothing", norm=None) -> Pair:
    """The rows in whole steps (M, D), and the steps (M,)."""
    x = normalized(x, norm)
    if before == "swiglu":
        gate, up = x.chunk(2, -1)
        x = F.silu(gate) * up
    A = x.half().float().nan_to_num(nan=torch.inf)
    large = A.abs() >= OUTLIER_THRESHOLD
    most, kept = A.masked_fill(large, 0).abs().amax(1), A.masked_fill(~large, 0).abs().sum(1)
    step = torch.maximum(most / 127, kept / MOST_STEPS)
    return (A * (1 / step.clamp(min=1e-30))[:, None]).round(), step


@triton.jit
def vectorwise_quant_kernel(
    x, weight, eps, digits, step, used, lists,
    D: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, BEFORE: tl.constexpr,
    THRESHOLD: tl.constexpr, TWO_DIGITS: tl.constexpr, MOST_STEPS: tl.constexpr,
    ROUND: tl.constexpr, LIST_ROWS: tl.constexpr, LIST_COLUMNS: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """Each program quantizes one row, which it holds in registers."""
    m = tl.program_id(0)
    row = m.to(tl.int64) * D
    values = ()
    for i in tl.static_range(TILES):
        d = i * TILE + tl.arange(0, TILE)
        if BEFORE == "swiglu":
            gate = tl.load(x + 2 * row + d, mask=d < D, other=0).to(tl.float32)
            up = tl.load(x + 2 * row + D + d, mask=d < D, other=0).to(tl.float32)
            values += (gate * tl.sigmoid(gate) * up,)
        else:
            values += (tl.load(x + row + d, mask=d < D, other=0).to(tl.float32),)
    norm = 1.0
    if BEFORE == "rms_norm":
        squares = tl.zeros((TILE,), tl.float32)
        for i in tl.static_range(TILES):
            squares += values[i] * values[i]
        norm = tl.rsqrt(tl.sum(squares, 0) / D + eps)
    most_small = tl.zeros((TILE,), tl.float32)
    most_kept = tl.zeros((TILE,), tl.float32)
    sum_kept = tl.zeros((TILE,), tl.float32)
    halves = ()
    for i in tl.static_range(TILES):
        value = values[i]
        if BEFORE == "rms_norm":
            d = i * TILE + tl.arange(0, TILE)
            value *= norm * tl.load(weight + d, mask=d < D, other=0).to(tl.float32)
        half = value.to(tl.float16)
        value = tl.abs(half.to(tl.float32))
        value = tl.where(value == value, value, float("inf"))  # NaN makes the row infinite, too
        kept = tl.where(value < THRESHOLD, 0, value)
        most_small = tl.maximum(most_small, tl.where(value < THRESHOLD, value, 0))
        most_kept = tl.maximum(most_kept, kept)
        sum_kept += kept
        halves += (half,)
    scale = tl.maximum(tl.max(most_small, 0) / 127, tl.sum(sum_kept, 0) / MOST_STEPS)
    inverse = 1 / tl.maximum(scale, 1e-30)
    kept = tl.max(most_kept, 0)
    digits_used = 1 + (kept > 0).to(tl.int32) + (kept * inverse > TWO_DIGITS).to(tl.int32)
    tl.store(step + m, scale)
    tl.store(used + m, digits_used)
    digits += 3 * row
    for i in tl.static_range(TILES):
        d = i * TILE + tl.arange(0, TILE)
        whole = (tl.fma(halves[i].to(tl.float32), inverse, ROUND) - ROUND).to(tl.int32)
        rest = (whole + 128) >> 8
        higher = (rest + 128) >> 8
        tl.store(digits + d, (whole - (rest << 8)).to(tl.int8), mask=d < D)
        if digits_used > 1:
            tl.store(digits + D + d, (rest - (higher << 8)).to(tl.int8), mask=d < D)
        if digits_used > 2:
            tl.store(digits + 2 * D + d, higher.to(tl.int8), mask=d < D)

    if kept > 0:  # list the groups that no other row of the block has listed
        GROUPS: tl.constexpr = (D + LIST_COLUMNS - 1) // LIST_COLUMNS
        counts = lists + m // LIST_ROWS * LIST
        flags, listed = counts + 2, counts + 2 + GROUPS
        if digits_used > 2:
            tl.store(counts + 1, 1)
        for i in tl.static_range(TILES):
            g = i * (TILE // LIST_COLUMNS) + tl.arange(0, TILE // LIST_COLUMNS)
            large = (tl.abs(halves[i].to(tl.float32)) < THRESHOLD) == 0
            large = tl.reshape(large.to(tl.int32), (TILE // LIST_COLUMNS, LIST_COLUMNS))
            new = (g < GROUPS) & (tl.max(large, 1) > 0)
            new &= tl.load(flags + g, mask=new, other=1, cache_modifier=".cg") == 0
            new &= tl.atomic_xchg(flags + g, 1, mask=new, sem="relaxed") == 0
            place = tl.atomic_add(counts + g * 0, 1, mask=new, sem="relaxed")
            tl.store(listed + place, g, mask=new)


def vectorwise_quant(
    x: Tensor, buffers: Buffers, before: str = "nothing", norm: Norm = None
) -> Buffers:
    """Rows A (M, D) fp16 as whole multiples of a step each, rounded. `before` makes A of x:
    "nothing" x itself, "rms_norm" of x (M, D) float32, "swiglu" silu(first half) * second half of
    x (M, 2 D) fp16. A row's step is its largest entry below OUTLIER_THRESHOLD / 127, or the sum of
    its kept entries / MOST_STEPS if that is more; where the row is not finite, neither is its step.

    `buffers` are those of quant_buffers(M, D), and a list of quant_lists(), all zeros. Returned,
    for mixed_scaled_mm(), they are the low, middle and top digits of A (M, 3, D), the steps (M,),
    how many of the three each row uses (M,), the others being undefined, and which groups of
    columns have middle and top digits."""
    M, _, D = buffers[0].shape
    warps = 8 if D <= 8192 else 16
    tile = 128 * warps
    launch(
        vectorwise_quant_kernel, (M,), x, *(norm or (None, 0.0)), *buffers, D, tile,
        triton.cdiv(D, tile), before, OUTLIER_THRESHOLD, TWO_DIGITS, MOST_STEPS, ROUND, LIST_ROWS,
        LIST_COLUMNS, buffers[3].shape[1], num_warps=warps,
    )  # fmt: skip
    return buffers


def mixed_scaled_mm_torch(A: Pair, weights: Pair, out: Tensor, then: str) -> None:
    (whole, step), (CB, SCB) = A, weights
    y = (whole.double() @ CB.double().T) * step[:, None] * (SCB / 127)
    out.copy_(y + out if then == "add" else y)


@triton.jit
def multiplied(
    whole, digits, CB, listed, n_listed, row, rows, outputs,
    D: tl.constexpr, BLOCK_K: tl.constexpr, LIST_COLUMNS: tl.constexpr,
):  # fmt: skip
    """whole, plus the digits times CB in the listed groups of columns. Of the 326 us that the
    linears of a layer take for 512 rows, 31 are for 5 kept columns, of 398 103 for 30. In one loop
    with the low digits they took 380 and 457 (H200, 2026-11-28)."""
    k = tl.arange(0, BLOCK_K)
    for start in range(0, n_listed, BLOCK_K // LIST_COLUMNS):
        i = start + k // LIST_COLUMNS
        group = tl.load(listed + i, mask=i < n_listed, other=0)
        column = group * LIST_COLUMNS + k % LIST_COLUMNS
        column = tl.max_contiguous(tl.multiple_of(column, LIST_COLUMNS), LIST_COLUMNS)
        there = (i < n_listed) & ((column < D) | (D % LIST_COLUMNS == 0))
        a = tl.load(digits + rows + column[None, :], row & there[None, :], other=0)
        b = tl.load(CB + outputs + column[:, None], there[:, None], other=0)
        whole = tl.dot(a, b, whole, out_dtype=tl.int32)
    return whole


@triton.jit(do_not_specialize=["M"])
def mixed_scaled_mm_kernel(
    digits, step, used, lists, CB, SCB, out, M, N,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    NEIGHBOURS: tl.constexpr, THEN: tl.constexpr, LIST_ROWS: tl.constexpr,
    LIST_COLUMNS: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """Each program computes a tile. No float32 operations are fused, so that tiles of any size give
    the same bits."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    band = tl.program_id(0) // (NEIGHBOURS * tiles_n)
    within = tl.program_id(0) % (NEIGHBOURS * tiles_n)
    side_by_side = tl.minimum(NEIGHBOURS, tiles_m - band * NEIGHBOURS)
    m0 = (band * NEIGHBOURS + within % side_by_side) * BLOCK_M
    n0 = within // side_by_side * BLOCK_N
    digits += m0.to(tl.int64) * (3 * D)
    CB += n0.to(tl.int64) * D
    m = tl.arange(0, BLOCK_M)
    row = (m < M - m0)[:, None]
    n = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - n0)  # what repeats the last is never stored
    outputs = n[None, :] * D
    steps = tl.load(step + m0 + m, mask=m < M - m0, other=0)

    whole = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    rows = m[:, None] * (3 * D)
    GROUPS: tl.constexpr = (D + LIST_COLUMNS - 1) // LIST_COLUMNS
    counts = lists + m0 // LIST_ROWS * LIST
    listed, n_listed, has_top = counts + 2 + GROUPS, tl.load(counts), tl.load(counts + 1)
    digits_used = tl.load(used + m0 + m, mask=m < M - m0, other=0)[:, None]
    if n_listed > 0:
        if has_top > 0:
            whole = multiplied(
                whole, digits + 2 * D, CB, listed, n_listed, digits_used > 2, rows, outputs,
                D, BLOCK_K, LIST_COLUMNS,
            ) * 256  # fmt: skip
        whole = multiplied(
            whole, digits + D, CB, listed, n_listed, digits_used > 1, rows, outputs,
            D, BLOCK_K, LIST_COLUMNS,
        ) * 256  # fmt: skip

    k = tl.arange(0, BLOCK_K)
    for i in range(0, D, BLOCK_K):
        inside = (i + k < D) | (D % BLOCK_K == 0)  # the latter is known when it compiles
        a = tl.load(digits + rows + (i + k)[None, :], row & inside[None, :], other=0)
        b = tl.load(CB + outputs + (i + k)[:, None], inside[:, None], other=0)
        whole = tl.dot(a, b, whole, out_dtype=tl.int32)
    y = whole.to(tl.float32) * steps[:, None] * (tl.load(SCB + n0 + n) / 127)[None, :]
    n = tl.arange(0, BLOCK_N)
    there = row & (n < N - n0)[None, :]
    target = out + m0.to(tl.int64) * N + n0 + m[:, None] * N + n[None, :]
    if THEN == "add":  # with a load, which spills registers, wo took 42 us instead of 34 (H200)
        tl.atomic_add(target, y, mask=there, sem="relaxed")
    else:
        tl.store(target, y.to(out.dtype.element_ty), mask=there)


def tile_of(M: int, N: int) -> tuple[int, int, int]:
    """Rows and outputs of a program of (M, N), and its stages: those that take the least time. The
    bits don't depend on them."""

    def time(tile):
        rows, outputs, _, programs, each = tile
        return triton.cdiv(triton.cdiv(M, rows) * triton.cdiv(N, outputs), programs * SMS) * each

    return min(TILES, key=time)[:3]


def mixed_scaled_mm(A: Buffers, weights: Pair, out: Tensor, then: str) -> None:
    """Rows as vectorwise_quant() returned them times int8 weights CB (N, D) and scales SCB (N,):
    "store" puts the product (M, N) into out, "add" adds it to out."""
    (M, _, D), N = A[0].shape, out.shape[1]
    block_m, block_n, stages = tile_of(M, N)
    launch(
        mixed_scaled_mm_kernel, (triton.cdiv(M, block_m) * triton.cdiv(N, block_n),), *A, *weights,
        out, M, N, D, block_m, block_n, BLOCK_K, NEIGHBOURS, then, LIST_ROWS, LIST_COLUMNS,
        A[3].shape[1], num_warps=WARPS, num_stages=stages, enable_fp_fusion=False,
    )  # fmt: skip
