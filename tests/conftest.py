"""What do the tests share? The demo model, and small random checkpoints of any shape."""

# ruff: noqa: E402
import base64
import io
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

# With small matrices, threads mostly wait for each other: beside another program two took 431 s of
# CPU for what one does in 156.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import byte_pairs
import pytest
import torch

if not torch.cuda.is_available():  # triton reads it when it is imported, as bitsandbytes does
    os.environ["TRITON_INTERPRET"] = "1"

from checkpoints import random_weights, tiny_params, write_checkpoint

from llama import LLaMA, Tokenizer, cli
from llama.decode import TorchEngine

interpreter = sys.modules.get("triton.runtime.interpreter")
if interpreter and hasattr(interpreter, "_patch_lang"):
    # It replaces what is in triton.language for each call of a function within a kernel, which is
    # half of its time. Once for each module is enough where nothing is compiled.
    scopes, patch_lang = {}, interpreter._patch_lang

    def patch_once(fn):
        if fn.__module__ not in scopes:
            scopes[fn.__module__] = patch_lang(fn)
        return interpreter._LangPatchScope()  # nothing to restore

    interpreter._patch_lang = patch_once

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "llama" / "demo"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def python(*arguments, cwd=ROOT, **environment) -> subprocess.CompletedProcess:
    """What comes of a Python of its own, as users have it: stdout and stderr apart."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, torch sees none"))


def write_folder(folder, params, n_shards, **options):
    """folder, params and the random weights that it now holds, beside the demo's tokenizer."""
    weights = random_weights(params, vocab_size=vocab_size(), **options)
    write_checkpoint(folder, params, weights, n_shards)
    shutil.copy(DEMO / "tokenizer.model", folder)
    return folder, params, weights


@pytest.fixture
def make_folder(tmp_path):
    """make_folder(n_shards, dtype, outliers, **params) -> (folder, params, weights): a model folder
    with the demo's tokenizer."""

    def make(n_shards=1, dtype=torch.float16, outliers=(), name="tiny", **overrides):
        params = tiny_params(**overrides)
        return write_folder(tmp_path / name, params, n_shards, dtype=dtype, outliers=outliers)

    return make


@pytest.fixture
def plain_engine_verifies(monkeypatch):
    """plain_engine_verifies(cost): its steps take several tokens of a sequence, too, one after the
    other, so that they have the bits of as many steps, and are said to cost so much."""
    plain = TorchEngine.step

    def step(engine, tokens, positions):
        each = len(tokens) // engine.cache.k.shape[1]
        rows = zip(tokens.view(-1, each).T, positions.view(-1, each).T)
        return torch.stack([plain(engine, *row) for row in rows], 1).flatten(0, 1)

    def verifies(cost):
        monkeypatch.setattr(TorchEngine, "step", step)
        monkeypatch.setattr(TorchEngine, "cost", lambda *_: cost)

    return verifies


@pytest.fixture
def run_command(monkeypatch, capsys):
    """run_command(command, *arguments, stdin=b"", errors="strict") -> exit status, stdout and
    stderr of a command in this process: a function that `cli.run` is given, a script, or a module
    by its name; `errors` is what the locale does with bytes that are no text."""

    def call(command, *arguments, stdin=b"", errors="strict"):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8", errors))
        status = 0
        try:
            if isinstance(command, Path):
                runpy.run_path(str(command), run_name="__main__")
            elif isinstance(command, str):
                name = f"{command}.__main__" if command == "llama" else command
                monkeypatch.delitem(sys.modules, name, raising=False)  # else runpy warns
                runpy.run_module(command, run_name="__main__", alter_sys=True)
            else:
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
    write_folder(folder, params, 2, dtype=torch.float32)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def set_threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


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
    return Tokenizer(DEMO / "tokenizer.model").n_words
