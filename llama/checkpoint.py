"""How do files become a model?

Meta's folder (`params.json`, one `consolidated.NN.pth` for each model-parallel shard) is checked
whole before anything long starts: every name, shape and type against what `params.json` asks for,
and the room on the device. Then the weights stream: shards are memory-mapped, so only what is being
read is in memory; a matrix is joined from its shards in blocks of rows, quantized on the host by
several threads, moved, and forgotten. Anonymous host memory peaks at a few matrices on CUDA and at
the finished model on the CPU.
"""

import json
import pickle
import re
import sys
import time
import warnings
import zipfile
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from llama.int8 import Int8Linear, allocate, quantize
from llama.model import ModelArgs, Transformer, rotation_table

GIB = 2**30
VALUES_A_BLOCK = 2**20  # that a thread quantizes at once: 6 MiB of work, 2 ms away from Python
MOST_WORKERS = 32  # whose blocks keep host memory within its bound
AHEAD = 2  # matrices quantized while the one before them is finished and moved
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# What is found in place of a shard, by its first bytes.
NOT_SHARDS = {
    b"<": "a web page",
    b"version https://git-lfs": "a git-lfs pointer",
    b"\x80": "in torch's format before 1.6",
}
LARGEST_PICKLE = 2**24  # bytes; the list of 65B's tensors takes 2**17

# The dimension on which the model-parallel shards of a weight (out, in) are joined. Norms are the
# same in every shard. Embeddings are split along the model dimension up to Code Llama.
JOIN_DIM = {
    **dict.fromkeys(["wq", "wk", "wv", "w1", "w3", "output"], 0),
    **dict.fromkeys(["wo", "w2", "tok_embeddings"], 1),
}


@dataclass(frozen=True)
class Weight:
    """One tensor of the model as the shards hold it, memory-mapped."""

    name: str
    pieces: list[Tensor]
    dim: int | None  # on which the pieces are joined; None: one piece is the whole

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    def blocks(self) -> list[list[Tensor]]:
        """Consecutive blocks of rows, each the pieces that stand side by side in it."""
        width = sum(p.shape[1] for p in self.pieces[: None if self.dim == 1 else 1])
        rows = max(1, VALUES_A_BLOCK // width)
        split = [piece.split(rows) for piece in self.pieces]
        if self.dim == 1:
            return [list(block) for block in zip(*split)]
        return [[rows] for piece in split for rows in piece]

    def whole(self, dtype: torch.dtype) -> Tensor:
        return torch.cat(self.pieces, self.dim or 0).to(dtype)


def read_params(ckpt_dir: Path) -> dict:
    """The keys of params.json that `ModelArgs` knows; a warning names the others."""
    if not ckpt_dir.is_dir():
        found = "is a file" if ckpt_dir.exists() else "does not exist"
        raise FileNotFoundError(
            f"{ckpt_dir} {found}: pass the model folder, e.g. --ckpt_dir /w/13B"
        )
    if not list(ckpt_dir.glob("consolidated.*.pth")):
        held = ", ".join(sorted(f"{p.name}{'/' * p.is_dir()}" for p in ckpt_dir.iterdir())[:8])
        models = sorted(p.parent for p in ckpt_dir.glob("*/consolidated.*.pth"))
        example = models[0] if models else Path("/w/13B")
        raise FileNotFoundError(
            f"no consolidated.*.pth in {ckpt_dir} (it holds {held or 'nothing'}): "
            f"pass the model folder, e.g. --ckpt_dir {example}"
        )
    path = ckpt_dir / "params.json"
    if not path.is_file():
        raise FileNotFoundError(f"no params.json in {ckpt_dir}: copy it from where the shards are")
    try:
        params = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): download it again") from None
    params = params.get("model", params) if isinstance(params, dict) else params
    if not isinstance(params, dict):
        raise ValueError(f"{path} holds no JSON object: download it again")

    known = {field.name for field in fields(ModelArgs)} - {"max_batch_size", "max_seq_len"}
    if unknown := sorted(set(params) - known):
        warnings.warn(f"{path}: unknown keys are ignored: {', '.join(unknown)}", stacklevel=2)
    return {key: params[key] for key in known & set(params)}


def model_args(params: dict, vocab_size: int, **limits: int) -> ModelArgs:
    """`params` completed and checked; ValueError says what is missing or cannot be."""
    if params.get("vocab_size", -1) == -1:
        params = {**params, "vocab_size": vocab_size}
    missing = [key for key in ("dim", "n_layers", "n_heads", "norm_eps") if key not in params]
    if missing:
        raise ValueError(f"params.json lacks {', '.join(missing)}: download it again")
    args = ModelArgs(**params, **limits)
    if args.vocab_size != vocab_size:
        raise ValueError(
            f"the tokenizer has {vocab_size} pieces, params.json asks for {args.vocab_size}: "
            "pass the tokenizer.model that came with these weights"
        )
    return args


def open_shards(ckpt_dir: Path) -> dict[str, dict[str, Tensor]]:
    """File name -> its tensors, none of them read yet."""
    names = sorted(path.name for path in ckpt_dir.glob("consolidated.*.pth"))
    strange = [name for name in names if not re.fullmatch(r"consolidated\.\d\d\.pth", name)]
    if strange:
        raise ValueError(
            f"{ckpt_dir} holds {', '.join(strange)}, expected consolidated.00.pth and so on alone: "
            "move what is no shard elsewhere"
        )
    expected = [f"consolidated.{i:02d}.pth" for i in range(len(names))]
    if names != expected:
        absent = sorted(set(expected) - set(names))
        raise FileNotFoundError(
            f"{ckpt_dir} holds {', '.join(names)} but not {', '.join(absent)}: "
            "fetch the missing shard, download.sh resumes"
        )
    return {name: open_shard(ckpt_dir / name) for name in names}


def open_shard(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path} is not a file: replace it by the shard, download.sh fetches it")
    with path.open("rb") as file:
        start = file.read(64)
    kind = next((kind for begin, kind in NOT_SHARDS.items() if start.startswith(begin)), None)
    if kind:
        raise ValueError(f"{path} is {kind}, not a checkpoint: download it again")
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [entry for entry in archive.infolist() if entry.filename.endswith(".pkl")]
        if sum(entry.file_size for entry in pickles) > LARGEST_PICKLE:
            raise ValueError("its list of tensors is too long")
        shard = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds more than tensors, which loading could run as code: it was refused, "
            "pass Meta's original checkpoint"
        ) from None
    except Exception as error:  # torch raises many kinds, none of which names the file
        reason = (str(error).strip().splitlines() or [repr(error)])[0][:160]
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) is truncated or not a checkpoint ({reason}): "
            "compare it with checklist.chk, download it again"
        ) from None
    if not isinstance(shard, dict) or not all(
        isinstance(name, str)
        and isinstance(tensor, Tensor)
        and (tensor.layout, tensor.device.type) == (torch.strided, "cpu")
        for name, tensor in shard.items()
    ):
        raise ValueError(f"{path} holds no flat dict of tensors: expected one of Meta's shards")
    return {n: t.detach() for n, t in shard.items() if not n.endswith("rope.freqs")}


def plan(model: Transformer, shards: dict[str, dict[str, Tensor]]) -> list[Weight]:
    """Each tensor of the model once, in its order; ValueError names the first that does not fit,
    and whatever is missing or left over. Two shards that changed places look right: only their md5
    sums tell."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for file, shard in shards.items():
        missing = [name for name in expected if name not in shard]
        extra = [name for name in shard if name not in expected]
        if missing or extra:
            raise ValueError(
                f"{file} and params.json do not belong together: missing {_some(missing)}, "
                f"left over {_some(extra)}; take both from one model"
            )
    planned = []
    for name, shape in expected.items():
        pieces = {file: shard[name] for file, shard in shards.items()}
        dim = JOIN_DIM.get(name.split(".")[-2]) if len(shards) > 1 else None
        want = list(shape)
        if dim is not None:
            if shape[dim] % len(shards):
                raise ValueError(
                    f"{len(shards)} shards do not divide {name} {shape}: take all files from one "
                    "model"
                )
            want[dim] //= len(shards)
        for file, piece in pieces.items():
            check_piece(name, file, piece, shape, want, len(shards))
        whole = list(pieces.values())
        if dim is None:
            if not all(nearly_equal(whole[0], copy) for copy in whole[1:]):
                raise ValueError(
                    f"{name} is not the same in all shards: they are of different models, take all "
                    "files from one"
                )
            whole = whole[:1]
        elif any(torch.equal(a[:1], b[:1]) for a, b in combinations(whole, 2) if "wq" in name):
            raise ValueError(
                f"two shards hold the same {name}: one is a copy of the other, fetch it again"
            )
        planned.append(Weight(name, whole, dim))
    return planned


def nearly_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two copies of a norm are of one model: a hundredth apart on average at most."""
    return bool((a.float() - b.float()).abs().mean() <= 0.01 * a.float().abs().mean())


def check_piece(
    name: str, file: str, piece: Tensor, shape: tuple[int, ...], want: list[int], n_shards: int
) -> None:
    if piece.dtype not in DTYPES:
        raise ValueError(
            f"{name} in {file} is {piece.dtype}, expected float16, bfloat16 or float32: "
            "pass Meta's original checkpoint"
        )
    if name == "tok_embeddings.weight" and piece.shape[:1] != shape[:1]:
        raise ValueError(
            f"the weights have {piece.shape[0]} tokens, the tokenizer {shape[0]}: "
            "pass the tokenizer.model that came with these weights"
        )
    if list(piece.shape) != want:
        count = torch.Size(shape).numel() / max(piece.numel(), 1)
        is_one_of = count in range(1, 65) and count != n_shards
        hint = f" (it is one of {count:.0f} shards)" if is_one_of else ""
        shards = "1 shard asks" if n_shards == 1 else f"{n_shards} shards ask"
        raise ValueError(
            f"{name} in {file} is {tuple(piece.shape)}, but by params.json {shards} for "
            f"{tuple(want)}{hint}: take all files from one model"
        )


def _some(names: list[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


def weight_bytes(model: Transformer, dtype: torch.dtype) -> int:
    """Bytes of all weights on the device, from shapes alone: the model may be on "meta"."""
    total = 0
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if isinstance(module, Int8Linear):
                total += parameter.numel() + 4 * parameter.shape[0]
            else:
                total += parameter.numel() * dtype.itemsize
    return total


def size(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB else f"{nbytes / 2**20:.1f} MiB"


def cache_bytes(args: ModelArgs, batch: int, length: int, dtype: torch.dtype) -> int:
    return 2 * args.n_layers * batch * length * args.kv_heads * args.head_dim * dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """What this process can still take: on CUDA what the driver and torch's own pool have free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _kernel_says("/proc/meminfo", "MemAvailable") or sys.maxsize


def anonymous_bytes() -> int:
    """Host memory of this process that no file backs (mapped shards are not in it), and what torch
    has pinned for copies to CUDA, which the kernel does not count so; 0 where neither tells."""
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


def check_room(model: Transformer, device: torch.device, dtype: torch.dtype) -> None:
    """MemoryError unless the weights and one sequence of max_seq_len fit on the device."""
    args = model.args
    weights_need = weight_bytes(model, dtype)
    cache_need = cache_bytes(args, 1, args.max_seq_len, dtype)
    cache_need += 16 * args.max_seq_len * args.head_dim  # rotary table, float64 while it is made
    free = free_bytes(device)
    if weights_need + cache_need > free:
        raise MemoryError(
            f"the model needs {weights_need / GIB:.1f} GiB for weights and {cache_need / GIB:.1f} "
            f"GiB for one sequence of {args.max_seq_len} tokens, {device} has {free / GIB:.1f} GiB "
            "free: lower --max_seq_len, keep --use_int8=True, or take a smaller model"
        )


@torch.inference_mode(False)  # whose tensors the workers could not write
def load(ckpt_dir: Path, args: ModelArgs, device: torch.device, use_int8: bool) -> Transformer:
    """The model of a folder on `device`, in fp16 (float32 on the CPU) where it is not int8."""
    if device.type == "cuda":
        torch.cuda.init()
    started, memory_before = time.perf_counter(), anonymous_bytes()
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    with torch.device("meta"):
        model = Transformer(args, Int8Linear if use_int8 else nn.Linear).eval()
    planned = plan(model, open_shards(ckpt_dir))
    check_room(model, device, dtype)

    peak = 0
    if use_int8:
        for group in model.linears():
            allocate(group, device)

    total = sum(weight.nbytes for weight in planned)
    threads = torch.get_num_threads()
    workers = min(threads, MOST_WORKERS)
    bar = tqdm(
        total=total / GIB,
        desc=f"Loading {ckpt_dir.resolve().name}",
        bar_format="{desc}: {percentage:3.0f}% |{bar}| {n:.2f}/{total:.2f} GiB{postfix}, "
        "{remaining} left",
    )

    def settle(weight: Weight, finish: Callable[[], None]) -> int:
        finish()
        if weight.name.startswith("layers."):
            layer = int(weight.name.split(".")[1]) + 1
            bar.set_postfix_str(f"layer {layer}/{args.n_layers}", refresh=False)
        bar.update(weight.nbytes / GIB)
        return anonymous_bytes()

    # Each worker quantizes its own rows on one core.
    with bar, ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            running = deque()
            for weight in planned:
                running.append((weight, start(model, weight, device, dtype, pool)))
                peak = max(peak, anonymous_bytes())
                if len(running) > AHEAD:
                    peak = max(peak, settle(*running.popleft()))
            while running:
                peak = max(peak, settle(*running.popleft()))
        finally:
            torch.set_num_threads(threads)
    model.rotation = rotation_table(args, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    print(
        f"Loaded {ckpt_dir.resolve().name} in {time.perf_counter() - started:.1f} s: "
        f"{size(weight_bytes(model, dtype))} on {device}, "
        f"host memory peaked {size(max(0, peak - memory_before))} above the start",
        file=sys.stderr,
    )
    return model


def start(
    model: Transformer,
    weight: Weight,
    device: torch.device,
    dtype: torch.dtype,
    pool: ThreadPoolExecutor,
) -> Callable[[], None]:
    """Begins to put one weight into its module; what it returns waits for the end of that."""
    path, attribute = weight.name.rsplit(".", 1)
    module = model.get_submodule(path)
    if not isinstance(module, Int8Linear):
        tensor = weight.whole(dtype).to(device)
        setattr(module, attribute, nn.Parameter(tensor, requires_grad=False))
        return lambda: None

    target = module.state.CB, module.state.SCB
    staging = target
    if device.type == "cuda":
        staging = [torch.empty_like(t, device="cpu", pin_memory=True) for t in target]
    CB, SCB = staging
    jobs, first = [], 0
    for block in weight.blocks():
        rows = slice(first, first + len(block[0]))
        jobs.append(pool.submit(quantize, block, CB[rows], SCB[rows]))
        first = rows.stop

    def finish() -> None:
        try:
            for job in jobs:
                job.result()
        except ValueError as error:
            raise ValueError(f"{weight.name} {error}: the shards are damaged") from None
        for there, here in zip(target, staging):
            if there is not here:
                there.copy_(here, non_blocking=True)

    return finish
