"""How does one measure a model one does not have? python tests/random_model.py 13B FOLDER

Writes a folder in Meta's format, of a published size and with its number of shards, filled with
random values: speed and memory do not depend on what the weights say. As in trained models, norm
weights are below 1 but for a few features, whose activations pass 6.0. Its tokenizer has 32,000
pieces, one a character, or Llama 3's number of ranks, so what such a model prints is no language.
One shard at a time is in memory (up to 17 GB).

With --int8 as third argument it writes what llama.quantize would, one layer in memory and the same
random codes in all of them: 65B takes 66 GB, which fits in /dev/shm where 130 GB fit nowhere.
"""

import io
import itertools
import json
import sys
from base64 import b64encode
from pathlib import Path

import torch
from checkpoints import JOINED_ON, shapes
from sentencepiece import SentencePieceTrainer

from llama.benchmark import NORM, OUTLIER, OUTLIERS
from llama.memory import SIZES, VOCABULARY
from llama.params import INT8_FORMAT
from llama.tokenizer import SPECIAL_TOKENS

SHARDS = {"7B": 1, "8B": 1, "13B": 2, "30B": 4, "65B": 8}


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


def write_ranks(path: Path, count: int) -> None:
    """A Llama 3 tokenizer of the shortest byte strings."""
    strings = (bytes(s) for n in (1, 2, 3) for s in itertools.product(range(256), repeat=n))
    ranked = enumerate(itertools.islice(strings, count))
    path.write_bytes(b"".join(b64encode(string) + b" %d\n" % rank for rank, string in ranked))


def words(params: dict) -> int:
    return params["vocab_size"] if params["vocab_size"] > 0 else VOCABULARY


def main(size: str, folder: Path, int8: bool = False) -> None:
    params = {"multiple_of": 256, "norm_eps": 1e-6, "vocab_size": -1} | SIZES[size]
    folder.mkdir(parents=True, exist_ok=True)
    torch.serialization.set_crc32_options(False)  # six times as fast; nobody checks them
    if int8:
        params["int8_format"] = INT8_FORMAT
        write_int8(params, folder)
    else:
        write_shards(params, SHARDS[size], folder)
    torch.serialization.set_crc32_options(True)
    if params["vocab_size"] > 0:
        write_ranks(folder / "tokenizer.model", params["vocab_size"] - SPECIAL_TOKENS)
    else:
        write_tokenizer(folder / "tokenizer.model")
    (folder / "params.json").write_text(json.dumps(params))


def write_shards(params: dict, n_shards: int, folder: Path) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for rank in range(n_shards):
        shard = {}
        for name, shape in shapes(params, words(params)).items():
            dim = JOINED_ON.get(name.split(".")[-2])
            if dim is None:
                shard[name] = torch.full(shape, NORM, dtype=torch.float16)
                shard[name][OUTLIERS] = OUTLIER
                continue
            split = [n // n_shards if i == dim else n for i, n in enumerate(shape)]
            scale = 1 if name.startswith("tok") else shape[1] ** -0.5
            shard[name] = (torch.randn(split, device=device, dtype=torch.float16) * scale).cpu()
        torch.save(shard, folder / f"consolidated.{rank:02d}.pth")


def write_int8(params: dict, folder: Path) -> None:
    made = {}  # kind of weight -> its tensors

    def random(name: str, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
        if len(shape) == 1:
            norm = torch.full(shape, NORM, dtype=torch.float16)
            norm[OUTLIERS] = OUTLIER
            return {"weight": norm}
        if name.startswith("tok"):
            return {"weight": torch.randn(shape, dtype=torch.float16)}
        codes = torch.empty(shape, dtype=torch.int8).random_(-127, 128)
        # Uniform codes have a standard deviation of 73: outputs get that of the inputs.
        scales = torch.full(shape[:1], 127 / 73 / shape[1] ** 0.5)
        return {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0).byte()}

    names = shapes(params, words(params))
    layers = [f"layers.{i}." for i in range(params["n_layers"])]
    for i, start in enumerate(["tok", *layers, ("norm", "output")]):
        tensors = {}
        for name, shape in names.items():
            if name.startswith(start):
                path = name.removesuffix(".weight")
                kind = path.removeprefix(start) if start in layers else path
                if kind not in made:
                    made[kind] = random(name, shape)
                tensors |= {f"{path}.{part}": tensor for part, tensor in made[kind].items()}
        torch.save(tensors, folder / f"consolidated.{i:02d}.pth")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:] == ["--int8"])
