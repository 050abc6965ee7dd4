"""How does one measure a model one does not have? python tests/random_model.py 13B FOLDER

Writes a folder in Meta's format, of a published size and with its number of shards, filled with
random values: speed and memory do not depend on what the weights say. A few features have norm
weights of 8, so that activations beyond 6.0 occur as in trained models. Its tokenizer has 32,000
pieces, one a character, so what such a model prints is no language. One shard at a time is in
memory (up to 17 GB).
"""

import io
import json
import sys
from pathlib import Path

import torch
from checkpoints import JOINED_ON, shapes
from sentencepiece import SentencePieceTrainer

from llama.benchmark import OUTLIER, OUTLIERS
from llama.memory import SIZES, VOCABULARY

SHARDS = {"7B": 1, "13B": 2, "30B": 4, "65B": 8}


def write_tokenizer(path: Path) -> None:
    letters = [chr(c) for c in (*range(0x21, 0x7F), *range(0x4E00, 0x9FA6), *range(0xAC00, 0xD7A4))]
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter("".join(letters[i : i + 100]) for i in range(0, len(letters), 100)),
        model_writer=model,
        model_type="char",
        vocab_size=VOCABULARY,
        character_coverage=1.0,
        normalization_rule_name="identity",
        pad_id=-1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def main(size: str, folder: Path) -> None:
    params = {"multiple_of": 256, "norm_eps": 1e-6, "vocab_size": -1} | SIZES[size]
    n_shards = SHARDS[size]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(n_shards):
        shard = {}
        for name, shape in shapes(params, VOCABULARY).items():
            dim = JOINED_ON.get(name.split(".")[-2])
            if dim is None:
                shard[name] = torch.ones(shape, dtype=torch.float16)
                shard[name][OUTLIERS] = OUTLIER
                continue
            split = [n // n_shards if i == dim else n for i, n in enumerate(shape)]
            scale = 1 if name.startswith("tok") else shape[1] ** -0.5
            shard[name] = (torch.randn(split, device=device, dtype=torch.float16) * scale).cpu()
        torch.save(shard, folder / f"consolidated.{rank:02d}.pth")
    write_tokenizer(folder / "tokenizer.model")
    (folder / "params.json").write_text(json.dumps(params))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
