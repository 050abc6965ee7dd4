"""The fast engine: prefill and decode steps of an int8 model on CUDA, out of `kernels`.

It computes what `Transformer` does in a few launches a layer instead of some thirty, with a float32
residual stream. The layers of a prompt are LLM.int8(). A decode step, which is bound by reading the
weights, rounds activations less, to two int8 digits, as a prompt's output head does. Each row's
result is the same bit for bit whatever runs beside it, and wherever a prompt is cut. Nothing waits
for the host: a CUDA graph can hold a step.
"""

from contextlib import closing
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from llama.buffers import DecodeBuffers, Pair, PrefillBuffers
from llama.int8 import join
from llama.kernels.attention import attend as attend_one
from llama.kernels.few_rows import linear, split
from llama.kernels.launch import repeating
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
        self.buffers = DecodeBuffers(model.args, cache.k.shape[1] * each, cache.k.device)

    def prefill(self, tokens: Tensor, spans: list[Span]) -> Tensor:
        """The residual stream (T, D) float32 after all layers, which the head reads, of tokens (T,)
        that are the spans of several sequences, side by side. What comes before a span is in the
        cache; its own keys and values are added."""
        args, rotation, device = self.model.args, self.model.rotation, tokens.device
        tiles = tiles_of(spans, device)
        places = places_of(spans, self.cache.k.shape[2], device)
        buffers = PrefillBuffers(args, len(tokens), device)
        residual, qkv, w13, heads = buffers.residual, buffers.qkv, buffers.w13, buffers.heads
        residual.copy_(self.model.tok_embeddings.weight[tokens])

        def multiply(x, weights, out, then, codes, before="nothing", norm=None):
            mixed_scaled_mm(vectorwise_quant(x, codes, before, norm), weights, out, then)

        caches, first = zip(self.cache.k, self.cache.v), zip(*first_token(self.model))
        with closing(repeating(zip(self.model.layers, self.layers, caches, first))) as layers:
            for layer, (wqkv, wo, w1w3, w2), caches, first in layers:
                norm = layer.attention_norm.weight, args.norm_eps
                multiply(residual, wqkv, qkv, "store", buffers.dim, "rms_norm", norm)
                rotate(qkv, caches, places, rotation, tokens, args.bos_id, first)
                attend(qkv, caches, tiles, heads)
                multiply(heads, wo, residual, "add", buffers.dim)
                norm = layer.ffn_norm.weight, args.norm_eps
                multiply(residual, w1w3, w13, "store", buffers.dim, "rms_norm", norm)
                multiply(w13, w2, residual, "add", buffers.hidden, "swiglu")
        return residual

    def head(self, features: Tensor) -> Tensor:
        """Float32 logits (T, V) of what follows each of some tokens."""
        logits = torch.empty(len(features), self.model.args.vocab_size, device=features.device)
        linear(normalized(features, self.model.norm), self.output, logits, "store")
        return logits

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits (B, V) float32, always the same memory, that follow tokens (B,) at positions (B,),
        the same number of each sequence, side by side."""
        model, buffers, rows = self.model, self.buffers, len(tokens)
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
