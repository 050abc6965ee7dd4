"""Makes a model from the files of its folder, and writes the folder of its int8 form.

`plan` checks every name, shape and type in the shards against what `params.json` asks for before
anything long starts. Then `stream` fills tensors in several threads: each reads a block of rows
from the shards, joins and quantizes it, and moves it to its place. Host memory peaks at a few
blocks a thread on CUDA and at the finished model on the CPU.

`save_int8` writes a folder of the same kind that is already quantized, one file a layer; loading it
is reading it. Its names are bitsandbytes': X.weight (int8), X.SCB, X.weight_format (0: by rows).
"""

import contextlib
import ctypes
import json
import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from llama.int8 import Int8Linear, allocate, check_finite, quantize
from llama.model import ModelArgs, Transformer, rotation_table
from llama.params import INT8_FORMAT, read_params
from llama.room import GIB, anonymous_bytes, check_room, size, weight_bytes
from llama.shards import Buffer, Piece, one_line, open_shards, some_of
from llama.tokenizer import Tokenizer

# Values that a thread quantizes at once, and threads. 13B on 16 cores: 4.0 to 4.4 s; 2^23: 5.5,
# 2^21: 5.5, 2^20: 10.5, since threads wait for Python between calls of torch; 16 threads: 4.1 to
# 4.9 with twice the host memory, 6: 4.6 (H200 machine, page cache, 2026-11-23).
VALUES_A_BLOCK = 2**22
MOST_THREADS = 8
BYTES_A_BLOCK = 2**22  # that a thread reads at once where nothing is to be quantized
AHEAD = 4  # weights in work beside the one that is waited for
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
BY_ROWS = 0  # bitsandbytes' weight_format of codes that lie row after row

# The dimension on which the model-parallel shards of a weight (out, in) are joined. Norms are the
# same in every shard. Embeddings are split along the model dimension up to Code Llama.
JOIN_DIM = {
    **dict.fromkeys(["wq", "wk", "wv", "w1", "w3", "output"], 0),
    **dict.fromkeys(["wo", "w2", "tok_embeddings"], 1),
}


@dataclass(frozen=True)
class Weight:
    """One tensor of the model as the shards hold it; as a matrix, so norms are one row."""

    name: str
    pieces: list[Piece]
    dim: int | None  # on which the pieces are joined; None: one piece is the whole

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces[0].dtype

    @property
    def layer(self) -> int | None:
        return int(self.name.split(".")[1]) if self.name.startswith("layers.") else None

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    def blocks(self, targets: list[Tensor]) -> list[tuple[tuple[Piece, ...], tuple[Tensor, ...]]]:
        """Blocks of rows: the pieces that stand side by side in one, and the same rows of targets,
        which are as in `stream`."""
        quantizes = len(targets) == 2
        values = VALUES_A_BLOCK if quantizes else BYTES_A_BLOCK // self.dtype.itemsize
        side_by_side = self.pieces if self.dim == 1 else self.pieces[:1]
        most = max(1, values // sum(piece.shape[1] for piece in side_by_side))
        split = [piece.split(most) for piece in self.pieces]
        pieces = list(zip(*split)) if self.dim == 1 else list(zip(chain(*split)))
        if targets[0].dim() == 1:
            targets = [targets[0][None]]
        rows = [block[0].shape[0] for block in pieces]
        return list(zip(pieces, zip(*(target.split(rows) for target in targets))))


@torch.inference_mode(False)  # other threads could not write tensors that were made in it
def load(ckpt_dir: Path, args: ModelArgs, device: torch.device, use_int8: bool) -> Transformer:
    """The model of a folder on `device`, in fp16 (float32 on the CPU) where it is not int8."""
    if device.type == "cuda":
        torch.cuda.init()
    started, memory_before = time.perf_counter(), anonymous_bytes()
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

    name, peak = one_line(ckpt_dir.resolve().name), memory_before
    targets = partial(targets_in, model, dtype, device)
    with closing(stream(planned, targets, f"Loading {name}", args.n_layers)) as done:
        for _ in done:
            peak = max(peak, anonymous_bytes())
    model.rotation = rotation_table(args, device)
    print(
        f"Loaded {name} in {time.perf_counter() - started:.1f} s: "
        f"{size(weight_bytes(model, dtype))} on {device}, "
        f"host memory peak +{size(peak - memory_before)}",
        file=sys.stderr,
    )
    return model


def targets_in(
    model: Transformer, dtype: torch.dtype, device: torch.device, weight: Weight
) -> list[Tensor]:
    """What a weight fills: a tensor of values, made here, or the codes and scales of a layer."""
    path, attribute = weight.name.rsplit(".", 1)
    module = model.get_submodule(path)
    if not isinstance(module, Int8Linear):
        empty = torch.empty(getattr(module, attribute).shape, dtype=dtype, device=device)
        setattr(module, attribute, nn.Parameter(empty, requires_grad=False))
        return [empty]
    if attribute == "SCB":
        return [module.state.SCB]
    return [module.state.CB] if weight.dtype == torch.int8 else [module.state.CB, module.state.SCB]


@torch.inference_mode(False)
def save_int8(ckpt_dir: Path, args: ModelArgs, tokenizer: Tokenizer, out_dir: Path) -> None:
    """Writes a model folder's int8 form, whole or not at all: until then it has another name.
    Host memory peaks at two layers in int8 and a few blocks a thread."""
    if os.path.lexists(out_dir):
        raise FileExistsError(f"{out_dir} is there already: pass an --out_dir that is not")
    unfinished = out_dir.with_name(f"{out_dir.name}.unfinished")
    if os.path.lexists(unfinished):
        raise FileExistsError(
            f"{unfinished} is there already: another run writes it, or one was killed; delete it "
            "then, and run again"
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
            f"the int8 form needs {size(needed)}, {disk} has {size(free)} free: make room there or "
            "pass an --out_dir on another disk"
        )

    unfinished.mkdir(parents=True)
    try:
        targets = partial(int8_targets, model)
        title = f"Quantizing {one_line(ckpt_dir.resolve().name)}"
        with closing(stream(planned, targets, title, args.n_layers)) as done:
            for i, (_, layer) in enumerate(groupby(done, lambda filled: filled[0].layer)):
                tensors = {}
                for weight, filled in layer:
                    tensors |= by_name(weight, filled)
                write(tensors, unfinished / f"consolidated.{i:02d}.pth")
        shutil.copy(tokenizer.path, unfinished / "tokenizer.model")
        params = read_params(ckpt_dir) | {"int8_format": INT8_FORMAT}
        (unfinished / "params.json").write_text(json.dumps(params))
        unfinished.rename(out_dir)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def int8_targets(model: Transformer, weight: Weight) -> list[Tensor]:
    """What a weight fills: codes and scales, or where it is not quantized the values."""
    shape = model.get_parameter(weight.name).shape
    if not isinstance(model.get_submodule(weight.name.removesuffix(".weight")), Int8Linear):
        return [torch.empty(shape, dtype=weight.dtype, device="cpu")]
    scales = torch.empty(shape[0], dtype=torch.float32, device="cpu")
    return [torch.empty(shape, dtype=torch.int8, device="cpu"), scales]


def by_name(weight: Weight, filled: list[Tensor]) -> dict[str, Tensor]:
    path = weight.name.removesuffix(".weight")
    by_rows = torch.tensor(BY_ROWS, dtype=torch.uint8, device="cpu")
    names = weight.name, f"{path}.SCB", f"{path}.weight_format"
    return dict(zip(names, filled if len(filled) == 1 else [*filled, by_rows]))


def write(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        with path.open("wb") as file:
            torch.save(tensors, file)
            file.flush()
            os.fsync(file.fileno())  # whole on the disk before the folder gets its name
    except (OSError, RuntimeError) as error:
        # Torch closes the file nevertheless, and then complains of what it finds.
        cause = error if isinstance(error, OSError) else error.__context__ or error
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        raise OSError(
            f"{path} could not be written ({getattr(cause, 'strerror', type(cause))}), nothing is "
            "left of it: make room on its disk, or pass an --out_dir on another"
        ) from None


def holds_int8(shards: dict[str, dict[str, Piece]]) -> bool:
    return any(name.endswith(".SCB") for shard in shards.values() for name in shard)


def plan(model: Transformer, shards: dict[str, dict[str, Piece]]) -> list[Weight]:
    """Each tensor of the model once, in its order; ValueError names the first that does not fit,
    and whatever is missing or left over. Two shards that changed places look right: only their md5
    sums tell."""
    int8 = holds_int8(shards)
    expected = expected_tensors(model, int8)
    if int8:
        together = {}
        for file, shard in shards.items():
            if twice := [name for name in shard if name in together]:
                raise ValueError(f"{file} holds {some_of(twice)} again: quantize the model again")
            together |= shard
        shards = {"the int8 files": together}
    for file, shard in shards.items():
        missing = [name for name in expected if name not in shard]
        extra = [name for name in shard if name not in expected]
        if missing or extra:
            raise ValueError(
                f"{file} and params.json do not belong together: missing {some_of(missing)}, "
                f"left over {some_of(extra)}; take both from one model"
            )
    planned = []
    for name, (shape, dtypes) in expected.items():
        pieces = [shard[name] for shard in shards.values()]
        dim = JOIN_DIM.get(name.split(".")[-2]) if len(shards) > 1 else None
        for piece in pieces:
            check_piece(name, piece, shape, dim, len(shards), dtypes)
        if not name.endswith(".weight_format"):
            pieces = pieces[: 1 if dim is None else None]
            planned.append(Weight(name, [piece.as_matrix() for piece in pieces], dim))
        elif pieces[0].read(Buffer()).item() != BY_ROWS:
            raise ValueError(
                f"{name} in {pieces[0].path.name} is not {BY_ROWS} (by rows): quantize the model "
                "again"
            )
    return planned


def expected_tensors(model: Transformer, int8: bool) -> dict[str, tuple[tuple, tuple]]:
    """The name of each tensor -> its shape in the model, and the types that it may have."""
    expected = {}
    for name, parameter in model.named_parameters():
        shape, path = tuple(parameter.shape), name.removesuffix(".weight")
        expected[name] = shape, FLOATS
        if int8 and isinstance(model.get_submodule(path), Int8Linear):
            expected[name] = shape, (torch.int8,)
            expected[f"{path}.SCB"] = shape[:1], (torch.float32,)
            expected[f"{path}.weight_format"] = (), (torch.uint8,)
    return expected


def check_piece(name: str, piece: Piece, shape: tuple, dim: int | None, of: int, dtypes: tuple):
    """ValueError unless it is one of so many pieces of a tensor of this whole shape, cut on dim, as
    params.json asks for it, and of one of these types."""
    file = piece.path.name
    if piece.dtype not in dtypes:
        raise ValueError(
            f"{name} in {file} is {piece.dtype}, expected {' or '.join(map(str, dtypes))}: pass "
            "Meta's original checkpoint, or what llama.quantize made of it"
        )
    if name == "tok_embeddings.weight" and len(piece.shape) == 2 and piece.shape[0] != shape[0]:
        raise ValueError(
            f"the weights have {piece.shape[0]!s:.60} tokens, the tokenizer {shape[0]}: "
            "pass the tokenizer.model that came with these weights"
        )
    if dim is not None and shape[dim] % of:
        raise ValueError(f"{of} shards do not divide {name} {shape}: take all files from one model")
    want = tuple(n // of if i == dim else n for i, n in enumerate(shape))
    if piece.shape != want:
        count = math.prod(shape) / max(math.prod(piece.shape), 1)
        shards = "1 shard asks" if of == 1 else f"{of} shards ask"
        hint = f" (it is one of {count:.0f} shards)" if count in {*range(1, 65)} - {of} else ""
        raise ValueError(
            f"{name} in {file} is {piece.shape!s:.60}, but by params.json {shards} for {want}"
            f"{hint}: take all files from one model"
        )


def stream(
    planned: list[Weight], targets_of: Callable[[Weight], list[Tensor]], title: str, n_layers: int
) -> Iterator[tuple[Weight, list[Tensor]]]:
    """Fills what targets_of(weight) gives, one tensor of values or two of int8 codes and scales, in
    several threads. Yields each weight with its tensors when they are filled, in order. ValueError
    if a value is not finite."""
    threads = min(torch.get_num_threads(), MOST_THREADS)
    idle = [Worker() for _ in range(threads)]
    running = deque()
    bar = tqdm(
        disable=sys.stderr is None,  # a service, or pythonw
        total=sum(weight.nbytes for weight in planned) / GIB,
        desc=title,
        bar_format="{desc}: {percentage:3.0f}% |{bar}| {n:.2f}/{total:.2f} GiB{postfix}, "
        "{remaining} left",
    )
    with bar, ThreadPoolExecutor(threads, initializer=work_on_one_core) as pool:
        try:
            for weight in planned:
                targets = targets_of(weight)
                jobs = [pool.submit(fill, idle, weight, *block) for block in weight.blocks(targets)]
                running.append((weight, targets, jobs))
                while len(running) > (0 if weight is planned[-1] else AHEAD):
                    done, filled, jobs = running.popleft()
                    for job in jobs:
                        job.result()
                    if done.layer is not None:
                        bar.set_postfix_str(f"layer {done.layer + 1}/{n_layers}", refresh=False)
                    bar.update(done.nbytes / GIB)
                    yield done, filled
        finally:  # after an error nobody waits for the rest
            pool.shutdown(wait=False, cancel_futures=True)


def work_on_one_core() -> None:
    """Of this thread alone. torch.set_num_threads is not: threads that begin meanwhile, or load
    too, would find its 1 and keep it."""
    torch.get_num_threads()  # at its first use in a thread torch sets OpenMP's number
    with contextlib.suppress(AttributeError):  # a torch without OpenMP: threads are many, no more
        ctypes.CDLL(torch._C.__file__).omp_set_num_threads(1)


class Worker:
    """The buffers of one thread."""

    def __init__(self):
        self.read, self.joined = Buffer(), Buffer()
        self.pinned = [Buffer(pinned=True), Buffer(pinned=True)]


def fill(idle: list[Worker], weight: Weight, block: tuple[Piece, ...], targets: tuple[Tensor, ...]):
    """Puts pieces of a weight that stand side by side where they belong, with the buffers of an
    idle worker. ValueError names weight and file if a value is not finite there."""
    worker = idle.pop()
    try:
        here = [
            pinned.view(target.shape, target.dtype) if target.is_cuda else target
            for pinned, target in zip(worker.pinned, targets)
        ]
        convert(block, here, worker)
        for target, source in zip(targets, here):
            if target.is_cuda:
                target.copy_(source)  # and waits: the next block takes the same pinned memory
    except ValueError as error:
        files = " or ".join(piece.path.name for piece in block)
        raise ValueError(f"{weight.name} in {files} {error}: the file is damaged") from None
    finally:
        idle.append(worker)


def convert(block: tuple[Piece, ...], targets: list[Tensor], worker: Worker) -> None:
    """Reads a block's values, or makes its codes and scales, in host memory."""
    out, quantizes = targets[0], len(targets) == 2
    if len(block) == 1 and block[0].dtype == out.dtype and block[0].contiguous:
        block[0].read_into(out)
    else:
        values = worker.joined.view(out.shape, torch.float32) if quantizes else out
        widths = [piece.shape[1] for piece in block]
        for piece, part in zip(block, values.split(widths, 1) if len(block) > 1 else [values]):
            read = piece.read(worker.read)
            part.copy_(read.half() if quantizes and read.dtype != torch.half else read)
    if quantizes:
        quantize(values, *targets)
    elif out.is_floating_point():
        check_finite(*out.aminmax())
