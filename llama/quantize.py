"""Saves a model's int8 form: python -m llama.quantize --ckpt_dir /w/13B --out_dir /w/13B_int8

It is a model folder of half the size, which loads without quantizing. No GPU is needed.
"""

import os
from pathlib import Path

from llama import checkpoint
from llama.cli import run, say
from llama.params import read_model


def main(ckpt_dir: str, out_dir: str, tokenizer_path: str | None = None):
    """Saves the int8 form of a model in a new folder.

    Args:
        ckpt_dir: a model folder in Meta's format
        out_dir: the folder to write, which must not be there yet
        tokenizer_path: its tokenizer.model (looked for in the folder and beside it)
    """
    folder, out = (Path(os.path.expanduser(path)) for path in (ckpt_dir, out_dir))
    checkpoint.save_int8(folder, *read_model(folder, tokenizer_path), out)
    say(f"Wrote {out}")


if __name__ == "__main__":
    run(main)
