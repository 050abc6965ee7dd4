"""How does an int8 model run fast on CUDA? Prefill and decode steps out of `kernels`.

The same mathematics as `Transformer.forward`, with a float32 residual stream, in few launches a
layer instead of some thirty. A prompt is LLM.int8(): activations are rounded to int8 row by row,
those of 6.0 and more are kept in fp16. A decode step, which is bound by reading the weights, rounds
them less: fp16 in one row, two int8 digits in several. Every row's result is computed from that row
alone, bit for bit, whatever stands beside it.

Nothing here waits for the host, so `graph` can capture a step.
"""

import torch
from torch import Tensor

from llama import kernels
from llama.int8 import OUTLIER_THRESHOLD, join
from llama.model import KVCache, Transformer, attend


class Fused:
    """A model and the cache of B sequences, whose tensors are views of theirs."""

    def __init__(self, model: Transformer, cache: KVCache):
        args, B, device = model.args, cache.batch, cache.k.device
        self.model, self.cache = model, cache
        self.layers = [[join(group) for group in layer.linears()] for layer in model.layers]
        self.output = join([model.output])
        half = {"dtype": torch.float16, "device": device}
        self.qkv = torch.empty(B, len(self.layers[0][0][1]), device=device)
        self.heads = torch.empty(B, args.dim, **half)
        self.hidden = torch.empty(B, args.hidden_dim, **half)
        self.logits = torch.empty(B, args.vocab_size, device=device)
        self.parts = kernels.linear_buffers(
            B, max(args.vocab_size, 3 * args.dim, args.hidden_dim), device
        )
        self.splits = kernels.attend_buffers(B, args.n_heads, args.head_dim, device)

    def prefill(self, tokens: Tensor, row: int) -> Tensor:
        """Float32 logits (1, V) of what follows tokens (T,), sequence `row` from its beginning."""
        norm = self.model.norm.weight, self.model.norm.eps
        last = self.features(tokens, row)[-1:]
        logits = torch.empty_like(self.logits[:1])
        kernels.linear(last, *self.output, logits, "store", self.parts, norm)
        return logits

    def head(self, features: Tensor) -> Tensor:
        """Float32 logits (T, V) of what follows each of some tokens."""
        norm, (T, D) = self.model.norm, features.shape
        room = kernels.quant_room(T, D, features.device)
        codes = kernels.vectorwise_quant(
            features, OUTLIER_THRESHOLD, room, "rms_norm", norm.weight, norm.eps
        )
        logits = torch.empty(T, len(self.output[1]), device=features.device)
        kernels.mixed_scaled_mm(*codes, *self.output, logits, "store")
        return logits

    def features(self, tokens: Tensor, row: int) -> Tensor:
        """The residual stream (T, D) float32 after all layers; fills the cache."""
        args, rotation = self.model.args, self.model.rotation
        T, device = len(tokens), tokens.device
        residual = self.model.tok_embeddings.weight[tokens].float()
        half = {"dtype": torch.float16, "device": device}
        qkv, w13 = (torch.empty(T, len(self.layers[0][i][1]), **half) for i in (0, 2))
        heads = args.n_heads, args.kv_heads, args.kv_heads
        q, k, v = qkv.view(1, T, -1, args.head_dim).split(heads, 2)
        narrow = kernels.quant_room(T, args.dim, device)
        wide = kernels.quant_room(T, args.hidden_dim, device)
        launch = kernels.Repeated()

        def linear(x, weights, out, then, room, before="nothing", gain=None):
            codes = kernels.vectorwise_quant(
                x, OUTLIER_THRESHOLD, room, before, gain, args.norm_eps, launch
            )
            kernels.mixed_scaled_mm(*codes, *weights, out, then, launch)

        caches = self.cache.k[:, row], self.cache.v[:, row]
        for layer, weights, *cache in zip(self.model.layers, self.layers, *caches):
            launch.again()
            gain = layer.attention_norm.weight
            linear(residual, weights[0], qkv, "store", narrow, "rms_norm", gain)
            kernels.rotate(qkv, *cache, rotation, launch)
            out = attend(q, k, v, None).reshape(T, args.dim)
            linear(out, weights[1], residual, "add", narrow)
            gain = layer.ffn_norm.weight
            linear(residual, weights[2], w13, "store", narrow, "rms_norm", gain)
            linear(w13, weights[3], residual, "add", wide, "swiglu")
        return residual

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Float32 logits (B, V) of what follows tokens (B,) at positions (B,), the same tensor at
        each call."""
        model, parts = self.model, self.parts
        eps, rotation = model.args.norm_eps, model.rotation
        residual = model.tok_embeddings.weight[tokens].float()
        for i, (layer, weights) in enumerate(zip(model.layers, self.layers)):
            qkv, wo, w13, w2 = weights
            norm = layer.attention_norm.weight, eps
            kernels.linear(residual, *qkv, self.qkv, "store", parts, norm)
            k, v = self.cache.k[i], self.cache.v[i]
            kernels.attend(self.qkv, k, v, positions, rotation, self.heads, self.splits)
            kernels.linear(self.heads, *wo, residual, "add", parts)
            norm = layer.ffn_norm.weight, eps
            kernels.linear(residual, *w13, self.hidden, "swiglu", parts, norm)
            kernels.linear(self.hidden, *w2, residual, "add", parts)
        norm = model.norm.weight, eps
        kernels.linear(residual, *self.output, self.logits, "store", parts, norm)
        return self.logits
