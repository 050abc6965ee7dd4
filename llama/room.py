"""What a model takes, and whether it fits.

Everything is counted before anything is read: the weights, the keys and values of a number of
sequences, and the buffers that a step works in, by making them on the meta device. On CUDA the
counts are those of torch's pool, which is what the driver sees; CUDA's own context comes on top.
"""

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from llama.buffers import MOST_ROWS, PACK, DecodeBuffers, PrefillBuffers
from llama.int8 import Int8Linear
from llama.lookup import EACH
from llama.model import KVCache, ModelArgs, Transformer

GIB = 2**30
META = torch.device("meta")
# Torch's CUDA pool asks the driver for whole multiples of this for tensors beyond 10 MiB
# (c10/cuda/CUDACachingAllocator.h: kRoundLarge, kMinLargeAlloc). What it asks for smaller ones is
# shared and too little to count.
POOL_ROUND = 2 * 2**20
POOL_LARGE = 10 * 2**20
SAMPLING = 64  # bytes a logit: probabilities, their order and sums, in and beside a graph


@dataclass(frozen=True)
class Need:
    """Bytes on the device."""

    weights: int
    cache: int
    work: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.work


def need(
    model: Transformer, batch: int, length: int, dtype: torch.dtype, lookup: bool = False
) -> Need:
    """For `batch` sequences of `length` tokens; the model may be on the meta device. Work is what
    a pass of their prefill takes at its peak, in int8 on CUDA, and a step of the batch."""
    args = model.args
    rotation = args.max_seq_len * args.head_dim * torch.float32.itemsize
    cache = KVCache(args, batch, length, dtype, META)
    prefill = PrefillBuffers(args, min(PACK, batch * length), META)
    rows = max(batch, min(EACH * batch, MOST_ROWS)) if lookup else batch
    decode = DecodeBuffers(args, rows, META)
    attention = prefill.qkv[:, : args.dim].nbytes
    return Need(
        weights=rotation + sum(map(pooled, weight_sizes(model, dtype))),
        cache=pooled(cache.k.nbytes) + pooled(cache.v.nbytes),
        work=nbytes(prefill) + attention + nbytes(decode) + SAMPLING * rows * args.vocab_size,
    )


def weight_sizes(model: Transformer, dtype: torch.dtype) -> list[int]:
    """Bytes of each tensor that the loader makes, dtype being that of weights that are not int8."""
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
    return sum(weight_sizes(model, dtype))


def cache_bytes(args: ModelArgs, batch: int, length: int, dtype: torch.dtype) -> int:
    return nbytes(KVCache(args, batch, length, dtype, META))


def nbytes(buffers) -> int:
    """Bytes of the tensors that an object holds, in tuples too."""
    held = [x if isinstance(x, tuple) else (x,) for x in vars(buffers).values()]
    return sum(tensor.nbytes for tensors in held for tensor in tensors)


def pooled(count: int) -> int:
    """Bytes that torch's pool takes for a tensor of so many."""
    return -(-count // POOL_ROUND) * POOL_ROUND if count > POOL_LARGE else count


def check_room(model: Transformer, device: torch.device, dtype: torch.dtype) -> None:
    """MemoryError unless the model and one sequence of max_seq_len fit on the device; a warning if
    max_batch_size sequences do not."""
    args, free = model.args, free_bytes(device)
    one = need(model, 1, args.max_seq_len, dtype)
    if one.total > free:
        raise MemoryError(
            f"the model needs {one.weights / GIB:.1f} GiB for weights and "
            f"{(one.total - one.weights) / GIB:.1f} GiB for one sequence of max_seq_len = "
            f"{args.max_seq_len} tokens, but {device} has {free / GIB:.1f} GiB free: lower "
            "--max_seq_len, keep --use_int8=True, or take a smaller model"
        )
    every = need(model, args.max_batch_size, args.max_seq_len, dtype)
    if every.total > free:
        warnings.warn(
            f"{args.max_batch_size} sequences of {args.max_seq_len} tokens need "
            f"{(every.total - every.weights) / GIB:.1f} GiB, {device} has "
            f"{(free - every.weights) / GIB:.1f} GiB beside the weights: fewer will be "
            "continued at once (see python -m llama.memory)",
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
    stats = torch.cuda.host_memory_stats() if torch.cuda.is_initialized() else {}
    pinned = stats.get("allocated_bytes.current", 0)
    return _kernel_says("/proc/self/status", "RssAnon") + pinned


def _kernel_says(file: str, key: str) -> int:
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:  # not Linux
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key)), 0)


def size(count: int) -> str:
    """Bytes in GiB or MiB, for a person."""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"
