"""Attention of a decode step in one launch.

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
# Most programs of a step: fewer leave the GPU idle, more only cost their launch. With 1,024 a step
# of 32 rows took 24.0 ms after 1,900 tokens, with these 22.9 (13B, H100, 2026-11-27).
PROGRAMS = 4096
# Keys and values in int8, with a scale for each head of a token, take half the memory, but turning
# codes into fp16 more than doubles the instructions: a step of 32 rows took 25.5 ms instead of 18.3
# after 1,900 tokens, of 1 row 4.76 instead of 4.49 (13B, H200, 2026-11-27; commit be9496b).
WARPS = 4
STAGES = 3


def attend_torch(q, caches, positions, buffers=None) -> Pair:
    slots, _, _, K = caches[0].shape
    out = torch.empty(q.shape, device=q.device)
    for b, position in enumerate(positions.tolist()):
        slot = b // (len(q) // slots)
        keys, values = (cache[slot : slot + 1, : position + 1].float() for cache in caches)
        seen = torch.ones(1, 1, 1, position + 1, dtype=torch.bool, device=q.device)
        heads = q[b].float().view(1, 1, -1, K) * K**0.5
        out[b] = model.attend(heads, keys, values, seen).flatten()
    return split_torch(out, group=K)


@triton.jit
def store_digits(
    heads, h, there, digits, scales, H: tl.constexpr, K: tl.constexpr, DIGITS: tl.constexpr
):
    """Stores heads (n, K), whose numbers are h (n,), as two digits and a scale each."""
    high, low, scale = digits_of(heads, DIGITS)
    out = digits + h[:, None] * K + tl.arange(0, K)[None, :]
    tl.store(out, high, there[:, None])
    tl.store(out + H * K, low, there[:, None])
    tl.store(scales + h, scale, there)


@triton.jit
def attend_kernel(
    queries, k_cache, v_cache, positions, partial, arrivals, digits, scales, S, EACH,
    H: tl.constexpr, HKV: tl.constexpr, K: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
    LEAST: tl.constexpr, MAX_SPLITS: tl.constexpr, DIGITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each program attends for the query heads of one key head of one row to some splits of the
    tokens. HEADS is their number, or the least that a tensor core takes."""
    b, kv, first = tl.program_id(0) // HKV, tl.program_id(0) % HKV, tl.program_id(1)
    GROUP: tl.constexpr = H // HKV
    if PDL:
        gdc_launch_dependents()
    position = tl.load(positions + b)
    blocks = position // BLOCK + 1
    steps = tl.maximum((blocks + MAX_SPLITS - 1) // MAX_SPLITS, LEAST)
    splits = (blocks + steps - 1) // steps
    d, h = tl.arange(0, K), tl.arange(0, HEADS)
    there = h < GROUP
    if first < splits:  # the others leave without waiting, which makes room for the next kernel
        if PDL:
            gdc_wait()
        digits, scales = digits + 2 * b * H * K, scales + b * H
        own = queries + (b * H + kv * GROUP + h)[:, None] * K + d[None, :]
        q = tl.load(own, there[:, None], 0)
        start = ((b // EACH).to(tl.int64) * S * HKV + kv) * K
        value, total = tl.zeros((HEADS, K), tl.float32), tl.zeros((HEADS,), tl.float32)
        # A split leaves values (GROUP, K), then the best scores and the totals.
        SIZE: tl.constexpr = GROUP * (K + 2)
        parts = partial + tl.program_id(0) * MAX_SPLITS * SIZE
        split = first
        while split < splits:
            best = tl.full((HEADS,), -1.0e30, tl.float32)
            total = tl.zeros((HEADS,), tl.float32)
            value = tl.zeros((HEADS, K), tl.float32)
            tokens = split * steps * BLOCK + tl.arange(0, BLOCK)
            for i in range(0, tl.minimum(steps, blocks - split * steps)):
                token = tokens + i * BLOCK
                seen = token <= position
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
            store_digits(heads, kv * GROUP + h, there, digits, scales, H, K, DIGITS)
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
                    store_digits(
                        merged[None, :],
                        kv * GROUP + g + one,
                        one == 0,
                        digits,
                        scales,
                        H,
                        K,
                        DIGITS,
                    )


def attend(q: Tensor, caches: Pair, positions: Tensor, buffers: Pair) -> Pair:
    """Attends from the tokens at `positions` (B,) to themselves and those before them, in caches
    (slots, S, Hkv, K) fp16, of which B / slots rows share one: q (B, H K) fp16, rotated and times
    K^-1/2 -> (B, H K), as few_rows.split() has it, with a scale a head. `buffers` are
    attend_buffers()."""
    (B, width), (slots, S, Hkv, K) = q.shape, caches[0].shape
    H = width // K
    heads = max(16, triton.next_power_of_2(H // Hkv))
    digits = torch.empty(B, 2, H * K, dtype=torch.int8, device=q.device)
    scales = torch.empty(B, H, device=q.device)
    programs = min(MAX_SPLITS, triton.cdiv(S, LEAST * BLOCK), triton.cdiv(PROGRAMS, B * Hkv))
    attend_kernel[(B * Hkv, programs)](
        q, *caches, positions, *buffers, digits, scales, S, B // slots, H, Hkv, K,
        heads, BLOCK, LEAST, MAX_SPLITS, DIGITS, **dependent(q), num_warps=WARPS,
        num_stages=STAGES,
    )  # fmt: skip
    return digits, scales
