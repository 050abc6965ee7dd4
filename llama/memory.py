"""Estimates a model's GPU memory from its shapes: python -m llama.memory --size 13B"""

import torch
from torch import nn

from llama.cli import run
from llama.int8 import Int8Linear
from llama.model import ModelArgs, Transformer
from llama.params import model_args, model_folder, read_model
from llama.room import GIB, free_bytes, need

GROUPED_QUERY = {"n_kv_heads": 8, "norm_eps": 1e-5}
OF_70B = {"dim": 8192, "n_layers": 80, "n_heads": 64, "multiple_of": 4096}
OF_70B |= {"ffn_dim_multiplier": 1.3}
LLAMA_3 = GROUPED_QUERY | {"vocab_size": 128256, "rope_theta": 5e5, "use_scaled_rope": True}
SIZES = {  # what params.json of the models has besides norm_eps 1e-6 and a vocabulary of 32,000
    "7B": {"dim": 4096, "n_layers": 32, "n_heads": 32},
    "13B": {"dim": 5120, "n_layers": 40, "n_heads": 40},
    "30B": {"dim": 6656, "n_layers": 60, "n_heads": 52},
    "34B": GROUPED_QUERY | {"dim": 8192, "n_layers": 48, "n_heads": 64, "rope_theta": 1e6},
    "65B": {"dim": 8192, "n_layers": 80, "n_heads": 64, "norm_eps": 1e-5},
    "70B": LLAMA_3 | OF_70B,
    "2-70B": GROUPED_QUERY | OF_70B,
    "1B": LLAMA_3 | {"dim": 2048, "n_layers": 16, "n_heads": 32, "ffn_dim_multiplier": 1.5},
    "3B": LLAMA_3 | {"dim": 3072, "n_layers": 28, "n_heads": 24},
    "8B": LLAMA_3
    | {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 1024, "ffn_dim_multiplier": 1.3},
}
VOCABULARY = 32000
CONTEXT = 0.5  # GiB that the driver counts for CUDA and its libraries before the first weight


def args_of(size: str, **limits: int) -> ModelArgs:
    """The arguments of Meta's model of this size; ValueError if there is none."""
    if size.upper() not in SIZES:
        raise ValueError(f"size is {size!r:.60}, expected one of {', '.join(SIZES)}")
    params = {"norm_eps": 1e-6, "vocab_size": VOCABULARY} | SIZES[size.upper()]
    return model_args(params, params["vocab_size"], **limits)


def size_beside(ckpt_dir: str | None, size: str | None) -> str:
    """13B if neither is given; ValueError if both are."""
    if None not in (size, ckpt_dir):
        raise ValueError(
            "--size and --ckpt_dir are two models, expected one: leave one of them out"
        )
    return "13B" if size is None else size


def main(
    size: str | None = None,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    max_batch_size: int = 1,
    max_seq_len: int = 2048,
):
    """Estimates the GPU memory of a model.

    Args:
        size: 7B, 13B (if none is given), 30B or 65B (LLaMA; Llama 2 alike), 34B (Code Llama), 2-70B
            (Llama 2), or 1B, 3B, 8B or 70B (Llama 3)
        ckpt_dir: a model folder instead
        tokenizer_path: its tokenizer.model (looked for in the folder and beside it)
        max_batch_size: sequences at once
        max_seq_len: their length in tokens, prompt and continuation
    """
    limits = {"max_seq_len": max_seq_len, "max_batch_size": max_batch_size}
    size = size_beside(ckpt_dir, size)
    if ckpt_dir is None:
        args = args_of(size, **limits)
    else:
        args, _ = read_model(model_folder(ckpt_dir), tokenizer_path, **limits)
    with torch.device("meta"):
        models = [Transformer(args, linear) for linear in (Int8Linear, nn.Linear)]
    int8, half = (need(model, max_batch_size, max_seq_len, torch.float16) for model in models)

    sequences = "sequence" if max_batch_size == 1 else "sequences"
    print(f"{ckpt_dir or size}, {max_batch_size} {sequences} of {max_seq_len} tokens, in GiB")
    print(f"{'':16}{'int8':>8}{'fp16':>8}")
    for name, part in (("weights", "weights"), ("keys and values", "cache"), ("work", "work")):
        print(f"{name:16}{getattr(int8, part) / GIB:8.2f}{getattr(half, part) / GIB:8.2f}")
    print(f"{'CUDA itself':16}{CONTEXT:8.2f}{CONTEXT:8.2f}")
    print(f"{'together':16}{int8.total / GIB + CONTEXT:8.2f}{half.total / GIB + CONTEXT:8.2f}")
    if torch.cuda.is_available():
        free = free_bytes(torch.device("cuda")) / GIB + CONTEXT  # ours is taken by now
        print(f"{'free':16}{free:8.2f}{free:8.2f}  on {torch.cuda.get_device_name()}")
    else:
        print("torch sees no CUDA GPU here")


if __name__ == "__main__":
    run(main)
