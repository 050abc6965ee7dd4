"""How does one save the int8 form? python -m llama.quantize --ckpt_dir /w/13B --out_dir /w/13B_int8

What it writes is a model folder like any other, half as large, and loading it quantizes nothing. No
GPU is needed.
"""

import os
import sys
from pathlib import Path

from llama import checkpoint, params
from llama.cli import run


def main(ckpt_dir: str, out_dir: str, tokenizer_path: str | None = None):
    """Writes a model's int8 form.

    Args:
        ckpt_dir: a model folder in Meta's format
        out_dir: the folder to write, which must not be there yet
        tokenizer_path: its tokenizer.model (looked for in the folder and beside it)
    """
    folder, out = (Path(os.path.expanduser(path)) for path in (ckpt_dir, out_dir))
    checkpoint.save_int8(folder, *params.read_model(folder, tokenizer_path), out)
    print(f"Wrote {out}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
