"""LLM.int8() for many rows: the linear layers of a prompt, each row by itself.

The method of Dettmers et al. 2022 (arXiv 2208.07339, section 3): activations are rounded to int8
row by row, those that reach the threshold are kept apart in more bits, int8 tensor cores multiply
the codes, and the product of what was kept is added. bitsandbytes keeps whole columns; here a row
keeps its own large entries alone. They become integers of two int8 digits, 256 high + low, so that
every sum is exact in int32, in whatever order and whatever columns other rows need: a row's result
has the same bits in any company. Which columns a block of rows needs is listed on the device.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from llama.buffers import LIST_ROWS, Pair
from llama.int8 import OUTLIER_THRESHOLD
from llama.kernels.few_rows import DIGITS, Norm, normalized
from llama.kernels.launch import launch

# A program computes BLOCK_M rows x BLOCK_N outputs, BLOCK_K inputs a step. The linears of a layer
# of 13B take 319 us for 512 rows and 983 for 1,900 (int8 peak: 164 and 609). TMA descriptors: 312
# and 961. Queries, keys and values alone: 69 and 221; 128 x 256 tiles, 8 warps 83 and 271; BLOCK_K
# 64 80 and 259 (H200, 2026-11-27).
BLOCK_M = 128
BLOCK_N = 128
BLOCK_K = 128
WARPS = 4
# Rows up to which a program computes 64 of them, and programs below which it computes 64 outputs:
# for 272 rows those linears take 245 us instead of 279, for 128 rows 138 instead of 154.
FEW_ROWS = 320
FEW_PROGRAMS = 132  # the SMs of an H200
SHARED = 96 * 1024  # bytes for the stages of a program, so that two fit on an SM of 228 KiB
# Blocks of rows that share weights in the cache; 8: 1,900 rows took 5 % longer, 4: 2 % (same GPU).
NEIGHBOURS = 16
BLOCK_KEPT = 32  # kept columns that are multiplied at once, the least of an int8 tensor core
TINY = 1e-30
# Limits of int32: codes up to 127 times whole numbers that add up to 2^23 + D / 2 fit in it, as do
# 2^22 units of `step` and D products of two codes (D < 65,000).
MOST_UNITS = 2.0**23
MOST_STEPS = 2.0**22
ROUND = 1.5 * 2.0**23  # added to a float32 below 2^22, it leaves no bits for a fraction
Buffers = tuple[Tensor, ...]


def vectorwise_quant_torch(x, buffers, before="nothing", norm=None):
    x = normalized(x, norm)
    if before == "swiglu":
        gate, up = x.chunk(2, -1)
        x = F.silu(gate) * up
    A = buffers[0].copy_(x).float()
    large = ~(A.abs() < OUTLIER_THRESHOLD)
    small = A.masked_fill(large, 0)
    kept = A.masked_fill(~large, 0).abs().nan_to_num(nan=torch.inf)
    step = torch.maximum(small.abs().amax(1) / 127, kept.sum(1) / MOST_STEPS)
    unit = torch.maximum(kept.amax(1) / DIGITS, kept.sum(1) / MOST_UNITS)
    CA = (small * (1 / step.clamp(min=TINY))[:, None]).round()
    return CA.to(torch.int8), step, (buffers[0], unit)


@triton.jit
def vectorwise_quant_kernel(
    x, weight, eps, A, CA, step, unit, flags, columns, counts,
    D: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, BEFORE: tl.constexpr,
    THRESHOLD: tl.constexpr, DIGITS: tl.constexpr, MOST_UNITS: tl.constexpr,
    MOST_STEPS: tl.constexpr, ROUND: tl.constexpr, LIST_ROWS: tl.constexpr,
):  # fmt: skip
    """Each program quantizes one row, which it holds in registers."""
    m = tl.program_id(0)
    row = m.to(tl.int64) * D
    A, CA = A + row, CA + row
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
        d = i * TILE + tl.arange(0, TILE)
        value = values[i]
        if BEFORE == "rms_norm":
            value *= norm * tl.load(weight + d, mask=d < D, other=0).to(tl.float32)
        half = value.to(tl.float16)
        if BEFORE != "nothing":
            tl.store(A + d, half, mask=d < D)
        value = tl.abs(half.to(tl.float32))
        value = tl.where(value == value, value, float("inf"))  # NaN makes the row infinite, too
        kept = tl.where(value < THRESHOLD, 0, value)
        most_small = tl.maximum(most_small, tl.where(value < THRESHOLD, value, 0))
        most_kept = tl.maximum(most_kept, kept)
        sum_kept += kept
        halves += (half,)
    kept = tl.max(most_kept, 0)
    sum_of_kept = tl.sum(sum_kept, 0)
    scale = tl.maximum(tl.max(most_small, 0) / 127, sum_of_kept / MOST_STEPS)
    tl.store(step + m, scale)
    tl.store(unit + m, tl.maximum(kept / DIGITS, sum_of_kept / MOST_UNITS))
    inverse = 1 / tl.maximum(scale, 1e-30)
    for i in tl.static_range(TILES):
        d = i * TILE + tl.arange(0, TILE)
        value = halves[i].to(tl.float32)
        value = tl.where(tl.abs(value) < THRESHOLD, value, 0)
        whole = tl.fma(value, inverse, ROUND) - ROUND
        tl.store(CA + d, whole.to(tl.int8), mask=d < D)

    if kept > 0:  # list the columns that no other row of the block has listed
        block = m // LIST_ROWS
        flags += block * D
        for i in tl.static_range(TILES):
            d = i * TILE + tl.arange(0, TILE)
            new = (d < D) & ((tl.abs(halves[i].to(tl.float32)) < THRESHOLD) == 0)
            new &= tl.load(flags + d, mask=new, other=1, cache_modifier=".cg") == 0
            new &= tl.atomic_xchg(flags + d, 1, mask=new, sem="relaxed") == 0
            place = tl.atomic_add(counts + 2 * block + d * 0, 1, mask=new, sem="relaxed")
            tl.store(columns + block * D + place, d, mask=new)


def vectorwise_quant(
    x: Tensor, buffers: Buffers, before: str = "nothing", norm: Norm = None
) -> tuple[Tensor, Tensor, Buffers]:
    """Rows as int8 codes and a step each: A = CA * step where |A| < OUTLIER_THRESHOLD, else CA is
    0 and A kept apart. A (M, D) fp16 is what `before` makes of x: "nothing" x itself; "rms_norm" of
    x (M, D) float32; "swiglu" silu(first half) * second half of x (M, 2 D) fp16. Returns CA, step
    (M,) and what mixed_scaled_mm() finds the kept entries by: A, the unit (M,) that they are
    multiples of, and the columns listed for each LIST_ROWS rows. All lie in `buffers`, which are
    quant_buffers(M, D). Where a row is not finite, so are step and unit."""
    A, CA, step, *kept = buffers
    M, D = CA.shape
    A = x if before == "nothing" else A
    warps = 8 if D <= 8192 else 16
    tile = 128 * warps
    launch(
        vectorwise_quant_kernel, (M,), x, *(norm or (None, 0.0)), A, CA, step, *kept, D, tile,
        triton.cdiv(D, tile), before, OUTLIER_THRESHOLD, DIGITS, MOST_UNITS, MOST_STEPS, ROUND,
        LIST_ROWS, num_warps=warps,
    )  # fmt: skip
    return CA, step, (A, *kept)


def mixed_scaled_mm_torch(CA, step, kept, weights, out, then: str) -> None:
    (A, unit, *_), (CB, SCB) = kept, weights
    codes = CB.double().T
    large = A.double().masked_fill(A.abs() < OUTLIER_THRESHOLD, 0)
    digits = (large * (1 / unit.clamp(min=TINY))[:, None]).round()
    steps = (digits @ codes * (unit / step.clamp(min=TINY))[:, None] + 0.5).floor()
    y = (steps + CA.double() @ codes) * step[:, None] * (SCB / 127)
    out.copy_(y + out if then == "add" else y)


@triton.jit
def kept_digits(
    listed, j, n_kept, rows, row, inverse, weights, THRESHOLD: tl.constexpr, ROUND: tl.constexpr
):
    """High and low digits (BLOCK_M, BLOCK_KEPT) of what rows keep in the j-th of the listed
    columns, and the codes of the weights there (BLOCK_KEPT, BLOCK_N)."""
    column = tl.load(listed + j, mask=j < n_kept, other=0)
    value = tl.load(rows + column[None, :], row & (j < n_kept)[None, :], other=0).to(tl.float32)
    value = tl.where(tl.abs(value) < THRESHOLD, 0, value)
    digits = (tl.fma(value, inverse, ROUND) - ROUND).to(tl.int32)
    high = (digits + 128) >> 8
    codes = tl.load(weights + column[:, None], (j < n_kept)[:, None], other=0)
    return high.to(tl.int8), (digits - (high << 8)).to(tl.int8), codes


@triton.jit(do_not_specialize=["M"])
def mixed_scaled_mm_kernel(
    CA, step, A, unit, flags, columns, counts, CB, SCB, out, M, N,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_KEPT: tl.constexpr, NEIGHBOURS: tl.constexpr, THEN: tl.constexpr,
    THRESHOLD: tl.constexpr, ROUND: tl.constexpr, LIST_ROWS: tl.constexpr,
):  # fmt: skip
    """Each program computes a tile; the last of a block of rows empties its list for the next.
    Float32 operations are fused only where the code calls fma: for the same bits in any tiles."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (NEIGHBOURS * tiles_n)
    within = tl.program_id(0) % (NEIGHBOURS * tiles_n)
    side_by_side = tl.minimum(NEIGHBOURS, tiles_m - group * NEIGHBOURS)
    m0 = (group * NEIGHBOURS + within % side_by_side) * BLOCK_M
    n0 = within // side_by_side * BLOCK_N
    CA += m0.to(tl.int64) * D
    A += m0.to(tl.int64) * D
    CB += n0.to(tl.int64) * D
    out += m0.to(tl.int64) * N + n0
    m = tl.arange(0, BLOCK_M)
    row = (m < M - m0)[:, None]
    n = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - n0)  # what repeats the last is never stored
    outputs = n[None, :] * D
    steps = tl.load(step + m0 + m, mask=m < M - m0, other=0)

    # What was kept: the high digits of all columns, 256 times that, the low digits; then as
    # multiples of `step`. There are seldom more columns than one dot takes.
    whole = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    block = m0 // LIST_ROWS
    n_kept = tl.load(counts + 2 * block)
    if n_kept > 0:
        units = tl.load(unit + m0 + m, mask=m < M - m0, other=0)
        inverse = (1 / tl.maximum(units, 1e-30))[:, None]
        listed, rows, j = columns + block * D, A + m[:, None] * D, tl.arange(0, BLOCK_KEPT)
        high, low, codes = kept_digits(
            listed, j, n_kept, rows, row, inverse, CB + outputs, THRESHOLD, ROUND
        )
        start = BLOCK_KEPT
        while start < n_kept:
            more, _, its_codes = kept_digits(
                listed, start + j, n_kept, rows, row, inverse, CB + outputs, THRESHOLD, ROUND
            )
            whole = tl.dot(more, its_codes, whole, out_dtype=tl.int32)
            start += BLOCK_KEPT
        whole = tl.dot(high, codes, whole, out_dtype=tl.int32) * 256
        whole = tl.dot(low, codes, whole, out_dtype=tl.int32)
        start = BLOCK_KEPT
        while start < n_kept:
            _, more, its_codes = kept_digits(
                listed, start + j, n_kept, rows, row, inverse, CB + outputs, THRESHOLD, ROUND
            )
            whole = tl.dot(more, its_codes, whole, out_dtype=tl.int32)
            start += BLOCK_KEPT
        ratio = (units / tl.maximum(steps, 1e-30))[:, None]
        whole = tl.floor(tl.fma(whole.to(tl.float32), ratio, 0.5)).to(tl.int32)

    k = tl.arange(0, BLOCK_K)
    for i in range(0, D, BLOCK_K):
        inside = (i + k < D) | (D % BLOCK_K == 0)  # the latter is known when it compiles
        a = tl.load(CA + m[:, None] * D + (i + k)[None, :], row & inside[None, :], other=0)
        b = tl.load(CB + outputs + (i + k)[:, None], inside[:, None], other=0)
        whole = tl.dot(a, b, whole, out_dtype=tl.int32)
    y = whole.to(tl.float32) * steps[:, None] * (tl.load(SCB + n0 + n) / 127)[None, :]
    n = tl.arange(0, BLOCK_N)
    there = row & (n < N - n0)[None, :]
    target = out + m[:, None] * N + n[None, :]
    if THEN == "add":  # with a load, which spills registers, wo took 42 us on 512 rows; now 34
        tl.atomic_add(target, y, mask=there, sem="relaxed")
    else:
        tl.store(target, y.to(out.dtype.element_ty), mask=there)

    if n_kept > 0:
        tl.debug_barrier()
        ROW_TILES: tl.constexpr = LIST_ROWS // BLOCK_M
        programs = tl.minimum(ROW_TILES, tiles_m - block * ROW_TILES) * tiles_n
        if tl.atomic_add(counts + 2 * block + 1, 1) == programs - 1:
            tl.store(counts + 2 * block + tl.arange(0, 2), 0)
            start = 0
            while start < n_kept:
                j = start + tl.arange(0, BLOCK_K)
                column = tl.load(columns + block * D + j, mask=j < n_kept, other=0)
                tl.store(flags + block * D + column, 0, mask=j < n_kept)
                start += BLOCK_K


def tile_of(M: int, N: int) -> tuple[int, int, int]:
    """Rows and outputs of a program of (M, N), and its stages. The bits don't depend on them."""
    rows = 64 if M <= FEW_ROWS else BLOCK_M
    programs = triton.cdiv(M, rows) * triton.cdiv(N, BLOCK_N)
    outputs = 64 if programs < FEW_PROGRAMS else BLOCK_N
    return rows, outputs, SHARED // ((rows + outputs) * BLOCK_K)


def mixed_scaled_mm(
    CA: Tensor, step: Tensor, kept: Buffers, weights: Pair, out: Tensor, then: str
) -> None:
    """Rows as vectorwise_quant() returned them times int8 weights CB (N, D) and scales SCB (N,):
    "store" puts the product (M, N) into out, "add" adds it to out. It empties the lists of columns:
    call it once for each call of vectorwise_quant()."""
    (M, D), N = CA.shape, out.shape[1]
    block_m, block_n, stages = tile_of(M, N)
    launch(
        mixed_scaled_mm_kernel, (triton.cdiv(M, block_m) * triton.cdiv(N, block_n),), CA, step,
        *kept, *weights, out, M, N, D, block_m, block_n, BLOCK_K, BLOCK_KEPT, NEIGHBOURS, then,
        OUTLIER_THRESHOLD, ROUND, LIST_ROWS, num_warps=WARPS, num_stages=stages,
        enable_fp_fusion=False,
    )  # fmt: skip
