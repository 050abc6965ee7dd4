"""The decoder: a running batch of sequences, each in a slot with its own length.

`prefill(slot, ids, uniform)` begins a sequence while those in the other slots wait, also in a slot
whose sequence has ended; `step()` returns the newest token of every slot. A slot's tokens are drawn
from its own logits with its own random numbers, so that no sequence depends on the others.

Two engines compute the logits, with the same methods: `TorchEngine` by the model's own forward, and
`fused.FusedEngine` out of our kernels. Where the engine allows it, a step becomes a CUDA graph:
launched one by one from Python, its kernels would take longer to launch than to run.
"""

from collections.abc import Callable
from itertools import takewhile

import torch
from torch import Tensor

from llama.int8 import Int8Linear
from llama.model import KVCache, Transformer

ENGINES = ("triton", "bnb")

# A slot, the position of its first token and how many: those before it are in its cache already.
Span = tuple[int, int, int]
# logits (B, V), tokens (B, S), lengths (B,), uniform (B,) in [0, 1) -> the next token (B,)
Pick = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class TorchEngine:
    """Computes with the model's own forward: fp16, float32, and int8 by bitsandbytes' product."""

    def __init__(self, model: Transformer, cache: KVCache):
        self.model, self.cache = model, cache
        # bitsandbytes asks the host whether there are outliers, which a CUDA graph cannot hold.
        self.capturable = cache.k.is_cuda and not isinstance(model.output, Int8Linear)

    def prefill(self, tokens: Tensor, spans: list[Span]) -> Tensor:
        """What the head reads (T, D) of tokens (T,), which spans divide among sequences; fills the
        cache."""
        parts = tokens.split([count for _, _, count in spans])
        features = [
            self.model.features(part[None], start, self.cache.slot(slot, start + count))[0]
            for part, (slot, start, count) in zip(parts, spans)
        ]
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
        self.tokens = torch.zeros(slots, length, **whole)
        self.uniform = torch.zeros(slots, length, **single)  # draws the token at the same place
        self.lengths = torch.ones(slots, **whole)
        self.last = torch.zeros(slots, **whole)  # the last place that each sequence may fill
        self.newest = torch.zeros(slots, **whole)
        self.logprobs = torch.zeros(slots, **single) if logprobs else None
        self.left = [0] * slots  # tokens still to be drawn
        self.due = False  # the newest tokens were returned, others are to follow
        self.graph: torch.cuda.CUDAGraph | None = None

    def prefill(self, slot: int, ids: list[int], uniform: Tensor, start: int = 0) -> None:
        """Begins a sequence with ids in a slot and draws its first token; the first `start` of them
        are in the slot's cache already. uniform (n,), on the host, has a number in [0, 1) for each
        token to come, of which there is at least one."""
        self.left[slot] = 0
        if self.due and any(self.left):
            self._advance()
        self.due = False
        length, end = len(ids), len(ids) + len(uniform)
        self.lengths[slot] = start + 1  # should what follows be interrupted: see cached()
        # The host does not wait for the step that runs: this shall come right after it.
        self.tokens[slot, :length].copy_(torch.tensor(ids, device="cpu"), non_blocking=True)
        self.uniform[slot, length:end].copy_(uniform, non_blocking=True)
        self.left[slot] = len(uniform) - 1
        features = self.engine.prefill(
            self.tokens[slot, start:length], [(slot, start, length - start)]
        )
        self.lengths[slot], self.last[slot] = length, end - 1
        self._draw(self.engine.head(features[-1:]), slice(slot, slot + 1))

    def share(self, ids: list[int]) -> None:
        """Prefills what all prompts begin with and copies its keys and values to every slot. No
        sequence writes over what it begins with, so they are there for later ones in a slot too:
        pass start=len(ids) to prefill(). To be called before the first sequence."""
        self.engine.prefill(torch.tensor(ids, device=self.tokens.device), [(0, 0, len(ids))])
        for cache in (self.engine.cache.k, self.engine.cache.v):
            cache[:, 1:, : len(ids)] = cache[:, :1, : len(ids)]

    def cached(self, slot: int, ids: list[int]) -> int:
        """How many of ids, the last not among them, a slot's cache holds from an earlier sequence
        that begins alike. Its newest token is never in it."""
        there = self.tokens[slot, : self.lengths[slot] - 1].tolist()
        return len([*takewhile(lambda pair: pair[0] == pair[1], zip(there, ids[:-1]))])

    def step(self) -> list[list]:
        """The newest token of every slot, NOT_FINITE where its logits were not all finite; with
        logprobs, a second list has theirs. A sequence that has ended goes on in its last place:
        nobody reads it. With a CUDA graph the next step already runs meanwhile."""
        if self.due:
            self._advance()
        drawn = [self.newest] if self.logprobs is None else [self.newest, self.logprobs]
        drawn = [values.to("cpu", non_blocking=True) for values in drawn]
        arrived = torch.cuda.current_stream().record_event() if self.newest.is_cuda else None
        self.due = max(self.left) > 0
        if self.due and self.engine.capturable:
            self._advance()
        if arrived:
            arrived.synchronize()
        return [values.tolist() for values in drawn]

    def close(self) -> None:
        """Lets go of cache and graph, though the frames of an error may still hold this decoder."""
        vars(self.engine).clear()
        vars(self).clear()

    def _advance(self) -> None:
        """Computes what follows the newest token of every slot, and draws the next."""
        self.due = False
        self.left = [max(0, n - 1) for n in self.left]
        if self.engine.capturable:
            self.graph = self.graph or self._capture()
            self.graph.replay()
        else:
            self._forward()

    def _forward(self) -> None:
        tokens, positions = self.newest.clamp(min=0), self.lengths - 1
        self._draw(self.engine.step(tokens, positions), slice(None))

    def _draw(self, logits: Tensor, slots: slice) -> None:
        tokens, lengths = self.tokens[slots], self.lengths[slots]
        place = torch.minimum(lengths, self.last[slots])[:, None]
        uniform = self.uniform[slots].gather(1, place)[:, 0]
        drawn = self.pick(logits, tokens, lengths, uniform)
        self.newest[slots] = drawn
        drawn = drawn.clamp(min=0)[:, None]
        if self.logprobs is not None:
            self.logprobs[slots] = logits.log_softmax(-1).gather(1, drawn)[:, 0]
        tokens.scatter_(1, place, drawn)
        lengths.copy_(place[:, 0] + 1)

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
