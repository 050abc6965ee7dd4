"""Rotary embedding of a prompt; its keys and values go into the cache."""

import triton
import triton.language as tl
from torch import Tensor

from llama import model
from llama.kernels.launch import launch

BLOCK_T = 16  # tokens a program


def rotate_torch(qkv, k_cache, v_cache, rotation) -> None:
    (T, _), (_, Hkv, K) = qkv.shape, k_cache.shape
    q, k, v = qkv.view(T, -1, K).split([qkv.shape[1] // K - 2 * Hkv, Hkv, Hkv], 1)
    for x in (q, k):
        x.copy_(model.rotate(x[None], rotation[None, :T])[0])
    k_cache[:T], v_cache[:T] = k, v


@triton.jit(do_not_specialize=["T"])
def rotate_kernel(
    qkv, k_cache, v_cache, rotation, T,
    H: tl.constexpr, HKV: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Each program turns one head of BLOCK_T tokens."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    h = tl.program_id(1)
    d = tl.arange(0, K)[None, :]
    inside = t < T
    source = qkv + (t * (H + 2 * HKV) + h) * K + d
    x = tl.load(source, mask=inside)
    if h < H + HKV:
        even, odd = tl.split(tl.reshape(x.to(tl.float32), (BLOCK_T, K // 2, 2)))
        angle = tl.load(rotation + t * K + d, mask=inside)
        cos, sin = tl.split(tl.reshape(angle, (BLOCK_T, K // 2, 2)))
        turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
        x = tl.reshape(turned, (BLOCK_T, K)).to(x.dtype)
        tl.store(source, x, mask=inside)
        if h >= H:
            tl.store(k_cache + (t * HKV + h - H) * K + d, x, mask=inside)
    else:
        tl.store(v_cache + (t * HKV + h - H - HKV) * K + d, x, mask=inside)


def rotate(qkv: Tensor, k_cache: Tensor, v_cache: Tensor, rotation: Tensor) -> None:
    """Rotates queries and keys of the first T tokens of a sequence in place, and stores keys and
    values in the caches (S, Hkv, K) fp16. qkv (T, (H + 2 Hkv) K) fp16 holds all three side by side;
    rotation (.., K/2, 2) float32."""
    (T, width), (_, Hkv, K) = qkv.shape, k_cache.shape
    heads = width // K
    grid = (triton.cdiv(T, BLOCK_T), heads)
    constants = heads - 2 * Hkv, Hkv, K, BLOCK_T
    launch(rotate_kernel, grid, qkv, k_cache, v_cache, rotation, T, *constants, num_warps=4)
