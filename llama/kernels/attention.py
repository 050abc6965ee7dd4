"""Attention of a decode step in one launch: rotary embedding, cache write, sequences in splits. If
it has several tokens of a sequence, another launch before it writes them all to the cache.

A program takes all query heads that share a key head, so that each key and value is read once, and
multiplies on tensor cores. A sequence is split by its length alone, so that a row's result does not
depend on its company.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llama import model
from llama.buffers import MAX_SPLITS, Pair
from llama.kernels.few_rows import DIGITS, digits_of, split_torch
from llama.kernels.launch import dependent

BLOCK = 64  # tokens at a time
# Blocks that a split has at least. Of what a plain sum of keys and values takes, 0.95 to 0.98 was
# reached with 40 heads, 32 rows and 2,048 tokens, and 0.83 with 32 heads on 8, 8 rows and 8,192; 4
# blocks: 0.93 and 0.77 (H100, 2026-11-26).
LEAST = 8
PROGRAMS = 1024  # as many as there is work for: more would only be launched
WARPS = 4
STAGES = 3


def attend_torch(qkv, caches, positions, rotation, buffers=None, each=1) -> Pair:
    B, (_, _, Hkv, K) = len(qkv), caches[0].shape
    q, k, v = qkv.view(B, 1, -1, K).split([qkv.shape[1] // K - 2 * Hkv, Hkv, Hkv], 2)
    q, k = (model.rotate(x, rotation[positions, None]) for x in (q, k))
    out = torch.empty(B, q.shape[2] * K, device=qkv.device)
    for b, position in enumerate(positions.tolist()):
        caches[0][b // each, position], caches[1][b // each, position] = k[b, 0], v[b, 0]
        keys, values = (cache[b // each, None, : position + 1].float() for cache in caches)
        seen = torch.ones(1, 1, 1, position + 1, dtype=torch.bool, device=qkv.device)
        out[b] = model.attend(q[b : b + 1], keys, values, seen).flatten()
    return split_torch(out, group=K)


@triton.jit
def store_heads(
    heads, h, there, digits, scales, H: tl.constexpr, K: tl.constexpr, DIGITS: tl.constexpr
):
    """Stores heads (n, K), whose numbers are h (n,), as two digits and a scale each."""
    high, low, scale = digits_of(heads, DIGITS)
    out = digits + h[:, None] * K + tl.arange(0, K)[None, :]
    tl.store(out, high, there[:, None])
    tl.store(out + H * K, low, there[:, None])
    tl.store(scales + h, scale, there)


@triton.jit
def angles(rotation, position, d, K: tl.constexpr):
    """What rotated() multiplies values d of a head at a position and their partners by. Pair i is
    (2i, 2i + 1): x turns into x cos - partner sin, or + for the odd one."""
    angle = rotation + position * K + d // 2 * 2
    return tl.load(angle), tl.load(angle + 1) * tl.where(d % 2 == 0, -1.0, 1.0)


@triton.jit
def rotated(head, d, cos, sin):
    """A head (K,). Where and how it is compiled changes no bit: no rounding is left open."""
    return tl.fma(tl.load(head + d), cos, tl.load(head + (d ^ 1)) * sin)


@triton.jit
def store_kernel(
    qkv, k_cache, v_cache, positions, rotation, S, each,
    H: tl.constexpr, HKV: tl.constexpr, K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each program writes one key and value head of a row."""
    b, kv, d = tl.program_id(0), tl.program_id(1), tl.arange(0, K)
    if PDL:
        gdc_launch_dependents()
    position = tl.load(positions + b)
    cos, sin = angles(rotation, position, d, K)
    at = (((b // each).to(tl.int64) * S + position) * HKV + kv) * K + d
    if PDL:
        gdc_wait()
    row = qkv + b * (H + 2 * HKV) * K
    tl.store(k_cache + at, rotated(row + (H + kv) * K, d, cos, sin).to(tl.float16))
    tl.store(v_cache + at, tl.load(row + (H + HKV + kv) * K + d).to(tl.float16))


@triton.jit(do_not_specialize=["each"])
def attend_kernel(
    qkv, k_cache, v_cache, positions, rotation, partial, arrivals, digits, scales, S, scale, each,
    H: tl.constexpr, HKV: tl.constexpr, K: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
    LEAST: tl.constexpr, MAX_SPLITS: tl.constexpr, DIGITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each program attends for the query heads of one key head of one row to some splits of the
    tokens. HEADS is their number, or the least that a tensor core takes. `each` is no constant, so
    that what is compiled, and with it every bit, is the same for any."""
    b, kv, first = tl.program_id(0) // HKV, tl.program_id(0) % HKV, tl.program_id(1)
    GROUP: tl.constexpr = H // HKV
    if PDL:
        gdc_launch_dependents()
    # The kernel before this one writes qkv alone: all else is there since the step began.
    position = tl.load(positions + b)
    blocks = position // BLOCK + 1
    steps = tl.maximum((blocks + MAX_SPLITS - 1) // MAX_SPLITS, LEAST)
    splits = (blocks + steps - 1) // steps
    d, h = tl.arange(0, K), tl.arange(0, HEADS)
    there = h < GROUP
    cos, sin = angles(rotation, position, d, K)
    if PDL:
        gdc_wait()
    if first < splits:
        digits, scales = digits + 2 * b * H * K, scales + b * H
        row = qkv + b * (H + 2 * HKV) * K
        head = row + (kv * GROUP + h)[:, None] * K
        q = tl.load(head + d[None, :], there[:, None], 0) * cos[None, :]
        q += tl.load(head + (d ^ 1)[None, :], there[:, None], 0) * sin[None, :]
        q = (q * scale).to(tl.float16)
        start = ((b // each).to(tl.int64) * S * HKV + kv) * K
        value, total = tl.zeros((HEADS, K), tl.float32), tl.zeros((HEADS,), tl.float32)
        # A split leaves values (GROUP, K), then the best scores and the totals.
        SIZE: tl.constexpr = GROUP * (K + 2)
        parts = partial + tl.program_id(0) * MAX_SPLITS * SIZE
        split = first
        while split < splits:
            if split == splits - 1:  # the row's own token may not be in the cache yet
                k_new = rotated(row + (H + kv) * K, d, cos, sin).to(tl.float16)
                v_new = tl.load(row + (H + HKV + kv) * K + d).to(tl.float16)
                if each == 1:
                    tl.store(k_cache + start + position * HKV * K + d, k_new)
                    tl.store(v_cache + start + position * HKV * K + d, v_new)
                best = tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], 1)
                total = tl.full((HEADS,), 1, tl.float32)
                value = tl.zeros((HEADS, K), tl.float32) + v_new.to(tl.float32)[None, :]
            else:
                best = tl.full((HEADS,), -1.0e30, tl.float32)
                total = tl.zeros((HEADS,), tl.float32)
                value = tl.zeros((HEADS, K), tl.float32)
            tokens = split * steps * BLOCK + tl.arange(0, BLOCK)
            for i in range(0, tl.minimum(steps, blocks - split * steps)):
                token = tokens + i * BLOCK
                seen = token < position
                at = start + token[:, None].to(tl.int64) * (HKV * K) + d[None, :]
                k = tl.load(k_cache + at, seen[:, None], 0)
                v = tl.load(v_cache + at, seen[:, None], 0)
                scores = tl.where(seen[None, :], tl.dot(q, tl.trans(k)), -float("inf"))
                new_best = tl.maximum(best, tl.max(scores, 1))
                weight = tl.exp(scores - new_best[:, None])
                shrink = tl.exp(best - new_best)
                total = total * shrink + tl.sum(weight, 1)
                value = tl.dot(weight.to(tl.float16), v, value * shrink[:, None])
                best = new_best
            if splits > 1:
                mine = parts + split * SIZE
                tl.store(mine + h[:, None] * K + d[None, :], value, there[:, None])
                tl.store(mine + GROUP * K + h, best, there)
                tl.store(mine + GROUP * (K + 1) + h, total, there)
            split += tl.num_programs(1)

        if splits == 1:
            heads = value / total[:, None]
            store_heads(heads, kv * GROUP + h, there, digits, scales, H, K, DIGITS)
        else:
            tl.debug_barrier()
            arrived = tl.atomic_add(arrivals + tl.program_id(0), 1)
            # The last to arrive merges all, in the order of the splits.
            if arrived == tl.minimum(splits, tl.num_programs(1)) - 1:
                tl.store(arrivals + tl.program_id(0), 0)
                s = tl.arange(0, MAX_SPLITS)
                for g in tl.static_range(GROUP):
                    theirs = parts + s * SIZE
                    other = theirs + GROUP * K + g
                    bests = tl.load(other, s < splits, -float("inf"), cache_modifier=".cg")
                    totals = tl.load(other + GROUP, s < splits, 0, cache_modifier=".cg")
                    theirs = theirs[:, None] + g * K + d[None, :]
                    values = tl.load(theirs, (s < splits)[:, None], 0, cache_modifier=".cg")
                    weight = tl.exp(bests - tl.max(bests, 0))
                    merged = tl.sum(weight[:, None] * values, 0) / tl.sum(weight * totals, 0)
                    one = tl.arange(0, 1)
                    store_heads(
                        merged[None, :],
                        kv * GROUP + g + one,
                        one == 0,
                        digits,
                        scales,
                        H,
                        K,
                        DIGITS,
                    )


def attend(
    qkv: Tensor, caches: Pair, positions: Tensor, rotation: Tensor, buffers: Pair, each: int = 1
) -> Pair:
    """Rotates the queries and keys of one new token a row, stores its key and value at `positions`
    (B,), and attends to all tokens up to it: qkv (B, (H + 2 Hkv) K) float32, caches (B / each, S,
    Hkv, K) fp16, rotation (.., K/2, 2) float32 -> (B, H K), as few_rows.split() has it, with a
    scale a head. `each` rows, one after the other, are of one sequence. `buffers` are
    attend_buffers(). A row has the same bits for any `each`."""
    B, (_, S, Hkv, K) = len(qkv), caches[0].shape
    H = qkv.shape[1] // K - 2 * Hkv
    heads = max(16, triton.next_power_of_2(H // Hkv))
    pdl = dependent(qkv)
    if each > 1:
        store_kernel[(B, Hkv)](
            qkv, *caches, positions, rotation, S, each, H, Hkv, K, **pdl, num_warps=1
        )
    digits = torch.empty(B, 2, H * K, dtype=torch.int8, device=qkv.device)
    scales = torch.empty(B, H, device=qkv.device)
    programs = min(MAX_SPLITS, triton.cdiv(S, LEAST * BLOCK), triton.cdiv(PROGRAMS, B * Hkv))
    attend_kernel[(B * Hkv, programs)](
        qkv, *caches, positions, rotation, *buffers, digits, scales, S, K**-0.5, each, H, Hkv, K,
        heads, BLOCK, LEAST, MAX_SPLITS, DIGITS, **pdl, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return digits, scales
