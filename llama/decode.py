"""The decoder: a running batch of sequences, each in a slot with its own length.

`begin(slot, ids, uniform)` queues a sequence for a slot, also for one whose sequence has ended;
`step()` returns the newest token of every slot. Between two steps of the sequences that run, one
pass prefills the next of the queue: at most PACK tokens, of several short prompts or of one long
one, so that is how long the others wait. A slot's tokens are drawn from its own logits with its own
random numbers, so that no sequence depends on the others.

Two engines compute the logits, with the same methods: `TorchEngine` by the model's own forward, and
`fused.FusedEngine` out of our kernels. Where the engine allows it, a step becomes a CUDA graph:
launched one by one from Python, its kernels would take longer to launch than to run.
"""

from collections.abc import Callable, Iterator
from itertools import takewhile

import torch
from torch import Tensor

from llama.buffers import PACK
from llama.int8 import Int8Linear
from llama.model import KVCache, Span, Transformer

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
        """What the head reads (T, D), of tokens (T,) that are the spans of several sequences, side
        by side. What comes before a span is in the cache; its own keys and values are added."""
        features = []
        parts = tokens.split([count for *_, count in spans])
        for part, (slot, start, count) in zip(parts, spans):
            cache = self.cache.slot(slot, start + count)
            features += self.model.features(part[None], start, cache)
        return torch.cat(features)

    def head(self, features: Tensor) -> Tensor:
        """Float32 logits (T, V) of what follows each of some tokens."""
        return self.model.output(features).float()

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Float32 logits (B, V) of what follows tokens (B,) at positions (B,)."""
        return self.model(tokens[:, None], positions, self.cache)


def make_engine(model: Transformer, name: str, slots: int, length: int):
    """The engine of this name, with a cache for so many sequences of that length."""
    weight = model.tok_embeddings.weight
    cache = KVCache(model.args, slots, length, weight.dtype, weight.device)
    if name == "triton" and weight.is_cuda and isinstance(model.output, Int8Linear):
        from llama.fused import FusedEngine  # Triton comes with torch's CUDA build alone

        return FusedEngine(model, cache)
    return TorchEngine(model, cache)


def in_passes(engine, ids: list[int]) -> Iterator[Tensor]:
    """Prefills slot 0 with ids, PACK at a time; yields what the head reads of each pass."""
    for start in range(0, len(ids), PACK):
        part = torch.tensor(ids[start : start + PACK], device=engine.cache.k.device)
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
    ):
        self.engine, self.pick = make_engine(model, engine, slots, length), pick
        whole = {"dtype": torch.long, "device": model.tok_embeddings.weight.device}
        single = whole | {"dtype": torch.float32}
        self.slots = torch.arange(slots, **whole)
        self.tokens = torch.zeros(slots, length, **whole)
        self.uniform = torch.zeros(slots, length, **single)  # draws the token at the same place
        self.lengths = torch.ones(slots, **whole)
        self.last = torch.zeros(slots, **whole)  # the last place that each sequence may fill
        self.newest = torch.zeros(slots, **whole)
        self.logprobs = torch.zeros(slots, **single) if logprobs else None
        self.left = [0] * slots  # tokens still to be drawn
        # By slot: ids of which not all are in the cache yet, how many are, and where the sequence
        # ends. Such a slot has no newest token.
        self.queue: dict[int, tuple[list[int], int, int]] = {}
        self.returned = False  # the newest tokens
        self.graph: torch.cuda.CUDAGraph | None = None

    def begin(self, slot: int, ids: list[int], uniform: Tensor, start: int = 0) -> None:
        """Queues a sequence for a slot; the first `start` of its ids are in the slot's cache
        already. uniform (n,), on the host, has a number in [0, 1) for each token to come, of which
        there is at least one."""
        end = len(ids) + len(uniform)
        self.left[slot] = 0
        self._hold(slot, start)
        # The host does not wait for the step that runs: this shall come right after it.
        self.uniform[slot, len(ids) : end].copy_(uniform, non_blocking=True)
        self.queue[slot] = ids, start, end

    def share(self, ids: list[int]) -> None:
        """Prefills what all prompts begin with and copies its keys and values to every slot. No
        sequence writes over what it begins with, so they are there for later ones in a slot too:
        pass start=len(ids) to begin(). To be called before the first sequence."""
        length = len(ids)
        for _ in in_passes(self.engine, ids):
            pass
        for cache in (self.engine.cache.k, self.engine.cache.v):
            cache[:, 1:, :length] = cache[:, :1, :length]
        self.tokens[:, :length] = torch.tensor(ids, device=self.tokens.device)
        self._hold(slice(None), length)

    def cached(self, slot: int, ids: list[int]) -> int:
        """How many of ids, the last not among them, a slot's cache holds from an earlier sequence
        that begins alike. Its newest token is never in it."""
        there = self.tokens[slot, : self.lengths[slot] - 1].tolist()
        return len([*takewhile(lambda pair: pair[0] == pair[1], zip(there, ids[:-1]))])

    def step(self) -> list[list]:
        """The newest token of every slot that is not in the queue, NOT_FINITE where its logits were
        not all finite; with logprobs, a second list has theirs. A sequence that has ended goes on
        in its last place: nobody reads it. With a CUDA graph the next step already runs meanwhile;
        the first tokens do not wait until it is captured."""
        if self.returned and any(self.left):
            self._advance()
        if self.queue:
            self._prefill()
        drawn = [self.newest] if self.logprobs is None else [self.newest, self.logprobs]
        drawn = [values.to("cpu", non_blocking=True) for values in drawn]
        arrived = torch.cuda.current_stream().record_event() if self.newest.is_cuda else None
        self.returned = True
        if self.graph and any(self.left):
            self._advance()
        if arrived:
            arrived.synchronize()
        return [values.tolist() for values in drawn]

    def close(self) -> None:
        """Lets go of cache and graph, though the frames of an error may still hold this decoder."""
        vars(self.engine).clear()
        vars(self).clear()

    def _hold(self, slots: int | slice, start: int) -> None:
        """Has steps, which run over all slots, write to place `start` alone, which the next prefill
        overwrites; what is before it is in the cache."""
        self.lengths[slots], self.last[slots] = start + 1, start

    def _prefill(self) -> None:
        """One pass over the first of the queue. A prompt is cut at every PACK tokens of its own,
        whatever its company, and draws its first token in the pass that ends it."""
        spans, tokens = [], []
        for slot, (ids, start, _) in self.queue.items():
            part = ids[start : start + PACK]
            if len(tokens) + len(part) > PACK:
                break
            spans.append((slot, start, len(part)))
            tokens += part
        tokens = torch.tensor(tokens, device="cpu").to(self.tokens.device, non_blocking=True)
        counts = [count for _, _, count in spans]
        for (slot, start, count), part in zip(spans, tokens.split(counts)):
            self.tokens[slot, start : start + count] = part
        features = self.engine.prefill(tokens, spans)

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
        # As many rows as in a step, some of them twice: how many end here changes no rounding.
        each = self.slots % len(spans)
        self._draw(self.engine.head(features[counts.cumsum(0)[each] - 1]), slots[each])

    def _advance(self) -> None:
        """Computes what follows the newest token of every slot, and draws the next."""
        self.returned = False
        self.left = [max(0, n - 1) for n in self.left]
        if self.engine.capturable:
            self.graph = self.graph or self._capture()
            self.graph.replay()
        else:
            self._forward()

    def _forward(self) -> None:
        tokens, positions = self.newest.clamp(min=0), self.lengths - 1
        self._draw(self.engine.step(tokens, positions), self.slots)

    def _draw(self, logits: Tensor, slots: Tensor) -> None:
        """Draws what follows the sequences in slots (n,) from logits (n, V)."""
        tokens, lengths = self.tokens[slots], self.lengths[slots]
        place = torch.minimum(lengths, self.last[slots])
        drawn = self.pick(logits, tokens, lengths, self.uniform[slots, place])
        self.newest[slots] = drawn
        drawn = drawn.clamp(min=0)
        if self.logprobs is not None:
            self.logprobs[slots] = logits.log_softmax(-1).gather(1, drawn[:, None])[:, 0]
        self.tokens[slots, place] = drawn
        self.lengths[slots] = place + 1

    def _capture(self) -> torch.cuda.CUDAGraph:
        """A step as a CUDA graph. It runs once to compile and warm up, and what it changed is put
        back. Other threads may use the GPU meanwhile."""
        state = [self.tokens, self.lengths, self.newest]
        before = [tensor.clone() for tensor in state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            try:
                graph.capture_begin(capture_error_mode="thread_local")
                self._forward()
            finally:  # after Ctrl-C, too: a stream left capturing would refuse all other work
                if torch.cuda.is_current_stream_capturing():
                    graph.capture_end()
        for tensor, value in zip(state, before):
            tensor.copy_(value)
        return graph
