"""The memory that kernels work in, made once for a running batch.

`room` counts it on the meta device, without Triton: so the constants that fix a size are here.
"""

import copy

import torch
from torch import Tensor

from llama.model import ModelArgs

Pair = tuple[Tensor, Tensor]
# Most tokens of prompts in one pass. While sequences run, they wait for it: on an H200 13B takes 16
# ms for 512, as long as two steps of 32 rows (2026-11-28). Where none does, fewer passes are
# faster: 1,900 tokens took 61 ms, and 77 in passes of 512 (2026-11-27).
PACK = 512
PACK_ALONE = 2048
TILE_ROWS = 64  # of a prompt, in `prefill_attention`; a pass is padded to whole tiles
MOST_ROWS = 32  # that `few_rows.linear` multiplies at once; more go in groups
MAX_SPLITS = 32  # splits of a sequence in `attention.attend`
# Rows of a prompt that share a list in `llm_int8`, and columns that are listed together.
LIST_ROWS = 128
LIST_COLUMNS = 16


class PrefillBuffers:
    """For passes of up to PACK_ALONE tokens of sequences in so many slots of a length: which tokens
    they are, where they go, and what their layers work in."""

    def __init__(self, args: ModelArgs, slots: int, length: int, device: torch.device):
        half = {"dtype": torch.float16, "device": device}
        T = in_whole_tiles(min(PACK_ALONE, slots * length))
        self.tokens = torch.zeros(T, dtype=torch.long, device=device)
        self.places = torch.empty(T, dtype=torch.int32, device=device)
        self.tiles = torch.empty(T // TILE_ROWS + slots, 4, dtype=torch.int32, device=device)
        self.residual = torch.empty(T, args.dim, dtype=torch.float32, device=device)
        self.qkv = torch.empty(T, (args.n_heads + 2 * args.kv_heads) * args.head_dim, **half)
        self.heads = torch.empty(T, args.dim, **half)
        self.w13 = torch.empty(T, 2 * args.hidden_dim, **half)
        self.dim = quant_buffers(T, args.dim, device)
        self.hidden = quant_buffers(T, args.hidden_dim, device)
        self.dim_lists = quant_lists((args.n_layers, 3), T, args.dim, device)
        self.hidden_lists = quant_lists((args.n_layers,), T, args.hidden_dim, device)

    def part(self, T: int) -> "PrefillBuffers":
        """Views of this memory for a pass of T tokens, padded to whole tiles."""
        view, most, T = copy.copy(self), len(self.tokens), in_whole_tiles(T)
        view.tiles = self.tiles[: len(self.tiles) - (most - T) // TILE_ROWS]
        for name in ("tokens", "places", "residual", "qkv", "heads", "w13"):
            setattr(view, name, getattr(self, name)[:T])
        for name in ("dim", "hidden"):
            setattr(view, name, tuple(x[:T] for x in getattr(self, name)))
        return view


class DecodeBuffers:
    """For steps of at most B rows, of which a sequence may have several."""

    def __init__(self, args: ModelArgs, B: int, device: torch.device):
        single = {"dtype": torch.float32, "device": device}
        self.q = torch.empty(B, args.dim, dtype=torch.float16, device=device)
        self.hidden = torch.empty(B, args.hidden_dim, **single)
        self.logits = torch.empty(B, args.vocab_size, **single)
        self.attend = attend_buffers(B, args.n_heads, args.kv_heads, args.head_dim, device)


def in_whole_tiles(T: int) -> int:
    return -(-T // TILE_ROWS) * TILE_ROWS


def quant_buffers(M: int, D: int, device: torch.device) -> tuple[Tensor, ...]:
    """For `llm_int8.vectorwise_quant` of M rows: three digits, the step and the number of digits of
    each row."""
    digits = torch.empty(M, 3, D, dtype=torch.int8, device=device)
    step = torch.empty(M, dtype=torch.float32, device=device)
    used = torch.empty(M, dtype=torch.int32, device=device)
    return digits, step, used


def quant_lists(calls: tuple[int, ...], M: int, D: int, device: torch.device) -> Tensor:
    """Lists (blocks, size) for each call with M rows: of LIST_ROWS rows, how many groups of columns
    are listed, whether there are top digits, a flag a group, and the groups. They must be zeros
    when a call begins. Each starts at a multiple of 16 bytes."""
    size = -(-(2 + 2 * -(-D // LIST_COLUMNS)) // 4) * 4
    return torch.zeros(*calls, -(-M // LIST_ROWS), size, dtype=torch.int32, device=device)


def attend_buffers(B: int, H: int, Hkv: int, K: int, device: torch.device) -> Pair:
    """For `attention.attend`: the results of the splits of each head, and how many have arrived for
    each key head."""
    partial = torch.zeros(B * H * MAX_SPLITS * (K + 2), dtype=torch.float32, device=device)
    return partial, torch.zeros(B * Hkv, dtype=torch.int32, device=device)
