"""Makes a model from the files of its folder, and writes the folder of its int8 form.

`plan` checks every name, shape and type in the shards against what `params.json` asks for before
anything long starts. Then `fill_model` lets several threads each read a block of rows from the
shards, join and quantize it, and move it to its place. Host memory peaks at a few blocks a thread
on CUDA and at the finished model on the CPU.

`save_int8` writes a folder of the same kind that is already quantized, one file a layer; loading it
is reading it. Its names are bitsandbytes': X.weight (int8), X.SCB, X.weight_format (0: by rows).
"""

import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from io import BufferedReader
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from llama.device import use_cores
from llama.int8 import Int8Linear, allocate, check_finite, check_saved, quantize
from llama.model import ModelArgs, Transformer, rotation_table
from llama.params import INT8_FORMAT, read_params
from llama.room import GIB, anonymous_bytes, check_room, readable, weight_bytes
from llama.shards import Buffer, StoredTensor, one_line, open_shards, read_bytes, some_of
from llama.tokenizer import Tokenizer

# Values that a thread quantizes at once, and threads. 13B on 16 cores: 4.0 to 4.4 s; 2^23: 5.5,
# 2^21: 5.5, 2^20: 10.5, since threads wait for Python between calls of torch; 16 threads: 4.1 to
# 4.9 with twice the host memory, 6: 4.6 (H200 machine, page cache, 2026-11-23).
VALUES_A_BLOCK = 2**22
MOST_THREADS = 8
BYTES_A_BLOCK = 2**22  # that a thread reads at once where nothing is to be quantized
LARGEST_CHECKLIST = 2**20  # bytes; Meta's have at most 500
AHEAD = 4  # weights that load concurrently after the one that is waited for
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
BY_ROWS = 0  # bitsandbytes' weight_format of codes that lie row after row

Shards = dict[str, dict[str, StoredTensor]]  # by the names of file and tensor
Block = tuple[StoredTensor, ...]  # the same rows of parts that stand side by side


@dataclass(frozen=True)
class Weight:
    """One tensor of the model as the shards hold it: rows of parts that stand side by side."""

    name: str
    parts: list[list[StoredTensor]]

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0][0].dtype

    @property
    def layer(self) -> int | None:
        return int(self.name.split(".")[1]) if self.name.startswith("layers.") else None

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for row in self.parts for part in row)

    def blocks(self, targets: list[Tensor]) -> list[tuple[Block, tuple[Tensor, ...]]]:
        """Cuts it into blocks, each with the rows that it fills of the targets (see targets_in)."""
        values = VALUES_A_BLOCK if len(targets) == 2 else BYTES_A_BLOCK // self.dtype.itemsize
        most = max(1, values // sum(math.prod(part.shape[1:]) for part in self.parts[0]))
        blocks = [block for row in self.parts for block in zip(*(p.split(most) for p in row))]
        rows = [block[0].shape[0] for block in blocks]
        return list(zip(blocks, zip(*(target.split(rows) for target in targets))))


@torch.inference_mode(False)  # other threads could not write tensors that were made in it
def load(ckpt_dir: Path, args: ModelArgs, device: torch.device, use_int8: bool) -> Transformer:
    """The model of a folder on `device`, in fp16 (float32 on the CPU) where it is not int8."""
    if device.type == "cuda":
        torch.cuda.init()
    started, before = time.perf_counter(), anonymous_bytes()
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    shards = open_shards(ckpt_dir)
    if holds_int8(shards) and not use_int8:
        raise ValueError(
            f"{ckpt_dir} holds int8 weights, which do not give fp16 ones (use_int8=False): pass "
            "the folder that they were made from"
        )
    with torch.device("meta"):
        model = Transformer(args, Int8Linear if use_int8 else nn.Linear).eval()
    planned = plan(model, shards)
    check_room(model, device, dtype)
    if use_int8:
        for group in model.linears():
            allocate(group, device)

    path = ckpt_dir.resolve()
    of_many = path.name == "original"  # as any model's folder on Hugging Face
    name = one_line(f"{path.parent.name}/original" if of_many else path.name)
    with closing(fill_model(planned, model, device, dtype, f"Loading {name}")) as done:
        peak = max(before, *(anonymous_bytes() for _ in done))
    model.rotation = rotation_table(args, device)
    if sys.stderr is not None:  # else print() would write to stdout
        print(
            f"Loaded {name} in {time.perf_counter() - started:.1f} s: "
            f"{readable(weight_bytes(model, dtype))} on {device}, "
            f"host memory peak +{readable(peak - before)}",
            file=sys.stderr,
        )
    return model


@torch.inference_mode(False)
def save_int8(ckpt_dir: Path, args: ModelArgs, tokenizer: Tokenizer, out_dir: Path) -> None:
    """Writes a model folder's int8 form, which has another name until it is whole. Host memory
    peaks at two layers in int8 and a few blocks a thread."""
    unfinished = out_dir.with_name(f"{out_dir.name}.unfinished")
    for path in (out_dir, unfinished):
        if os.path.lexists(path):
            raise FileExistsError(
                f"{path} is there already: pass an --out_dir that is not, or, if no other run "
                "writes it, delete it"
            )
    shards = open_shards(ckpt_dir)
    if holds_int8(shards):
        raise ValueError(f"{ckpt_dir} holds int8 weights already: load it as it is")
    with torch.device("meta"):
        model = Transformer(args)
    planned = plan(model, shards)
    disk = next(folder for folder in out_dir.absolute().parents if folder.exists())
    needed, free = weight_bytes(model, planned[0].dtype), shutil.disk_usage(disk).free
    if needed > free:
        raise OSError(
            f"the int8 form needs {readable(needed)}, {disk} has {readable(free)} free: make room "
            "there or pass an --out_dir on another disk"
        )
    if (ckpt_dir / "checklist.chk").exists():
        verify(ckpt_dir)

    unfinished.mkdir(parents=True)
    try:
        title = f"Quantizing {one_line(ckpt_dir.resolve().name)}"
        with closing(fill_model(planned, model, torch.device("cpu"), None, title)) as done:
            for i, (_, layer) in enumerate(groupby(done, lambda weight: weight.layer)):
                tensors = {}
                for weight in layer:
                    path = weight.name.removesuffix(".weight")
                    tensors |= model.get_submodule(path).state_dict(prefix=f"{path}.")
                    model.set_submodule(path, nn.Identity())  # frees it once it is written
                write(tensors, unfinished / f"consolidated.{i:02d}.pth")
        shutil.copy(tokenizer.path, unfinished / "tokenizer.model")
        params = json.dumps(read_params(ckpt_dir) | {"int8_format": INT8_FORMAT})
        (unfinished / "params.json").write_text(params)
        unfinished.rename(out_dir)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        with path.open("wb") as file:
            torch.save(tensors, file)
            file.flush()
            os.fsync(file.fileno())  # whole on the disk before the folder gets its name
    except (OSError, RuntimeError) as error:
        # After an error torch still ends the file, and complains of what it finds.
        cause = error.__context__ or error
        if not isinstance(cause, OSError):
            raise cause from None
        raise OSError(
            f"{path} could not be written ({cause.strerror}), nothing is left of it: make room on "
            "its disk, or pass an --out_dir on another"
        ) from None


def verify(ckpt_dir: Path) -> None:
    """Compares the shards' md5 sums with those in checklist.chk, each shard on a core, at 0.6 GB/s.
    Nothing else notices shards that changed places. FileNotFoundError without a list, ValueError
    if a sum differs."""
    checklist = ckpt_dir / "checklist.chk"
    if not checklist.is_file():
        raise FileNotFoundError(
            f"no checklist.chk in {ckpt_dir}: fetch it from where the shards came from, or load "
            "the model without --verify"
        )
    lines = re.findall(rb"^(\w{32}) [ *](.+?)\r?$", read_bytes(checklist, LARGEST_CHECKLIST), re.M)
    expected = {os.fsdecode(name): md5.decode().lower() for md5, name in lines}
    paths = [ckpt_dir / name for name in open_shards(ckpt_dir)]
    title = f"Verifying {one_line(ckpt_dir.resolve().name)}"
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("rb")) for path in paths]
        sums = [hashlib.md5(usedforsecurity=False) for _ in paths]
        bar = stack.enter_context(progress(sum(path.stat().st_size for path in paths), title))
        pool = stack.enter_context(ThreadPoolExecutor(MOST_THREADS))
        while done := sum(pool.map(hash_block, files, sums)):
            bar.update(done / GIB)
    for path, md5 in zip(paths, sums):
        if md5.hexdigest() != expected.get(path.name):
            raise ValueError(
                f"{path} has md5 sum {md5.hexdigest()}, checklist.chk says "
                f"{expected.get(path.name, 'nothing of it')}: take both from one model, or "
                "download the shard again"
            )


def hash_block(file: BufferedReader, md5) -> int:
    """Adds the next block of a file to its md5 sum; returns its bytes."""
    try:
        block = file.read(BYTES_A_BLOCK)
    except OSError as error:
        raise OSError(
            f"{file.name} could not be read ({error.strerror}): look after its disk, and run again"
        ) from None
    md5.update(block)
    return len(block)


def progress(nbytes: int, title: str) -> tqdm:
    """A bar on stderr that counts GiB."""
    return tqdm(
        disable=sys.stderr is None,  # a service, or pythonw
        total=nbytes / GIB,
        desc=title,
        bar_format="{desc}: {percentage:3.0f}% |{bar}| {n:.2f}/{total:.2f} GiB{postfix}, "
        "{remaining} left",
    )


def holds_int8(shards: Shards) -> bool:
    return any(name.endswith(".SCB") for shard in shards.values() for name in shard)


def plan(model: Transformer, shards: Shards) -> list[Weight]:
    """Where each tensor of the model is, in the model's order. ValueError names the first that does
    not fit, or what is missing or left over. Llama 3.2 has no output head in its files: it is the
    embeddings again."""
    # Scaled rope tells Llama 3.1 and later from those whose head is really missing.
    tied = model.args.use_scaled_rope and not any("output.weight" in s for s in shards.values())
    if tied and not holds_int8(shards):
        for shard in shards.values():
            if "tok_embeddings.weight" in shard:
                shard["output.weight"] = shard["tok_embeddings.weight"]
    held = {file: list(shard) for file, shard in shards.items()}
    if holds_int8(shards):
        for group in model.linears():
            allocate(group, torch.device("meta"))  # from here on state_dict has the int8 form
        held = {"the int8 files": [name for names in held.values() for name in names]}
    expected, planned = model.state_dict(), []
    for file, names in held.items():
        missing = list(Counter(expected.keys()) - Counter(names))
        extra = list(Counter(names) - Counter(expected.keys()))
        if missing or extra:
            raise ValueError(
                f"{file} and params.json do not belong together: missing {some_of(missing)}, "
                f"left over {some_of(extra)}; take both from one model"
            )
    for name, tensor in expected.items():
        parts = [shard[name] for shard in shards.values() if name in shard]
        # Model-parallel shards have a matrix's rows, all as wide as it is, or its columns (wo, w2,
        # and embeddings up to Code Llama); norms are the same in every shard.
        of_rows = parts[0].shape[-1:] == tensor.shape[-1:]
        dim = None if len(parts) == 1 or tensor.dim() < 2 else 0 if of_rows else 1
        for part in parts:
            check_part(name, part, tensor, dim, len(parts))
        if not name.endswith(".weight_format"):
            rows = {0: [[part] for part in parts], 1: [parts], None: [parts[:1]]}
            planned.append(Weight(name, rows[dim]))
        elif parts[0].read(Buffer()).item() != BY_ROWS:
            raise ValueError(f"{name} is not {BY_ROWS} (by rows): quantize the model again")
    return planned


def check_part(name: str, part: StoredTensor, tensor: Tensor, dim: int | None, parts: int) -> None:
    """ValueError unless so many parts like this, joined on dim, make this tensor of the model."""
    file, shape = part.path.name, tuple(tensor.shape)
    of_int8_form = name.endswith(".SCB") or not tensor.is_floating_point()
    dtypes = (tensor.dtype,) if of_int8_form else FLOATS
    if part.dtype not in dtypes:
        raise ValueError(
            f"{name} in {file} is {part.dtype}, expected {' or '.join(map(str, dtypes))}: pass "
            "Meta's original checkpoint, or what llama.quantize made of it"
        )
    together = tuple(n * parts if i == dim else n for i, n in enumerate(part.shape))
    if name == "tok_embeddings.weight" and len(together) == 2 and shape[0] % (part.shape[0] or 1):
        raise ValueError(
            f"the weights have {together[0]!s:.60} tokens, the tokenizer {shape[0]}: "
            "pass the tokenizer.model that came with these weights"
        )
    if together != shape:
        fitting = math.prod(shape) / max(math.prod(part.shape), 1)
        is_hint = fitting in {*range(1, 65)} - {parts}
        hint = f" (it is one of {fitting:.0f} shards)" if is_hint else ""
        joined = f" from {parts} shards together" if parts > 1 else ""
        raise ValueError(
            f"{name} in {file} is {part.shape!s:.60}{hint}, but params.json asks for {shape}"
            f"{joined}: take all files from one model"
        )


def targets_in(
    model: Transformer, weight: Weight, device: torch.device, dtype: torch.dtype | None
) -> list[Tensor]:
    """The tensors of the model that a weight fills: one of values, in the weight's own type if
    dtype is None, or a layer's codes and scales; made here if the layer has none yet."""
    path, attribute = weight.name.rsplit(".", 1)
    module = model.get_submodule(path)
    if not isinstance(module, Int8Linear):
        shape = getattr(module, attribute).shape
        values = torch.empty(shape, dtype=dtype or weight.dtype, device=device)
        setattr(module, attribute, nn.Parameter(values, requires_grad=False))
        return [values]
    if module.state.CB is None:
        allocate([module], device)
    if weight.dtype == torch.int8:
        return [module.state.CB]
    return [module.state.SCB] if attribute == "SCB" else [module.state.CB, module.state.SCB]


def fill_model(
    planned: list[Weight],
    model: Transformer,
    device: torch.device,
    dtype: torch.dtype | None,
    title: str,
) -> Iterator[Weight]:
    """Fills the model's tensors (see targets_in) in several threads, and yields each weight, in
    order, when it is in its place. ValueError as from fill_block."""
    threads = min(torch.get_num_threads(), MOST_THREADS)
    buffers = [Buffer(), Buffer(), Buffer(pinned=True), Buffer(pinned=True)]
    running = deque()
    bar = progress(sum(weight.nbytes for weight in planned), title)
    with bar, ThreadPoolExecutor(threads, initializer=use_cores, initargs=(1,)) as pool:
        try:
            for weight in planned:
                blocks = weight.blocks(targets_in(model, weight, device, dtype))
                jobs = [pool.submit(fill_block, buffers, weight.name, *block) for block in blocks]
                running.append((weight, jobs))
                while len(running) > (0 if weight is planned[-1] else AHEAD):
                    done, jobs = running.popleft()
                    for job in jobs:
                        job.result()
                    if done.layer is not None:
                        place = f"layer {done.layer + 1}/{len(model.layers)}"
                        bar.set_postfix_str(place, refresh=False)
                    bar.update(done.nbytes / GIB)
                    yield done
        finally:  # after an error nobody waits for the rest
            pool.shutdown(wait=False, cancel_futures=True)


def fill_block(buffers: list[Buffer], name: str, block: Block, targets: tuple[Tensor, ...]) -> None:
    """Loads one block of a weight into its targets, as values or as codes and scales, by way of
    pinned memory on CUDA. ValueError if a value is not finite, or not as quantize makes it."""
    to_read, to_join, *pinned = buffers
    here = [
        buffer.view(target.shape, target.dtype) if target.is_cuda else target
        for buffer, target in zip(pinned, targets)
    ]
    out, quantizes = here[0], len(targets) == 2
    if len(block) == 1 and block[0].dtype == out.dtype and block[0].contiguous:
        block[0].read_into(out)
    else:
        values = to_join.view(out.shape, torch.float32) if quantizes else out
        for part, columns in zip(block, values.split([part.shape[-1] for part in block], -1)):
            read = part.read(to_read)
            columns.copy_(read.half() if quantizes else read)
    try:
        if quantizes:
            quantize(values, *here)
        elif name.endswith(".SCB") or out.dtype == torch.int8:
            check_saved(out)
        else:
            check_finite(*out.aminmax())
    except ValueError as error:
        files = " or ".join(part.path.name for part in block)
        raise ValueError(f"{name} in {files} {error}: the file is damaged") from None
    for target, source in zip(targets, here):
        if target.is_cuda:
            target.copy_(source)  # and waits: the next block takes the same pinned memory
