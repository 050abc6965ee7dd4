"""Does a text stay the same when its next tokens are guessed from what is already there?"""

import dataclasses

import pytest
import torch
from conftest import DEVICES
from test_generation import STORY, encoded

from llama import LLaMA, Settings, chat, decode, lookup, room
from llama.decode import Decoder

WORDS = "king queen fox wolf cat old young good rich poor".split()
# Sentences that come again in the text, so that there is something to guess.
TALES = [
    f"{first} {word} went away. The {word} came home. {first} {word} went"
    for word in WORDS
    for first in ("One day the", "In the evening the", "The", "So the", "Then the")
]
PROMPTS = [*TALES, *(f"{tale} away. The {tale.split()[-2]}" for tale in TALES)]


@pytest.fixture
def counts(monkeypatch, plain_engine_verifies):
    """Steps verify wherever there are guesses; how many tokens each gave a slot comes here."""
    told, see = [], Decoder._see

    def seen(self, counts, *others):
        told.extend(counts)
        see(self, counts, *others)

    monkeypatch.setattr(lookup.Watch, "pays", lambda watch, left: any(watch.found))
    plain_engine_verifies(cost=1)
    monkeypatch.setattr(Decoder, "_see", seen)
    return told


@pytest.fixture
def foresee(monkeypatch):
    """foresee(llm, results): from now on guesses are what came before, but that each place of a
    sequence that is 2 more than a multiple of 11 is guessed wrong."""

    def know(llm, results):
        ids = [encoded(llm, row.prompt)[0] + row.tokens for row in results]

        def guess(tokens, lengths, count):
            for own, length in zip(tokens, lengths.tolist()):
                before = own[:length].tolist()
                later = [of[length:] for of in ids if of[:length] == before] or [[]]
                own[length : length + count] = 1
                for place, id in enumerate(later[0][:count], length):
                    own[place] = 1 if place % 11 == 2 else id
            return torch.ones_like(lengths)

        monkeypatch.setattr(decode, "guess", guess)

    return know


def results(llm, prompts, settings):
    """What came of each prompt, but for the time it took."""
    rows = llm.complete(prompts, settings, logprobs=True)
    return [dataclasses.replace(row, seconds=0, seconds_to_first_token=0) for row in rows]


def check_the_same(llm, prompts, foresee=None, **settings):
    """With lookup as without; returns it."""
    plain = Settings(**settings)
    expected = results(llm, prompts, plain)
    if foresee:
        foresee(llm, expected)
    assert results(llm, prompts, dataclasses.replace(plain, lookup=True)) == expected
    return expected


SETTINGS = [
    {"temperature": 0},
    {"seed": 5, "repetition_penalty": 0.7, "repetition_penalty_range": 3, "top_k": 40, "stop": "."},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_100_texts_are_the_same(demo, counts, foresee, settings, every, monkeypatch):
    """In slots that are refilled: tokens, log-probabilities and why they ended."""
    args = dataclasses.replace(demo.model.args, max_batch_size=4)
    monkeypatch.setattr(demo.model, "args", args)
    assert len(set(PROMPTS)) == 100
    check_the_same(demo, PROMPTS[::every], foresee, max_gen_len=10, **settings)
    assert max(counts) > 4 and min(counts) == 1


def test_a_text_that_repeats_itself_is_guessed(demo, counts):
    check_the_same(demo, ["The fox ran. " * 9, "A fox"], max_gen_len=30, temperature=0)
    assert max(counts) > 1


def test_continuations_of_one_prompt(demo, counts, foresee):
    rows = check_the_same(demo, [STORY] * 5, foresee, max_gen_len=12, seed=1)
    assert len({row.text for row in rows}) == 5 and max(counts) == 6


def test_a_sequence_that_fills_its_last_place(demo, counts, foresee, monkeypatch):
    """It ends within guesses that are right; of two, in their places, the other goes on."""
    monkeypatch.setattr(demo.model, "args", dataclasses.replace(demo.model.args, max_seq_len=40))
    for more in range(10):
        prompts = ["The king" + " a" * (26 + more), "Once upon a time"]
        rows = check_the_same(demo, prompts, foresee, max_gen_len=16, temperature=0)
        length = len(encoded(demo, prompts[0])[0])
        assert [len(row.tokens) for row in rows] == [min(16, 40 - length), 16]
    assert max(counts) == 8


def test_a_stop_string_within_guesses_ends_a_text(demo, counts, foresee):
    [whole] = check_the_same(demo, ["The king"], foresee, max_gen_len=30, temperature=0)
    for start in range(3, 60, 9):
        stop = whole.text[start : start + 6]
        [row] = check_the_same(
            demo, ["The king"], foresee, max_gen_len=30, temperature=0, stop=[stop]
        )
        assert row.finish_reason == "stop" and stop not in row.text
    foresee(demo, [whole])
    pieces = list(demo.stream("The king", 30, temperature=0, lookup=True))
    assert "".join(pieces) == whole.text and len(pieces) < 12


def test_the_end_of_text_within_guesses_ends_it(demo, counts, foresee, monkeypatch):
    """Here each token by turns is the end."""
    [whole] = check_the_same(demo, ["The king"], foresee, max_gen_len=20, temperature=0)
    for end in whole.tokens[:12]:
        monkeypatch.setattr(demo.tokenizer, "end_ids", {end})
        rows = check_the_same(demo, ["The king"], max_gen_len=20, temperature=0)
        assert rows[0].finish_reason == "eos" and end not in rows[0].tokens


def test_a_conversation_is_the_same(demo, counts, monkeypatch):
    monkeypatch.setattr(chat, "FEWEST_WORDS", 1)  # so that the demo chats
    for end in (demo.tokenizer.eos_id, demo.tokenizer.encode(".", bos=False, eos=False)[-1]):
        monkeypatch.setattr(demo.tokenizer, "end_ids", {end})
        said = []
        for on in (False, True):
            talk = chat.Chat(demo, Settings(20, seed=2, repetition_penalty=0.6, lookup=on))
            for line in ("The fox ran. " * 3, "The fox ran.", "Then the fox ran."):
                "".join(talk.answer(line))
            said.append(talk.messages)
        assert said[0] == said[1]
    assert max(counts) > 2


def test_the_command_line(run_command, counts):
    words = "llama", "--prompt", "The fox ran. " * 9, "--temperature=0", "--max_gen_len=20"
    words += ("--device=cpu",)
    plain, guessed = (run_command(*words, *more) for more in ([], ["--lookup"]))
    assert plain[:2] == guessed[:2] and plain[0] == 0 and max(counts) > 1
    assert " 20 new tokens" in plain[2] and " 20 new tokens" in guessed[2]


@torch.inference_mode()
def test_what_is_cached_ends_where_the_text_ended(demo):
    """A conversation goes on from it: what steps drew further is not a part of it."""
    [ids] = encoded(demo, "The king")
    decoder = demo.decoder(1, 40, Settings(temperature=0, lookup=True))
    decoder.begin(0, ids, torch.zeros(30))
    drawn = [id for _ in range(20) for id in decoder.step()[0][0]]
    decoder.end(0, len(ids) + 9)
    assert decoder.cached(0, ids + drawn) == len(ids) + 8


def test_plain_steps_where_it_cannot_pay(demo, monkeypatch):
    """The plain engine verifies one row after the other; and many slots leave no rows."""
    assert [lookup.rows_each(slots) for slots in (1, 4, 5, 16, 17, 40)] == [8, 8, 6, 2, 1, 1]
    monkeypatch.setattr(decode, "guess", None)
    check_the_same(demo, ["The fox ran. " * 9], max_gen_len=20, temperature=0)


def test_up_to_16_sequences_are_guessed(demo, plain_engine_verifies):
    plain_engine_verifies(cost=1)
    of = {slots: demo.decoder(slots, 40, Settings(lookup=True)) for slots in (1, 16, 17)}
    assert [decoder.each for decoder in of.values()] == [8, 2, 1]
    assert [decoder.watch is None for decoder in of.values()] == [False, False, True]


def guesses(ids, count=4):
    tokens = torch.zeros(1, 20, dtype=torch.long)
    tokens[0, : len(ids)] = torch.tensor(ids)
    found = lookup.guess(tokens, torch.tensor([len(ids)]), count)
    assert tokens[0, : len(ids)].tolist() == ids
    return found.tolist(), tokens[0, len(ids) : len(ids) + count].tolist()


@pytest.mark.parametrize("device", DEVICES)
def test_guesses(device):
    """The newest of two places; over the end of the sequence it repeats itself."""
    assert guesses([5, 6, 7, 1, 2, 3, 4, 9, 5, 6, 7]) == ([True], [1, 2, 3, 4])
    assert guesses([5, 6, 7, 1, 5, 6, 7, 2, 5, 6, 7]) == ([True], [2, 5, 6, 7])
    assert guesses([8, 5, 6, 7, 5, 6, 7]) == ([True], [5, 6, 7, 5])
    assert guesses([4, 4, 4, 4]) == ([True], [4] * 4)
    for none in ([5, 6, 7, 1, 2, 9, 6, 7], [5, 6, 7], [4, 4], [4]):
        assert guesses(none)[0] == [False]
    several = torch.tensor([[1, 2, 3, 9, 1, 2, 3, 0, 0, 0], [1, 2, 3, 9, 1, 2, 3, 5, 0, 0]])
    found = lookup.guess(several.to(device), torch.tensor([7, 8], device=device), 2)
    assert found.tolist() == [True, False]


def speed(watch, right, found=True):
    """Tokens a plain step's time, of a sequence whose next `right` guesses are right each time."""
    tokens = took = 0
    for n in right:
        verified = watch.pays([10**6])
        tested = watch.each - 1 if verified else 1
        gained = min(n, tested) + 1 if verified else 1
        right = watch.see(0, min(n, tested), tested, found)
        watch.spend(verified, [gained], [right])
        tokens, took = tokens + gained, took + (watch.cost if verified else 1)
    return tokens / took


@pytest.mark.parametrize("cost", [1.25, 1.4, 2.7])
def test_guesses_that_fail_cost_little(cost):
    """Of each row of guesses none, or one in three are right; or all are wrong after a long time
    in which all were right, and then right again."""
    turns = [0, 1] * 20 + [0] * 400
    for right in ([0] * 500, [0, 0, 1] * 200, turns, [0] * 99 + [1] + [0] * 99):
        assert speed(lookup.Watch(1, 8, cost), right) > 0.98
    watch = lookup.Watch(1, 8, cost)
    assert speed(watch, [9] * 100) > 0.9 * 8 / cost
    assert speed(watch, [0] * 200) > 0.94
    assert speed(watch, [9] * 50) > 0.7 * 8 / cost


def test_a_step_verifies_after_as_much_gain_was_missed_as_its_graph_takes():
    watch = lookup.Watch(1, 8, 1.25)
    for right in [0] + [1, 0, 0, 0, 0] * 99:  # guesses that are seldom right gain nothing
        watch.spend(False, [1], [watch.see(0, right, 1, True)])
        assert not watch.pays([99])
    for n in range(12):
        assert not watch.pays([99]), n
        watch.spend(False, [1], [watch.see(0, 1, 1, True)])
    assert watch.pays([99]) and not watch.pays([14]), "too little is left"
    watch.spend(True, [8], [watch.see(0, 7, 7, True)])
    assert watch.pays([10])


def test_a_sequence_without_guesses_waits_for_the_others():
    watch = lookup.Watch(3, 8, 1.6)
    for _ in range(50):
        watch.spend(False, [1, 1, 1], [1, None, 0])
    assert watch.missed == 0
    watch.spend(False, [1, 1, 1], [None] * 3)
    watch.spend(False, [1, 1, 1], [1, None, 1])
    assert watch.missed == pytest.approx((2 - 0.6) / 3)


@pytest.mark.parametrize("value", [1, "yes", None], ids=str)
def test_it_is_on_or_off(value):
    with pytest.raises(ValueError, match=f"^lookup is {value!r}, expected True or False$"):
        Settings(lookup=value)


def test_a_watch_knows_each_sequence():
    """Three copy, one of them near its end, and one does not."""
    watch = lookup.Watch(4, 8, 1.3)
    for _ in range(20):
        for slot in range(4):
            watch.see(slot, 7 * (slot < 3), 7, True)
    watch.spend(True, [8, 8, 8, 1], [7, 7, 7, 0])
    assert watch.pays([9, 9, 9, 9]) and watch.pays([0, 9, 0, 9]) and not watch.pays([0, 0, 0, 9])
    assert not watch.pays([0, 0, 1, 0]) and not watch.pays([0] * 4)
    watch.begin(1)
    assert watch.expected(1) == 1 and watch.expected(0) > 7
    watch.credit = 0
    assert not watch.pays([9, 9, 9, 9])


@torch.inference_mode()
def test_plain_steps_tell_how_guesses_would_have_fared(demo, foresee, monkeypatch):
    monkeypatch.setattr(decode.TorchEngine, "cost", lambda *_: 7.9)  # never pays
    ids, settings = encoded(demo, "The king")[0], Settings(30, temperature=0)
    foresee(demo, results(demo, ["The king"], settings))
    decoder = demo.decoder(1, 40, dataclasses.replace(settings, lookup=True))
    decoder.begin(0, ids, torch.zeros(30))
    chances = []
    while sum(decoder.left) or not chances:
        decoder.step()
        right, of = decoder.watch.fared[0]
        chances.append(right / of)
    falls = [place for place, (one, two) in enumerate(zip(chances, chances[1:])) if two < one]
    assert [place + len(ids) + 1 for place in falls] == [13, 24] and chances[8] > 0.7


def test_memory_for_more_rows_is_counted(demo):
    plain, more = (room.need(demo.model, 1, 64, torch.float32, on).work for on in (False, True))
    assert more > plain
    works = [room.need(demo.model, n, 64, torch.float32, True).work for n in range(1, 40)]
    assert works == sorted(works)


@pytest.mark.cuda
@pytest.mark.parametrize("settings", SETTINGS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("always", [True, False], ids=["always", "where it pays"])
def test_texts_are_the_same_on_cuda(settings, always, request):
    """100 prompts in 1 to 20 slots, with logprobs, by two graphs: one that verifies, one plain."""
    counts = request.getfixturevalue("counts") if always else None
    llm = LLaMA.build(device="cuda")
    args = llm.model.args
    for slots in (1, 3, 5, 16, 20):
        llm.model.args = dataclasses.replace(args, max_batch_size=slots)
        check_the_same(llm, PROMPTS, max_gen_len=60, **settings)
    assert not always or max(counts) > 4
