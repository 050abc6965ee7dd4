"""The guesses of prompt lookup in one launch instead of two dozen, a program a sequence.

The twin is `llama.lookup.guess`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # places looked at together


@triton.jit
def guess_kernel(
    tokens, lengths, found, stride, count,
    NGRAM: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program guesses what follows a sequence. COUNT is count or more."""
    b = tl.program_id(0)
    length = tl.load(lengths + b)
    tokens += b.to(tl.int64) * stride
    places = tl.zeros((BLOCK,), tl.int64)
    start = length * 0
    while start < length:
        end = start + tl.arange(0, BLOCK)
        same = (end >= NGRAM) & (end < length)
        for i in tl.static_range(1, NGRAM + 1):
            last = tl.load(tokens + length - i, length >= i, -1)
            same &= tl.load(tokens + end - i, same, -2) == last
        places = tl.where(same, end, places)
        start += BLOCK
    newest = tl.max(places, 0)
    new = tl.arange(0, COUNT)
    guesses = tl.load(tokens + newest + new % (length - newest), new < count)
    tl.store(tokens + length + new, guesses, new < count)
    tl.store(found + b, newest > 0)


def guess(tokens: Tensor, lengths: Tensor, count: int, ngram: int) -> Tensor:
    """As `llama.lookup.guess`, of n-grams of `ngram` tokens."""
    found = torch.empty(len(tokens), dtype=torch.bool, device=tokens.device)
    most = triton.next_power_of_2(count)
    guess_kernel[(len(tokens),)](
        tokens, lengths, found, tokens.stride(0), count, ngram, most, BLOCK, num_warps=4
    )
    return found
