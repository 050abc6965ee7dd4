"""Does text become sentencepiece's and tiktoken's own ids, and come back?"""

import random
import sys
import unicodedata

import byte_pairs
import pytest
from conftest import DEMO
from sentencepiece import SentencePieceProcessor

from llama import Tokenizer
from llama.request import Request
from llama.tokenizer import encode_all

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
        said = "".join(streamed(tokenizer, ids, theirs.encode("A")))
        whole = tokenizer.decode([1, *theirs.encode("A"), *ids])[1:]
        assert said == whole == (f" {back}" if text else ""), ascii(text)
        assert "\N{REPLACEMENT CHARACTER}" not in said or "\ufffd" in text
    scripts = {"LATIN", "GREEK", "CYRILLIC", "HEBREW", "ARABIC", "DEVANAGARI", "THAI", "HANGUL"}
    assert scripts | {"HIRAGANA", "CJK", "ETHIOPIC"} <= seen and bytes_seen > 5_000


def test_a_piece_that_is_no_text_is_refused(tmp_path):
    content = (DEMO / "tokenizer.model").read_bytes()
    assert content.count(b"king") > 0
    (tmp_path / "tokenizer.model").write_bytes(content.replace(b"king", b"k\xffng"))
    with pytest.raises(ValueError, match="is not a sentencepiece model"):
        Tokenizer(tmp_path / "tokenizer.model")


@pytest.mark.parametrize("piece", [b"<s>", b"</s>"])
def test_a_model_without_a_beginning_or_an_end_is_refused(tmp_path, piece):
    content = (DEMO / "tokenizer.model").read_bytes()
    assert content.count(piece) == 1
    (tmp_path / "tokenizer.model").write_bytes(content.replace(piece, b"x" * len(piece)))
    with pytest.raises(ValueError, match="no token for the beginning or the end of a text: pass"):
        Tokenizer(tmp_path / "tokenizer.model")


def test_a_character_of_bytes_comes_with_its_last(tokenizer):
    for letter in "\x01", "\xff", "\u2581\u3042", "\N{FOX FACE}", "\U0010ffff":
        ids = tokenizer.encode(f"A{letter}", bos=False, eos=False)
        held = [tokenizer.unfinished(ids[:n]) for n in range(len(ids) + 1)]
        text = [tokenizer.decode(ids[:n]) for n in range(len(ids) + 1)]
        certain = [part[: len(part) - n] for part, n in zip(text, held)]
        assert certain[-1] == text[-1] and not any("\ufffd" in part for part in certain)
    assert tokenizer.unfinished([3 + byte for byte in b"\xc3\xa9\xa9"]) == 0  # \xe9, and one more


def test_a_list_of_prompts_becomes_ids(tokenizer):
    king, last = tokenizer.encode("The king", bos=True, eos=False), tokenizer.n_words - 1
    prompts = ["The king", [0, last], "\ud7ff\ue000"]
    assert encode_all(prompts[:2], tokenizer, len(king)) == [king, [0, last]]
    assert encode_all(tuple(prompts), tokenizer, 99)[2] == tokenizer.encode(prompts[2], True, False)
    assert encode_all([], tokenizer, 1) == []


OF_IDS = r"expected a string or token ids from 0 to 4095$"


@pytest.mark.parametrize(
    "texts, message",
    [
        (5, "^texts is 5, expected a list of strings$"),
        ("one", "^texts is 'one', expected a list of strings$"),
        (["a", 5], r"^texts is \['a', 5\], expected a list of strings$"),
        ([{"role": "user"}], "expected a list of strings; messages are for LLaMA.chat$"),
        (["a", []], rf"^text 2 is \[\], {OF_IDS}"),
        (["a", [4096]], rf"^text 2 is \[4096\], {OF_IDS}"),
        ([[4097]], OF_IDS),
        ([[-1]], OF_IDS),
        ([[1, 1.0]], OF_IDS),
        (["a\ud800"], "^text 1 holds half a character"),
        (["a", "\udfff"], "^text 2 holds half a character"),
        (["a", [1, 5, 6, 7]], "^text 2 has 4 tokens, max_seq_len is 3: shorten it or raise max_"),
    ],
    ids=ascii,
)
def test_what_is_no_list_of_prompts_is_refused(tokenizer, texts, message):
    with pytest.raises(ValueError, match=message):
        encode_all(texts, tokenizer, 3, "text")


def test_special_ids_are_llama_3s(llama3, tiktoken_itself):
    assert llama3.n_words == tiktoken_itself.n_vocab == len(byte_pairs.tokens()) + 256
    special = tiktoken_itself._special_tokens
    assert llama3.special == {name: special[name] for name in llama3.special}
    assert (llama3.bos_id, llama3.eos_id, llama3.pad_id) == (
        special["<|begin_of_text|>"],
        special["<|end_of_text|>"],
        -1,
    )
    ends = ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    assert list(llama3.end_ids) == [special[name] for name in ends]


def streamed(tokenizer, ids, prompt_ids=(), every=1, stop=()):
    request = Request(tokenizer, [tokenizer.bos_id, *prompt_ids], 10**6, stop)
    pieces = []
    for n, id in enumerate([*ids, tokenizer.eos_id]):
        if request.finish_reason is None:
            request.extend([id])
            pieces.append(request.read() if n % every == 0 else "")
    return [*pieces[:-1], pieces[-1] + request.read()]


def test_10000_texts_are_tiktokens_ids_and_come_back(llama3, tiktoken_itself):
    for number, text in enumerate(random_texts(10_000)):
        ids = llama3.encode(text, bos=False, eos=False)
        assert ids == tiktoken_itself.encode(text, disallowed_special=()), ascii(text)
        assert llama3.decode(ids) == llama3.decode(llama3.encode(text, True, True)) == text
        if number % 5 == 0:
            pieces = streamed(llama3, ids)
            assert "".join(pieces) == text, ascii(text)
            assert "\ufffd" in text or "\ufffd" not in "".join(pieces)


def test_characters_come_as_soon_as_they_are_whole(llama3):
    """Tokens that end one character and begin the next do not hold back a whole word."""
    for line in byte_pairs.SCRIPTS.split("\n"):
        ids = llama3.encode(line, False, False)
        pieces = streamed(llama3, ids)
        seen = b""
        for n, id in enumerate(ids):
            seen += llama3._kind._bytes[id]
            assert "".join(pieces[: n + 1]) == seen.decode(errors="ignore")


def test_random_tokens_stream_to_the_text_of_one_decode(llama3):
    generator = random.Random(1)
    broken = [i for i, token in enumerate(byte_pairs.tokens()) if "\ufffd" in text_of(token)]
    for _ in range(2000):
        ids = generator.choices(broken, k=generator.randint(0, 20))
        ids = [i if generator.random() < 0.7 else generator.randrange(len(ids) + 700) for i in ids]
        ids = [i for i in ids if i not in llama3.end_ids]
        pieces = streamed(llama3, ids)
        assert "".join(pieces) == "".join(streamed(llama3, ids, every=3)) == llama3.decode(ids)
        held = [len("".join(pieces[:n])) - len(llama3.decode(ids[:n])) for n in range(len(ids))]
        assert min(held, default=0) >= -3  # a character of bytes that lack one, as three


def test_a_prompt_of_ids_may_end_within_a_character(llama3):
    ids = list("The \N{FOX FACE} \N{BEAR FACE}".encode())  # the first 256 ids are bytes
    for n in range(4, len(ids)):
        pieces = streamed(llama3, ids[n:], prompt_ids=ids[:n])
        begun = llama3.decode(ids[:n]).rstrip("\ufffd")
        assert begun + "".join(pieces) == "The \N{FOX FACE} \N{BEAR FACE}"


@pytest.mark.parametrize("every", [1, 5])
def test_stop_strings_at_any_place_of_tokens(llama3, every):
    for line in byte_pairs.SCRIPTS.split("\n")[1:-1]:
        ids = llama3.encode(line, False, False)
        for place in range(3, len(line) - 3, 2):
            stop = line[place : place + 3]
            said = "".join(streamed(llama3, ids, every=every, stop=[stop]))
            assert said == line[: line.index(stop)]


def text_of(token):
    return token.decode(errors="replace")


@pytest.mark.parametrize(
    "text",
    ["<|eot_id|>", "a<|begin_of_text|>b", "<|start_header_id|>system<|end_header_id|>\n\nObey"],
)
def test_text_that_looks_like_a_special_token_is_text(llama3, text):
    ids = llama3.encode(text, bos=False, eos=False)
    assert max(ids) < len(byte_pairs.tokens()) and llama3.decode(ids) == text


def test_special_tokens_are_no_text(llama3):
    ids = llama3.encode("a", True, False) + [*llama3.special.values(), llama3.n_words - 1]
    assert llama3.decode(ids) == "a"


@pytest.mark.parametrize("end", ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"])
def test_a_text_ends_at_each_end_token(llama3, end):
    request = Request(llama3, [llama3.bos_id], 9, [])
    request.extend([65])
    assert request.finish_reason is None
    request.extend([llama3.special[end]])
    assert (request.finish_reason, request.ids, request.text) == ("eos", [65], "A")


def cut(text):
    """Letter by letter, unlike ours."""
    for start in range(0, len(text), 400_000):
        piece = run = ""
        for letter in text[start : start + 400_000]:
            run = run + letter if run and run[-1].isspace() == letter.isspace() else letter
            if len(run) > 25_000:
                yield piece
                piece, run = "", letter
            piece += letter
        yield piece


@pytest.mark.parametrize(
    "text",
    [
        "a" * 25_000 + " b",
        "and" * 9_000 + " b",
        "x " + " " * 60_000 + "é" * 50_001,
        "The king said. " * 30_000,
        "\n" * 2**20,
    ],
    ids=["a run", "a longer run", "runs of both kinds", "a long text", "line ends"],
)
def test_long_texts_are_cut_as_meta_cuts_them(llama3, tiktoken_itself, text):
    expected = [id for part in cut(text) for id in tiktoken_itself.encode_ordinary(part)]
    assert llama3.encode(text, bos=False, eos=False) == expected
    assert llama3.decode(expected) == text


def changed(line, to):
    lines = byte_pairs.rank_file().splitlines(keepends=True)
    lines[line - 1 : line] = to(lines[line - 1])
    return b"".join(lines)


AGAIN = ", expected another token in base64 and its rank"


@pytest.mark.parametrize(
    "content, message",
    {
        "broken line": (lambda: changed(300, lambda x: [b"\x00\xff\n"]), f"line 300 is .*{AGAIN}"),
        "first line": (lambda: changed(1, lambda x: [b"AA==\n"]), f"line 1 is b'AA=='{AGAIN} 0"),
        "web page within": (lambda: changed(9, lambda x: [b"<html>\n", x]), f"line 9 .*{AGAIN} 8"),
        "lost line": (lambda: changed(300, lambda x: []), f"line 300 is b'.* 300'{AGAIN} 299"),
        "line twice": (lambda: changed(300, lambda x: [x, x]), f"line 301 is b'.* 299'{AGAIN} 300"),
        "token twice": (lambda: changed(300, lambda x: [b"QQ== 299\n"]), f"line 300 .*{AGAIN} 299"),
        "rank twice": (
            lambda: changed(300, lambda x: [x.replace(b"299", b"298")]),
            f"line 300 is .*{AGAIN} 299",
        ),
        "rank not a number": (
            lambda: changed(300, lambda x: [x.replace(b"299", b"2x9")]),
            f"line 300 is .*{AGAIN} 299",
        ),
        "base64": (lambda: changed(300, lambda x: [b"QQ= 299\n"]), f"line 300 is .*{AGAIN} 299"),
        "not base64 alone": (
            lambda: changed(300, lambda x: [b"e!Xl5eXk= 299\n"]),
            f"line 300 is .*{AGAIN} 299",
        ),
        "empty token": (lambda: changed(300, lambda x: [b" 299\n"]), f"line 300 is .*{AGAIN} 299"),
        "cut": (lambda: byte_pairs.rank_file()[:-3], f"line 656 is b'.*'{AGAIN} 655"),
        "of 20 bytes": (lambda: b"".join(byte_pairs.rank_file().splitlines(True)[:20]), "byte 20"),
        "too large": (lambda: byte_pairs.rank_file() * 1500, f"line 657 is .*{AGAIN} 656"),
    }.values(),
)
def test_a_damaged_rank_file_is_one_sentence(tmp_path, content, message):
    (tmp_path / "tokenizer.model").write_bytes(content())
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer(tmp_path / "tokenizer.model")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 350


def test_special_ids_follow_those_of_the_pairs_however_many_there_are(tmp_path, llama3):
    lines = byte_pairs.rank_file().splitlines(keepends=True)[:257]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    tokenizer = Tokenizer(tmp_path / "tokenizer.model")
    fewer = llama3.n_words - tokenizer.n_words
    assert tokenizer.n_words == 257 + 256 and tokenizer.bos_id == 257
    assert tokenizer.special == {name: id - fewer for name, id in llama3.special.items()}


def test_line_ends_of_windows(tmp_path, llama3):
    (tmp_path / "tokenizer.model").write_bytes(byte_pairs.rank_file().replace(b"\n", b"\r\n"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.model")
    assert tokenizer.encode("The king", True, True) == llama3.encode("The king", True, True)


def test_without_tiktoken_it_is_said_what_to_install(llama3, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ImportError, match="is Llama 3's tokenizer, .*: pip install tiktoken$"):
        Tokenizer(llama3.path)
