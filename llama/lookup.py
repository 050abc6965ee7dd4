"""Prompt lookup: the tokens that followed the same words earlier in a sequence are taken as guesses
of the next ones (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding).

A step that verifies computes the logits after the newest token and after each guess at once. A
token is drawn from each as if all guesses before it were right, and is kept if they are: so a
sequence is the same as without guesses. Such a step takes longer than a plain one, whatever comes
of it. `Watch` decides which to take; plain steps, too, show how guesses would have fared. The first
that verifies costs most, as its CUDA graph is captured: it waits until as much gain was missed.

It is for our kernels, whose rows have the same bits however many there are. Where the plain engine
computes, on the CPU for one, it changes nothing: there each row would take a step.
"""

import torch
from torch import Tensor

from llama.buffers import MOST_ROWS

EACH = 8  # most rows of a sequence in a step that verifies: its newest token and 7 guesses
NGRAM = 3  # last tokens of a sequence that are looked up
KEPT = 0.8  # how much older guesses weigh after each newer one
# A sequence begins as if 0.5 of 4 guesses had been right: more must be before a step verifies.
# Simulated, if such a step costs 1.25: tales that copy parts came 2.34 times as fast as without,
# others 0.996 times; with n-grams of 2 2.28 and 0.990, of 4 2.27 and 1.000.
FIRST = 0.5, 4.0
LOSS = 0.015  # of the time may be lost by guesses that were wrong
# Plain steps that verifying would have saved until the first step verifies, and is expected to save
# from then on: the capture of its CUDA graph takes about as long.
MISSED = 12.0


def rows_each(slots: int) -> int:
    """Rows of a sequence in a step that verifies: as many as one reading of the weights serves."""
    return max(1, min(EACH, MOST_ROWS // slots))


def guess(tokens: Tensor, lengths: Tensor, count: int) -> Tensor:
    """Writes guesses of what follows sequences tokens[b, :lengths[b]] behind them, `count` of each;
    returns of which (B,) there are any. They are what follows the newest earlier place with the
    same last NGRAM tokens. Nothing waits for the host."""
    if tokens.is_cuda:
        from llama.kernels import lookup  # only here: importing triton takes a while

        return lookup.guess(tokens, lengths, count, NGRAM)
    new = torch.arange(count, device=tokens.device)
    last = lengths[:, None] - NGRAM + torch.arange(NGRAM, device=tokens.device)
    same = (tokens.unfold(1, NGRAM, 1) == tokens.gather(1, last.clamp(min=0))[:, None]).all(-1)
    ends = torch.arange(NGRAM, tokens.shape[1] + 1, device=tokens.device)  # of those n-grams
    ends = torch.where(same & (ends < lengths[:, None]), ends, 0).amax(1, keepdim=True)
    # A guess may reach the end of the sequence: then it goes on with itself.
    period = lengths[:, None] - ends
    guesses = tokens.gather(1, ends + new % period)
    tokens.scatter_(1, lengths[:, None] + new, guesses)
    return ends[:, 0] > 0


class Watch:
    """Which of the next steps verify guesses: those that are expected to give more tokens than
    plain steps in the same time, as long as no more than LOSS of the time is lost by them. Each
    sequence has its own estimate.

    `cost` is the time of a step that verifies, in plain steps; `each` its rows of a sequence."""

    def __init__(self, slots: int, each: int, cost: float):
        self.each, self.cost = each, cost
        self.found = [False] * slots  # are there guesses of what follows the newest step seen?
        self.fared = [FIRST] * slots  # of the newest guesses: how many were right, and how many
        self.credit = LOSS  # plain steps that may still be lost
        self.captured = False  # is there a CUDA graph of a step that verifies?
        self.missed = 0.0  # plain steps that verifying would have gained until now

    def begin(self, slot: int) -> None:
        """Forgets a slot's sequence for a new one."""
        self.found[slot], self.fared[slot] = False, FIRST

    def see(self, slot: int, right: int, tested: int, found: bool) -> int | None:
        """Takes what a step told of a sequence: how many guesses were right before one was wrong,
        of so many at most, and whether there are some for the next step. Returns how many were
        right, None if there were none."""
        guessed, self.found[slot] = self.found[slot], found
        if not guessed:
            return None
        before, of = self.fared[slot]
        tries = min(right + 1, tested)
        kept = KEPT**tries
        self.fared[slot] = kept * before + right, kept * of + tries
        return right

    def spend(self, verified: bool, tokens: list[int], right: list[int | None]) -> None:
        """Takes what a step gave the sequences that run: tokens, and what see() returned."""
        if verified:
            self.credit += sum(tokens) / len(tokens) - self.cost
            self.captured = True
            return
        self.credit += LOSS
        if any(one is not None for one in right):
            # Steps that verify would have given a right guess for nothing, others at their cost.
            gain = sum(one or 1 - self.cost for one in right) / len(right)
            self.missed = max(0.0, self.missed + gain)

    def expected(self, slot: int) -> float:
        """Tokens that a step which verifies gives a sequence: the first, and each guess that is
        right with all before it."""
        right, of = self.fared[slot]
        chance = right / of if self.found[slot] else 0
        return sum(chance**n for n in range(self.each))

    def pays(self, left: list[int]) -> bool:
        """Shall the next step verify? left has the tokens that each sequence still lacks."""
        running = [(slot, n) for slot, n in enumerate(left) if n]
        tokens = sum(min(n, self.expected(slot)) for slot, n in running)
        share = 1 - self.cost * len(running) / tokens if running else 0  # of the time, saved
        if not self.captured and (self.missed < MISSED or share * max(left) < MISSED):
            return False
        return self.credit > 0 and share > 0
