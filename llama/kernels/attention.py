"""Attention of a decode step in one launch: rotary embedding, cache write, sequences in splits."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llama import model
from llama.buffers import MAX_SPLITS, Pair
from llama.kernels.launch import dependent


def attend_torch(qkv, caches, positions, rotation, out, buffers=None) -> None:
    B, _, Hkv, K = caches[0].shape
    q, k, v = qkv.view(B, 1, -1, K).split([qkv.shape[1] // K - 2 * Hkv, Hkv, Hkv], 2)
    q, k = (model.rotate(x, rotation[positions, None]) for x in (q, k))
    for b, position in enumerate(positions.tolist()):
        caches[0][b, position], caches[1][b, position] = k[b, 0], v[b, 0]
        keys, values = (cache[b : b + 1, : position + 1].float() for cache in caches)
        seen = torch.ones(1, 1, 1, position + 1, dtype=torch.bool, device=qkv.device)
        out[b] = model.attend(q[b : b + 1], keys, values, seen).flatten()


@triton.jit
def attend_kernel(
    qkv, k_cache, v_cache, positions, rotation, partial, arrivals, out, S, scale,
    H: tl.constexpr, HKV: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
    MAX_SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each program attends for one head of one row to SPLIT tokens of its sequence."""
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
        q = (tl.load(row + h * K + d) * cos + tl.load(row + h * K + (d ^ 1)) * sin) * scale

        k_row, v_row = row + (H + kv) * K, row + (H + HKV + kv) * K
        k_new = (tl.load(k_row + d) * cos + tl.load(k_row + (d ^ 1)) * sin).to(tl.float16)
        v_new = tl.load(v_row + d).to(tl.float16)
        head = (b.to(tl.int64) * S * HKV + kv) * K
        newest = head + position * HKV * K + d

        best = -1.0e30
        total = 0.0
        value = tl.zeros((K,), tl.float32)
        if position < first + SPLIT:  # the newest token is in this split, and not yet in the cache
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
        if arrived == n - 1:  # the last to arrive merges all, in the order of the splits
            tl.store(arrivals + tl.program_id(0), 0)
            s = tl.arange(0, MAX_SPLITS)
            theirs = partial + (tl.program_id(0) * MAX_SPLITS + s) * (K + 2)
            bests = tl.load(theirs + K, mask=s < n, other=-float("inf"), cache_modifier=".cg")
            totals = tl.load(theirs + K + 1, mask=s < n, other=0, cache_modifier=".cg")
            values = tl.load(theirs[:, None] + d, (s < n)[:, None], other=0, cache_modifier=".cg")
            weight = tl.exp(bests - tl.max(bests, 0))
            merged = tl.sum(weight[:, None] * values, 0) / tl.sum(weight * totals, 0)
            tl.store(out + tl.program_id(0) * K + d, merged.to(tl.float16))


def attend(
    qkv: Tensor, caches: Pair, positions: Tensor, rotation: Tensor, out: Tensor, buffers: Pair
) -> None:
    """Rotates the queries and keys of one new token a row, stores its key and value at `positions`
    (B,), and attends to all tokens up to it: qkv (B, (H + 2 Hkv) K) float32, caches (B, S, Hkv, K)
    fp16, rotation (.., K/2, 2) float32 -> out (B, H K) fp16. `buffers` are attend_buffers()."""
    B, S, Hkv, K = caches[0].shape
    H = qkv.shape[1] // K - 2 * Hkv
    split = max(64, triton.next_power_of_2(triton.cdiv(S, MAX_SPLITS)))
    attend_kernel[(B * H, triton.cdiv(S, split))](
        qkv, *caches, positions, rotation, *buffers, out, S, K**-0.5, H, Hkv, K, split, 64,
        MAX_SPLITS, **dependent(qkv), num_warps=4,
    )  # fmt: skip
