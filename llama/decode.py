"""The decoder: a running batch of sequences, each in a slot with its own length.

`begin(slot, ids, uniform)` queues a sequence for a slot, also for one whose sequence has ended;
`step()` returns the newest tokens of every slot: one, or more where guesses were right (`lookup`).
Between two steps of the sequences that run, one pass prefills the next of the queue: at most PACK
tokens, of several short prompts or of one long one, so that is how long the others wait. A slot's
tokens are drawn from its own logits with its own random numbers, so that no sequence depends on the
others, but for how the plain engine rounds another number of rows.

Two engines compute the logits, with the same methods: `TorchEngine` by the model's own forward, and
`fused.FusedEngine` out of our kernels. Where the engine allows it, a step becomes a CUDA graph:
launched one by one from Python, its kernels would take longer to launch than to run.
"""

from collections.abc import Callable, Iterator
from itertools import takewhile

import torch
from torch import Tensor

from llama.buffers import PACK, PACK_ALONE
from llama.int8 import Int8Linear
from llama.kernels.launch import captured
from llama.lookup import Watch, guess, rows_each
from llama.model import KVCache, Span, Transformer
from llama.sampling import log_probabilities

ENGINES = ("triton", "bnb")

# logits (B, V), tokens (B, S), lengths (B,), uniform (B,) in [0, 1) -> the next token (B,)
Pick = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class TorchEngine:
    """Computes with the model's own forward: fp16, float32, and int8 by bitsandbytes' product."""

    def __init__(self, model: Transformer, cache: KVCache):
        self.model, self.cache = model, cache
        # bitsandbytes asks the host whether there are outliers, which a CUDA graph cannot hold.
        self.capturable = cache.k.is_cuda and not isinstance(model.output, Int8Linear)

    def prefill(self, tokens: Tensor, spans: list[Span]) -> Tensor:
        """What the head reads (T, D), of tokens (T,) that are the spans of several slots, side by
        side. What comes before a span is in the cache; its own keys and values are added."""
        features = []
        for (slot, start, count), own in zip(spans, tokens.split([count for *_, count in spans])):
            # Its bits depend on where a prompt is cut: at every PACK tokens, whatever its company.
            for at, part in zip(range(start, start + count, PACK), own.split(PACK)):
                cache = self.cache.slot(slot, at + len(part))
                features += self.model.features(part[None], at, cache)
        return torch.cat(features)

    def head(self, features: Tensor) -> Tensor:
        """Float32 logits (T, V) of what follows each of some tokens."""
        return self.model.output(features).float()

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Float32 logits (B, V) of what follows tokens (B,) at positions (B,)."""
        # Not by forward(): Ctrl-C as it enters inference mode once more would leave that on.
        return self.head(self.model.features(tokens[:, None], positions, self.cache)[:, -1])

    def cost(self, each: int) -> float:
        """Plain steps that a step with `each` rows a sequence would take: nothing is to be gained,
        so the decoder does not ask for one."""
        return each


def make_engine(model: Transformer, name: str, slots: int, length: int, each: int = 1):
    """The engine of this name, with a cache for so many sequences of that length, of which a step
    takes up to `each` tokens."""
    weight = model.tok_embeddings.weight
    cache = KVCache(model.args, slots, length, weight.dtype, weight.device)
    if name == "triton" and weight.is_cuda and isinstance(model.output, Int8Linear):
        from llama.fused import FusedEngine  # Triton comes with torch's CUDA build alone

        return FusedEngine(model, cache, each)
    return TorchEngine(model, cache)


def in_passes(engine, ids: list[int], most: int) -> Iterator[Tensor]:
    """Prefills slot 0 with ids, `most` at a time; yields what the head reads of each pass."""
    for start in range(0, len(ids), most):
        part = torch.tensor(ids[start : start + most], device=engine.cache.k.device)
        yield engine.prefill(part, [(0, start, len(part))])


class Decoder:
    """The state of a running batch of sequences of at most `length` tokens. Cache, tokens, logits
    and graph are its own, so several decoders may use one model by turns."""

    def __init__(
        self,
        model: Transformer,
        engine: str,
        slots: int,
        length: int,
        pick: Pick,
        logprobs: bool = False,
        lookup: bool = False,
    ):
        each = rows_each(slots) if lookup else 1
        self.engine, self.pick = make_engine(model, engine, slots, length, each), pick
        cost = self.engine.cost(each)
        self.each = each if cost < each else 1  # of a sequence, most tokens of a step
        self.watch = Watch(slots, each, cost) if self.each > 1 else None
        whole = {"dtype": torch.long, "device": model.tok_embeddings.weight.device}
        single = whole | {"dtype": torch.float32}
        self.slots = torch.arange(slots, **whole)
        self.rows = torch.arange(self.each, **whole)
        # Guesses are written behind a sequence, and may pass its end.
        self.tokens = torch.zeros(slots, length + self.each, **whole)
        self.uniform = torch.zeros(slots, length + self.each, **single)  # draws the token there
        self.lengths = torch.ones(slots, **whole)
        self.last = torch.zeros(slots, **whole)  # the last place that each sequence may fill
        # Of the newest step: what it drew of each sequence, how many of these tokens are its own,
        # how many guesses were right, and whether there are some for the next step.
        self.newest = torch.zeros(slots, self.each, **whole)
        self.counts, self.right, self.found = self.told = torch.ones(3, slots, **whole)
        self.logprobs = torch.zeros(slots, self.each, **single) if logprobs else None
        self.left = [0] * slots  # most tokens still to be drawn; right guesses count when read
        self.ends = [length] * slots  # tokens of each sequence that are its own
        # By slot: ids of which not all are in the cache yet, how many are, and where the sequence
        # ends. Such a slot has no newest token.
        self.queue: dict[int, tuple[list[int], int, int]] = {}
        self.returned = False  # whether step() returned the newest tokens
        self.verified = False  # whether they come of a step that verified guesses
        self.graphs: dict[bool, torch.cuda.CUDAGraph] = {}  # of a step, by whether it verifies

    def begin(self, slot: int, ids: list[int], uniform: Tensor, start: int = 0) -> None:
        """Queues a sequence for a slot; the first `start` of its ids are in the slot's cache
        already. uniform (n,), on the host, has a number in [0, 1) for each token to come, of which
        there is at least one."""
        end = len(ids) + len(uniform)
        self.left[slot], self.ends[slot] = 0, end
        self._hold(slot, start)
        if self.watch:
            self.watch.begin(slot)
        # The host does not wait for the step that runs: this shall come right after it.
        self.uniform[slot, len(ids) : end].copy_(uniform, non_blocking=True)
        self.queue[slot] = ids, start, end

    def end(self, slot: int, length: int) -> None:
        """Ends a slot's sequence after its first `length` tokens; steps may have drawn more."""
        self.left[slot], self.ends[slot] = 0, length

    def share(self, ids: list[int]) -> None:
        """Prefills what all prompts begin with and copies its keys and values to every slot. No
        sequence writes over what it begins with, so they are there for later ones in a slot too:
        pass start=len(ids) to begin(). To be called before the first sequence."""
        length = len(ids)
        for _ in in_passes(self.engine, ids, PACK_ALONE):
            pass
        for cache in (self.engine.cache.k, self.engine.cache.v):
            cache[:, 1:, :length] = cache[:, :1, :length]
        self.tokens[:, :length] = torch.tensor(ids, device=self.tokens.device)
        self._hold(slice(None), length)

    def cached(self, slot: int, ids: list[int]) -> int:
        """How many of ids, the last not among them, a slot's cache holds from an earlier sequence
        that begins alike. Its newest token is never in it."""
        length = min(int(self.lengths[slot]), self.ends[slot])
        there = self.tokens[slot, : length - 1].tolist()
        return len([*takewhile(lambda pair: pair[0] == pair[1], zip(there, ids[:-1]))])

    def step(self) -> list[list[list]]:
        """The newest tokens, one or more, of every slot that is not in the queue; NOT_FINITE for
        one whose logits were not all finite. With logprobs, a second list has theirs. A sequence
        that has ended goes on, at most to its last place: nobody reads that. With a CUDA graph the
        next step already runs meanwhile; the first tokens do not wait until it is captured."""
        if self.returned and any(self.left):
            self._advance()
        queued = {*self.queue}
        if queued:
            self._prefill()
        drawn = [self.newest] if self.logprobs is None else [self.newest, self.logprobs]
        drawn += [self.told] if self.watch else []
        drawn = [values.to("cpu", non_blocking=True) for values in drawn]
        arrived = torch.cuda.current_stream().record_event() if self.newest.is_cuda else None
        self.returned, verified, self.verified = True, self.verified, False
        if self.graphs and any(self.left):
            self._advance()
        if arrived:
            arrived.synchronize()
        drawn = [values.tolist() for values in drawn]
        if not self.watch:
            return drawn
        *drawn, told = drawn
        self._see(*told, verified, queued)
        return [[own[:n] for own, n in zip(values, told[0])] for values in drawn]

    def close(self) -> None:
        """Lets go of cache and graph, though the frames of an error may still hold this decoder."""
        vars(self.engine).clear()
        vars(self).clear()

    def _hold(self, slots: int | slice, start: int) -> None:
        """Has steps, which run over all slots, put keys and values at place `start` alone, tokens
        there and behind it: all are overwritten before they are read. What is before is cached."""
        self.lengths[slots], self.last[slots] = start + 1, start

    def _prefill(self) -> None:
        """One pass over the first of the queue: whole prompts, or a part of the first. A prompt
        draws its first token in the pass that ends it."""
        spans, tokens, most = [], [], PACK if any(self.left) else PACK_ALONE
        for slot, (ids, start, _) in self.queue.items():
            part = ids[start : start + most]
            if len(tokens) + len(part) > most:
                break
            spans.append((slot, start, len(part)))
            tokens += part
        tokens = torch.tensor(tokens, device="cpu").to(self.tokens.device, non_blocking=True)
        counts = [count for _, _, count in spans]
        for (slot, start, count), part in zip(spans, tokens.split(counts)):
            self.tokens[slot, start : start + count] = part
        features = self.engine.prefill(tokens, spans)

        slot, start, count = spans[-1]
        ids, _, end = self.queue[slot]
        if start + count < len(ids):  # a part of a long prompt fills its pass alone
            self.queue[slot] = ids, start + count, end
            self._hold(slot, start + count)
            return
        for slot, _, _ in spans:
            ids, _, end = self.queue.pop(slot)
            self.left[slot] = end - len(ids) - 1
            self.lengths[slot], self.last[slot] = len(ids), end - 1
        ends = torch.tensor([counts, [slot for slot, _, _ in spans]], device="cpu")
        counts, slots = ends.to(tokens.device, non_blocking=True)
        # As many rows as in a step, which repeat those that end here: their number changes no
        # rounding.
        each = self.slots % len(spans)
        self._draw(self.engine.head(features[counts.cumsum(0)[each] - 1]), slots[each])

    def _advance(self) -> None:
        """Computes what follows the newest token of every slot, and draws the next."""
        self.returned = False
        self.verified = self.watch is not None and self.watch.pays(self.left)
        self.left = [max(0, n - 1) for n in self.left]
        forward = self._verify if self.verified else self._forward
        if self.engine.capturable:
            if self.verified not in self.graphs:
                self._capture(forward)
            self.graphs[self.verified].replay()
        else:
            forward()

    def _forward(self) -> None:
        positions = self.lengths - 1
        tokens = self.tokens[self.slots, positions]
        self._draw(self.engine.step(tokens, positions), self.slots)

    def _verify(self) -> None:
        """As many plain steps at once as guesses are right, and one more. What follows a guess is
        drawn as if it and those before it were right: with the random number of its place, and
        after their tokens."""
        places = self.lengths[:, None] + self.rows  # (B, each), of what is drawn
        rows = self.tokens.gather(1, places - 1)
        # What lies beyond the end of a sequence is computed in its last place, and not read.
        positions = torch.minimum(places - 1, self.last[:, None])
        logits = self.engine.step(rows.flatten(), positions.flatten())
        sequences = self.tokens[:, None].expand(-1, self.each, -1).flatten(0, 1)
        uniform = self.uniform.gather(1, places).flatten()
        drawn = self.pick(logits, sequences, places.flatten(), uniform).view(rows.shape)
        right = (drawn[:, :-1] == rows[:, 1:]).cumprod(1).sum(1)

        self.newest.copy_(drawn)
        drawn = drawn.clamp(min=0)
        if self.logprobs is not None:
            self.logprobs.copy_(log_probabilities(logits, drawn.flatten()).view(rows.shape))
        self.tokens.scatter_(1, places, drawn)
        self.lengths.copy_(torch.minimum(self.lengths + right + 1, self.last + 1))
        self.right.copy_(right)
        self.counts.copy_(right + 1)
        self.found.copy_(guess(self.tokens, self.lengths, self.each - 1))

    def _draw(self, logits: Tensor, slots: Tensor) -> None:
        """Draws what follows the sequences in slots (n,) from logits (n, V)."""
        tokens, lengths = self.tokens[slots], self.lengths[slots]
        place = torch.minimum(lengths, self.last[slots])
        drawn = self.pick(logits, tokens, lengths, self.uniform[slots, place])
        self.newest[slots, 0] = drawn
        drawn = drawn.clamp(min=0)
        if self.logprobs is not None:
            self.logprobs[slots, 0] = log_probabilities(logits, drawn)
        self.tokens[slots, place] = drawn
        self.lengths[slots] = place + 1
        if self.watch:
            guessed = tokens.gather(1, place[:, None])[:, 0]
            self.right[slots] = (drawn == guessed).long()
            self.counts.index_fill_(0, slots, 1)
            self.found.copy_(guess(self.tokens, self.lengths, self.each - 1))

    def _see(
        self,
        counts: list[int],
        right: list[int],
        found: list[int],
        verified: bool,
        queued: set[int],
    ) -> None:
        """Has the watch take what a step told of the sequences that run. Those that were queued
        before it had their first token of a prefill."""
        tokens, guessed = [], []
        for slot in {*range(len(self.left))} - {*self.queue}:
            tested = self.each - 1 if verified else 1
            outcome = self.watch.see(slot, right[slot], tested, found[slot] > 0)
            if self.left[slot] and slot not in queued:
                tokens.append(counts[slot])
                guessed.append(outcome)
            self.left[slot] = max(0, self.left[slot] - counts[slot] + 1)
        if tokens:
            self.watch.spend(verified, tokens, guessed)

    def _capture(self, forward: Callable[[], None]) -> None:
        """Adds a step to the graphs. It runs to compile and warm up, which draws tokens: these and
        lengths are put back, and the rest is overwritten when the graph runs."""
        state = [self.tokens, self.lengths]
        before = [tensor.clone() for tensor in state]
        self.graphs[self.verified] = captured(forward, warm_up=True)
        if len(self.graphs) == 2:
            self.watch.cost = milliseconds(self.graphs[True]) / milliseconds(self.graphs[False])
        for tensor, value in zip(state, before):
            tensor.copy_(value)


def milliseconds(graph: torch.cuda.CUDAGraph) -> float:
    """That a graph takes, from its second run on."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
