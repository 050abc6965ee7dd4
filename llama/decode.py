"""How is one token a row decoded fast? A step of an int8 model on CUDA, out of `kernels`.

The same mathematics as `Transformer.forward` with T = 1, in seven launches a layer (eleven for
several rows) instead of some thirty. The residual stream is float32; int8 weights are multiplied by
fp16 activations or by two int8 digits of them, finer than the single digit of LLM.int8(). Every
row's result is computed from that row alone, bit for bit, whatever stands beside it.

Nothing here waits for the host, so `graph` can capture a step.
"""

import torch
from torch import Tensor

from llama import kernels
from llama.int8 import join
from llama.model import KVCache, Transformer


class FusedStep:
    """step(tokens (B,), positions (B,)) -> float32 logits (B, V), the same tensor at each call."""

    def __init__(self, model: Transformer, cache: KVCache):
        args, B, device = model.args, cache.batch, cache.k.device
        self.model, self.cache = model, cache
        self.layers = [[join(group) for group in layer.linears()] for layer in model.layers]
        self.head = join([model.output])
        half = {"dtype": torch.float16, "device": device}
        self.x = torch.empty(B, args.dim, **half)
        self.qkv = torch.empty(B, len(self.layers[0][0][1]), device=device)
        self.heads = torch.empty(B, args.dim, **half)
        self.hidden = torch.empty(B, args.hidden_dim, **half)
        self.logits = torch.empty(B, args.vocab_size, device=device)
        self.parts = kernels.linear_buffers(
            B, max(args.vocab_size, 3 * args.dim, args.hidden_dim), device
        )
        self.splits = kernels.attend_buffers(B, args.n_heads, args.head_dim, device)

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        model, x, parts = self.model, self.x, self.parts
        eps, rotation = model.args.norm_eps, model.rotation
        residual = model.tok_embeddings.weight[tokens].float()
        for i, (layer, weights) in enumerate(zip(model.layers, self.layers)):
            qkv, wo, w13, w2 = weights
            kernels.rms_norm(residual, layer.attention_norm.weight, eps, x)
            kernels.linear(x, *qkv, self.qkv, "store", parts)
            k, v = self.cache.k[i], self.cache.v[i]
            kernels.attend(self.qkv, k, v, positions, rotation, self.heads, self.splits)
            kernels.linear(self.heads, *wo, residual, "add", parts)
            kernels.rms_norm(residual, layer.ffn_norm.weight, eps, x)
            kernels.linear(x, *w13, self.hidden, "swiglu", parts)
            kernels.linear(self.hidden, *w2, residual, "add", parts)
        kernels.rms_norm(residual, model.norm.weight, eps, x)
        kernels.linear(x, *self.head, self.logits, "store", parts)
        return self.logits
