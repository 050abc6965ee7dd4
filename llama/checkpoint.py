"""How do files become a model?

What the shards hold is checked whole before anything long starts: every name, shape and type
against what `params.json` asks for, and the room on the device. Then the weights stream through
several threads: each reads a block of rows from the shards, joins and quantizes it, and moves it to
its place. Anonymous host memory peaks at a few blocks a thread on CUDA and at the finished model on
the CPU.

`save_int8` writes a folder of the same kind that is already quantized, one file a layer; loading it
is reading it. Its names are bitsandbytes': X.weight (int8), X.SCB, X.weight_format (0: by rows).
"""

import contextlib
import ctypes
import json
import os
import shutil
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations, groupby
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from llama.int8 import Int8Linear, allocate, check_finite, quantize
from llama.model import ModelArgs, Transformer, rotation_table
from llama.room import GIB, anonymous_bytes, check_room, size, weight_bytes
from llama.shards import INT8_FORMAT, Piece, one_line, open_shards, scratch, some_of
from llama.params import read_params
from llama.tokenizer import Tokenizer

# Values that a thread quantizes at once, and threads. 13B on 16 cores: 4.0 to 4.4 s; 2^23: 5.5,
# 2^21: 5.5, 2^20: 10.5, since threads wait for Python between calls of torch; 16 threads: 4.1 to
# 4.9 with twice the host memory, 6: 4.6 (H200 machine, page cache, 2026-11-23).
VALUES_A_BLOCK = 2**22
MOST_WORKERS = 8
BYTES_A_BLOCK = 2**22  # that a thread reads at once where nothing is to be quantized
AHEAD = 4  # weights in work beside the one that is waited for
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
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
        return self.pieces[0].tensor.dtype

    @property
    def layer(self) -> int | None:
        return int(self.name.split(".")[1]) if self.name.startswith("layers.") else None

    @property
    def nbytes(self) -> int:
        return sum(piece.tensor.nbytes for piece in self.pieces)

    def blocks(self, values: int) -> list[list[Piece]]:
        """Consecutive blocks of rows, each the pieces that stand side by side in it."""
        side_by_side = self.pieces if self.dim == 1 else self.pieces[:1]
        rows = max(1, values // sum(piece.tensor.shape[1] for piece in side_by_side))
        split = [piece.split(rows) for piece in self.pieces]
        if self.dim == 1:
            return [list(block) for block in zip(*split)]
        return [[part] for parts in split for part in parts]


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

    def place(weight: Weight) -> list[Tensor]:
        path, attribute = weight.name.rsplit(".", 1)
        module = model.get_submodule(path)
        if not isinstance(module, Int8Linear):
            empty = torch.empty(getattr(module, attribute).shape, dtype=dtype, device=device)
            setattr(module, attribute, nn.Parameter(empty, requires_grad=False))
            return [empty]
        CB, SCB = module.state.CB, module.state.SCB
        if attribute == "SCB":
            return [SCB]
        return [CB] if weight.dtype == torch.int8 else [CB, SCB]

    name = one_line(ckpt_dir.resolve().name)
    peak = stream(planned, place, f"Loading {name}", args.n_layers)
    model.rotation = rotation_table(args, device)
    print(
        f"Loaded {name} in {time.perf_counter() - started:.1f} s: "
        f"{size(weight_bytes(model, dtype))} on {device}, "
        f"host memory peaked {size(max(0, peak - memory_before))} above the start",
        file=sys.stderr,
    )
    return model


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

    parts = groupby(planned, lambda weight: weight.layer)
    number = {weight.name: i for i, (_, part) in enumerate(parts) for weight in part}
    last = {i: name for name, i in number.items()}
    unwritten = defaultdict(dict)

    def place(weight: Weight) -> list[Tensor]:
        path = weight.name.removesuffix(".weight")
        shape, tensors = model.get_parameter(weight.name).shape, unwritten[number[weight.name]]
        if not isinstance(model.get_submodule(path), Int8Linear):
            tensors[weight.name] = torch.empty(shape, dtype=weight.dtype, device="cpu")
            return [tensors[weight.name]]
        tensors[weight.name] = torch.empty(shape, dtype=torch.int8, device="cpu")
        tensors[f"{path}.SCB"] = torch.empty(shape[0], dtype=torch.float32, device="cpu")
        by_rows = torch.tensor(BY_ROWS, dtype=torch.uint8, device="cpu")
        tensors[f"{path}.weight_format"] = by_rows
        return [tensors[weight.name], tensors[f"{path}.SCB"]]

    def done(weight: Weight) -> None:
        i = number[weight.name]
        if weight.name == last[i]:
            write(unwritten.pop(i), unfinished / f"consolidated.{i:02d}.pth")

    unfinished.mkdir(parents=True)
    try:
        stream(
            planned, place, f"Quantizing {one_line(ckpt_dir.resolve().name)}", args.n_layers, done
        )
        shutil.copy(tokenizer.path, unfinished / "tokenizer.model")
        params = read_params(ckpt_dir) | {"int8_format": INT8_FORMAT}
        (unfinished / "params.json").write_text(json.dumps(params))
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
        # Torch closes the file nevertheless, and then complains of what it finds.
        cause = error if isinstance(error, OSError) else error.__context__ or error
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        raise OSError(
            f"{path} could not be written ({getattr(cause, 'strerror', type(cause))}), nothing is "
            "left of it: make room on its disk, or pass an --out_dir on another"
        ) from None


def plan(model: Transformer, shards: dict[str, dict[str, Piece]]) -> list[Weight]:
    """Each tensor of the model once, in its order; ValueError names the first that does not fit,
    and whatever is missing or left over. Two shards that changed places look right: only their md5
    sums tell."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if holds_int8(shards):
        shards = {"the int8 files": joined(shards)}
        expected = with_scales(expected, model)
    for file, shard in shards.items():
        missing = [name for name in expected if name not in shard]
        extra = [name for name in shard if name not in expected]
        if missing or extra:
            raise ValueError(
                f"{file} and params.json do not belong together: missing {some_of(missing)}, "
                f"left over {some_of(extra)}; take both from one model"
            )
    planned = []
    for name, shape in expected.items():
        pieces = [shard[name] for shard in shards.values()]
        dim = JOIN_DIM.get(name.split(".")[-2]) if len(shards) > 1 else None
        want = list(shape)
        if dim is not None:
            if shape[dim] % len(shards):
                raise ValueError(
                    f"{len(shards)} shards do not divide {name} {shape}: take all files from one "
                    "model"
                )
            want[dim] //= len(shards)
        kinds = DTYPES
        if name.removesuffix("weight") + "SCB" in expected:
            kinds = (torch.int8,)
        if name.endswith(".weight_format"):
            kinds = (torch.uint8,)
        for piece in pieces:
            check_piece(name, piece, shape, want, len(shards), kinds)
        if kinds == (torch.uint8,):
            if pieces[0].read().item() != BY_ROWS:
                raise ValueError(
                    f"{name} in {pieces[0].path.name} is not {BY_ROWS} (by rows): quantize the "
                    "model again"
                )
            continue
        if dim is None:
            if not all(nearly_equal(pieces[0], copy) for copy in pieces[1:]):
                raise ValueError(
                    f"{name} is not the same in all shards: they are of different models, take all "
                    "files from one"
                )
            pieces = pieces[:1]
        elif any(same_first_row(a, b) for a, b in combinations(pieces, 2) if "wq" in name):
            raise ValueError(
                f"two shards hold the same {name}: one is a copy of the other, fetch it again"
            )
        planned.append(Weight(name, [piece.as_matrix() for piece in pieces], dim))
    return planned


def holds_int8(shards: dict[str, dict[str, Piece]]) -> bool:
    return any(name.endswith(".SCB") for shard in shards.values() for name in shard)


def joined(shards: dict[str, dict[str, Piece]]) -> dict[str, Piece]:
    """The tensors of files none of which has a part of another's."""
    together = {}
    for file, shard in shards.items():
        if twice := sorted(set(together) & set(shard)):
            raise ValueError(f"{file} holds {some_of(twice)} again: quantize the model again")
        together |= shard
    return together


def with_scales(expected: dict[str, tuple], model: Transformer) -> dict[str, tuple]:
    """The shapes that a folder of save_int8 holds."""
    more = {}
    for name, shape in expected.items():
        more[name] = shape
        path = name.removesuffix(".weight")
        if isinstance(model.get_submodule(path), Int8Linear):
            more |= {f"{path}.SCB": shape[:1], f"{path}.weight_format": ()}
    return more


def same_first_row(a: Piece, b: Piece) -> bool:
    a, b = (piece.split(1)[0].read().clone() for piece in (a, b))
    return torch.equal(a, b)


def nearly_equal(a: Piece, b: Piece) -> bool:
    """Whether two copies of a norm are of one model: a hundredth apart on average at most."""
    a, b = (piece.read().float().clone() for piece in (a, b))
    return bool((a - b).abs().mean() <= 0.01 * a.abs().mean())


def check_piece(
    name: str,
    piece: Piece,
    shape: tuple[int, ...],
    want: list[int],
    n_shards: int,
    kinds: tuple[torch.dtype, ...],
) -> None:
    """ValueError unless a piece of a tensor of this whole shape has the shape `want`, as by
    params.json each of so many shards has it, and one of these types."""
    file, tensor = piece.path.name, piece.tensor
    if tensor.dtype not in kinds:
        raise ValueError(
            f"{name} in {file} is {tensor.dtype}, expected {' or '.join(map(str, kinds))}: pass "
            "Meta's original checkpoint, or what llama.quantize made of it"
        )
    if name == "tok_embeddings.weight" and tensor.dim() == 2 and len(tensor) != shape[0]:
        raise ValueError(
            f"the weights have {tensor.shape[0]} tokens, the tokenizer {shape[0]}: "
            "pass the tokenizer.model that came with these weights"
        )
    if list(tensor.shape) != want:
        count = torch.Size(shape).numel() / max(tensor.numel(), 1)
        is_one_of = count in range(1, 65) and count != n_shards
        hint = f" (it is one of {count:.0f} shards)" if is_one_of else ""
        shards = "1 shard asks" if n_shards == 1 else f"{n_shards} shards ask"
        raise ValueError(
            f"{name} in {file} is {tuple(tensor.shape)}, but by params.json {shards} for "
            f"{tuple(want)}{hint}: take all files from one model"
        )


def stream(
    planned: list[Weight],
    place: Callable[[Weight], list[Tensor]],
    title: str,
    n_layers: int,
    done: Callable[[Weight], None] = lambda weight: None,
) -> int:
    """Fills the tensors that place(weight) returns: one with the values, or two with int8 codes and
    scales. Calls done(weight) in order. Returns the peak of anonymous_bytes()."""
    peak = 0
    workers = min(torch.get_num_threads(), MOST_WORKERS)
    bar = tqdm(
        disable=sys.stderr is None,  # a service, or pythonw
        total=sum(weight.nbytes for weight in planned) / GIB,
        desc=title,
        bar_format="{desc}: {percentage:3.0f}% |{bar}| {n:.2f}/{total:.2f} GiB{postfix}, "
        "{remaining} left",
    )
    running = deque()

    def settle() -> None:
        weight, jobs = running.popleft()
        try:
            for job in jobs:
                job.result()
        except ValueError as error:
            raise ValueError(f"{weight.name} in {error}: the file is damaged") from None
        done(weight)
        if weight.layer is not None:
            bar.set_postfix_str(f"layer {weight.layer + 1}/{n_layers}", refresh=False)
        bar.update(weight.nbytes / GIB)

    pool = ThreadPoolExecutor(workers, initializer=work_on_one_core)
    with bar, pool:
        try:
            for weight in planned:
                running.append((weight, start(weight, place(weight), pool)))
                peak = max(peak, anonymous_bytes())
                if len(running) > AHEAD:
                    settle()
            while running:
                settle()
                peak = max(peak, anonymous_bytes())
        finally:  # after an error nobody waits for the rest, or keeps what it was for
            pool.shutdown(wait=False, cancel_futures=True)
            running.clear()
    return peak


def work_on_one_core() -> None:
    """Of this thread alone. torch.set_num_threads is not: threads that begin meanwhile, or load
    too, would find its 1 and keep it."""
    torch.get_num_threads()  # at its first use in a thread torch sets OpenMP's number
    with contextlib.suppress(AttributeError):  # a torch without OpenMP: threads are many, no more
        ctypes.CDLL(torch._C.__file__).omp_set_num_threads(1)


def start(weight: Weight, targets: list[Tensor], pool: ThreadPoolExecutor) -> list[Future]:
    if targets[0].dim() == 1:
        targets = [targets[0][None]]
    quantizes = len(targets) == 2
    jobs, first = [], 0
    for block in weight.blocks(
        VALUES_A_BLOCK if quantizes else BYTES_A_BLOCK // weight.dtype.itemsize
    ):
        rows = slice(first, first + len(block[0].tensor))
        jobs.append(pool.submit(fill, block, [target[rows] for target in targets]))
        first = rows.stop
    return jobs


def fill(block: list[Piece], targets: list[Tensor]) -> None:
    """Puts pieces that stand side by side where they belong; ValueError names the file if a value
    is not finite there."""
    here = [
        scratch(f"pinned {i}", target.shape, target.dtype, True) if target.is_cuda else target
        for i, target in enumerate(targets)
    ]
    out, quantizes = here[0], len(here) == 2
    first = block[0].tensor
    if len(block) == 1 and first.dtype == out.dtype and first.is_contiguous():
        block[0].read_into(out)
    else:
        values = scratch("joined", out.shape, torch.float32) if quantizes else out
        parts = [values]
        if len(block) > 1:
            parts = values.split([piece.tensor.shape[1] for piece in block], 1)
        for piece, part in zip(block, parts):
            read = piece.read()
            part.copy_(read.half() if quantizes and read.dtype != torch.half else read)
    try:
        if quantizes:
            quantize(values, *here)
        elif out.is_floating_point():
            check_finite(*out.aminmax())
    except ValueError as error:
        files = " or ".join(piece.path.name for piece in block)
        raise ValueError(f"{files} {error}") from None
    for target, source in zip(targets, here):
        if target.is_cuda:
            target.copy_(source)  # and waits: the next block takes the same pinned memory
