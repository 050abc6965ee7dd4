"""The memory that kernels work in, made for each pass of a prefill and once for a running batch.

`room` counts it on the meta device, without Triton: so the constants that fix a size are here.
"""

import torch
from torch import Tensor

from llama.model import ModelArgs

Pair = tuple[Tensor, Tensor]
# Most tokens of prompts in one pass. While sequences run, they wait for it: on an H200 13B takes 19
# ms for 512, as long as two or three steps of 32 rows. Where none does, fewer passes are faster:
# 1,900 tokens take 61 ms, and 77 in passes of 512.
PACK = 512
PACK_ALONE = 2048
MOST_ROWS = 32  # that `few_rows.linear` multiplies at once; more go in groups
MAX_SPLITS = 32  # splits of a sequence in `attention.attend`
# Rows of a prompt that share a list in `llm_int8`, and columns that are listed together.
LIST_ROWS = 128
LIST_COLUMNS = 32


class PrefillBuffers:
    """For the layers of a pass of T tokens."""

    def __init__(self, args: ModelArgs, T: int, device: torch.device):
        half = {"dtype": torch.float16, "device": device}
        self.residual = torch.empty(T, args.dim, dtype=torch.float32, device=device)
        self.qkv = torch.empty(T, (args.n_heads + 2 * args.kv_heads) * args.head_dim, **half)
        self.heads = torch.empty(T, args.dim, **half)
        self.w13 = torch.empty(T, 2 * args.hidden_dim, **half)
        self.dim = quant_buffers(T, args.dim, device)
        self.hidden = quant_buffers(T, args.hidden_dim, device)


class DecodeBuffers:
    """For steps of at most B rows, of which a sequence may have several."""

    def __init__(self, args: ModelArgs, B: int, device: torch.device):
        single = {"dtype": torch.float32, "device": device}
        self.q = torch.empty(B, args.dim, dtype=torch.float16, device=device)
        self.hidden = torch.empty(B, args.hidden_dim, **single)
        self.logits = torch.empty(B, args.vocab_size, **single)
        self.attend = attend_buffers(B, args.n_heads, args.kv_heads, args.head_dim, device)


def quant_buffers(M: int, D: int, device: torch.device) -> tuple[Tensor, ...]:
    """For `llm_int8.vectorwise_quant` of M rows: three digits, the step and the number of digits of
    each row, and for each LIST_ROWS rows a flag a group of columns, the groups listed, and how many
    they are, whether they have top digits, and how many programs are done with them."""
    digits = torch.empty(3, M, D, dtype=torch.int8, device=device)
    step = torch.empty(M, dtype=torch.float32, device=device)
    used = torch.empty(M, dtype=torch.int32, device=device)
    blocks, groups = -(-M // LIST_ROWS), -(-D // LIST_COLUMNS)
    lists = (blocks, groups), (blocks, groups), (blocks, 3)
    return digits, step, used, *(torch.zeros(s, dtype=torch.int32, device=device) for s in lists)


def attend_buffers(B: int, H: int, Hkv: int, K: int, device: torch.device) -> Pair:
    """For `attention.attend`: the results of the splits of each head, and how many have arrived for
    each key head."""
    partial = torch.zeros(B * H * MAX_SPLITS * (K + 2), dtype=torch.float32, device=device)
    return partial, torch.zeros(B * Hkv, dtype=torch.int32, device=device)
