"""Does it talk, and is each row what it would be alone?"""

import contextlib
import dataclasses
import inspect
import sys
import traceback

import pytest
import torch
from conftest import DEVICES
from torch.autograd import grad_mode

from llama import LLaMA, Settings, decode, device, generation
from llama.decode import Decoder

PROMPTS = [
    "Once upon a time there was a little",
    "The king",
    "In the middle of the forest, where nobody ever went, an old bear had built himself a house",
]


def decoder_of(llm, prompt_ids, count, seen):
    """Takes the most likely token of each slot, `count` of them; seen gets the logits."""

    def pick(logits, *_):
        seen.append(logits.clone())
        return logits.argmax(-1)

    length = max(map(len, prompt_ids)) + count
    decoder = Decoder(llm.model, llm.engine, len(prompt_ids), length, pick)
    for slot, ids in enumerate(prompt_ids):
        decoder.begin(slot, ids, torch.zeros(count))
    return decoder


def newest(decoder):
    """The newest token of each slot, where each has one."""
    return [id for [id] in decoder.step()[0]]


def encoded(llm, *prompts):
    return [llm.tokenizer.encode(prompt, bos=True, eos=False) for prompt in prompts]


def test_a_seed_gives_the_same_texts_again_and_another_seed_others(demo):
    """In the order of their prompts, and a prompt that is there twice has two."""
    prompts = [*PROMPTS, PROMPTS[0]]
    one, two, other = (demo.generate(prompts, max_gen_len=30, seed=s) for s in (5, 5, 6))
    assert one == two and one != other and one[0] != one[3]
    for prompt, result in zip(prompts, one, strict=True):
        assert result.startswith(prompt) and len(result) > len(prompt) + 10


@pytest.mark.parametrize(
    "settings", [{"seed": 5}, {"temperature": 0, "repetition_penalty": 1.3}], ids=str
)
def test_a_row_does_not_depend_on_its_company(demo_float, settings):
    together = demo_float.generate(PROMPTS, max_gen_len=40, **settings)
    assert demo_float.generate(PROMPTS[:1], max_gen_len=40, **settings) == together[:1]
    others = demo_float.generate(["A fox", *PROMPTS[1:]], max_gen_len=60, **settings)
    for text, longer in zip(together[1:], others[1:]):
        assert longer.startswith(text) and len(longer) > len(text)


def test_no_seed_is_random(demo):
    state = torch.get_rng_state()
    assert demo.generate(PROMPTS, 30) != demo.generate(PROMPTS, 30)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's generator is left alone


@torch.inference_mode()
@pytest.mark.parametrize("device", DEVICES)
def test_a_slot_is_given_a_new_prompt_while_others_go_on(device):
    """Its tokens are those it has alone, the others' what they would have been."""
    llm = LLaMA.build(device=device, use_int8=device == "cuda")
    one, two, new = encoded(llm, *PROMPTS)

    def beside_two(ids, count):
        decoder = decoder_of(llm, [ids, two], count, [])
        return [list(column) for column in zip(*(newest(decoder) for _ in range(count)))]

    decoder = decoder_of(llm, [one, two], 40, [])
    steps = [newest(decoder) for _ in range(10)]
    decoder.begin(0, new, torch.zeros(12))
    steps += [newest(decoder) for _ in range(12)]
    ids = [list(column) for column in zip(*steps)]
    assert ids[0] == beside_two(one, 10)[0] + beside_two(new, 12)[0]
    assert ids[1] == beside_two(one, 22)[1]


@torch.inference_mode()
def test_a_decoder_computes_no_more_than_its_sequences_ask_for(demo_float, passes):
    """And knows after each step what its cache holds: all but the newest token."""
    [ids] = encoded(demo_float, PROMPTS[0])
    decoder, said = decoder_of(demo_float, [ids], 4, []), [*ids]
    for _ in range(4):
        said += decoder.step()[0][0]
        assert decoder.cached(0, [*said, 5, 5, 5]) == len(said) - 1
    assert passes == [[(0, 0, len(ids))], None, None, None]
    decoder.step()
    assert len(passes) == 4


@torch.inference_mode()
def test_a_step_reads_the_token_that_was_drawn_the_first_of_the_vocabulary_too(demo_float):
    [ids], seen = encoded(demo_float, PROMPTS[1]), []

    def first(logits, *_):
        seen.append(logits.clone())
        return torch.zeros(len(logits), dtype=torch.long)

    decoder = Decoder(demo_float.model, "triton", 1, len(ids) + 3, first)
    decoder.begin(0, ids, torch.zeros(3))
    assert [decoder.step()[0] for _ in range(3)] == [[[0]]] * 3
    expected = torch.cat([*demo_float.logits([*ids, 0, 0])])[-3:]
    assert (torch.cat(seen) - expected).abs().max() < 1e-4


LIST = [*PROMPTS, "A fox", "Once", "The old king and his daughter", "An apple"]


@pytest.fixture
def pack(monkeypatch):
    """pack(n): from now on a pass of a prefill has at most n tokens, or `alone` if no row runs."""

    def set_most(n, alone=None):
        for module in (decode, generation):
            monkeypatch.setattr(module, "PACK", n)
        monkeypatch.setattr(decode, "PACK_ALONE", alone or n)

    return set_most


@pytest.fixture
def passes(monkeypatch):
    """[(slot, start, tokens), ...] of each pass of a prefill, None for each step."""
    seen, prefill, step = [], decode.TorchEngine.prefill, decode.TorchEngine.step

    def prefilled(self, tokens, spans):
        assert len(tokens) == sum(count for _, _, count in spans) <= decode.PACK_ALONE
        seen.append(spans)
        return prefill(self, tokens, spans)

    monkeypatch.setattr(decode.TorchEngine, "prefill", prefilled)
    monkeypatch.setattr(decode.TorchEngine, "step", lambda *args: seen.append(None) or step(*args))
    return seen


def spans(passes):
    return [span for each in passes if each for span in each]


@pytest.fixture
def slots(monkeypatch):
    """slots(llm, n): for this test it continues n prompts at a time."""

    def set_slots(llm, n):
        args = dataclasses.replace(llm.model.args, max_batch_size=n)
        monkeypatch.setattr(llm.model, "args", args)

    return set_slots


def test_loading_writes_nothing_to_stdout(monkeypatch, capsys):
    """Not even where stderr is closed."""
    monkeypatch.setattr(sys, "stderr", None)
    LLaMA.build(device="cpu")
    assert capsys.readouterr().out == ""


def test_ctrl_c_between_two_turns_leaves_torch_as_it_was(demo):
    """Python looks for signals where a function begins and where one written in C has returned: at
    each of these moments around a turn, though the error is kept, as a notebook keeps it."""
    files = contextlib.__file__, device.__file__, generation.__file__, grad_mode.__file__
    moments = 0
    while True:
        seen = []
        moments += 1

        def interrupt(frame, event, _, seen=seen, moment=moments):
            if event in ("call", "c_return") and frame.f_code.co_filename in files:
                seen.append((event, frame.f_code.co_name))
                if len(seen) == moment:
                    raise KeyboardInterrupt

        kept = None
        sys.setprofile(interrupt)
        try:
            demo.generate(["A"], 2)
        except KeyboardInterrupt as error:
            kept = error
        finally:
            sys.setprofile(None)
        if kept is None:
            break
        assert kept.__traceback__
        assert not torch.is_inference_mode_enabled() and not demo._lock.locked(), seen[-1]
    assert moments > 100


def test_logprobs_come_where_they_are_wanted(demo):
    settings = Settings(2)
    assert [row.logprobs for row in demo.complete(["A"], settings)] == [[]]
    assert [row.logprobs for row in demo.completions(["A"], settings)] == [[]]
    assert [row.logprobs for row in next(demo.steps(["A"], settings))] == [[]]


def test_slots_are_refilled_and_each_text_is_what_it_is_alone(demo_float, passes, slots):
    """Each prompt comes into the slot that is free first, and the last row ends alone."""
    settings = {"max_gen_len": 40, "seed": 3, "stop": ["the", "."], "temperature": 1.2}
    slots(demo_float, 1)
    alone = demo_float.generate(LIST, **settings)
    slots(demo_float, 3)
    passes.clear()
    results = list(demo_float.completions(LIST, Settings(**settings), logprobs=True))
    in_order = sorted(results, key=lambda result: result.index)
    assert [result.prompt + result.text for result in in_order] == alone
    assert [result.index for result in in_order] == list(range(len(LIST)))
    assert results != in_order  # as they end
    for result in results:
        assert result.prompt == LIST[result.index]
        assert result.finish_reason in ("stop", "length")
        assert len(result.tokens) == len(result.logprobs)
        assert 0 < result.seconds_to_first_token <= result.seconds
    filled = [slot for slot, _, _ in spans(passes)]
    assert filled[:3] == [0, 1, 2] and len(filled) == len(LIST)
    ends, lengths = [0] * 3, [len(result.tokens) for result in in_order]
    for length in lengths:
        ends[ends.index(min(ends))] += length
    # A row whose end the host has just read is refilled at once: no step goes by without it.
    assert passes.count(None) == max(ends) - 1


def test_a_list_that_is_left_or_fails_lets_go_of_its_decoder(demo, monkeypatch):
    closed, close = [], Decoder.close
    monkeypatch.setattr(Decoder, "close", lambda self: closed.append(1) or close(self))
    results = demo.completions(LIST, Settings(5, seed=1))
    assert next(results).index == 0
    results.close()
    assert closed == [1]
    monkeypatch.setattr(generation, "next_token", lambda *_, **__: torch.tensor([-1]))
    with pytest.raises(FloatingPointError, match="not finite"):
        demo.complete(LIST, Settings(5))
    assert closed == [1, 1]


STORY = "Once upon a time there was a king who had three sons, and the youngest of them was called "
STORY += "simple, because he said little. One day the king called his sons and said: "


def test_what_all_prompts_begin_with_is_prefilled_once(demo_float, passes, slots, monkeypatch):
    """With the texts of prompts that share nothing, in refilled slots too; skipping some changes
    nothing for the others."""
    prompts = [STORY + end for end in ("go", "sit down", "go and look for the fox", "eat")] * 2
    ids = encoded(demo_float, *prompts)
    settings = Settings(12, repetition_penalty=1.3, seed=4)
    slots(demo_float, 3)
    together = demo_float.complete(prompts, settings)
    [(slot, start, shared)] = passes[0]
    assert slot == start == 0 and shared >= 32
    assert [span[1:] for span in spans(passes[1:])] == [(shared, len(row) - shared) for row in ids]
    steps = demo_float.steps(prompts, settings, skip={0, 1, 2, 4, 6})
    rest = {row.index: row.text for rows in steps for row in rows if row.finish_reason}
    assert rest == {place: together[place].text for place in (3, 5, 7)}
    monkeypatch.setattr(generation, "SHARED", 10**6)
    passes.clear()
    apart = demo_float.complete(prompts, settings)
    assert [result.text for result in apart] == [result.text for result in together]
    assert [span[1:] for span in spans(passes)] == [(0, len(row)) for row in ids]


def test_n_continuations_take_one_prefill(demo_float, passes):
    texts = demo_float.generate([STORY] * 4, 12, seed=1)
    length = len(encoded(demo_float, STORY)[0])
    assert passes[:2] == [[(0, 0, length - 1)], [(slot, length - 1, 1) for slot in range(4)]]
    assert set(passes[2:]) == {None}
    assert len(set(texts)) == 4 and texts[0] == demo_float.generate([STORY], 12, seed=1)[0]


@pytest.mark.parametrize("beginning", ["", STORY], ids=["", "shared"])
def test_prompts_are_packed_and_cut_without_a_change(demo_float, passes, slots, pack, beginning):
    """Each text is what it is where all prompts fit in a pass, and each token is computed once."""
    slots(demo_float, 3)
    prompts, settings = [beginning + prompt for prompt in (*LIST, STORY)], Settings(12, seed=4)
    expected = [result.text for result in demo_float.complete(prompts, settings)]
    tokens = sum(count for _, _, count in spans(passes))
    for most in (20, 8):
        passes.clear()
        pack(most)
        assert [result.text for result in demo_float.complete(prompts, settings)] == expected
        assert sum(count for _, _, count in spans(passes)) == tokens
        assert (most, 1) in {(count, len(each)) for each in passes if each for *_, count in each}
        assert most == 8 or max(len(each) for each in passes if each) > 1


@torch.inference_mode()
def test_running_rows_wait_for_one_pass_between_two_steps(demo_float, passes, pack):
    """Of a long prompt, which takes three, or of short ones; and the first row is not disturbed."""
    prompts = encoded(demo_float, "The king", PROMPTS[2], "A fox", "Once")
    assert [*map(len, prompts)] == [3, 21, 3, 2]
    decoder = decoder_of(demo_float, prompts, 12, [])
    expected = [*zip(*(newest(decoder) for _ in range(12)))]
    pack(8, alone=16)
    decoder, drawn = Decoder(demo_float.model, "triton", 4, 40, decoder.pick), [[], [], [], []]
    passes.clear()
    for slots in ([0], [1, 2, 3], *[[]] * 10):
        for slot in slots:
            decoder.begin(slot, prompts[slot], torch.zeros(12))
        drawn_now = newest(decoder)
        for slot in {*range(4)} - {*decoder.queue} if len(passes) > 1 else [0]:
            drawn[slot].append(drawn_now[slot])
    of_long = [[(1, 0, 8)], None, [(1, 8, 8)], None, [(1, 16, 5), (2, 0, 3)]]
    assert passes == [[(0, 0, 3)], None, *of_long, None, [(3, 0, 2)], *[None] * 7]
    assert [*map(len, drawn)] == [12, 9, 9, 8]
    assert all(ids == list(of[: len(ids)]) for ids, of in zip(drawn, expected))


@torch.inference_mode()
def test_where_none_runs_a_pass_is_longer(demo_float, passes, pack):
    pack(8, alone=16)
    decoder = decoder_of(demo_float, encoded(demo_float, PROMPTS[2], "A fox"), 3, [])
    while decoder.queue:
        decoder.step()
    assert passes == [[(0, 0, 16)], [(0, 16, 5), (1, 0, 3)]]


def tokens_of(decoder, slots):
    """The first 20 tokens of each slot."""
    tokens = [[] for _ in range(slots)]
    while min(map(len, tokens)) < 20:
        drawn = newest(decoder)
        for slot in {*range(slots)} - {*decoder.queue}:
            tokens[slot].append(drawn[slot])
    return [ids[:20] for ids in tokens]


@torch.inference_mode()
def test_steps_of_others_leave_what_is_shared(demo_float):
    [ids] = encoded(demo_float, STORY)
    shared, likely = len(ids) - 1, lambda logits, *_: logits.argmax(-1)
    decoder = Decoder(demo_float.model, "triton", 2, 60, likely)
    decoder.share(ids[:shared])
    decoder.begin(0, ids, torch.zeros(9), shared)
    for _ in range(9):
        decoder.step()
    for cache in (decoder.engine.cache.k, decoder.engine.cache.v):
        assert torch.equal(cache[:, 0, :shared], cache[:, 1, :shared])
    assert decoder.cached(1, ids) == shared


@torch.inference_mode()
@pytest.mark.parametrize(
    "layers, cached",
    [(2, [0, 0, 0]), (10, [2, 0, 0]), (27, [2, 8, 0]), (37, [2, 16, 0]), (44, [2, 16, 0])],
)
def test_after_ctrl_c_it_is_known_what_is_cached(demo_float, monkeypatch, pack, layers, cached):
    """In a pass or a step, one of a long prompt, one of two; each slot goes on from it."""
    pack(8)
    prompts = encoded(demo_float, "The king", PROMPTS[2], "A fox")
    decoder = decoder_of(demo_float, prompts, 40, [])
    Layer, calls = type(demo_float.model.layers[0]), []
    forward = Layer.forward

    def interrupted(layer, *args):
        calls.append(layer)
        if len(calls) == layers:
            raise KeyboardInterrupt
        return forward(layer, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Layer, "forward", interrupted)
        while True:
            decoder.step()
    found = [decoder.cached(slot, ids) for slot, ids in enumerate(prompts)]
    assert found == cached
    fresh = tokens_of(decoder_of(demo_float, prompts, 40, []), len(prompts))
    for slot, (ids, start) in enumerate(zip(prompts, found)):
        decoder.begin(slot, ids, torch.zeros(40), start)
    assert tokens_of(decoder, len(prompts)) == fresh


def test_an_error_keeps_nothing_of_its_call_and_those_before_keep_what_they_had(demo, monkeypatch):
    """A notebook holds the last error, a debugger shows the variables of one that is handled."""

    def fail(logits, *_, **__):
        raise RuntimeError

    def own():
        mine = "kept"
        raise KeyError(mine)

    monkeypatch.setattr(generation, "next_token", fail)
    try:
        own()
    except KeyError as before:
        with pytest.raises(RuntimeError) as caught:
            demo.generate(["A"], 5)
        assert before.__traceback__.tb_next.tb_frame.f_locals == {"mine": "kept"}
    frame = [frame for frame, _ in traceback.walk_tb(caught.value.__traceback__)][-1]
    assert frame.f_code is fail.__code__ and not frame.f_locals


def test_small_models_work_on_one_core_and_large_ones_on_all(demo, monkeypatch, set_threads):
    threads = []

    def watched(logits, *_, **__):
        threads.append(torch.get_num_threads())
        return logits.argmax(-1)

    monkeypatch.setattr(generation, "next_token", watched)
    set_threads(3)
    demo.generate(["A"], 1)
    monkeypatch.setattr(generation, "ONE_CORE", 2**20)
    LLaMA(demo.model, demo.tokenizer).generate(["A"], 1)
    assert threads == [1, 3] and torch.get_num_threads() == 3


def test_fewer_slots_where_memory_is_short(demo, monkeypatch):
    expected, made, cache = demo.generate(LIST, 30, seed=1), [], decode.KVCache
    length = max(map(len, encoded(demo, *LIST))) + 30
    need = generation.room.need(demo.model, 3, length, torch.float32)
    monkeypatch.setattr(generation.room, "free_bytes", lambda device: need.cache + need.work)
    monkeypatch.setattr(decode, "KVCache", lambda *a: made.append(a[1]) or cache(*a))
    with pytest.warns(UserWarning, match=r"7 sequences of \d+ tokens need .*: 3 at a time are"):
        assert demo.generate(LIST, 30, seed=1) == expected
    assert made == [3]


def test_messages_about_memory_say_how_much(demo, monkeypatch):
    """A sequence whose work does not fit beside its cache is refused before a decoder is made."""
    GIB, need = generation.room.GIB, generation.room.Need
    half = GIB // 2
    monkeypatch.setattr(generation.room, "need", lambda _, n, *__: need(0, n * GIB, half))
    monkeypatch.setattr(generation.room, "cache_bytes", lambda *_: GIB)
    monkeypatch.setattr(generation.room, "free_bytes", lambda device: 5 * half)
    with pytest.warns(UserWarning, match="^3 sequences .* need 3.5 GiB, cpu has 2.5 GiB free: 2 "):
        demo.generate(PROMPTS, 1)
    monkeypatch.setattr(generation.room, "free_bytes", lambda device: 3 * half)
    demo.generate(PROMPTS[:1], 1)
    monkeypatch.setattr(generation.room, "free_bytes", lambda device: 3 * half - 1)
    monkeypatch.setattr(generation, "Decoder", None)
    with pytest.raises(
        MemoryError, match="^1 x .* need 1.0 GiB .* has 1.5 GiB free: lower .*--max_gen"
    ):
        demo.generate(PROMPTS[:1], 1)


def test_pieces_join_to_what_generate_returns(demo):
    for seed, prompt in enumerate((*PROMPTS, "", "A\N{FOX FACE}")):
        settings = {"max_gen_len": 30, "seed": seed, "temperature": 1.5, "top_p": 1}
        settings["stop"] = ["the", "and a"] if seed % 2 else []
        [whole] = demo.generate([prompt], **settings)
        assert prompt + "".join(demo.stream(prompt, **settings)) == whole


def test_a_stream_that_is_left_leaves_the_model_as_it_was(demo):
    expected = demo.generate(PROMPTS[:1], 20, seed=1)
    next(demo.stream(PROMPTS[1], 20, seed=1))
    one, two = (demo.stream(PROMPTS[0], 20, seed=1) for _ in range(2))
    interleaved = [a + b for a, b in zip(one, two)]
    assert demo.generate(PROMPTS[:1], 20, seed=1) == expected
    assert len(interleaved) > 10


def test_signatures_show_each_setting():
    """What a notebook shows, in the order and with the defaults that callers rely on."""
    limit, *others = inspect.signature(Settings).parameters.values()
    optional = limit.replace(default=None, annotation=int | None)  # 256, or as long as fits
    for method, what, first in (
        (LLaMA.generate, "prompts", limit),
        (LLaMA.chat, "messages", optional),
        (LLaMA.stream, "prompt", optional),
    ):
        parameters = dict(inspect.signature(method).parameters)
        assert list(parameters)[:2] == ["self", what]
        assert list(parameters.values())[2:] == [first, *others]
    for name in inspect.signature(Settings).parameters:
        assert f"    {name}: " in LLaMA.generate.__doc__
    with pytest.raises(TypeError, match=r"LLaMA.generate\(\) got .* argument 'max_new_tokens'"):
        LLaMA.generate(None, [], max_new_tokens=5)


def test_settings_arrive_where_they_belong(demo, monkeypatch):
    """Each by its place: no two change places between generate, chat, stream and Settings."""
    values = 7, 0.5, 0.25, 1.5, 9, 0.75, 11, ("x",), 13, 0.125
    seen, nothing = [], (_ for _ in ())
    monkeypatch.setattr(demo, "steps", lambda _, settings: seen.append(settings) or nothing)
    demo.generate([], *values)
    demo.stream("", *values)
    assert seen == [Settings(*values)] * 2


def check_logprobs(llm, prompts, settings):
    """Decoded step by step with a penalty, and scored at once without: the model's own."""
    rows = llm.complete(prompts, settings, logprobs=True)
    for prompt, row in zip(prompts, rows, strict=True):
        ids = llm.tokenizer.encode(prompt, bos=True, eos=False) + row.tokens
        every = torch.cat(list(llm.logits(ids[:-1]))).log_softmax(-1)
        scores = every.gather(-1, torch.tensor(ids[1:])[:, None])[-len(row.tokens) :, 0]
        assert scores.tolist() == pytest.approx(row.logprobs, abs=1e-3)
    return rows


def test_logprobs_are_those_of_one_prefill(demo_float):
    settings = Settings(40, temperature=1.0, repetition_penalty=1.3, seed=2)
    rows = check_logprobs(demo_float, PROMPTS, settings)
    assert [len(row.tokens) for row in rows] == [40] * 3


def test_max_seq_len_ends_a_row_while_its_neighbour_goes_on(make_folder):
    llm = LLaMA.build(make_folder()[0], max_seq_len=16, device="cpu", use_int8=False)
    prompts = ["a" + " a" * 13, "The king and his queen", "A"]  # the first has room for one token
    rows = check_logprobs(llm, prompts, Settings(16, seed=1))
    assert 1 == len(rows[0].tokens) < len(rows[1].tokens) < len(rows[2].tokens)
    lengths = map(len, encoded(llm, *prompts))
    assert [count + len(row.tokens) for count, row in zip(lengths, rows)] == [16] * 3
    assert [row.finish_reason for row in rows] == ["length"] * 3


def test_scores_are_log_probabilities_of_the_texts_tokens(demo_float, pack):
    ids = [demo_float.tokenizer.encode(p, bos=True, eos=False) for p in PROMPTS]
    expected = []
    for row in ids:
        with torch.no_grad():
            logits = demo_float.model.output(demo_float.model.features(torch.tensor([row])))[0]
        every = logits.double().log_softmax(-1)
        expected.append([every[i, token].item() for i, token in enumerate(row[1:])])
    for most in (512, 3):
        pack(most)
        scores = demo_float.score(PROMPTS)
        assert [len(s) for s in scores] == [len(row) - 1 for row in ids]
        for got, want in zip(scores, expected):
            assert got == pytest.approx(want, abs=1e-4)


def test_scores_of_empty_and_of_long_texts(make_folder):
    llm = LLaMA.build(make_folder()[0], max_seq_len=600, device="cpu")
    empty, long = llm.score(["", "a" + " a" * 598])
    assert empty == [] and len(long) == 599 and max(long) < 0
    with pytest.raises(ValueError, match="text 2 has .* tokens, max_seq_len is 600"):
        llm.score(["a", "a " * 600])
    with pytest.raises(ValueError, match="texts is 'one', expected a list of strings"):
        llm.score("one")


def test_penalty_prevents_repetition(demo):
    plain = demo.generate(["the the the the"], 40, temperature=0)[0].split()
    penalized = demo.generate(["the the the the"], 40, temperature=0, repetition_penalty=2.0)
    assert len(set(penalized[0].split())) > len(set(plain))


class Scripted(torch.nn.Module):
    """Stands in for the head: row b says its own list of tokens, whatever the input."""

    def __init__(self, scripts, vocab_size):
        super().__init__()
        self.scripts, self.vocab_size, self.calls = scripts, vocab_size, 0

    def forward(self, x):
        logits = torch.zeros(len(x), self.vocab_size)
        for row, script in enumerate(self.scripts):
            logits[row, script[min(self.calls, len(script) - 1)]] = 9
        self.calls += 1
        return logits


@pytest.fixture
def script(demo, monkeypatch):
    def install(*texts):
        scripts = [demo.tokenizer.encode(text, bos=False, eos=True) for text in texts]
        head = Scripted(scripts, demo.tokenizer.n_words)
        monkeypatch.setitem(demo.model._modules, "output", head)
        return scripts

    return install


def test_stop_strings_end_a_row_and_the_call_when_all_have(demo, script):
    script("was red, it is said. Nobody", "and his queen. Then she spoke")
    results = demo.generate(["The fox", "The king"], 100, temperature=0, stop=["said", ". "])
    assert results == ["The fox was red, it is ", "The king and his queen"]
    assert demo.model.output.calls < 20


def test_a_row_stops_at_eos_and_the_call_when_all_have(demo, script):
    scripts = script("was \N{FOX FACE}日本.", "and his queen lived long ago, they say.")
    results = demo.generate(["The fox", "The king"], 100, temperature=0)
    assert results == [
        "The fox was \N{FOX FACE}日本.",
        "The king and his queen lived long ago, they say.",
    ]
    # One prefill for both, then one step for each token up to the longer row's end.
    assert demo.model.output.calls == max(map(len, scripts))


def test_prompt_as_long_as_max_seq_len_gets_no_continuation(make_folder):
    llm, prompt = LLaMA.build(make_folder()[0], max_seq_len=9, device="cpu"), "a" + " a" * 7
    assert len(llm.tokenizer.encode(prompt, bos=True, eos=False)) == 9
    assert llm.generate([prompt], 5) == [prompt]
    with pytest.raises(ValueError, match="prompt 1 has 10 tokens, max_seq_len is 9"):
        llm.generate([prompt + " a"], 5)


def test_cache_takes_what_this_call_needs(demo, monkeypatch):
    made = []
    cache = decode.KVCache
    monkeypatch.setattr(decode, "KVCache", lambda *a: made.append(a) or cache(*a))
    demo.generate(PROMPTS[:2], max_gen_len=5)
    assert made[0][1:3] == (2, max(map(len, encoded(demo, *PROMPTS[:2]))) + 5)


def test_a_very_long_wish_takes_no_more_than_there_is_room_for(make_folder):
    llm = LLaMA.build(make_folder()[0], max_seq_len=16, device="cpu")
    with pytest.warns(UserWarning, match=r"max_gen_len is \d+, but .* end at max_seq_len, 16 "):
        longest = llm.generate(PROMPTS[:1], 2**31, seed=1)
    assert longest == llm.generate(PROMPTS[:1], 16, seed=1)


def test_no_prompts_no_results(demo):
    assert demo.generate([], 5) == []


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"seed": 10**400}, "seed is 1000"),
        ({"stop": 5}, "stop is 5, expected a text or a list of texts"),
        ({"stop": ""}, "stop is '', expected a text or a list of texts, none of them empty"),
        ({"stop": ["a", ""]}, "stop is .'a', ''., expected a text or a list of texts"),
        ({"prompts": "one string"}, "prompts is 'one string', expected a list of strings"),
        ({"prompts": [1]}, "expected a list of strings$"),
        ({"prompts": [{"role": "user"}]}, "a list of strings; messages are for LLaMA.chat"),
        ({"prompts": None}, "prompts is None, expected a list of strings"),
        ({"prompts": ["a", "b\ud800"]}, "prompt 2 holds half a character"),
    ],
    ids=str,
)
def test_settings_out_of_range(demo, settings, message):
    with pytest.raises(ValueError, match=message):
        demo.generate(**{"prompts": ["a"], "max_gen_len": 5} | settings)


def test_prompts_are_checked_without_a_model(make_folder):
    folder = make_folder()[0]
    generation.check_prompts(["a", "b"], folder)
    with pytest.raises(ValueError, match="prompt 2 has .* tokens, max_seq_len is 512"):
        generation.check_prompts(["a", "a " * 600], folder)
    with pytest.raises(FileNotFoundError, match="/nowhere does not exist"):
        generation.check_prompts([], "/nowhere")


def test_stream_says_at_once_what_is_wrong(demo):
    """Not at the first piece."""
    for arguments in (["a", 0], [["a"], 5], ["b\ud800", 5], ["a " * 600, 5], ["a", 5, "hot"]):
        with pytest.raises(ValueError):
            demo.stream(*arguments)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"device": "gpu"}, "device is 'gpu', expected cuda, cuda:1 or cpu"),
        ({"device": "meta"}, "device is 'meta', expected"),
        ({"use_int8": "false"}, "use_int8 is 'false', expected True or False"),
        ({"engine": "fast"}, "engine is 'fast', expected triton or bnb"),
        ({"ckpt_dir": ""}, "ckpt_dir is '', expected the model folder"),
        ({"ckpt_dir": 5}, "ckpt_dir is 5, expected the model folder"),
        ({"tokenizer_path": 5}, "tokenizer_path is 5, expected a path: pass the tokenizer.model"),
        ({"device": "cpu:7"}, "device is 'cpu:7', expected cuda, cuda:1 or cpu"),
    ],
    ids=str,
)
def test_build_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        LLaMA.build(**{"device": "cpu"} | options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")
def test_cuda_without_cuda():
    with pytest.raises(ValueError, match="torch .* sees no CUDA GPU"):
        LLaMA.build(device="cuda")


def test_bitsandbytes_without_its_cuda_library(monkeypatch):
    import bitsandbytes.cextension as cextension

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(cextension, "lib", cextension.ErrorHandlerMockBNBNativeLibrary("absent"))
    with pytest.raises(ImportError, match="bitsandbytes has no library for CUDA .* --use_int8"):
        LLaMA.build(device="cuda")


@pytest.mark.cuda
@pytest.mark.parametrize("use_int8", [True, False])
def test_cuda_says_nearly_what_the_cpu_says(use_int8, demo_float):
    """fp16 keeps 11 bits, int8 7: the logits' error stays below 1 % and 5 % of their spread."""
    tokens = torch.tensor([demo_float.tokenizer.encode(PROMPTS[2], bos=True, eos=False)])
    expected = demo_float.model(tokens, 0)
    llm = LLaMA.build(device="cuda", use_int8=use_int8)
    error = llm.model(tokens.cuda(), 0).cpu() - expected
    assert error.std() < (0.05 if use_int8 else 0.01) * expected.std()
    results = llm.generate(PROMPTS, 40, seed=3, repetition_penalty=1.1)
    assert all(r.startswith(p) for p, r in zip(PROMPTS, results))


@pytest.mark.cuda
def test_cuda_memory_is_given_back():
    import gc

    gc.collect()
    before = torch.cuda.memory_allocated()
    llm = LLaMA.build(device="cuda")
    llm.generate(PROMPTS, 40)
    del llm
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + 2**20 * 40  # cuBLAS keeps a workspace
