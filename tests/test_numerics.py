"""What happens at the ends of the numbers, of the context, and of what a row may depend on?"""

import random

import oracle
import pytest
import torch
from checkpoints import random_weights, tiny_params
from test_generation import decoder_of
from test_model import TOLERANCE, cache_of, float_model

from llama import LLaMA

CASES, ROWS = 1000, 6


def overflowing(folder, dtype):
    """A model whose hidden state passes 65,504 after its first layer."""
    llm = LLaMA.build(folder, device="cpu", use_int8=False)
    llm.model.to(dtype)
    with torch.no_grad():
        llm.model.layers[0].feed_forward.w2.weight.fill_(6e4)
    return llm


def test_a_hidden_state_beyond_fp16_is_reported_not_sampled(make_folder):
    folder = make_folder()[0]
    seen = []
    wide = overflowing(folder, torch.float32)
    wide.model.layers[1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    assert wide.generate(["The king"], 3)[0].startswith("The king")
    assert max(x.abs().max() for x in seen) > 65_504 and all(x.isfinite().all() for x in seen)
    narrow = overflowing(folder, torch.float16)
    for settings in ({"temperature": 0}, {"seed": 1}):
        with pytest.raises(FloatingPointError, match="not finite: .* overflow fp16"):
            narrow.generate(["The king"], 3, **settings)
        with pytest.raises(FloatingPointError):
            list(narrow.stream("The king", 3, **settings))
    with pytest.raises(FloatingPointError, match="not finite: the weights are damaged or overflow"):
        narrow.score(["The king"])
    with torch.no_grad():  # below the limit the same model is sampled in fp16
        narrow.model.layers[0].feed_forward.w2.weight.fill_(60)
    assert narrow.generate(["The king"], 3)[0].startswith("The king")


@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_last_position_of_a_long_context(theta):
    """In one prefill, and as a last step after all others."""
    params = tiny_params(n_layers=1, rope_theta=theta)
    weights = random_weights(params, dtype=torch.float32, vocab_size=100)
    model = float_model(params, weights, max_seq_len=2048)
    tokens = torch.randint(3, 100, (1, 2048), generator=torch.Generator().manual_seed(1))
    expected = torch.from_numpy(oracle.logits(weights, params, tokens[0].tolist())[-1])
    assert (model(tokens, 0)[0] - expected).abs().max() < TOLERANCE
    cache = cache_of(model, 1, 2048)
    model(tokens[:, :-1], 0, cache)
    assert (model(tokens[:, -1:], 2047, cache)[0] - expected).abs().max() < TOLERANCE


@torch.inference_mode()
def decoded(llm, prompt_ids):
    """Logits (steps, B, V) of two tokens for each row, most likely ones."""
    seen = []
    decoder = decoder_of(llm, prompt_ids, 2, seen)
    for _ in range(2):
        decoder.step()
    return torch.stack([torch.cat(seen[:-1]), seen[-1]])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["demo", "demo_float"])
def test_1000_rows_depend_neither_on_neighbours_nor_on_the_run(form, request, set_threads):
    """Bit for bit at one batch size and length of the longest, whatever its neighbours are and
    wherever it stands. Alone, where the matrix product sums in another order, its logits are the
    same up to float32 rounding: measured 4e-6 of their spread, allowed five times as much."""
    llm, generator = request.getfixturevalue(form), random.Random(form)
    set_threads(1)  # small matrices: threads would mostly wait for each other

    def ids(length):
        return [1, *(generator.randrange(3, llm.tokenizer.n_words) for _ in range(length))]

    for batch in range(CASES // 2 // (ROWS - 1)):
        rows = [ids(generator.randint(0, 6)) for _ in range(ROWS)]
        logits = decoded(llm, rows)
        assert torch.equal(logits, decoded(llm, rows))
        stranger = max(range(ROWS), key=lambda row: len(rows[row]))  # keeps the batch as long
        place = generator.sample(range(ROWS), ROWS)  # of each row among the others
        company = [None] * ROWS
        for row in range(ROWS):
            company[place[row]] = ids(len(rows[row]) - 1) if row == stranger else rows[row]
        among = decoded(llm, company)
        for row in set(range(ROWS)) - {stranger}:
            assert torch.equal(logits[:, row], among[:, place[row]]), (rows, row, place)
        if batch % 10 == 0:
            alone = decoded(llm, rows[:1])[:, 0]
            assert (alone - logits[:, 0]).abs().max() < 2e-5 * alone.std()
            assert torch.equal(alone.argmax(-1), logits[:, 0].argmax(-1))
            wrong = decoded(llm, [[*rows[0], 5]])[:, 0]
            assert (wrong - logits[:, 0]).abs().max() > 1e-2 * alone.std()
