"""Causal attention of a prefill: the new tokens of several sequences, side by side.

Keys and values, those of the new tokens too, are read from the caches in blocks that begin at fixed
positions, from the first to the token's own, with one running softmax (Milakov and Gimelshein 2018,
arXiv 1805.02867; Dao 2023, arXiv 2307.08691). So a token's result depends on its own sequence and
position alone: not by a bit on what it was packed or cut with.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama import model
from llama.buffers import TILE_ROWS, Pair
from llama.kernels.launch import launch
from llama.model import Span

# Keys at a time, and loads ahead. With TILE_ROWS queries a program, 40 heads took 105 us for 1,900
# tokens, 32 heads on 8 1.17 ms for 8,192 (torch's: 91 us and 0.93 ms); 128 rows: 107 us and 1.14
# ms, but 7.2 us instead of 5.8 for 128 tokens; 128 keys: 178 us; 2 stages: 114 us (H100,
# 2026-11-26).
BLOCK = 64
STAGES = 3
LOG2_E = math.log2(math.e)


def tiles_of(spans: list[Span], count: int) -> Tensor:
    """What each of so many programs attends for, (count, 4) int32 on the host: slot, first row, its
    position, number of rows. The tiles with the most keys come first, so that none is left over at
    the end; empty ones come last."""
    tiles, first = [], 0
    for slot, start, rows in spans:
        for i in range(0, rows, TILE_ROWS):
            tiles.append((slot, first + i, start + i, min(TILE_ROWS, rows - i)))
        first += rows
    tiles.sort(key=lambda tile: -tile[2])
    tiles += [(0, 0, 0, 0)] * (count - len(tiles))
    return torch.tensor(tiles, dtype=torch.int32, device="cpu")


def attend_torch(qkv, caches, tiles, out) -> None:
    Hkv, K = caches[0].shape[2:]
    for slot, row, position, count in tiles.tolist():
        new, end = slice(row, row + count), position + count
        q = qkv[None, new, : out.shape[1]].unflatten(2, (-1, K)).float()
        k, v = (cache[slot, None, :end].float() for cache in caches)
        seen = torch.ones(count, end, dtype=torch.bool, device=q.device).tril(position)
        out[new] = model.attend(q, k, v, seen[None, None])[0].flatten(1)


@triton.jit
def attend_to(
    best, total, value, q, k_head, v_head, positions, start, end, last, scale,
    STRIDE: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Goes on with a softmax over the keys from start to end, all of them seen if WHOLE. A block
    that a row does not see adds zeros to it."""
    d = tl.arange(0, K)[None, :]
    for first in tl.range(start, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        at = token[:, None].to(tl.int64) * STRIDE + d
        if WHOLE:
            k, v = tl.load(k_head + at), tl.load(v_head + at)
        else:
            there = (token <= last)[:, None]
            k, v = tl.load(k_head + at, there, other=0), tl.load(v_head + at, there, other=0)
        scores = tl.dot(q, tl.trans(k))
        if not WHOLE:
            seen = token[None, :] <= positions[:, None]
            scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(best, tl.max(scores, 1) * scale)
        weight = tl.exp2(tl.fma(scores, scale, -new[:, None]))
        shrink = tl.exp2(best - new)
        total = tl.fma(total, shrink, tl.sum(weight, 1))
        value = tl.dot(weight.to(tl.float16), v, value * shrink[:, None])
        best = new
    return best, total, value


@triton.jit
def attend_kernel(
    qkv, k_cache, v_cache, tiles, out, S, scale,
    H: tl.constexpr, HKV: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program attends for one head of a tile of rows."""
    h = tl.program_id(0)
    tile = tiles + tl.program_id(1) * 4
    slot, first = tl.load(tile), tl.load(tile + 1)
    position, count = tl.load(tile + 2), tl.load(tile + 3)
    r, d = tl.arange(0, ROWS), tl.arange(0, K)[None, :]
    there = (r < count)[:, None]
    rows = (first + r).to(tl.int64)[:, None]
    q = tl.load(qkv + rows * ((H + 2 * HKV) * K) + h * K + d, there, other=0)
    head = (slot.to(tl.int64) * S * HKV + h // (H // HKV)) * K
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    value = tl.zeros((ROWS, K), tl.float32)
    last = position + count - 1
    whole = (position + 1) // BLOCK * BLOCK  # keys in blocks that all rows see
    best, total, value = attend_to(
        best, total, value, q, k_cache + head, v_cache + head, position + r, 0, whole, last, scale,
        HKV * K, K, BLOCK, True,
    )  # fmt: skip
    best, total, value = attend_to(
        best, total, value, q, k_cache + head, v_cache + head, position + r, whole, last + 1, last,
        scale, HKV * K, K, BLOCK, False,
    )  # fmt: skip
    value = (value / total[:, None]).to(tl.float16)
    tl.store(out + rows * (H * K) + h * K + d, value, there)


def attend(qkv: Tensor, caches: Pair, tiles: Tensor, out: Tensor) -> None:
    """Attention of rows of qkv (T, (H + 2 Hkv) K) fp16, of which only the queries are read, to the
    keys and values up to their own in the caches (B, S, Hkv, K) fp16, into out (T, H K) fp16. Which
    row is which token, tiles_of() says."""
    (_, S, Hkv, K), H = caches[0].shape, out.shape[1] // caches[0].shape[3]
    launch(
        attend_kernel, (H, len(tiles)), qkv, *caches, tiles, out, S, K**-0.5 * LOG2_E, H, Hkv, K,
        TILE_ROWS, BLOCK, num_warps=4, num_stages=STAGES, enable_fp_fusion=False,
    )  # fmt: skip
