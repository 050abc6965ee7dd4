"""The draw of the next token without a sort, in 5 or 8 short launches, however the logits are.

The twin is `llama.sampling.draw`. Where the nucleus ends, and which token a uniform number picks,
are one question: up to which token, most likely first, does the mass add up to a goal? The answer
is found by narrowing: one pass over the row measures the mass up to each of BINS bounds, the next
narrows the bin that holds the answer, then the tokens of that narrower bin are gathered, and one
program a row finds the answer among them. All other passes are split over many programs a row.

A token's key is its distance below the largest logit, divided by the temperature, in steps of 2^-24
nats, as fine as float32 tells probabilities apart. Tokens of one key come in the order of their
ids. Masses are whole numbers, floor(2^42 e^-distance), so sums are exact in any order, and a row's
draw has the same bits at any batch size. What is cut off is less than V 2^-42 of the mass (3e-8 for
V = 128,256), and distances and exponentials in float32 are within 1e-6: a draw differs from exact
arithmetic only where the uniform number is about that near to a boundary between two tokens.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama.settings import Settings

STEPS = tl.constexpr(2.0**24)  # of a key in a nat
FARTHEST = tl.constexpr(32.0)  # nats: what is farther below the largest logit has no mass
WHOLE = tl.constexpr(2.0**42)  # mass of the likeliest token; 2^20 tokens stay below 2^62
# Bins of a pass: for 32 rows and 128,256 tokens a draw takes 146 us, with 16 bins 167, with 4 321;
# for 1 row 61, 55 and 101 (H100, 2026-11-27).
BINS = tl.constexpr(8)
NEVER = tl.constexpr(2**62)
BLOCK = 4096  # tokens a program of a pass
FOUND_BLOCK = 1024  # tokens that the last program looks at together


@triton.jit
def extremes_kernel(logits, extremes, V, P: tl.constexpr, BLOCK: tl.constexpr):
    """Each program stores the largest and smallest of BLOCK logits; infinity for both unless all
    are finite."""
    b, part = tl.program_id(0), tl.program_id(1)
    token = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + b.to(tl.int64) * V + token, mask=token < V, other=0)
    finite = tl.min((tl.abs(x) < float("inf")).to(tl.int32), 0) == 1
    most = tl.max(tl.where(token < V, x, -float("inf")), 0)
    least = tl.min(tl.where(token < V, x, float("inf")), 0)
    mine = extremes + (b * P + part) * 2
    tl.store(mine, tl.where(finite, most, float("inf")))
    tl.store(mine + 1, tl.where(finite, least, float("inf")))


@triton.jit
def largest(extremes, b, P: tl.constexpr, P2: tl.constexpr):
    part = tl.arange(0, P2)
    return tl.max(tl.load(extremes + (b * P + part) * 2, part < P, other=-float("inf")), 0)


@triton.jit
def key_of(x, most, warmth):
    """warmth: 1 / temperature."""
    return (tl.minimum((most - x) * warmth, FARTHEST) * STEPS).to(tl.int32)


@triton.jit
def mass_of(key):
    return (tl.exp(key.to(tl.float32) * (-1 / STEPS)) * WHOLE).to(tl.int64)


@triton.jit
def goal(total, uniform, b, top_p, CUT: tl.constexpr):
    """The answer is the first token up to which, itself included, the mass is greater than this."""
    total = tl.load(total)
    if CUT:  # the nucleus: that mass is top_p of the whole, or more
        share = total.to(tl.float64) * top_p
        below = share.to(tl.int64)
        below -= (below.to(tl.float64) == share).to(tl.int64)
    else:
        share = total.to(tl.float64) * tl.load(uniform + b)
        below = share.to(tl.int64)
    # There is a token up to which the mass is greater: float64 may round a total above 2^53 up.
    return tl.maximum(tl.minimum(below, total - 1), 0)


@triton.jit
def bin_of(mass, count, ends, below, top_k, last, CUT: tl.constexpr):
    """The bin that holds the answer: how many bins end before it."""
    if CUT:
        before = (mass <= below) & (count < top_k) & (ends <= last)
    else:
        before = mass <= below
    return tl.sum(before.to(tl.int32), 0)


@triton.jit
def narrowed(level, below, top_k, last, CUT: tl.constexpr):
    """The first key and the width of that bin, of a level's bins, and the mass and the number of
    the tokens before it."""
    r = tl.arange(0, BINS)
    low, width = tl.load(level), tl.load(level + 1)
    mass, count = tl.load(level + 4 + r), tl.load(level + 4 + BINS + r)
    answer = bin_of(mass, count, low + (r + 1) * width, below, top_k, last, CUT)
    mass, count = tl.where(r == answer - 1, mass, 0), tl.where(r == answer - 1, count, 0)
    mass_before, count_before = tl.sum(mass, 0), tl.sum(count, 0)
    if answer == 0:
        mass_before, count_before = tl.load(level + 2), tl.load(level + 3)
    return low + answer * width, width, mass_before, count_before


@triton.jit(do_not_specialize=["top_k", "last"])
def measure_kernel(
    logits, extremes, uniform, parent, total, level, stride, V, warmth, top_p, top_k, last,
    FIRST: tl.constexpr, CUT: tl.constexpr, COUNT: tl.constexpr, P: tl.constexpr,
    P2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program adds the masses of its BLOCK tokens to a level of its row: its first key, the
    width of a bin, the mass and number of the tokens before them, the mass up to the end of each
    bin, and the number of tokens."""
    b, part = tl.program_id(0), tl.program_id(1)
    most = largest(extremes, b, P, P2)
    level += b * stride
    if FIRST:
        parts = tl.arange(0, P2)
        least = tl.min(tl.load(extremes + (b * P + parts) * 2 + 1, parts < P, other=most), 0)
        low, width = tl.zeros((), tl.int64), key_of(least, most, warmth).to(tl.int64) // BINS + 1
    else:
        below = goal(total + b * stride, uniform, b, top_p, CUT)
        low, width, mass_before, count_before = narrowed(
            parent + b * stride, below, top_k, last, CUT
        )
        width = (width + BINS - 1) // BINS
        if part == 0:
            tl.store(level + 2, mass_before)
            tl.store(level + 3, count_before)
    if part == 0:
        tl.store(level, low)
        tl.store(level + 1, width)
    token = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + b.to(tl.int64) * V + token, mask=token < V, other=0)
    key = tl.where(token < V, key_of(x, most, warmth), 2**30)
    mass = mass_of(key)
    for r in tl.static_range(BINS):
        before = key < (low + (r + 1) * width).to(tl.int32)
        tl.atomic_add(level + 4 + r, tl.sum(tl.where(before, mass, 0), 0), sem="relaxed")
        if COUNT:
            count = tl.sum(before.to(tl.int32), 0).to(tl.int64)
            tl.atomic_add(level + 4 + BINS + r, count, sem="relaxed")


@triton.jit(do_not_specialize=["top_k", "last"])
def gather_kernel(
    logits, extremes, uniform, parent, total, level, gathered, stride, V, warmth, top_p, top_k,
    last, CUT: tl.constexpr, P: tl.constexpr, P2: tl.constexpr, BLOCK: tl.constexpr,
    ID_BITS: tl.constexpr,
):  # fmt: skip
    """Each program gathers those of its BLOCK tokens that are in the bin, in any order, as key and
    id in one number, and adds their number to level."""
    b, part = tl.program_id(0), tl.program_id(1)
    below = goal(total + b * stride, uniform, b, top_p, CUT)
    low, width, _, _ = narrowed(parent + b * stride, below, top_k, last, CUT)
    token = part * BLOCK + tl.arange(0, BLOCK)
    row = b.to(tl.int64) * V
    x = tl.load(logits + row + token, mask=token < V, other=0)
    key = tl.where(token < V, key_of(x, largest(extremes, b, P, P2), warmth), 2**30)
    within = ((key >= low.to(tl.int32)) & (key < (low + width).to(tl.int32))).to(tl.int32)
    first = tl.atomic_add(level + b * stride, tl.sum(within, 0).to(tl.int64), sem="relaxed")
    place = gathered + row + first + tl.cumsum(within, 0) - 1
    tl.store(place, (key.to(tl.int64) << ID_BITS) | token, mask=within == 1)


@triton.jit(do_not_specialize=["top_k", "last"])
def find_kernel(
    extremes, uniform, parent, total, level, gathered, tokens, stride, V, top_p, top_k, last,
    CUT: tl.constexpr, P: tl.constexpr, P2: tl.constexpr, BLOCK: tl.constexpr,
    ID_BITS: tl.constexpr,
):  # fmt: skip
    """Each program finds the answer of its row among the gathered: the last token kept, up to which
    the mass is stored at level + 1, or the token drawn."""
    b = tl.program_id(0)
    below = goal(total + b * stride, uniform, b, top_p, CUT)
    low, width, mass_before, count_before = narrowed(parent + b * stride, below, top_k, last, CUT)
    low, width = low << ID_BITS, width << ID_BITS
    level += b * stride
    n = tl.load(level)
    r = tl.arange(0, BINS)
    kept = mass_before
    gathered += b.to(tl.int64) * V
    first, inside = n * 0, n * 0  # of the gathered: how many are before the bin, and in it
    while (width > 1) & (inside != 1):
        width = (width + BINS - 1) // BINS
        ends = low + (r + 1) * width
        mass = tl.zeros((BINS,), tl.int64) + mass_before
        number = tl.zeros((BINS,), tl.int64)
        start = n * 0
        while start < n:
            i = start + tl.arange(0, BLOCK)
            one = tl.load(gathered + i, mask=i < n, other=NEVER)
            before = (one[:, None] < ends[None, :]) & (i < n)[:, None]
            mass += tl.sum(tl.where(before, mass_of(one >> ID_BITS)[:, None], 0), 0)
            number += tl.sum(before.to(tl.int32), 0)
            start += BLOCK
        count = count_before + number
        answer = bin_of(mass, count, ends >> ID_BITS, below, top_k, last, CUT)
        low += answer * width
        kept = tl.sum(tl.where(r == answer, mass, 0), 0)
        first = tl.where(answer > 0, tl.sum(tl.where(r == answer - 1, number, 0), 0), first)
        inside = tl.sum(tl.where(r == answer, number, 0), 0) - first
    if width > 1:  # a single one is in the bin
        start, end = n * 0, low + width
        while start < n:
            i = start + tl.arange(0, BLOCK)
            one = tl.load(gathered + i, mask=i < n, other=NEVER)
            low = tl.maximum(low, tl.max(tl.where(one < end, one, 0), 0))
            start += BLOCK
        kept -= tl.where(low >> ID_BITS > last, mass_of(low >> ID_BITS), 0)
    if CUT:
        tl.store(level + 1, kept)
    else:
        finite = largest(extremes, b, P, P2) < float("inf")
        token = low & ((1 << ID_BITS) - 1)
        tl.store(tokens + b, tl.where(finite, token, -1))


def draw(logits: Tensor, uniform: Tensor, settings: Settings) -> Tensor:
    """As `llama.sampling.draw`: logits (B, V) float32 of at most 2^20 tokens, uniform (B,) float32
    -> tokens (B,), NOT_FINITE where logits are not. The temperature is above 0."""
    logits = logits.contiguous()
    B, V = logits.shape
    P = triton.cdiv(V, BLOCK)
    new = {"device": logits.device, "dtype": torch.int64}
    # Levels of a row: of all tokens, then for the cut and for the draw one level and the gathered.
    size = 4 + 2 * BINS.value
    levels = torch.zeros(B, 5, size, **new)
    gathered, tokens = torch.empty(B, V, **new), torch.empty(B, **new)
    extremes = torch.empty(B, P, 2, device=logits.device)

    warmth = min(1 / max(settings.temperature, 1e-38), 1e30)
    last = min(-math.log(settings.min_p), 64) if settings.min_p else 64
    cuts = settings.top_p, settings.top_k or V, round(last * STEPS.value)
    parts = {"P": P, "P2": triton.next_power_of_2(P), "BLOCK": BLOCK, "num_warps": 8}
    ids = {"ID_BITS": V.bit_length()}
    extremes_kernel[(B, P)](logits, extremes, V, P, BLOCK, num_warps=8)
    top, stride = levels[:, 0], 5 * size
    total = top[:, 3 + BINS.value]
    state = logits, extremes, uniform
    some = bool(settings.top_k)
    args = top, total, top, stride, V, warmth, *cuts
    measure_kernel[(B, P)](*state, *args, FIRST=True, CUT=False, COUNT=some, **parts)
    for cut in (True, False) if settings.top_p < 1 or some or settings.min_p else (False,):
        level, rest = levels[:, 1 if cut else 3], levels[:, 2 if cut else 4]
        args = top, total, level, stride, V, warmth, *cuts
        counted = cut and some
        measure_kernel[(B, P)](*state, *args, FIRST=False, CUT=cut, COUNT=counted, **parts)
        args = level, total, rest, gathered, stride, V, warmth, *cuts
        gather_kernel[(B, P)](*state, *args, CUT=cut, **parts, **ids)
        args = level, total, rest, gathered, tokens, stride, V, *cuts
        one = parts | {"BLOCK": FOUND_BLOCK, "num_warps": 16}
        find_kernel[(B,)](extremes, uniform, *args, CUT=cut, **one, **ids)
        total = rest[:, 1]  # the mass of those kept
    return tokens
