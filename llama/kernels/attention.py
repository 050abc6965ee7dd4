"""Attention of a decode step in one launch: rotary embedding, cache write, sequences in splits."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from llama.buffers import MAX_SPLITS
from llama.kernels.launch import dependent


def attend_torch(qkv, k_cache, v_cache, positions, rotation, out, buffers=None) -> None:
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
    buffers: tuple[Tensor, Tensor],
) -> None:
    """Rotates the queries and keys of one new token a row, stores its key and value at `positions`
    (B,), and attends to all tokens up to it: qkv (B, (H + 2 Hkv) K) float32, caches (B, S, Hkv, K)
    fp16, rotation (.., K/2, 2) float32 -> out (B, H K) fp16. `buffers` are
    those of attend_buffers()."""
    B, S, Hkv, K = k_cache.shape
    H = qkv.shape[1] // K - 2 * Hkv
    split = max(64, triton.next_power_of_2(triton.cdiv(S, MAX_SPLITS)))
    attend_kernel[(B * H, triton.cdiv(S, split))](
        qkv, k_cache, v_cache, positions, rotation, *buffers, out, S, K**-0.5, H, Hkv, K, split, 64,
        MAX_SPLITS, **dependent(qkv), num_warps=4,
    )  # fmt: skip
