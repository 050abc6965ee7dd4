"""The fast engine: prefill and decode steps of an int8 model on CUDA, out of `kernels`.

It computes what `Transformer` does in a few launches a layer instead of some thirty, with a float32
residual stream. The layers of a prompt are LLM.int8(). A decode step is bound by reading the
weights, so it can afford finer activations, of two int8 digits; a prompt's output head has them,
too. Each row's result is the same bit for bit whatever runs beside it, and wherever a prompt is
cut. Nothing waits for the host: a CUDA graph can hold a step, or a pass of a prompt.
"""

from contextlib import closing
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from llama.buffers import PACK, DecodeBuffers, Pair, PrefillBuffers
from llama.int8 import join
from llama.kernels.attention import attend as attend_one
from llama.kernels.few_rows import linear, split
from llama.kernels.launch import captured, repeating
from llama.kernels.llm_int8 import mixed_scaled_mm, vectorwise_quant
from llama.kernels.prefill_attention import attend, tiles_of
from llama.kernels.rotary import places_of, rotate
from llama.model import KVCache, RMSNorm, Span, Transformer

# A step takes as long as reading the weights, and 1 / ROWS of that for each row: of 13B 4.1 ms for
# 1 row, 4.8 for 8 and 7.2 for 32 (H200, 2026-11-27). Guesses and draws add to a step with several
# rows a sequence.
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
        (slots, S), device = cache.k.shape[1:3], cache.k.device
        self.pass_buffers = PrefillBuffers(model.args, slots, S, device)
        self.step_buffers = DecodeBuffers(model.args, slots * each, device)
        # By the padded length of a pass: None after a first one, which compiles; then its graph.
        self.graphs: dict[int, torch.cuda.CUDAGraph | None] = {}

    def prefill(self, tokens: Tensor, spans: list[Span]) -> Tensor:
        """The residual stream (T, D) float32 after all layers, which the head reads, of at most
        PACK_ALONE tokens (T,) that are the spans of different slots, side by side; the next pass
        overwrites it. What comes before a span is in the cache; its own keys and values are
        added."""
        count, buffers = len(tokens), self.pass_buffers.part(len(tokens))
        T = len(buffers.tokens)
        places = places_of(spans, self.cache.k.shape[2], T)
        buffers.places.copy_(places, non_blocking=True)
        buffers.tiles.copy_(tiles_of(spans, len(buffers.tiles)), non_blocking=True)
        buffers.tokens[:count] = tokens
        buffers.residual[:count] = self.model.tok_embeddings.weight[tokens]
        buffers.residual[count:], buffers.heads[count:] = 0, 0  # then nothing of them is large
        layers = partial(self._layers, buffers, first_token(self.model))
        if T in self.graphs:
            # The second pass of a length takes as long as the first, the next ones about half of it
            # for 128 tokens of 13B; from PACK on the host is no longer what takes longest.
            self.graphs[T] = self.graphs[T] or captured(layers, warm_up=False)
            self.graphs[T].replay()
        else:
            layers()
            if T <= PACK and tokens.is_cuda:
                self.graphs[T] = None
        return buffers.residual[:count]

    def _layers(self, buffers: PrefillBuffers, first: Pair) -> None:
        """All layers of a pass, whose residual stream begins as the embeddings of its tokens."""
        cache, rotation, bos = self.cache, self.model.rotation, self.model.args.bos_id
        tokens, places, tiles = buffers.tokens, buffers.places, buffers.tiles
        residual, qkv, w13, heads = buffers.residual, buffers.qkv, buffers.w13, buffers.heads

        def multiply(x, weights, out, then, digits, before="nothing", norm=None):
            norm = norm and (norm.weight, norm.eps)
            mixed_scaled_mm(vectorwise_quant(x, digits, before, norm), weights, out, then)

        lists = buffers.dim_lists.zero_(), buffers.hidden_lists.zero_()
        layers = zip(self.model.layers, self.layers, cache.k, cache.v, *first, *lists)
        with closing(repeating(layers)) as layers:
            for layer, (wqkv, wo, w1w3, w2), k, v, first_k, first_v, of_dim, of_hidden in layers:
                to_qkv, to_wo, to_w1w3 = ((*buffers.dim, own) for own in of_dim)
                to_w2 = *buffers.hidden, of_hidden
                multiply(residual, wqkv, qkv, "store", to_qkv, "rms_norm", layer.attention_norm)
                rotate(qkv, (k, v), places, rotation, tokens, bos, (first_k, first_v))
                attend(qkv, (k, v), tiles, heads)
                multiply(heads, wo, residual, "add", to_wo)
                multiply(residual, w1w3, w13, "store", to_w1w3, "rms_norm", layer.ffn_norm)
                multiply(w13, w2, residual, "add", to_w2, "swiglu")

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
