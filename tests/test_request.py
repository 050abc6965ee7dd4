"""Is what streams whole characters, and in the end what `generate` gives?"""

import random

import pytest
from conftest import DEMO

from llama import Tokenizer, request
from llama.request import Completion, Request

TOKENIZER = Tokenizer(DEMO / "tokenizer.model")
PROMPTS = ["", "Once upon a time", "A\N{FOX FACE}", " ", "日本 "]


def pieces(prompt, ids, stop=(), limit=10**6, every=1):
    """Text as it comes, when it is read after each `every` ids."""
    row = Request(TOKENIZER, TOKENIZER.encode(prompt, True, False), limit, stop)
    read = []
    for n, id in enumerate([*ids, TOKENIZER.eos_id], 1):
        if row.finish_reason:
            break
        row.extend([id])
        if n % every == 0:
            read.append(row.read())
    read.append(row.read())
    assert "".join(read) == row.text and row.read() == ""
    return [piece for piece in read if piece], row


def random_ids(generator, n):
    """Bytes that begin, continue and break characters, spaces, controls, and pieces of text."""
    some_bytes = [0x0A, 0x41, 0x80, 0x8A, 0x9F, 0xA6, 0xBD, 0xBF, 0xC3, 0xE0, 0xEF, 0xF0, 0xFF]
    choices = [3 + byte for byte in some_bytes] + [0, 1, TOKENIZER._kind._sp.piece_to_id("▁")]
    ids = [generator.choice(choices) for _ in range(n)]
    return [i if generator.random() < 0.6 else generator.randrange(259, 4096) for i in ids]


@pytest.mark.parametrize("every", [1, 3])
def test_joined_pieces_equal_the_whole_text(every):
    generator = random.Random(1)
    for _ in range(1000):
        prompt, ids = generator.choice(PROMPTS), random_ids(generator, generator.randrange(20))
        before = TOKENIZER.encode(prompt, True, False)
        whole = TOKENIZER.decode(before + ids)[len(TOKENIZER.decode(before)) :]
        assert "".join(pieces(prompt, ids, every=every)[0]) == whole, (prompt, ids)


def test_a_character_comes_whole_and_at_once():
    ids = TOKENIZER.encode("a\N{FOX FACE}é日b", False, False)
    assert pieces("The ", ids)[0] == [" a", "\N{FOX FACE}", "é", "日", "b"]


def test_broken_characters_are_not_held_for_ever():
    read, _ = pieces("A", [3 + 0xF0, 3 + 0x9F] * 100)
    assert len(read) > 90 and "".join(read) == "\N{REPLACEMENT CHARACTER}" * 200


def test_what_came_of_a_prompt(monkeypatch):
    """The clock begins with its turn."""
    clock = iter([1.0, 3.0, 5.51234567, 9.12345])
    monkeypatch.setattr(request.time, "perf_counter", lambda: next(clock))
    row = Request(TOKENIZER, [1], 2, [])
    row.begin()
    ids = [3 + ord("A"), 3 + ord("B")]
    for id in ids:
        row.extend([id], [-0.5])
    completion = row.completion()
    assert completion == Completion(0, "", "AB", ids, "length", 6.1235, 2.5123, [-0.5, -0.5])
    with pytest.raises(AttributeError):
        completion.text = ""


@pytest.mark.parametrize(
    "stop, text",
    [
        (["king"], "the old "),
        (["d king", "nobody"], "the ol"),
        (["the"], ""),
        (["kin", "king's"], "the old "),
        (["kings", "son"], "the old king's "),
        (["nobody"], "the old king's son said: ab"),
        (["ababc"], "the old king's son said: ab"),
        (["\n"], "the old king's son said: ab"),
    ],
)
@pytest.mark.parametrize("every", [1, 7])
def test_stop_strings(stop, text, every):
    """Letter by letter, so that every border of tokens is one within the stop string."""
    said = "the old king's son said: ab"
    ids = [TOKENIZER._kind._sp.piece_to_id(letter.replace(" ", "▁")) for letter in said]
    read, row = pieces("A", ids, stop, every=every)
    assert "".join(read) == text
    assert row.finish_reason == ("stop" if text != said else "eos")


def test_what_may_begin_a_stop_string_waits():
    ids = [TOKENIZER._kind._sp.piece_to_id(letter) for letter in "ababac"]
    assert pieces("A", ids, ["abac"])[0] == ["ab"]
    assert pieces("A", ids, ["abab!"])[0] == ["ab", "abac"]


def test_a_stop_string_is_the_reason_at_the_limit_and_the_first_of_two_in_a_token_counts():
    ids = TOKENIZER.encode("the king", False, False)
    assert pieces("A", ids, limit=len(ids))[1].finish_reason == "length"
    stopped = pieces("A", ids, ["king"], limit=len(ids))[1]
    assert (stopped.finish_reason, stopped.ids) == ("stop", ids)
    assert len(ids) == 2 and pieces("A", ids, ["ing", "k"])[1].text == " the "
