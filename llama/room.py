"""What does a model take, and is there room?

Everything is counted from shapes, before anything is read: the weights, the keys and values of a
number of sequences, and what a step works with. On CUDA the counts are those of torch's pool, which
is what the driver sees; CUDA's own context comes on top.
"""

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from llama.int8 import Int8Linear
from llama.model import ModelArgs, Transformer

GIB = 2**30
# Torch's CUDA pool asks the driver for whole multiples of this for tensors beyond 10 MiB
# (c10/cuda/CUDACachingAllocator.h: kRoundLarge, kMinLargeAlloc). What it asks for smaller ones is
# shared and too little to count.
POOL_ROUND = 2 * 2**20
POOL_LARGE = 10 * 2**20


@dataclass(frozen=True)
class Need:
    """Bytes on the device."""

    weights: int
    cache: int
    work: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.work


def need(model: Transformer, batch: int, length: int, dtype: torch.dtype) -> Need:
    """Of `batch` sequences of `length` tokens; the model may be on "meta"."""
    args = model.args
    half_cache = cache_bytes(args, batch, length, dtype) // 2  # keys, and values
    return Need(
        sum(map(pooled, weight_tensors(model, dtype))) + 16 * args.max_seq_len * args.head_dim,
        2 * pooled(half_cache),
        work_bytes(args, batch, length),
    )


def weight_tensors(model: Transformer, dtype: torch.dtype) -> list[int]:
    """Bytes of each tensor of weights that the loader makes, dtype being that of those not int8."""
    sizes = [
        parameter.numel() * dtype.itemsize
        for module in model.modules()
        if not isinstance(module, Int8Linear)
        for parameter in module.parameters(recurse=False)
    ]
    for group in model.linears():
        if isinstance(group[0], Int8Linear):
            rows = sum(linear.out_features for linear in group)
            sizes += [rows * group[0].in_features, rows * torch.float32.itemsize]
    return sizes


def weight_bytes(model: Transformer, dtype: torch.dtype) -> int:
    return sum(weight_tensors(model, dtype))


def cache_bytes(args: ModelArgs, batch: int, length: int, dtype: torch.dtype) -> int:
    return 2 * args.n_layers * batch * length * args.kv_heads * args.head_dim * dtype.itemsize


def work_bytes(args: ModelArgs, batch: int, length: int) -> int:
    """What is neither weights nor cache at the peak: the prefill of one prompt of `length` tokens
    in int8 on CUDA, and the buffers with which `batch` rows decode."""
    D, F, V = args.dim, args.hidden_dim, args.vocab_size
    qkv = (args.n_heads + 2 * args.kv_heads) * args.head_dim
    residual, heads = 4 * D, 2 * D  # float32, fp16
    codes = 5 * (D + F)  # kernels.quant_room: fp16, its codes, what was kept apart
    prefill = length * (residual + heads + codes + 2 * qkv + 2 * 2 * F)
    rows = 16 if batch <= 16 else -(-batch // 32) * 32  # of tensor cores
    sums = 32 * rows * max(V, 3 * D, F)  # of kernels.linear_buffers
    splits = 4 * batch * args.n_heads * 32 * (args.head_dim + 2)  # of kernels.attend_buffers
    sampling = 64 * batch * V  # logits, probabilities, their order and sums, in and beside a graph
    return prefill + sums + splits + sampling


def pooled(nbytes: int) -> int:
    return -(-nbytes // POOL_ROUND) * POOL_ROUND if nbytes > POOL_LARGE else nbytes


def check_room(model: Transformer, device: torch.device, dtype: torch.dtype) -> None:
    """MemoryError unless the model and one sequence of max_seq_len fit on the device; a warning if
    max_batch_size of them do not."""
    args, free = model.args, free_bytes(device)
    one = need(model, 1, args.max_seq_len, dtype)
    if one.total > free:
        raise MemoryError(
            f"the model needs {one.weights / GIB:.1f} GiB for weights and "
            f"{(one.cache + one.work) / GIB:.1f} GiB for one sequence of {args.max_seq_len} tokens "
            f"but {device} has {free / GIB:.1f} GiB free: lower --max_seq_len, keep "
            "--use_int8=True, or take a smaller model"
        )
    every = need(model, args.max_batch_size, args.max_seq_len, dtype)
    if every.total > free:
        warnings.warn(
            f"{args.max_batch_size} sequences of {args.max_seq_len} tokens need "
            f"{(every.cache + every.work) / GIB:.1f} GiB, {device} has "
            f"{(free - every.weights) / GIB:.1f} GiB beside the weights: so many at once, if as "
            "long, will be refused (see python -m llama.memory)",
            stacklevel=5,  # of whoever called LLaMA.build
        )


def free_bytes(device: torch.device) -> int:
    """What this process can still take: on CUDA what the driver and torch's own pool have free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _kernel_says("/proc/meminfo", "MemAvailable") or sys.maxsize


def anonymous_bytes() -> int:
    """Host memory of this process that no file backs, and what torch has pinned for copies to CUDA,
    which the kernel does not count so; 0 where neither tells."""
    pinned = 0
    if torch.cuda.is_initialized():
        pinned = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
    return _kernel_says("/proc/self/status", "RssAnon") + pinned


def _kernel_says(file: str, key: str) -> int:
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:  # not Linux
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key)), 0)


def size(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB else f"{nbytes / 2**20:.1f} MiB"
