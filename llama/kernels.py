"""What runs faster than torch's own ops? The parts of a decode step on CUDA, as Triton kernels.

Each op is a kernel, its launcher and, with the same arguments and results, a twin in plain torch
that says what it computes. Kernels run in Triton's interpreter on a CPU (TRITON_INTERPRET=1).

Decoding is bound by reading the weights once a token, so a step is a chain of short kernels in one
CUDA graph, and what is lost is the ramp at each start. From compute capability 9.0 on, kernels are
launched as programmatic dependents: each lets the next one start at once, requests its own weights,
which depend on no earlier kernel, and only then waits for the one before it.

B rows of the batch, D inputs, N outputs, S length of the cache, H heads, Hkv of them for keys and
values, K head dimension.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Columns of a weight row that 128 threads request at once. The linears of 13B at batch 1 in one
# graph read at 0.77 of a plain reduction's rate with it, all tiles of a row ahead of the wait (five
# ahead: 0.75); 512: 0.76, 2048: 0.67, a whole row in one load: 0.65 (H200, 2026-11-23).
TILE = 1024
# Outputs a program and steps requested ahead for several rows. The linears of 13B in one graph read
# at 0.67 (8 rows) and 0.54 (32) of that rate with these, the columns in 2 parts (4 where outputs
# are few); 6 ahead: 0.54 and 0.44; 128 outputs: 0.64 and 0.54; 32: 0.43 and 0.30; twice the parts:
# 0.59 and 0.51. Activations in fp16, on fp16 tensor cores: 0.26 at best (H200, 2026-11-23).
BLOCK_N = 64
STAGES = 4
GROUP = 128  # columns that share a scale where activations are split into two int8 digits
DIGITS = 32512  # the largest value of two digits: 256 x 127
MAX_SPLITS = 32  # of a sequence among the programs of attend(); one program merges them


def dependent(x: Tensor) -> dict:
    """Launch options: as a programmatic dependent where the GPU can."""
    can = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9
    return {"PDL": can, "launch_pdl": True} if can else {"PDL": False}


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    out.copy_(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float())


@triton.jit
def rms_norm_kernel(x, weight, out, eps, D: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    if PDL:
        gdc_launch_dependents()
    gain = tl.load(weight + columns, mask=inside, other=0).to(tl.float32)
    if PDL:
        gdc_wait()
    value = tl.load(x + row * D + columns, mask=inside, other=0)
    scale = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    tl.store(out + row * D + columns, (value * scale * gain).to(tl.float16), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """x (B, D) float32, weight (D,) fp16 -> out (B, D) fp16."""
    B, D = x.shape
    block = triton.next_power_of_2(D)
    rms_norm_kernel[(B,)](x, weight, out, eps, D, block, **dependent(x), num_warps=8)


def linear_torch(x: Tensor, CB: Tensor, SCB: Tensor, out: Tensor, then: str, parts=None) -> None:
    y = x.float() @ (CB.float() * (SCB / 127)[:, None]).T
    if then == "swiglu":
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    out.copy_(y + out if then == "add" else y)


@triton.jit
def requested(row, D: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr):
    """A row of weights as a tuple of tiles, all of them in flight; each byte is read once."""
    columns = tl.arange(0, TILE)
    tiles = ()
    for i in tl.static_range(TILES):
        inside = columns + i * TILE < D
        tiles += (
            tl.load(row + i * TILE + columns, inside, other=0, eviction_policy="evict_first"),
        )
    return tiles


@triton.jit
def matvec_kernel(
    x,
    CB,
    SCB,
    out,
    N,
    D: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    THEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """One output a program: its whole row of weights is in flight before the wait."""
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


def split_torch(x: Tensor) -> tuple[Tensor, Tensor]:
    groups = F.pad(x.float(), (0, -x.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    scales = groups.abs().amax(-1) / DIGITS
    whole = (groups / scales.clamp(min=1e-30)[..., None]).round().int().flatten(1)
    high = (whole + 128) >> 8
    digits = torch.stack([high, whole - (high << 8)])[..., : x.shape[1]]
    return digits.to(torch.int8), scales


@triton.jit
def split_kernel(
    x,
    digits,
    scales,
    B,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    DIGITS: tl.constexpr,
    PDL: tl.constexpr,
):
    b, g = tl.program_id(0), tl.program_id(1)
    columns = g * GROUP + tl.arange(0, GROUP)
    inside = columns < D
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    value = tl.load(x + b * D + columns, mask=inside, other=0).to(tl.float32)
    scale = tl.max(tl.abs(value), 0) / DIGITS
    ratio = value / tl.maximum(scale, 1e-30)
    whole = tl.where(ratio < 0, ratio - 0.5, ratio + 0.5).to(tl.int32)
    high = (whole + 128) >> 8
    tl.store(digits + b * D + columns, high.to(tl.int8), mask=inside)
    tl.store(digits + (B + b) * D + columns, (whole - (high << 8)).to(tl.int8), mask=inside)
    tl.store(scales + b * tl.num_programs(1) + g, scale)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, D) fp16 as two int8 digits and a float32 scale for each GROUP columns:
    x = (256 * digits[0] + digits[1]) * scale, digits (2, B, D), scales (B, D / GROUP). Its error is
    at most 1 / 64,000 of the group's largest magnitude."""
    (B, D), groups = x.shape, triton.cdiv(x.shape[1], GROUP)
    digits = torch.empty(2, B, D, dtype=torch.int8, device=x.device)
    scales = torch.empty(B, groups, device=x.device)
    split_kernel[(B, groups)](x, digits, scales, B, D, GROUP, DIGITS, **dependent(x), num_warps=1)
    return digits, scales


@triton.jit
def few_rows_kernel(
    digits,
    scales,
    CB,
    SCB,
    out,
    partial,
    arrivals,
    B,
    N,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    THEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N outputs of all rows a program, from a part of the columns, on int8 tensor cores."""
    tile, part = tl.program_id(0), tl.program_id(1)
    rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    batch = tl.arange(0, BLOCK_B)
    GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP
    SHARE: tl.constexpr = (GROUPS + SPLITS - 1) // SPLITS
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    weights = CB + rows[:, None].to(tl.int64) * D
    y = tl.zeros((BLOCK_N, BLOCK_B), tl.float32)
    y_up = tl.zeros((BLOCK_N, BLOCK_B), tl.float32)
    for i in range(0, SHARE):
        g = part * SHARE + i
        columns = g * GROUP + tl.arange(0, GROUP)
        there = (rows < N)[:, None] & (columns < D)[None, :]
        known = (batch < B)[None, :] & (columns < D)[:, None]
        value = digits + batch[None, :] * D + columns[:, None]
        high = tl.load(value, mask=known, other=0)
        low = tl.load(value + B * D, mask=known, other=0)
        at = tl.minimum(g, GROUPS - 1)  # past the last group there are no columns
        scale = tl.load(scales + batch * GROUPS + at, mask=batch < B, other=0)
        w = tl.load(weights + columns[None, :], mask=there, other=0)
        whole = tl.dot(w, high, out_dtype=tl.int32) * 256 + tl.dot(w, low, out_dtype=tl.int32)
        y += whole.to(tl.float32) * scale[None, :]
        if THEN == "swiglu":
            w = tl.load(weights + N.to(tl.int64) * D + columns[None, :], mask=there, other=0)
            whole = tl.dot(w, high, out_dtype=tl.int32) * 256 + tl.dot(w, low, out_dtype=tl.int32)
            y_up += whole.to(tl.float32) * scale[None, :]

    # Everybody leaves what it has; who comes last adds all up, in the order of the parts.
    SIZE: tl.constexpr = BLOCK_N * BLOCK_B
    spot = tl.arange(0, BLOCK_N)[:, None] * BLOCK_B + batch[None, :]
    mine = partial + (tile * SPLITS + part) * 2 * SIZE + spot
    tl.store(mine, y)
    if THEN == "swiglu":
        tl.store(mine + SIZE, y_up)
    tl.debug_barrier()
    if tl.atomic_add(arrivals + tile, 1) == SPLITS - 1:
        tl.store(arrivals + tile, 0)
        y = tl.zeros((BLOCK_N, BLOCK_B), tl.float32)
        y_up = tl.zeros((BLOCK_N, BLOCK_B), tl.float32)
        for s in tl.static_range(SPLITS):
            theirs = partial + (tile * SPLITS + s) * 2 * SIZE + spot
            y += tl.load(theirs, cache_modifier=".cg")
            if THEN == "swiglu":
                y_up += tl.load(theirs + SIZE, cache_modifier=".cg")
        y *= (tl.load(SCB + rows, mask=rows < N, other=0) / 127)[:, None]
        if THEN == "swiglu":
            y_up *= (tl.load(SCB + N + rows, mask=rows < N, other=0) / 127)[:, None]
            y = y * tl.sigmoid(y) * y_up
        there = (rows < N)[:, None] & (batch < B)[None, :]
        target = out + batch[None, :] * N + rows[:, None]
        if THEN == "add":
            y += tl.load(target, mask=there, other=0)
        tl.store(target, y.to(out.dtype.element_ty), mask=there)


def linear(
    x: Tensor, CB: Tensor, SCB: Tensor, out: Tensor, then: str, parts: tuple[Tensor, Tensor]
) -> None:
    """x (B, D) fp16 times int8 weights CB (N, D) with scales SCB (N,), accumulated in float32; B at
    most 32. `then` says what becomes of the product y (B, N): "store" puts it into out, "add" adds
    it, "swiglu" puts silu(y's first half) * its second half into out (B, N / 2). `parts` is
    linear_buffers()."""
    (B, D), N = x.shape, out.shape[1]
    if B == 1:
        tiles = triton.cdiv(D, TILE)
        matvec_kernel[(N,)](x, CB, SCB, out, N, D, TILE, tiles, then, **dependent(x), num_warps=4)
        return
    splits = 4 if N < 8192 else 2
    few_rows_kernel[(triton.cdiv(N, BLOCK_N), splits)](
        *split(x),
        CB,
        SCB,
        out,
        *parts,
        B,
        N,
        D,
        GROUP,
        max(16, triton.next_power_of_2(B)),
        BLOCK_N,
        splits,
        then,
        **dependent(x),
        num_warps=4,
        num_stages=STAGES,
    )


def linear_buffers(B: int, N: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What the programs of linear() leave for the last one, for layers of up to N outputs (a
    "swiglu" layer has half its weight's rows): partial sums and counts, zeros."""
    tiles = triton.cdiv(N, BLOCK_N)
    sums = tiles * BLOCK_N * max(16, triton.next_power_of_2(B)) * 2 * 4  # of both halves, 4 parts
    return torch.zeros(sums, device=device), torch.zeros(tiles, dtype=torch.int32, device=device)


def attend_torch(qkv, k_cache, v_cache, positions, rotation, out, splits=None) -> None:
    B, S, Hkv, K = k_cache.shape
    H = qkv.shape[1] // K - 2 * Hkv
    q, k, v = qkv.view(B, -1, K).split([H, Hkv, Hkv], 1)
    for b, position in enumerate(positions.tolist()):
        cos, sin = rotation[position].unbind(-1)
        turned = []
        for x in (q[b], k[b]):
            even, odd = x[:, ::2], x[:, 1::2]
            turned.append(torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1))
        k_cache[b, position] = turned[1].flatten(-2)
        v_cache[b, position] = v[b]
        keys = k_cache[b, : position + 1].float().repeat_interleave(H // Hkv, 1)  # (S', H, K)
        values = v_cache[b, : position + 1].float().repeat_interleave(H // Hkv, 1)
        scores = torch.einsum("hk,shk->hs", turned[0].flatten(-2), keys) / K**0.5
        out[b] = torch.einsum("hs,shk->hk", scores.softmax(-1), values).flatten()


@triton.jit
def attend_kernel(
    qkv,
    k_cache,
    v_cache,
    positions,
    rotation,
    partial,
    arrivals,
    out,
    S,
    scale,
    H: tl.constexpr,
    HKV: tl.constexpr,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One head of one row a program, and of its sequence SPLIT tokens."""
    b = tl.program_id(0) // H
    h = tl.program_id(0) % H
    split = tl.program_id(1)
    kv = h // (H // HKV)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    position = tl.load(positions + b)
    first = split * SPLIT
    if first <= position:
        d = tl.arange(0, K)
        # Pair i of a head is (2i, 2i + 1): x turns into x cos - partner sin, or + for the odd one.
        angle = rotation + position * K + d // 2 * 2
        cos = tl.load(angle)
        sin = tl.load(angle + 1) * tl.where(d % 2 == 0, -1.0, 1.0)
        row = qkv + b * (H + 2 * HKV) * K
        q = tl.load(row + h * K + d) * cos + tl.load(row + h * K + (d ^ 1)) * sin
        q *= scale

        k_row, v_row = row + (H + kv) * K, row + (H + HKV + kv) * K
        k_new = (tl.load(k_row + d) * cos + tl.load(k_row + (d ^ 1)) * sin).to(tl.float16)
        v_new = tl.load(v_row + d).to(tl.float16)
        head = (b.to(tl.int64) * S * HKV + kv) * K
        newest = head + position * HKV * K + d

        best = -1.0e30
        total = 0.0
        value = tl.zeros((K,), tl.float32)
        if position < first + SPLIT:  # this split owns the newest token, which no cache has yet
            best = tl.sum(q * k_new.to(tl.float32), 0)
            total = 1.0
            value = v_new.to(tl.float32)
            if h % (H // HKV) == 0:
                tl.store(k_cache + newest, k_new)
                tl.store(v_cache + newest, v_new)
        for start in range(0, SPLIT, BLOCK):
            token = first + start + tl.arange(0, BLOCK)
            seen = (token < position)[:, None]
            at = head + token[:, None].to(tl.int64) * (HKV * K) + d[None, :]
            k = tl.load(k_cache + at, mask=seen, other=0).to(tl.float32)
            v = tl.load(v_cache + at, mask=seen, other=0).to(tl.float32)
            score = tl.where(token < position, tl.sum(k * q[None, :], 1), -float("inf"))
            new_best = tl.maximum(best, tl.max(score, 0))
            weight = tl.exp(score - new_best)
            shrink = tl.exp(best - new_best)
            total = total * shrink + tl.sum(weight, 0)
            value = value * shrink + tl.sum(weight[:, None] * v, 0)
            best = new_best

        mine = partial + (tl.program_id(0) * MAX_SPLITS + split) * (K + 2)
        tl.store(mine + d, value)
        tl.store(mine + K, best)
        tl.store(mine + K + 1, total)
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals + tl.program_id(0), 1)
        n = position // SPLIT + 1
        if arrived == n - 1:  # the last one merges, in the order of the splits
            tl.store(arrivals + tl.program_id(0), 0)
            s = tl.arange(0, MAX_SPLITS)
            theirs = partial + (tl.program_id(0) * MAX_SPLITS + s) * (K + 2)
            bests = tl.load(theirs + K, mask=s < n, other=-float("inf"), cache_modifier=".cg")
            totals = tl.load(theirs + K + 1, mask=s < n, other=0, cache_modifier=".cg")
            values = tl.load(
                theirs[:, None] + d[None, :], mask=(s < n)[:, None], other=0, cache_modifier=".cg"
            )
            weight = tl.exp(bests - tl.max(bests, 0))
            merged = tl.sum(weight[:, None] * values, 0) / tl.sum(weight * totals, 0)
            tl.store(out + tl.program_id(0) * K + d, merged.to(tl.float16))


def attend(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    rotation: Tensor,
    out: Tensor,
    splits: tuple[Tensor, Tensor],
) -> None:
    """Rotates the queries and keys of one new token a row, stores its key and value at `positions`
    (B,), and attends to all tokens up to it: qkv (B, (H + 2 Hkv) K) float32, caches (B, S, Hkv, K)
    fp16, rotation (.., K/2, 2) float32 -> out (B, H K) fp16. `splits` is attend_buffers()."""
    B, S, Hkv, K = k_cache.shape
    H = qkv.shape[1] // K - 2 * Hkv
    split = max(64, triton.next_power_of_2(triton.cdiv(S, MAX_SPLITS)))
    attend_kernel[(B * H, triton.cdiv(S, split))](
        qkv,
        k_cache,
        v_cache,
        positions,
        rotation,
        *splits,
        out,
        S,
        K**-0.5,
        H,
        Hkv,
        K,
        split,
        64,
        MAX_SPLITS,
        **dependent(qkv),
        num_warps=4,
    )


def attend_buffers(B: int, H: int, K: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What the programs of one sequence leave for the last one: results and a count, zeros."""
    partial = torch.zeros(B * H * MAX_SPLITS * (K + 2), device=device)
    return partial, torch.zeros(B * H, dtype=torch.int32, device=device)
