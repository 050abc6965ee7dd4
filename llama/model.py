"""LLaMA: the decoder-only Transformer of Touvron et al. 2023 (arXiv 2302.13971, section 2.2), with
what its successors up to Llama 3.3 added: grouped-query attention, another rope base, scaled rope.

Weights carry Meta's names and shapes. The class of the linear layers is an argument: `Int8Linear`
stores them in 8 bits, `nn.Linear` gives the same model in floating point. Nothing here samples,
reads files or checks what a user passed.

Letters in shapes: B sequences, T tokens of this step, S length of the cache, H heads, Hkv heads of
keys and values, K head dimension, D model dimension, V vocabulary.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.int8 import Int8Linear

SHORT_CONTEXT = 8192  # tokens, which Llama 3 was trained with before its context was extended

LayerCache = tuple[Tensor, Tensor] | None  # keys and values of one layer, each (B, S, Hkv, K)
Span = tuple[int, int, int]  # new tokens of a sequence: its slot, their first position, how many


@dataclass(frozen=True)
class ModelArgs:
    """The keys of Meta's `params.json`, and the two limits of a session."""

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None  # None: as many as n_heads
    vocab_size: int = -1  # -1: the tokenizer's
    bos_id: int = 1  # the tokenizer's
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None  # None: 1
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    use_scaled_rope: bool = False  # from Llama 3.1 on

    max_batch_size: int = 32
    max_seq_len: int = 512

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def rope_factor(self) -> int:
        """Of scaled rope. It is not in params.json: 32 for the two shapes of Llama 3.2, 1B and 3B,
        else 8 (github.com/meta-llama/llama-models, issues 166 and 241)."""
        return 32 if (self.dim, self.n_layers) in ((2048, 16), (3072, 28)) else 8

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward layer: 2/3 of 4 D (arXiv 2302.13971, section 2.2), rounded
        up to a multiple."""
        hidden = int((self.ffn_dim_multiplier or 1) * int(2 * 4 * self.dim / 3))
        return -(-hidden // self.multiple_of) * self.multiple_of


class KVCache:
    """Keys and values of B sequences of at most S tokens: two tensors (n_layers, B, S, Hkv, K), in
    fp16 4 x n_layers x Hkv x K bytes a token. It begins with zeros: what is not yet written is
    masked, but a NaN there would still poison the sum."""

    def __init__(
        self, args: ModelArgs, batch: int, length: int, dtype: torch.dtype, device: torch.device
    ):
        shape = (args.n_layers, batch, length, args.kv_heads, args.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    def slot(self, i: int, length: int) -> "KVCache":
        """The cache of the first tokens of sequence i, a view of this one's memory."""
        view = copy.copy(self)
        view.k, view.v = self.k[:, i : i + 1, :length], self.v[:, i : i + 1, :length]
        return view


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the quotient in float32 (Zhang and Sennrich 2019,
    arXiv 1910.07467, section 4)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return y.type_as(x) * self.weight


def rotation_table(args: ModelArgs, device: torch.device) -> Tensor:
    """(max_seq_len, K/2, 2): cos and sin of m theta^(-2i/K) at position m and pair i (Su et al.
    2021, arXiv 2104.09864, section 3.2.2). The angles are taken in float64: in float32 they would
    be off by 1e-4 at position 2,000."""
    pairs = torch.arange(0, args.head_dim, 2, dtype=torch.float64, device=device)
    frequencies = args.rope_theta ** (-pairs / args.head_dim)
    if args.use_scaled_rope:
        frequencies = scale_frequencies(frequencies, args.rope_factor)
    positions = torch.arange(args.max_seq_len, dtype=torch.float64, device=device)
    angles = torch.outer(positions, frequencies)
    return torch.stack([angles.cos(), angles.sin()], -1).float()


def scale_frequencies(frequencies: Tensor, factor: float) -> Tensor:
    """Divides by factor the frequencies that make less than one turn in the short context, leaves
    those that make more than four, and goes from one to the other linearly in the number of turns
    (apply_scaling in models/llama3/model.py of github.com/meta-llama/llama-models)."""
    turns = SHORT_CONTEXT * frequencies / (2 * math.pi)
    kept = ((turns - 1) / (4 - 1)).clamp(0, 1)
    return (1 - kept) * frequencies / factor + kept * frequencies


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turns the pairs (x0, x1), (x2, x3) ... of x (B, T, H, K) by rotation (B, T, K/2, 2)."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation[:, :, None].unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return turned.flatten(-2).type_as(x)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(K)) v (Vaswani et al. 2017, arXiv 1706.03762, section 3.2.1) of q
    (B, T, H, K) with k and v (B, S, Hkv, K), whose heads each serve H / Hkv neighbouring query
    heads (Ainslie et al. 2023, arXiv 2305.13245, section 2.2) -> (B, T, H, K)."""
    k, v, shared = k.transpose(1, 2), v.transpose(1, 2), q.shape[2] // k.shape[2]
    if mask is None:
        q = q.transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared > 1)
        return out.transpose(1, 2)
    # With a mask, enable_gqa would copy the cache: the heads of a group go as more tokens of one.
    q = q.unflatten(2, (-1, shared)).permute(0, 2, 3, 1, 4)  # (B, Hkv, H / Hkv, T, K)
    out = F.scaled_dot_product_attention(q.flatten(2, 3), k, v, mask.repeat(1, 1, shared, 1))
    return out.unflatten(2, q.shape[2:4]).permute(0, 3, 1, 2, 4).flatten(2, 3)


class Attention(nn.Module):
    def __init__(self, args: ModelArgs, linear: type[nn.Linear]):
        super().__init__()
        self.head_dim = args.head_dim
        kv_dim = args.kv_heads * args.head_dim
        self.wq = linear(args.dim, args.dim, bias=False)
        self.wk = linear(args.dim, kv_dim, bias=False)
        self.wv = linear(args.dim, kv_dim, bias=False)
        self.wo = linear(args.dim, args.dim, bias=False)

    def forward(
        self, x: Tensor, positions: Tensor, rotation: Tensor, cache: LayerCache, mask: Tensor | None
    ) -> Tensor:
        """x (B, T, D) at positions (B, T) -> (B, T, D). Writes keys and values to the cache. mask
        (B, 1, T, S) says which of them each token sees; without one it sees the tokens of this step
        up to itself."""
        q = rotate(self.wq(x).unflatten(-1, (-1, self.head_dim)), rotation)  # (B, T, H, K)
        k = rotate(self.wk(x).unflatten(-1, (-1, self.head_dim)), rotation)  # (B, T, Hkv, K)
        v = self.wv(x).unflatten(-1, (-1, self.head_dim))
        if cache is not None:
            keys, values = cache
            sequences = torch.arange(len(x), device=x.device)[:, None]
            keys[sequences, positions] = k
            values[sequences, positions] = v
            if mask is not None:
                k, v = keys, values
        return self.wo(attend(q, k, v, mask).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202, section 2)."""

    def __init__(self, args: ModelArgs, linear: type[nn.Linear]):
        super().__init__()
        self.w1 = linear(args.dim, args.hidden_dim, bias=False)
        self.w2 = linear(args.hidden_dim, args.dim, bias=False)
        self.w3 = linear(args.dim, args.hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs, linear: type[nn.Linear]):
        super().__init__()
        self.attention = Attention(args, linear)
        self.feed_forward = FeedForward(args, linear)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def linears(self) -> list[list[nn.Linear]]:
        """The linear layers in the order they run, those that read the same input together."""
        attention, ffn = self.attention, self.feed_forward
        return [
            [attention.wq, attention.wk, attention.wv],
            [attention.wo],
            [ffn.w1, ffn.w3],
            [ffn.w2],
        ]

    def forward(
        self, x: Tensor, positions: Tensor, rotation: Tensor, cache: LayerCache, mask: Tensor | None
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D); the other arguments are those of Attention."""
        x = x + self.attention(self.attention_norm(x), positions, rotation, cache, mask)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """`model(tokens, 0)` gives the logits of what follows; to go on from there, pass a cache."""

    def __init__(self, args: ModelArgs, linear: type[nn.Linear] = Int8Linear):
        super().__init__()
        self.args = args
        # nn.Embedding itself begins with normal_(), which imports torch._dynamo: 1 s a start.
        table = torch.empty(args.vocab_size, args.dim).uniform_(-1, 1)
        self.tok_embeddings = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(TransformerBlock(args, linear) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = linear(args.dim, args.vocab_size, bias=False)
        # On the meta device there is none yet: it comes with the weights.
        rotation = None if table.is_meta else rotation_table(args, table.device)
        self.register_buffer("rotation", rotation, persistent=False)

    def linears(self) -> list[list[nn.Linear]]:
        """All linear layers, those that read the same input together; the output head is last."""
        return [group for layer in self.layers for group in layer.linears()] + [[self.output]]

    @torch.inference_mode()
    def forward(
        self, tokens: Tensor, start_pos: int | Tensor, cache: KVCache | None = None
    ) -> Tensor:
        """Float32 logits (B, V) of what follows the last of tokens (B, T); start_pos is the
        position of tokens[:, 0], one for all sequences or a tensor (B,) with each one's own. The
        cache holds what came before, and receives the keys and values of tokens. ValueError for
        another start_pos than 0 without one."""
        if cache is None and not (isinstance(start_pos, int) and start_pos == 0):
            raise ValueError(
                f"start_pos is {start_pos} without a cache: pass the KVCache that holds what came "
                "before, or begin with 0"
            )
        return self.output(self.features(tokens, start_pos, cache)[:, -1]).float()

    def features(
        self, tokens: Tensor, start_pos: int | Tensor = 0, cache: KVCache | None = None
    ) -> Tensor:
        """What the output head reads, (B, T, D); arguments as those of forward()."""
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        start = torch.as_tensor(start_pos, device=tokens.device).reshape(-1, 1)
        positions = (start + steps).expand(tokens.shape)  # (B, T)
        rotation, mask = self.rotation[positions], None
        if cache is not None and (isinstance(start_pos, Tensor) or start_pos > 0):
            seen = torch.arange(cache.k.shape[2], device=tokens.device)
            mask = seen <= positions[:, None, :, None]

        x = self.tok_embeddings(tokens)
        for i, layer in enumerate(self.layers):
            of_layer = (cache.k[i], cache.v[i]) if cache is not None else None
            x = layer(x, positions, rotation, of_layer, mask)
        return self.norm(x)
