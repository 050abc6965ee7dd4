"""The memory that kernels work in, made once for a prompt or for a running batch.

`room` counts it on the meta device, without Triton: so the constants that fix a size are here.
"""

import torch
from torch import Tensor

from llama.model import ModelArgs

Pair = tuple[Tensor, Tensor]
# Most tokens of prompts in one pass, for which the sequences that run wait: on an H200 13B takes
# 18 ms for 512, as long as two or three of their steps, and 11 to 13 for 128, bound by launches.
PACK = 512
MOST_ROWS = 32  # that `few_rows.linear` multiplies at once; more go in groups
BLOCK_N = 64  # outputs a program of it, when there are several rows
MAX_PARTS = 4  # into which it splits the columns of a weight
MAX_SPLITS = 32  # splits of a sequence in `attention.attend`
BLOCK_KEPT = 16  # columns kept in fp16 that are added at once, the least of a tensor core


class PrefillBuffers:
    """For the layers of a prompt of T tokens."""

    def __init__(self, args: ModelArgs, T: int, device: torch.device):
        half = {"dtype": torch.float16, "device": device}
        self.residual = torch.empty(T, args.dim, dtype=torch.float32, device=device)
        self.qkv = torch.empty(T, (args.n_heads + 2 * args.kv_heads) * args.head_dim, **half)
        self.w13 = torch.empty(T, 2 * args.hidden_dim, **half)
        self.dim = quant_buffers(T, args.dim, device)
        self.hidden = quant_buffers(T, args.hidden_dim, device)


class DecodeBuffers:
    """For the steps of B sequences, and for the output head."""

    def __init__(self, args: ModelArgs, B: int, device: torch.device):
        single = {"dtype": torch.float32, "device": device}
        width = (args.n_heads + 2 * args.kv_heads) * args.head_dim
        self.qkv = torch.empty(B, width, **single)
        self.hidden = torch.empty(B, args.hidden_dim, **single)
        self.logits = torch.empty(B, args.vocab_size, **single)
        self.linear = linear_buffers(max(args.vocab_size, width, args.hidden_dim, args.dim), device)
        self.attend = attend_buffers(B, args.n_heads, args.kv_heads, args.head_dim, device)


def quant_buffers(M: int, D: int, device: torch.device) -> tuple[Tensor, ...]:
    """For `llm_int8.vectorwise_quant` of M rows: A, CA, SCA, the first token of each column that
    reached the threshold, and what was kept: columns, how many, values."""
    half, whole, width = torch.float16, torch.int32, -(-D // BLOCK_KEPT) * BLOCK_KEPT
    shapes = (M, D), (M, D), (M,), (D,), (D,), (), (M, width)
    dtypes = half, torch.int8, torch.float32, whole, whole, whole, half
    return tuple(torch.empty(s, dtype=d, device=device) for s, d in zip(shapes, dtypes))


def linear_buffers(N: int, device: torch.device) -> Pair:
    """For `few_rows.linear` with up to N outputs (a "swiglu" layer has half its weight's rows): the
    partial sums of its programs, and how many have arrived."""
    tiles = -(-N // BLOCK_N)
    sums = tiles * BLOCK_N * MOST_ROWS * 2 * MAX_PARTS  # 2: both halves of "swiglu"
    partial = torch.zeros(sums, dtype=torch.float32, device=device)
    return partial, torch.zeros(tiles, dtype=torch.int32, device=device)


def attend_buffers(B: int, H: int, Hkv: int, K: int, device: torch.device) -> Pair:
    """For `attention.attend`: the results of the splits of each head, and how many have arrived for
    each key head."""
    partial = torch.zeros(B * H * MAX_SPLITS * (K + 2), dtype=torch.float32, device=device)
    return partial, torch.zeros(B * Hkv, dtype=torch.int32, device=device)
