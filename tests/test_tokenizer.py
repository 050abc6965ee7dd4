"""Does text become sentencepiece's own ids and come back?"""

import base64

import pytest
from conftest import DEMO
from sentencepiece import SentencePieceProcessor

from llama import Tokenizer

TEXTS = [
    "Once upon a time",
    "  two spaces,\n\na line\tand a tab ",
    "1234 and 3.14",
    "naïve café, Straße, Ελληνικά, русский, 日本語, عربى",
    "\N{FOX FACE}\N{ZERO WIDTH JOINER}\N{SNOWMAN}",
    "",
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(DEMO / "tokenizer.model")


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_sentencepieces_and_text_comes_back(tokenizer, text):
    theirs = SentencePieceProcessor(model_file=str(DEMO / "tokenizer.model"))
    assert tokenizer.encode(text, bos=False, eos=False) == theirs.encode(text)
    ids = tokenizer.encode(text, bos=True, eos=True)
    assert ids == [1, *theirs.encode(text), 2]
    assert tokenizer.decode(ids) == text


def test_special_ids_are_llamas(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, -1)
    assert tokenizer.n_words == SentencePieceProcessor(str(DEMO / "tokenizer.model")).vocab_size()


def test_absent_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist: pass the tokenizer.model"):
        Tokenizer(tmp_path / "tokenizer.model")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html></html>", b"\x00" * 1000])
def test_what_is_no_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match="is not a sentencepiece model"):
        Tokenizer(tmp_path / "tokenizer.model")


def test_llama_3_tokenizer_is_named(tmp_path):
    lines = [base64.b64encode(bytes([65 + i])) + b" %d\n" % i for i in range(20)]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match="tiktoken file, as Llama 3 has it"):
        Tokenizer(tmp_path / "tokenizer.model")
