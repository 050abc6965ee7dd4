"""The fast engine: prefill and decode steps of an int8 model on CUDA, out of `kernels`.

It computes what `Transformer` does in a few launches a layer instead of some thirty, with a float32
residual stream. The layers of a prompt are LLM.int8(). A decode step, which is bound by reading the
weights, rounds activations less, to two int8 digits, as a prompt's output head does. Each row's
result is the same bit for bit whatever runs beside it, and wherever a prompt is cut. Nothing waits
for the host: a CUDA graph can hold a step, or a pass of a prompt.
"""

from contextlib import closing
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from llama.buffers import PACK, PACK_ALONE, DecodeBuffers, Pair, PrefillBuffers
from llama.int8 import join
from llama.kernels.attention import attend as attend_one
from llama.kernels.few_rows import linear, split
from llama.kernels.launch import captured, repeating
from llama.kernels.llm_int8 import mixed_scaled_mm, vectorwise_quant
from llama.kernels.prefill_attention import attend, tiles_of
from llama.kernels.rotary import places_of, rotate
from llama.model import KVCache, RMSNorm, Span, Transformer

# A step takes as long as reading the weights and, a row, 1 / ROWS of that: of 13B 4.1 ms for 1 row,
# 4.8 for 8 and 7.2 for 32 (H200, 2026-11-27). Guesses and draws add to one with several rows a
# sequence.
ROWS = 40
GUESSES = 1.05

_first_tokens: WeakKeyDictionary[Transformer, Pair] = WeakKeyDictionary()


class FusedEngine:
    """The methods of `decode.TorchEngine`, for the sequences of a cache."""

    capturable = True

    def __init__(self, model: Transformer, cache: KVCache, each: int = 1):
        self.model, self.cache = model, cache
        self.layers = [[join(group) for group in layer.linears()] for layer in model.layers]
        self.output = join([model.output])
        slots, S = cache.k.shape[1:3]
        rows, device = min(PACK_ALONE, slots * S), cache.k.device
        self.pass_buffers = PrefillBuffers(model.args, rows, slots, device)
        self.step_buffers = DecodeBuffers(model.args, slots * each, device)
        # Of passes of up to PACK tokens, by their padded length, from the second of that length on.
        self.graphs: dict[int, torch.cuda.CUDAGraph | None] = {}

    def prefill(self, tokens: Tensor, spans: list[Span]) -> Tensor:
        """The residual stream (T, D) float32 after all layers, which the head reads, of tokens (T,)
        that are the spans of several sequences, side by side. What comes before a span is in the
        cache; its own keys and values are added."""
        count, buffers = len(tokens), self.pass_buffers.first(len(tokens))
        buffers.tokens[:count] = tokens
        places = places_of(spans, self.cache.k.shape[2], len(buffers.places))
        buffers.places.copy_(places, non_blocking=True)
        buffers.tiles.copy_(tiles_of(spans, len(buffers.tiles)), non_blocking=True)
        buffers.residual.copy_(self.model.tok_embeddings.weight[buffers.tokens])
        layers, T = partial(self._layers, buffers), len(buffers.tokens)
        if T > PACK or not tokens.is_cuda or T not in self.graphs:
            self.graphs[T] = None
            layers()
        else:
            self.graphs[T] = self.graphs[T] or captured(layers)
            self.graphs[T].replay()
        return buffers.residual[:count].clone()

    def _layers(self, buffers: PrefillBuffers) -> None:
        """All layers of a pass, whose residual stream begins as the embeddings of its tokens."""
        model, cache, bos = self.model, self.cache, self.model.args.bos_id
        tokens, places, tiles = buffers.tokens, buffers.places, buffers.tiles
        residual, qkv, w13, heads = buffers.residual, buffers.qkv, buffers.w13, buffers.heads

        def multiply(x, weights, out, then, codes, before="nothing", norm=None):
            norm = norm and (norm.weight, norm.eps)
            mixed_scaled_mm(vectorwise_quant(x, codes, before, norm), weights, out, then)

        caches, first = zip(cache.k, cache.v), zip(*first_token(model))
        lists = buffers.dim_lists.zero_().unflatten(0, (-1, 3)), buffers.hidden_lists.zero_()
        layers = zip(model.layers, self.layers, caches, first, *lists)
        with closing(repeating(layers)) as layers:
            for layer, (wqkv, wo, w1w3, w2), caches, first, lists, hidden_list in layers:
                a, b, c = ((*buffers.dim, own) for own in lists)
                multiply(residual, wqkv, qkv, "store", a, "rms_norm", layer.attention_norm)
                rotate(qkv, caches, places, model.rotation, tokens, bos, first)
                attend(qkv, caches, tiles, heads)
                multiply(heads, wo, residual, "add", b)
                multiply(residual, w1w3, w13, "store", c, "rms_norm", layer.ffn_norm)
                multiply(w13, w2, residual, "add", (*buffers.hidden, hidden_list), "swiglu")

    def head(self, features: Tensor) -> Tensor:
        """Float32 logits (T, V) of what follows each of some tokens."""
        logits = torch.empty(len(features), self.model.args.vocab_size, device=features.device)
        linear(normalized(features, self.model.norm), self.output, logits, "store")
        return logits

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits (B, V) float32, always the same memory, that follow tokens (B,) at positions (B,),
        the same number of each sequence, side by side."""
        model, buffers, rows = self.model, self.step_buffers, len(tokens)
        residual = model.tok_embeddings.weight[tokens].float()
        q, hidden, logits = buffers.q[:rows], buffers.hidden[:rows], buffers.logits[:rows]
        angles, caches = model.rotation[positions], (self.cache.k, self.cache.v)
        for layer, (wqkv, wo, w1w3, w2), *cache in zip(model.layers, self.layers, *caches):
            x = normalized(residual, layer.attention_norm)
            linear(x, wqkv, q, "rotate", (cache, positions, angles))
            linear(attend_one(q, cache, positions, buffers.attend), wo, residual, "add")
            linear(normalized(residual, layer.ffn_norm), w1w3, hidden, "swiglu")
            linear(split(hidden), w2, residual, "add")
        linear(normalized(residual, model.norm), self.output, logits, "store")
        return logits

    def cost(self, each: int) -> float:
        """Plain steps that a step with `each` rows a sequence takes, before it is measured."""
        slots = self.cache.k.shape[1]
        return GUESSES * (ROWS + each * slots) / (ROWS + slots)


def first_token(model: Transformer) -> Pair:
    """Keys and values (n_layers, Hkv, K) fp16 of BOS as the first token, computed once a model. All
    texts begin with it and all their tokens attend to it, so that its rounding shows in each: a
    decode step rounds it less than a prefill would."""
    if model not in _first_tokens:
        cache = KVCache(model.args, 1, 1, torch.float16, model.tok_embeddings.weight.device)
        zero = torch.zeros(1, dtype=torch.long, device=cache.k.device)
        FusedEngine(model, cache).step(zero + model.args.bos_id, zero)
        _first_tokens[model] = cache.k[:, 0, 0], cache.v[:, 0, 0]
    return _first_tokens[model]


def normalized(x: Tensor, norm: RMSNorm) -> Pair:
    return split(x, (norm.weight, norm.eps))
