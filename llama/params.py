"""Reads what model a folder holds: `params.json` and the tokenizer, checked."""

import json
import os
from dataclasses import fields, replace
from pathlib import Path

from llama.model import ModelArgs
from llama.settings import check_fields
from llama.shards import one_line, read_bytes, some_of
from llama.tokenizer import Tokenizer

DEMO = Path(__file__).parent / "demo"
INT8_FORMAT = 1  # of the folders that checkpoint.save_int8 writes, in their params.json
LARGEST_PARAMS = 2**20  # bytes; Meta's files have about 100
OTHER_FORMATS = {".safetensors": "safetensors, as Hugging Face has them", ".gguf": "a GGUF file"}
# Parts of keys of params.json that models have which this program does not run.
OTHER_MODELS = {
    "vision_": "a model that sees images",
    "quantization_args": "a model that Meta quantized",
    "lora_args": "a model with adapters (LoRA)",
}
RANGES = {
    "dim": (int, 1, 2**17),
    "n_layers": (int, 1, 1000),
    "n_heads": (int, 1, 2**17),
    "vocab_size": (int, -1, 2**24),
    "multiple_of": (int, 1, 2**17),
    "ffn_dim_multiplier": (float, 0.01, 100),
    "norm_eps": (float, 1e-12, 0.1),
    "rope_theta": (float, 100, 1e12),
}
LIMITS = {"max_batch_size": (int, 1, 2**20), "max_seq_len": (int, 1, 2**20)}


def model_folder(ckpt_dir: str | Path | None) -> Path:
    """The path of a model folder; without one, of the demo model."""
    if ckpt_dir is None:
        return DEMO
    if not (ckpt_dir and isinstance(ckpt_dir, str | Path)):
        raise ValueError(
            f"ckpt_dir is {ckpt_dir!r:.60}, expected the model folder, e.g. --ckpt_dir /w/13B"
        )
    return Path(os.path.expanduser(ckpt_dir))


def read_model(
    ckpt_dir: Path, tokenizer_path: str | Path | None, **limits: int
) -> tuple[ModelArgs, Tokenizer]:
    """Limits are max_seq_len and max_batch_size. Without a path, the tokenizer is looked for in the
    folder and, where Meta has it, beside it. Errors of read_params, model_args and Tokenizer."""
    params = read_params(ckpt_dir)
    if tokenizer_path is None:
        near = ckpt_dir / "tokenizer.model", ckpt_dir.absolute().parent / "tokenizer.model"
        tokenizer_path = next((path for path in near if path.is_file()), near[0])
    tokenizer = Tokenizer(tokenizer_path)
    args = model_args(params, tokenizer.n_words, **limits)
    return replace(args, bos_id=tokenizer.bos_id), tokenizer


def read_params(ckpt_dir: Path) -> dict:
    """The keys of a model folder's params.json; OSError or ValueError if it has none to read."""
    if not list(ckpt_dir.glob("consolidated.*.pth")):
        raise FileNotFoundError(what_it_is(ckpt_dir))
    path = ckpt_dir / "params.json"
    if not path.is_file():
        raise FileNotFoundError(f"no params.json in {ckpt_dir}: copy it from where the shards are")
    try:
        params = json.loads(read_bytes(path, LARGEST_PARAMS).decode("utf-8-sig"))
        params = params.get("model", params) if isinstance(params, dict) else params
        if not isinstance(params, dict):
            raise ValueError(f"expected keys, found {params!r:.60}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON object ({error}): download it again") from None
    version = params.pop("int8_format", INT8_FORMAT)
    if version != INT8_FORMAT:
        raise ValueError(
            f"{path} is of int8 format {version!r:.60}, this program reads {INT8_FORMAT}: take a "
            "newer one, or quantize the model again"
        )
    return params


def what_it_is(path: Path) -> str:
    """Describes a path that is no folder of shards, and says what to pass instead."""
    models = sorted(shard.parent for shard in path.glob("*/consolidated.*.pth"))
    example = one_line(str(models[0]), 160) if models else "/w/13B"
    instead = f"pass the model folder, e.g. --ckpt_dir {example}"
    if not path.exists():
        return f"{path} does not exist: {instead}"
    entries = sorted(path.iterdir()) if path.is_dir() else [path]
    for entry in entries:
        if kind := OTHER_FORMATS.get(entry.suffix):
            file = one_line(str(entry), 160)
            return f"{file} is {kind}, not Meta's consolidated.*.pth: {instead}"
    if not path.is_dir():
        return f"{path} is a file: {instead}"
    held = some_of([entry.name for entry in entries])
    return f"no consolidated.*.pth in {path} (it holds {held}): {instead}"


def model_args(params: dict, vocab_size: int, **limits: int) -> ModelArgs:
    """Checks params. ValueError for a key that is missing, impossible, or unknown, which might
    change the result. The limits that some files hold do not count: ours do."""
    missing = [key for key in ("dim", "n_layers", "n_heads", "norm_eps") if key not in params]
    if missing:
        raise ValueError(f"params.json lacks {', '.join(missing)}: download it again")
    known = {field.name for field in fields(ModelArgs)} - {"bos_id"}
    if unknown := sorted(params.keys() - known):
        kinds = (kind for key, kind in OTHER_MODELS.items() if key in " ".join(unknown))
        raise ValueError(
            f"params.json has {some_of(unknown)}, as {next(kinds, 'another model')} has: pass the "
            "folder of a LLaMA 1, 2 or 3 for text, in fp16 or bf16"
        )
    args = ModelArgs(**{key: value for key, value in params.items() if key not in LIMITS})
    try:
        check_fields(args, **RANGES)
        check_fields(args, n_kv_heads=(int, 1, args.n_heads))
        if not isinstance(args.use_scaled_rope, bool):
            raise ValueError(
                f"use_scaled_rope is {args.use_scaled_rope!r:.60}, expected true or false"
            )
        if args.dim % (2 * args.n_heads) or args.n_heads % args.kv_heads:
            raise ValueError(
                f"dim is {args.dim}, n_heads {args.n_heads}, n_kv_heads {args.kv_heads}: expected "
                "heads of one even width, and n_kv_heads to divide n_heads"
            )
    except ValueError as error:
        raise ValueError(f"params.json: {error}; download it again") from None
    if args.vocab_size not in (-1, vocab_size):
        raise ValueError(
            f"the tokenizer has {vocab_size} pieces, params.json asks for {args.vocab_size}: "
            "pass the tokenizer.model that came with these weights"
        )
    args = replace(args, vocab_size=vocab_size, **limits)
    check_fields(args, **LIMITS)
    return args
