"""How much memory a model takes, and whether it fits.

Weights, keys and values, and the buffers of a step are counted before anything is read, by making
them on the meta device. The counts are of what torch's CUDA pool takes from the driver; CUDA's own
context comes on top.
"""

import sys
import warnings
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

import torch

from llama.buffers import MOST_ROWS, DecodeBuffers, PrefillBuffers
from llama.int8 import Int8Linear
from llama.lookup import EACH
from llama.model import KVCache, ModelArgs, Transformer

GIB = 2**30
META = torch.device("meta")
# For a tensor of more than POOL_LARGE bytes, torch's CUDA pool takes whole multiples of POOL_ROUND
# (kMinLargeAlloc and kRoundLarge in c10/cuda/CUDACachingAllocator.h); smaller ones share.
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
    """For `batch` sequences of `length` tokens; the model may be on the meta device. Work is the
    buffers of a prefill pass in int8 on CUDA, and of a step."""
    args = model.args
    rotation = args.max_seq_len * args.head_dim * torch.float32.itemsize
    cache = KVCache(args, batch, length, dtype, META)
    prefill = PrefillBuffers(args, batch, length, META)
    # At least what lookup.rows_each() allows, and never less for more sequences.
    rows = max(batch, min(EACH * batch, MOST_ROWS)) if lookup else batch
    decode = DecodeBuffers(args, rows, META)
    embedded = len(prefill.tokens) * args.dim * dtype.itemsize
    return Need(
        weights=rotation + sum(map(pooled, weight_sizes(model, dtype))),
        cache=pooled(cache.k.nbytes) + pooled(cache.v.nbytes),
        work=nbytes(prefill) + embedded + nbytes(decode) + SAMPLING * rows * args.vocab_size,
    )


def weight_sizes(model: Transformer, dtype: torch.dtype) -> list[int]:
    """Bytes of each tensor that the loader makes; dtype is that of weights that are not int8."""
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
    """Bytes that torch's pool takes for a tensor of `count` bytes."""
    return -(-count // POOL_ROUND) * POOL_ROUND if count > POOL_LARGE else count


def check_room(model: Transformer, device: torch.device, dtype: torch.dtype) -> None:
    """MemoryError unless the model and one sequence of max_seq_len fit on the device."""
    length, free = model.args.max_seq_len, free_bytes(device)
    one = need(model, 1, length, dtype)
    if one.total > free:
        raise MemoryError(
            f"the model needs {one.weights / GIB:.1f} GiB for weights and "
            f"{(one.total - one.weights) / GIB:.1f} GiB for one sequence of max_seq_len = {length} "
            f"tokens, but {device} has {free / GIB:.1f} GiB free: lower --max_seq_len, keep "
            "--use_int8=True, or take a smaller model"
        )


def slots_that_fit(model: Transformer, sequences: int, length: int, lookup: bool) -> int:
    """How many sequences of this length a loaded model continues at once: all up to max_batch_size,
    or, with a warning, as many as fit; MemoryError if none does."""
    weight, wanted = model.tok_embeddings.weight, min(sequences, model.args.max_batch_size)
    free = free_bytes(weight.device)

    def taken(slots: int) -> int:
        needed = need(model, slots, length, weight.dtype, lookup)
        return needed.cache + needed.work

    if taken(wanted) <= free:
        return wanted
    fit = bisect_right(range(1, wanted), free, key=taken)
    if not fit:
        raise too_big(model, 1, length)
    warnings.warn(
        f"{wanted} sequences of {length} tokens need {taken(wanted) / GIB:.1f} GiB, "
        f"{weight.device} has {free / GIB:.1f} GiB free: {fit} at a time are continued",
        stacklevel=2,
    )
    return fit


def check_cache(model: Transformer, sequences: int, length: int) -> None:
    """MemoryError unless keys and values of so many sequences fit beside a loaded model."""
    weight = model.tok_embeddings.weight
    if cache_bytes(model.args, sequences, length, weight.dtype) > free_bytes(weight.device):
        raise too_big(model, sequences, length)


def too_big(model: Transformer, sequences: int, length: int) -> MemoryError:
    """The error for sequences that do not fit, whether counted or found out."""
    weight = model.tok_embeddings.weight
    needed = cache_bytes(model.args, sequences, length, weight.dtype) / GIB
    return MemoryError(
        f"{sequences} x {length} tokens need {needed:.1f} GiB for keys and values and some for "
        f"work, {weight.device} has {free_bytes(weight.device) / GIB:.1f} GiB free: lower "
        "--max_batch_size, --max_gen_len or, with --chat, --max_seq_len"
    )


def free_bytes(device: torch.device) -> int:
    """What this process can still take; on CUDA from the driver and from torch's own pool."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _kernel_says("/proc/meminfo", "MemAvailable") or sys.maxsize


def anonymous_bytes() -> int:
    """Host memory of this process that no file backs, and what torch has pinned for copies to CUDA,
    which Linux counts apart; 0 where neither tells."""
    stats = torch.cuda.host_memory_stats() if torch.cuda.is_initialized() else {}
    pinned = stats.get("allocated_bytes.current", 0)
    return _kernel_says("/proc/self/status", "RssAnon") + pinned


def _kernel_says(file: str, key: str) -> int:
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:  # not Linux
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key)), 0)


def readable(count: int) -> str:
    """Bytes as GiB or MiB."""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"
