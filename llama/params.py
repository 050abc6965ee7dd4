"""temporary"""

import json
import warnings
from dataclasses import fields, replace
from pathlib import Path

from llama.model import ModelArgs
from llama.settings import check_fields
from llama.tokenizer import Tokenizer, read_bytes
from llama.shards import INT8_FORMAT, LARGEST_PARAMS, one_line, some_of


def read_model(
    ckpt_dir: Path, tokenizer_path: str | Path | None, **limits: int
) -> tuple[ModelArgs, Tokenizer]:
    """What model a folder holds, with max_seq_len and max_batch_size, and its tokenizer: where it
    is not given the one in the folder or, as Meta has it, beside it. Errors as those of the two."""
    params = read_params(ckpt_dir)
    if tokenizer_path is None:
        near = ckpt_dir / "tokenizer.model", ckpt_dir.absolute().parent / "tokenizer.model"
        tokenizer_path = next((path for path in near if path.is_file()), near[0])
    tokenizer = Tokenizer(tokenizer_path)
    return model_args(params, tokenizer.n_words, **limits), tokenizer


def read_params(ckpt_dir: Path) -> dict:
    """What params.json says of the model; OSError or ValueError if it does not or cannot."""
    if not ckpt_dir.is_dir():
        found = "is a file" if ckpt_dir.exists() else "does not exist"
        raise FileNotFoundError(
            f"{ckpt_dir} {found}: pass the model folder, e.g. --ckpt_dir /w/13B"
        )
    if not list(ckpt_dir.glob("consolidated.*.pth")):
        held = ", ".join(
            sorted(f"{one_line(p.name)}{'/' * p.is_dir()}" for p in ckpt_dir.iterdir())[:8]
        )
        models = sorted(p.parent for p in ckpt_dir.glob("*/consolidated.*.pth"))
        example = one_line(str(models[0])) if models else "/w/13B"
        raise FileNotFoundError(
            f"no consolidated.*.pth in {ckpt_dir} (it holds {held or 'nothing'}): "
            f"pass the model folder, e.g. --ckpt_dir {example}"
        )
    path = ckpt_dir / "params.json"
    if not path.is_file():
        raise FileNotFoundError(f"no params.json in {ckpt_dir}: copy it from where the shards are")
    content = read_bytes(path, LARGEST_PARAMS)
    if len(content) == LARGEST_PARAMS:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes, expected about 100: download it again"
        )
    try:
        params = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): download it again") from None
    params = params.get("model", params) if isinstance(params, dict) else params
    if not isinstance(params, dict):
        raise ValueError(f"{path} holds no JSON object: download it again")

    version = params.pop("int8_format", INT8_FORMAT)
    if version != INT8_FORMAT:
        raise ValueError(
            f"{path} is of int8 format {version!r:.60}, this program reads {INT8_FORMAT}: take a "
            "newer one, or quantize the model again"
        )
    return params


def model_args(params: dict, vocab_size: int, **limits: int) -> ModelArgs:
    """`params` completed and checked; ValueError says what is missing or cannot be, a warning what
    is not known."""
    known = {field.name for field in fields(ModelArgs)} - {"max_batch_size", "max_seq_len"}
    if unknown := sorted(set(params) - known):
        warnings.warn(f"params.json: unknown keys are ignored: {some_of(unknown)}", stacklevel=4)
    params = {key: value for key, value in params.items() if key in known}
    if params.get("vocab_size", -1) == -1:
        params = {**params, "vocab_size": vocab_size}
    missing = [key for key in ("dim", "n_layers", "n_heads", "norm_eps") if key not in params]
    if missing:
        raise ValueError(f"params.json lacks {', '.join(missing)}: download it again")
    try:
        args = ModelArgs(**params)
        check_fields(
            args,
            dim=(int, 1, 2**17),
            n_layers=(int, 1, 1000),
            n_heads=(int, 1, 2**17),
            vocab_size=(int, -1, 2**24),
            multiple_of=(int, 1, 2**17),
            ffn_dim_multiplier=(float, 0.01, 100),
            norm_eps=(float, 1e-12, 0.1),
            rope_theta=(float, 100, 1e12),
        )
        check_fields(args, n_kv_heads=(int, 1, args.n_heads))
        if args.dim % (2 * args.n_heads) or args.n_heads % args.kv_heads:
            raise ValueError("heads of one even width")
    except ValueError as error:
        raise ValueError(f"params.json: {error}; download it again") from None
    args = replace(args, **limits)
    check_fields(args, max_batch_size=(int, 1, 2**20), max_seq_len=(int, 1, 2**20))
    if args.vocab_size != vocab_size:
        raise ValueError(
            f"the tokenizer has {vocab_size} pieces, params.json asks for {args.vocab_size}: "
            "pass the tokenizer.model that came with these weights"
        )
    return args
