"""Where do tests get checkpoints? Random weights, written as Meta's files are laid out.

The idea: weights are made whole, so that a test can hand them to the oracle, and `write_checkpoint`
cuts them into model-parallel shards, so that a loader has to put them together again.
Limits: no tokenizer, no checklist.
"""

import json
from math import ceil
from pathlib import Path

import torch

OUTLIER = 8.0  # past the 6.0 from which LLM.int8() keeps a feature in fp16

# Module name -> the dim along which its shards are joined; what isn't here is replicated.
JOINED_ON = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0}
JOINED_ON |= {"output": 0, "tok_embeddings": 1}


def tiny_params(**overrides) -> dict:
    """params.json of a model of 0.1M parameters; 1, 2 or 4 shards get whole heads."""
    sizes = {"dim": 64, "multiple_of": 32, "n_heads": 4, "n_layers": 2}
    return sizes | {"norm_eps": 1e-5, "vocab_size": -1} | overrides


def shapes(params: dict, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Every weight of the model, unsplit, by Meta's name; the FFN size is by Meta's formula."""
    dim, multiple = params["dim"], params["multiple_of"]
    ffn = int((params.get("ffn_dim_multiplier") or 1) * int(2 * 4 * dim / 3))
    ffn = multiple * ceil(ffn / multiple)
    kv = dim // params["n_heads"] * (params.get("n_kv_heads") or params["n_heads"])
    layer = {"attention.wq": (dim, dim), "attention.wk": (kv, dim), "attention.wv": (kv, dim)}
    layer |= {"attention.wo": (dim, dim), "feed_forward.w1": (ffn, dim)}
    layer |= {"feed_forward.w2": (dim, ffn), "feed_forward.w3": (ffn, dim)}
    layer |= {"attention_norm": (dim,), "ffn_norm": (dim,)}
    named = {"tok_embeddings": (vocab_size, dim), "norm": (dim,), "output": (vocab_size, dim)}
    for n in range(params["n_layers"]):
        named |= {f"layers.{n}.{name}": shape for name, shape in layer.items()}
    return {f"{name}.weight": shape for name, shape in named.items()}


def random_weights(
    params: dict, seed: int = 0, dtype=torch.float16, outliers=(), vocab_size: int | None = None
) -> dict[str, torch.Tensor]:
    """Unsplit weights under which activations and logits stay of order one.

    In every norm the features listed in `outliers` have weight 8.0: about half of their entries
    leave the norm beyond 6.0, as a few features of trained models do, and what is computed from
    them grows. `vocab_size` is for params that say -1, the tokenizer's size, or nothing.
    """
    vocab_size = vocab_size or params.get("vocab_size", -1)
    if vocab_size < 1:
        raise ValueError(f"vocab_size is {vocab_size} in params: pass vocab_size=NUMBER")
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes(params, vocab_size).items():
        x = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            x = 1 + 0.1 * x
            x[list(outliers)] = OUTLIER
        elif name != "tok_embeddings.weight":
            x /= shape[1] ** 0.5
        weights[name] = x.to(dtype)
    return weights


def one_storage(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies that are views of one new buffer, a sharing that torch.save keeps."""
    assert len({t.dtype for t in tensors.values()}) == 1
    flat = torch.cat([t.flatten() for t in tensors.values()])
    parts = flat.split([t.numel() for t in tensors.values()])
    return {k: part.view(tensors[k].shape) for k, part in zip(tensors, parts, strict=True)}


def write_checkpoint(
    folder, params: dict, weights: dict[str, torch.Tensor], n_shards: int, embeddings_on: int = 1
) -> Path:
    """Writes params.json and consolidated.NN.pth into `folder`, made if need be; returns its path.
    Llama 3 has its embeddings joined on 0, along the vocabulary.

    As in the real files, a layer's tensors share one storage and rotary frequencies that nobody
    needs are in every shard. So is, whole, any weight of a name unknown here: loaders refuse those.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    head_dim = params["dim"] // params["n_heads"]
    freqs = params.get("rope_theta", 1e4) ** -(torch.arange(0, head_dim, 2) / head_dim)
    freqs = freqs.to(next(iter(weights.values())).dtype)
    inner = [f"layers.{n}.attention.inner_attention.rope" for n in range(params["n_layers"])]
    joined_on = JOINED_ON | {"tok_embeddings": embeddings_on}
    everything = weights | {f"{name}.freqs": freqs for name in ("rope", *inner)}
    for rank in range(n_shards):
        groups = {}  # "layers.N", or the name of a tensor outside the layers -> shares a storage
        for name, x in everything.items():
            dim = joined_on.get(name.split(".")[-2])
            if dim is not None:
                assert x.shape[dim] % n_shards == 0, f"{name}: {list(x.shape)} into {n_shards}"
                x = x.chunk(n_shards, dim)[rank]
            group = ".".join(name.split(".")[:2])
            groups.setdefault(group, {})[name] = x
        shard = {k: x for tensors in groups.values() for k, x in one_storage(tensors).items()}
        torch.save(shard, folder / f"consolidated.{rank:02}.pth")
    return folder
