"""The fast engine: prefill and decode steps of an int8 model on CUDA, out of `kernels`.

It computes what `Transformer` does in a few launches a layer instead of some thirty, with a float32
residual stream. A prompt is LLM.int8(). A decode step, which is bound by reading the weights,
rounds activations less, to two int8 digits. Each row's result is the same bit for bit whatever runs
beside it. Nothing waits for the host: a CUDA graph can hold a step.
"""

from contextlib import closing

import torch
from torch import Tensor

from llama.buffers import DecodeBuffers, Pair, PrefillBuffers
from llama.int8 import OUTLIER_THRESHOLD, join
from llama.kernels.attention import attend as attend_one
from llama.kernels.few_rows import linear, split
from llama.kernels.launch import repeating
from llama.kernels.llm_int8 import mixed_scaled_mm, vectorwise_quant
from llama.kernels.rotary import rotate
from llama.model import KVCache, RMSNorm, Transformer, attend


class FusedEngine:
    """The methods of `decode.TorchEngine`, for the sequences of a cache."""

    capturable = True

    def __init__(self, model: Transformer, cache: KVCache):
        self.model, self.cache = model, cache
        self.layers = [[join(group) for group in layer.linears()] for layer in model.layers]
        self.output = join([model.output])
        self.buffers = DecodeBuffers(model.args, cache.k.shape[1], cache.k.device)

    def prefill(self, tokens: Tensor, spans: list[tuple[int, int, int]]) -> Tensor:
        parts = tokens.split([count for _, _, count in spans])
        return torch.cat(
            [self._prefill(s, part, start) for part, (s, start, _) in zip(parts, spans)]
        )

    def _prefill(self, slot: int, tokens: Tensor, start: int) -> Tensor:
        """Runs tokens (T,) of a sequence from position `start` on, those before it being in the
        cache, and fills the cache. Returns the residual stream (T, D) float32 after all layers,
        which the head reads."""
        args, rotation = self.model.args, self.model.rotation[start:]
        end, mask = start + len(tokens), None
        if start:  # (1, 1, T, S): each token sees the cache up to itself
            seen = torch.arange(end, device=tokens.device)
            mask = (seen <= seen[start:, None])[None, None]
        buffers = PrefillBuffers(args, len(tokens), tokens.device)
        residual, qkv, w13 = buffers.residual, buffers.qkv, buffers.w13
        residual.copy_(self.model.tok_embeddings.weight[tokens])
        heads = args.n_heads, args.kv_heads, args.kv_heads
        q, k, v = qkv.view(1, len(tokens), -1, args.head_dim).split(heads, 2)

        def multiply(x, weights, out, then, codes, before="nothing", norm=None):
            rounded = vectorwise_quant(x, OUTLIER_THRESHOLD, codes, before, norm)
            mixed_scaled_mm(*rounded, weights, out, then)

        caches = self.cache.k[:, slot, :end], self.cache.v[:, slot, :end]
        new = (cache[:, start:] for cache in caches)
        layers = zip(self.model.layers, self.layers, *caches, *new)
        with closing(repeating(layers)) as alike:
            for layer, (wqkv, wo, w1w3, w2), keys, values, *written in alike:
                norm = layer.attention_norm.weight, args.norm_eps
                multiply(residual, wqkv, qkv, "store", buffers.dim, "rms_norm", norm)
                rotate(qkv, *written, rotation)
                if start:
                    k, v = keys[None], values[None]
                out = attend(q, k, v, mask).reshape(len(tokens), args.dim)
                multiply(out, wo, residual, "add", buffers.dim)
                norm = layer.ffn_norm.weight, args.norm_eps
                multiply(residual, w1w3, w13, "store", buffers.dim, "rms_norm", norm)
                multiply(w13, w2, residual, "add", buffers.hidden, "swiglu")
        return residual

    def head(self, features: Tensor) -> Tensor:
        """Float32 logits (T, V) of what follows each of some tokens."""
        logits = torch.empty(len(features), self.model.args.vocab_size, device=features.device)
        self._linear(normalized(features, self.model.norm), self.output, logits, "store")
        return logits

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits (B, V) float32, always one tensor, that follow tokens (B,) at positions (B,)."""
        model, buffers = self.model, self.buffers
        residual = model.tok_embeddings.weight[tokens].float()
        caches = self.cache.k, self.cache.v
        for layer, (wqkv, wo, w1w3, w2), *cache in zip(model.layers, self.layers, *caches):
            self._linear(normalized(residual, layer.attention_norm), wqkv, buffers.qkv, "store")
            heads = attend_one(buffers.qkv, cache, positions, model.rotation, buffers.attend)
            self._linear(heads, wo, residual, "add")
            self._linear(normalized(residual, layer.ffn_norm), w1w3, buffers.hidden, "swiglu")
            self._linear(split(buffers.hidden), w2, residual, "add")
        self._linear(normalized(residual, model.norm), self.output, buffers.logits, "store")
        return buffers.logits

    def _linear(self, x: Pair, weights: Pair, out: Tensor, then: str) -> None:
        linear(x, weights, out, then, self.buffers.linear)


def normalized(x: Tensor, norm: RMSNorm) -> Pair:
    return split(x, (norm.weight, norm.eps))
