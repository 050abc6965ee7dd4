"""LLM.int8() for many rows: the linear layers of a prompt.

The method of Dettmers et al. 2022 (arXiv 2208.07339, section 3): activations are rounded to int8
row by row, those that reach the threshold are kept apart in fp16, int8 tensor cores multiply the
codes, and the product of what was kept is added. Columns with anything kept are listed on the
device, in their order, so that results repeat bit for bit. bitsandbytes keeps whole columns; here
each starts at the first token that reaches the threshold, so that none depends on later ones.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from llama.buffers import BLOCK_KEPT, Pair
from llama.kernels.few_rows import Norm, normalized
from llama.kernels.launch import launch

# A program computes BLOCK_M rows x BLOCK_N outputs, BLOCK_K inputs a step. The linears of 13B for
# 512 and 1,900 rows take 13.5 and 49 ms (cuBLAS in fp16: 18.0 and 63); 8 warps: 16.8 and 50; 4
# stages: 23 and 71; 64 x 128, 4 stages: 15.1 and 56; BLOCK_K 64: 17.9 and 59 (H200, 2026-11-23).
BLOCK_M = 128
BLOCK_N = 128
BLOCK_K = 128
WARPS = 4
STAGES = 3
# Blocks of rows that share weights in the cache; 8: 1,900 rows took 5 % longer, 4: 2 % (same GPU).
NEIGHBOURS = 16
CHUNK = 4096  # columns that kept_kernel searches at once
KEPT_ROWS = 64  # rows for each of its programs
NEVER = 2**31 - 1  # the first token that reaches the threshold in a column where none does
Buffers = tuple[Tensor, ...]


def vectorwise_quant_torch(x, threshold, buffers, before="nothing", norm=None):
    x = normalized(x, norm)
    if before == "swiglu":
        gate, up = x.chunk(2, -1)
        x = F.silu(gate) * up
    A = buffers[0].copy_(x).float()
    large = ~(A.abs() < threshold)
    small = A.masked_fill(large, 0)
    SCA = small.abs().amax(1)
    CA = (small * (127 / SCA.clamp(min=1e-30))[:, None]).round()
    columns = large.any(0).nonzero()[:, 0]
    since = large[:, columns].cummax(0).values
    rest = (A - CA * (SCA / 127)[:, None])[:, columns].masked_fill(~since, 0).half()
    return CA.to(torch.int8), SCA, (columns, len(columns), rest)


@triton.jit
def vectorwise_quant_kernel(
    x, weight, eps, A, CA, SCA, first, threshold,
    D: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, BEFORE: tl.constexpr,
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
    most = tl.zeros((TILE,), tl.float32)
    most_small = tl.zeros((TILE,), tl.float32)
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
        value = tl.where(value == value, value, float("inf"))  # NaN is kept apart too
        most = tl.maximum(most, value)
        most_small = tl.maximum(most_small, tl.where(value < threshold, value, 0))
        halves += (half,)
    scale = tl.max(most_small, 0)
    tl.store(SCA + m, scale)
    for i in tl.static_range(TILES):
        d = i * TILE + tl.arange(0, TILE)
        value = halves[i].to(tl.float32)
        ratio = tl.where(tl.abs(value) < threshold, value, 0) * (127 / tl.maximum(scale, 1e-30))
        whole = (ratio + 12582912.0) - 12582912.0  # 1.5 * 2^23 leaves no bits for a fraction
        tl.store(CA + d, whole.to(tl.int8), mask=d < D)

    if tl.max(most, 0) >= threshold:
        for i in tl.static_range(TILES):
            d = i * TILE + tl.arange(0, TILE)
            large = (d < D) & ((tl.abs(halves[i].to(tl.float32)) < threshold) == 0)
            token = tl.load(first + d, mask=large, other=0, cache_modifier=".cg")
            # Only earlier tokens than any so far: else many programs would queue at few addresses.
            tl.atomic_min(first + d, m, mask=large & (token > m), sem="relaxed")


@triton.jit(do_not_specialize=["M"])
def kept_kernel(
    A, CA, SCA, first, columns, count, rest, M, D: tl.constexpr, WIDTH: tl.constexpr,
    CHUNK: tl.constexpr, NEVER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_KEPT: tl.constexpr,
):  # fmt: skip
    """Each program lists all columns with anything kept, and stores what its rows' codes lack."""
    n_kept = 0
    for start in range(0, D, CHUNK):
        d = start + tl.arange(0, CHUNK)
        kept = (tl.load(first + d, mask=d < D, other=NEVER) < NEVER).to(tl.int32)
        found = tl.sum(kept, 0)
        if found > 0:
            tl.store(columns + n_kept + tl.cumsum(kept, 0) - 1, d, mask=kept > 0)
        n_kept += found
    tl.store(count, n_kept)
    tl.debug_barrier()

    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    j = tl.arange(0, BLOCK_KEPT)[None, :]
    at, to = m.to(tl.int64) * D, m.to(tl.int64) * WIDTH + j
    scale = tl.load(SCA + m, mask=m < M, other=0) / 127
    i = 0
    while i < n_kept:
        column = tl.load(columns + i + j, mask=i + j < n_kept, other=0)
        token = tl.load(first + column, mask=i + j < n_kept, other=NEVER)
        there = (m < M) & (m >= token)
        value = tl.load(A + at + column, mask=there, other=0).to(tl.float32)
        value -= tl.load(CA + at + column, mask=there, other=0).to(tl.float32) * scale
        tl.store(rest + to + i, value.to(tl.float16), mask=m < M)
        i += BLOCK_KEPT


def vectorwise_quant(
    x: Tensor, threshold: float, buffers: Buffers, before: str = "nothing", norm: Norm = None
) -> tuple[Tensor, Tensor, Buffers]:
    """Rows as int8 codes and a scale each: A = CA * SCA / 127 where |A| < threshold. A (M, D) fp16
    is what `before` makes of x: "nothing" x itself; "rms_norm" of x (M, D) float32; "swiglu"
    silu(first half) * second half of x (M, 2 D) fp16. Returns CA, SCA and what was kept apart:
    columns, how many, and what the codes lack of A there (M, at least as many) fp16. All lie in
    `buffers`, which are quant_buffers(M, D)."""
    A, CA, SCA, first, *kept = buffers
    (M, D), width = CA.shape, kept[2].shape[1]
    A = x if before == "nothing" else A
    first.fill_(NEVER)
    warps = 8 if D <= 8192 else 16
    tile = 128 * warps
    launch(
        vectorwise_quant_kernel, (M,), x, *(norm or (None, 0.0)), A, CA, SCA, first, threshold, D,
        tile, triton.cdiv(D, tile), before, num_warps=warps,
    )  # fmt: skip
    launch(
        kept_kernel, (triton.cdiv(M, KEPT_ROWS),), A, CA, SCA, first, *kept, M, D, width, CHUNK,
        NEVER, KEPT_ROWS, BLOCK_KEPT, num_warps=8,
    )  # fmt: skip
    return CA, SCA, tuple(kept)


def mixed_scaled_mm_torch(CA, SCA, kept, weights, out, then: str) -> None:
    (columns, count, rest), (CB, SCB) = kept, weights
    columns, rest = columns[:count].long(), rest[:, :count]
    y = CA.double() @ CB.double().T * (SCA / 127)[:, None]
    y = (y + rest.double() @ CB[:, columns].double().T) * (SCB / 127)
    out.copy_(y + out if then == "add" else y)


@triton.jit(do_not_specialize=["M"])
def mixed_scaled_mm_kernel(
    CA, SCA, columns, count, rest, CB, SCB, out, M, N,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_KEPT: tl.constexpr, NEIGHBOURS: tl.constexpr, THEN: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (NEIGHBOURS * tiles_n)
    within = tl.program_id(0) % (NEIGHBOURS * tiles_n)
    side_by_side = tl.minimum(NEIGHBOURS, tiles_m - group * NEIGHBOURS)
    m0 = (group * NEIGHBOURS + within % side_by_side) * BLOCK_M
    n0 = within // side_by_side * BLOCK_N
    CA += m0.to(tl.int64) * D
    rest += m0.to(tl.int64) * WIDTH
    CB += n0.to(tl.int64) * D
    out += m0.to(tl.int64) * N + n0
    m = tl.arange(0, BLOCK_M)
    row = (m < M - m0)[:, None]
    n = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - n0)  # what repeats the last is never stored
    outputs = n[None, :] * D

    k = tl.arange(0, BLOCK_K)
    whole = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for i in range(0, D, BLOCK_K):
        inside = (i + k < D) | (D % BLOCK_K == 0)  # the latter is known when it compiles
        a = tl.load(CA + m[:, None] * D + (i + k)[None, :], row & inside[None, :], other=0)
        b = tl.load(CB + outputs + (i + k)[:, None], inside[:, None], other=0)
        whole = tl.dot(a, b, whole, out_dtype=tl.int32)
    y = whole.to(tl.float32) * (tl.load(SCA + m0 + m, mask=m < M - m0, other=0) / 127)[:, None]

    j = tl.arange(0, BLOCK_KEPT)
    n_kept = tl.load(count)
    start = 0
    while start < n_kept:
        column = tl.load(columns + start + j, mask=start + j < n_kept, other=0)
        a = tl.load(rest + m[:, None] * WIDTH + (start + j)[None, :], mask=row, other=0)
        b = tl.load(CB + outputs + column[:, None]).to(tl.float16)
        y = tl.dot(a, b, y)
        start += BLOCK_KEPT

    y *= (tl.load(SCB + n0 + n) / 127)[None, :]
    n = tl.arange(0, BLOCK_N)
    there = row & (n < N - n0)[None, :]
    target = out + m[:, None] * N + n[None, :]
    if THEN == "add":  # with a load, which spills registers, wo took 42 us on 512 rows; now 34
        tl.atomic_add(target, y, mask=there, sem="relaxed")
    else:
        tl.store(target, y.to(out.dtype.element_ty), mask=there)


def mixed_scaled_mm(
    CA: Tensor, SCA: Tensor, kept: Buffers, weights: Pair, out: Tensor, then: str
) -> None:
    """Rows as vectorwise_quant() returned them times int8 weights CB (N, D) and scales SCB (N,):
    "store" puts the product (M, N) into out, "add" adds it to out."""
    (M, D), N = CA.shape, out.shape[1]
    launch(
        mixed_scaled_mm_kernel, (triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N),), CA, SCA,
        *kept, *weights, out, M, N, D, kept[2].shape[1], BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_KEPT,
        NEIGHBOURS, then, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
