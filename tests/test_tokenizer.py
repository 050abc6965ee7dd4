"""Does text become sentencepiece's own ids and come back?"""

import base64
import random
import unicodedata

import pytest
from conftest import DEMO
from sentencepiece import SentencePieceProcessor

from llama import Tokenizer
from llama.continuation import Continuation

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


def random_texts(count):
    """Words of one script or of all, symbols and whatever else is assigned, in each text."""
    generator = random.Random(1)
    planes = [range(0x20), range(0x20, 0x7F), range(0x7F, 0x2B00), range(0x2B00, 0xD800)]
    planes += [range(0xE000, 0x10000), range(0x10000, 0x20000), range(0x20000, 0x110000)]
    scripts = [range(start, start + 0x80) for start in range(0, 0x3000, 0x80)]
    words = DEMO.joinpath("SOURCES.md").read_text().split()
    for _ in range(count):
        kinds = [generator.choice(scripts), generator.choice(planes), range(0x20, 0x7F)]
        parts = []
        for _ in range(generator.randint(0, 6)):
            letters = generator.choice(kinds)
            word = "".join(map(chr, generator.choices(letters, k=generator.randint(1, 8))))
            parts.append(generator.choice([word, word, generator.choice(words)]))
        yield generator.choice(["", " ", "  ", "\n"]).join(parts)


def test_10000_texts_of_many_scripts(tokenizer):
    theirs = SentencePieceProcessor(model_file=str(DEMO / "tokenizer.model"))
    seen, bytes_seen, number = set(), 0, 0
    for text in random_texts(10_000):
        number += 1
        ids = tokenizer.encode(text, bos=False, eos=False)
        assert ids == theirs.encode(text)
        # sentencepiece writes a space as this character, and reads it as one.
        back = text.replace("\u2581", " ")
        assert tokenizer.decode(ids) == tokenizer.decode([1, *ids, 2]) == back, ascii(text)
        seen |= {unicodedata.name(c, "").split(" ")[0] for c in text}
        pieces = [theirs.is_byte(id) for id in ids]
        bytes_seen += any(pieces)
        if number % 5:
            continue
        streamed = Continuation(tokenizer, [1, *theirs.encode("A")], 10**6, [])
        said = []
        for id in [*ids, tokenizer.eos_id]:
            streamed.add(id)
            said.append(streamed.read())
        whole = tokenizer.decode([1, *theirs.encode("A"), *ids])[1:]
        assert "".join(said) == whole == (f" {back}" if text else ""), ascii(text)
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(said) or "\ufffd" in text
    scripts = {"LATIN", "GREEK", "CYRILLIC", "HEBREW", "ARABIC", "DEVANAGARI", "THAI", "HANGUL"}
    assert scripts | {"HIRAGANA", "CJK", "ETHIOPIC"} <= seen and bytes_seen > 5_000


def test_a_piece_that_is_no_text_is_refused(tmp_path):
    content = (DEMO / "tokenizer.model").read_bytes()
    assert content.count(b"king") > 0
    (tmp_path / "tokenizer.model").write_bytes(content.replace(b"king", b"k\xffng"))
    with pytest.raises(ValueError, match="is not a sentencepiece model"):
        Tokenizer(tmp_path / "tokenizer.model")
