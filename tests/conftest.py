"""What do the tests share? The demo model, and small random checkpoints of any shape."""

# ruff: noqa: E402
import base64
import io
import os
import shutil
import sys
from pathlib import Path

import byte_pairs
import pytest
import torch

if not torch.cuda.is_available():  # triton reads it when it is imported, as bitsandbytes does
    os.environ["TRITON_INTERPRET"] = "1"

from checkpoints import random_weights, tiny_params, write_checkpoint

from llama import LLaMA, cli

DEMO = Path(__file__).parents[1] / "llama" / "demo"


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, torch sees none"))


@pytest.fixture
def make_folder(tmp_path):
    """make_folder(n_shards, dtype, outliers, **params) -> (folder, params, weights): a model folder
    with the demo's tokenizer."""

    def make(n_shards=1, dtype=torch.float16, outliers=(), name="tiny", **overrides):
        params = tiny_params(**overrides)
        weights = random_weights(params, dtype=dtype, outliers=outliers, vocab_size=vocab_size())
        folder = write_checkpoint(tmp_path / name, params, weights, n_shards)
        shutil.copy(DEMO / "tokenizer.model", folder)
        return folder, params, weights

    return make


@pytest.fixture
def run_command(monkeypatch, capsys):
    """run_command(command, *arguments, stdin=b"") -> exit status, stdout and stderr of what
    `cli.run` makes of a command in this process."""

    def call(command, *arguments, stdin=b""):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8"))
        status = 0
        try:
            cli.run(command)
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def large_folder(tmp_path_factory):
    """0.9 GB in fp32, where the float16 of one matrix or of one shard would show."""
    folder = tmp_path_factory.mktemp("large") / "large"
    params = tiny_params(dim=2048, n_heads=16, n_layers=4, multiple_of=256)
    weights = random_weights(params, dtype=torch.float32, vocab_size=vocab_size())
    write_checkpoint(folder, params, weights, 2)
    shutil.copy(DEMO / "tokenizer.model", folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def demo():
    """The demo model in int8 on the CPU."""
    return LLaMA.build(device="cpu")


@pytest.fixture(scope="session")
def demo_float():
    return LLaMA.build(device="cpu", use_int8=False)


@pytest.fixture(scope="session")
def llama3(tmp_path_factory):
    """A tokenizer of Llama 3's kind, with fewer pairs."""
    pytest.importorskip("tiktoken")
    from llama import Tokenizer

    path = tmp_path_factory.mktemp("llama3") / "tokenizer.model"
    path.write_bytes(byte_pairs.rank_file())
    return Tokenizer(path)


@pytest.fixture(scope="session")
def tiktoken_itself(llama3):
    """With all special tokens, unlike ours."""
    import tiktoken

    lines = [line.split() for line in llama3.path.read_text().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    names = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|{i}|>" for i in range(2, 6))]
    names += ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"]
    names += [f"<|{i}|>" for i in range(10, 256)]
    special = {name: len(ranks) + i for i, name in enumerate(names)}
    return tiktoken.Encoding(
        "test", pat_str=byte_pairs.PATTERN, mergeable_ranks=ranks, special_tokens=special
    )


def vocab_size() -> int:
    from llama import Tokenizer

    return Tokenizer(DEMO / "tokenizer.model").n_words
