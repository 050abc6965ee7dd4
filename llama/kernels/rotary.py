"""Rotary embedding of the rows of a prefill; their keys and values go into the caches."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from llama import model
from llama.buffers import Pair
from llama.kernels.launch import launch
from llama.model import Span

BLOCK_T = 16  # tokens a program; bound by memory: 37 us for 1,900 rows of 13B (H200, 2026-11-28)


def places_of(spans: list[Span], S: int, count: int) -> Tensor:
    """Where the tokens of spans lie in a cache of S tokens a slot: slot * S + position, (count,)
    int32 on the host, and -1 behind the last."""
    starts = [(slot * S + start, rows) for slot, start, rows in spans]
    places = [torch.arange(at, at + n, dtype=torch.int32, device="cpu") for at, n in starts]
    places = torch.cat(places)
    return F.pad(places, (0, count - len(places)), value=-1)


def rotate_torch(qkv, caches, places, rotation, tokens, bos, first) -> None:
    (_, S, Hkv, K), T = caches[0].shape, int((places >= 0).sum())
    qkv, places, tokens = qkv[:T], places[:T], tokens[:T]
    q, k, v = qkv.view(T, -1, K).split([qkv.shape[1] // K - 2 * Hkv, Hkv, Hkv], 1)
    for x in (q, k):
        x.copy_(model.rotate(x[None], rotation[None, places % S])[0])
    known = (places % S == 0) & (tokens == bos)
    for x, exact, cache in zip((k, v), first, caches):
        cache[places // S, places % S] = torch.where(known[:, None, None], exact, x)


@triton.jit(do_not_specialize=["T"])
def rotate_kernel(
    qkv, k_cache, v_cache, places, rotation, tokens, bos, first_k, first_v, T, S,
    H: tl.constexpr, HKV: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Each program turns one head of BLOCK_T tokens."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    h = tl.program_id(1)
    d = tl.arange(0, K)[None, :]
    place = tl.load(places + t, mask=t < T, other=-1)
    inside = place >= 0
    source = qkv + (t * (H + 2 * HKV) + h) * K + d
    target = place.to(tl.int64) * (HKV * K) + d
    known = (place % S == 0) & (tl.load(tokens + t, mask=inside) == bos)
    x = tl.load(source, mask=inside)
    if h < H + HKV:
        even, odd = tl.split(tl.reshape(x.to(tl.float32), (BLOCK_T, K // 2, 2)))
        angle = tl.load(rotation + place % S * K + d, mask=inside)
        cos, sin = tl.split(tl.reshape(angle, (BLOCK_T, K // 2, 2)))
        turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
        x = tl.reshape(turned, (BLOCK_T, K)).to(x.dtype)
        tl.store(source, x, mask=inside)
        if h >= H:
            at = (h - H) * K
            x = tl.where(known, tl.load(first_k + at + d), x)
            tl.store(k_cache + target + at, x, mask=inside)
    else:
        at = (h - H - HKV) * K
        x = tl.where(known, tl.load(first_v + at + d), x)
        tl.store(v_cache + target + at, x, mask=inside)


def rotate(
    qkv: Tensor,
    caches: Pair,
    places: Tensor,
    rotation: Tensor,
    tokens: Tensor,
    bos: int,
    first: Pair,
) -> None:
    """Rotates queries and keys of tokens (T,) in place, and stores keys and values in the caches
    (B, S, Hkv, K) fp16 where places_of() says; where BOS is first in a sequence, `first` (Hkv, K)
    are its key and value instead. qkv (T, (H + 2 Hkv) K) fp16 holds all three side by side;
    rotation (.., K/2, 2) float32 begins with position 0. Tokens without a place are left alone."""
    (T, width), (_, S, Hkv, K) = qkv.shape, caches[0].shape
    heads = width // K
    args = qkv, *caches, places, rotation, tokens, bos, *first, T, S
    constants = heads - 2 * Hkv, Hkv, K, BLOCK_T
    launch(rotate_kernel, (triton.cdiv(T, BLOCK_T), heads), *args, *constants, num_warps=4)
