"""Is whatever a grammar can write read as a second reader reads it, or refused in a sentence?

`grammars` writes files of model folders as they may be, and now and then something else in a place.
python tests/test_fuzz.py MINUTES does so for longer and says how many were read.
"""

import contextlib
import io
import itertools
import resource
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import byte_pairs
import faults
import fire
import pytest
import second_reader
import torch
from grammars import WORDS, FolderWriter, ShardWriter, written
from hypothesis import HealthCheck, given, seed, settings

from llama import LLaMA, Tokenizer
from llama.params import model_args, read_params
from llama.shards import Buffer, open_shard

pytestmark = pytest.mark.slow

OPTIONS = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
SECONDS, MIB = 2, 200
TEXTS = ["", "a", " ab  ba\n", "e\xe9\u65e5 b\u2581a", "The king's 1234 foxes <s> bebe", "abe" * 40]


def shard(folder):
    pieces = open_shard(folder / "consolidated.00.pth").items()
    found = {name: piece.read(Buffer()).clone() for name, piece in pieces}

    def compare():
        expected = second_reader.read(folder / "consolidated.00.pth")
        assert list(found) == list(expected)
        for name, x in expected.items():
            assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape), name
            assert found[name].tolist() == x.tolist(), name  # no numbers here are NaN
        return "read, with tensors" if found else "read, empty"

    return compare


def params(folder):
    (folder / "consolidated.00.pth").touch()
    found = model_args(read_params(folder), WORDS)

    def compare():
        content = (folder / "params.json").read_bytes()
        expected = second_reader.params(content, WORDS)
        assert {name: getattr(found, name) for name in expected} == expected

    return compare


def ranks(folder):
    tokenizer = Tokenizer(folder / "tokenizer.model")

    def compare():
        expected = second_reader.Ranks((folder / "tokenizer.model").read_bytes())
        count = len(expected.tokens)
        assert (tokenizer.n_words, tokenizer.bos_id) == (count + 256, count)
        assert tokenizer.end_ids == (count + 1, count + 8, count + 9)
        for text in TEXTS:
            ids = expected.encode(text)
            assert tokenizer.encode(text, True, False) == [count, *ids]
            assert tokenizer.decode([*ids, count]) == text
        for id, token in enumerate(expected.tokens):
            assert tokenizer.decode([id]) == token.decode(errors="replace")

    return compare


def sentencepiece(folder):
    tokenizer = Tokenizer(folder / "tokenizer.model")

    def compare():
        expected = second_reader.SentencePiece((folder / "tokenizer.model").read_bytes())
        assert tokenizer.n_words == len(expected.pieces)
        assert (tokenizer.bos_id, tokenizer.eos_id) == (expected.bos_id, expected.eos_id)
        if not expected.usual:
            return "read, of another kind"
        for id in range(tokenizer.n_words):
            assert tokenizer.decode([id, id]) == expected.decode_twice(id)
        for text in TEXTS:
            assert tokenizer.encode(text, False, True) == [*expected.encode(text), expected.eos_id]

    return compare


def int8_folder(folder):
    (folder / "tokenizer.model").write_bytes(
        b"".join(byte_pairs.rank_file().splitlines(keepends=True)[:256])
    )
    with contextlib.redirect_stderr(io.StringIO()):
        found = faults.held(LLaMA.build(folder, device="cpu").model)

    def compare():
        expected = second_reader.int8_folder(folder, WORDS)
        assert found.keys() == expected.keys()
        for name, x in expected.items():
            assert torch.equal(found[name], x if x.dtype == torch.int8 else x.float()), name

    return compare


def file(name, strategy):
    return strategy.map(lambda content: {name: content})


KINDS = {  # what is drawn: the contents of files by name
    shard: file("consolidated.00.pth", written(ShardWriter, "shard")),
    params: file("params.json", written(FolderWriter, "params")),
    ranks: file("tokenizer.model", written(FolderWriter, "ranks")),
    sentencepiece: file("tokenizer.model", written(FolderWriter, "sentencepiece")),
    int8_folder: written(FolderWriter, "int8"),
}


def check(kind, contents, counts):
    """Reads a folder twice and compares; counts what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in contents.items():
            Path(folder, name).write_bytes(content)
        started = time.perf_counter()
        try:
            compare = kind(Path(folder))
        except (ValueError, OSError) as error:
            assert str(error).isprintable() and len(str(error)) < 800, error
            counts["refused"] += 1
        else:
            counts[compare() or "read"] += 1
        assert time.perf_counter() - started < SECONDS


def run(kind, counts, number, max_examples):
    """Tries so many, others for another number. It fails with the smallest that fails."""

    @seed(number)
    @settings(max_examples=max_examples, **OPTIONS)
    @given(KINDS[kind])
    def some(contents):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of zipfile, about names that are there twice
            check(kind, contents, counts)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    some()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MIB * 1024


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_a_grammar_writes(kind):
    counts = Counter()
    run(kind, counts, 0, 400 if kind is shard else 200)
    assert len(counts) > 1 and min(counts.values()) > 9, counts


def main(minutes: float):
    counts, end = {kind: Counter() for kind in KINDS}, time.monotonic() + 60 * minutes
    for number in itertools.count(1):
        for kind in KINDS:
            run(kind, counts[kind], number, 200)
        if time.monotonic() > end:
            break
    for kind, of_kind in counts.items():
        print(f"{kind.__name__}: {of_kind.total()}, {dict(of_kind)}")


if __name__ == "__main__":
    fire.Fire(main)
