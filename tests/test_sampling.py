"""Does the next token come from the distribution that the formulas say?"""

import pytest
import torch

from llama import Settings, sampling
from llama.sampling import NOT_FINITE, has_kernel, next_token, penalize, uniform_numbers

PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])


def sample(logits, uniform, settings):
    return next_token(logits, None, None, uniform, settings)


def draw(logits, temperature=1.0, top_p=1.0, n=10_000, **cuts):
    """Shares of the tokens over n evenly spread uniform numbers: exact to 1 / n a token."""
    uniform = (torch.arange(n) + 0.5) / n
    settings = Settings(temperature=temperature, top_p=top_p, **cuts)
    tokens = sample(logits.expand(n, -1), uniform, settings)
    return torch.bincount(tokens, minlength=logits.shape[-1]) / n


def test_a_slightly_different_distribution_is_seen():
    assert not torch.allclose(draw(1.01 * PROBABILITIES.log()), PROBABILITIES, atol=3e-4)


def test_temperature_sharpens():
    expected = PROBABILITIES.square() / PROBABILITIES.square().sum()
    assert torch.allclose(draw(PROBABILITIES.log(), temperature=0.5), expected, atol=3e-4)


@pytest.mark.parametrize(
    "cuts, kept",
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.01}, [1]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.41}, [1, 3]),
        ({"top_p": 0.69}, [1, 3]),
        ({"top_p": 0.8}, [1, 3, 4]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 3, 4]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"min_p": 0.37}, [1, 3, 4]),
        ({"min_p": 0.38}, [1, 3]),
        ({"min_p": 1.0}, [1]),
        ({"top_k": 3, "min_p": 0.38}, [1, 3]),
        ({"top_k": 2, "min_p": 0.2}, [1, 3]),
        ({"top_p": 0.39, "top_k": 3}, [1]),
    ],
    ids=str,
)
def test_cuts_keep_what_their_formulas_say(cuts, kept):
    expected = torch.zeros(5)
    expected[kept] = PROBABILITIES[kept]
    assert torch.allclose(draw(PROBABILITIES.log(), **cuts), expected / expected.sum(), atol=3e-4)


def test_of_equal_tokens_those_of_the_lowest_ids_are_kept():
    """And a sum that is top_p exactly is enough."""
    for cuts in ({"top_p": 0.5}, {"top_k": 2}):
        assert draw(torch.ones(4), **cuts).tolist() == [0.5, 0.5, 0, 0]


def test_min_p_is_of_the_probabilities_after_temperature():
    """Squared, 0.3 is no longer 0.6 of 0.4, but 0.5625."""
    for min_p, kept in ((0.6, 1), (0.55, 2)):
        shares = draw(PROBABILITIES.log(), temperature=0.5, min_p=min_p)
        assert (shares > 0).sum() == kept


def test_temperature_0_and_nearly_0_are_greedy():
    logits = torch.tensor([[1.0, 5.0, 2.0], [300.0, -400.0, 299.0], [1e30, 2e30, -1e30]])
    for temperature in (0, 5e-324, 1e-46, 1e-38, 1e-30, 1e-20):  # float32 takes some for 0
        settings = Settings(temperature=temperature, top_p=0.9)
        assert sample(logits, torch.tensor([0.999, 0.5, 0]), settings).tolist() == [1, 0, 1]
    assert sample(torch.ones(1, 4), torch.tensor([0.999]), Settings(temperature=0, top_p=1)) == 0


def test_each_place_of_a_list_has_its_own_numbers_again_and_again():
    numbers = {tuple(uniform_numbers(7, place, 9).tolist()) for place in (0, 1, 2, 0, 1, 2)}
    assert len(numbers) == 3


def test_ends_of_the_uniform_numbers_pick_possible_tokens():
    logits = torch.tensor([[0.0, -torch.inf, 1.0, -1000.0]]).nan_to_num(neginf=-1e30)
    for u in (0.0, 1 - 2**-24):
        settings = Settings(temperature=1.0, top_p=1.0)
        assert sample(logits, torch.tensor([u]), settings).item() in (0, 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_marked_alone(bad):
    logits = torch.randn(3, 50)
    logits[1, 7] = bad
    for temperature in (0, 0.8):
        tokens = sample(logits, torch.full((3,), 0.5), Settings(temperature=temperature))
        assert tokens[1] == NOT_FINITE < 0 and (tokens[[0, 2]] >= 0).all()


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)], ids=str)
def test_which_gpus_have_a_kernel(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_kernel(torch.device("cuda:0")) == (capability >= (8, 0))
    assert not has_kernel(torch.device("cpu")) and not has_kernel(torch.device("mps"))
    monkeypatch.setattr(sampling, "find_spec", lambda name: None)
    assert not has_kernel(torch.device("cuda"))


def slow_penalty(logits, history, penalty, window, slope):
    """The docstring of `penalize`, one token at a time."""
    logits = logits.clone()
    recent = history[-window:]
    for token in set(recent):
        i, p = recent[::-1].index(token), penalty
        if slope:
            x = 1 - 2 * i / (window - 1) if window > 1 else 1.0
            y = slope * x / (1 + abs(x) * (slope - 1))
            p = 1 + (penalty - 1) * (1 + y) / 2
        logits[token] = logits[token] / p if logits[token] > 0 else logits[token] * p
    return logits


@pytest.mark.parametrize("slope", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("window", [1, 2, 5, 1024])
@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_penalty_equals_its_formula(slope, window, penalty):
    histories = [[3, 7, 3, 9, 1, 1, 4], [5], [2, 2, 2, 8]]
    logits = torch.randn(3, 12, generator=torch.Generator().manual_seed(2))
    tokens = torch.zeros(3, 10, dtype=torch.long)
    for row, history in enumerate(histories):
        tokens[row, : len(history)] = torch.tensor(history)
    lengths = torch.tensor([len(h) for h in histories])
    settings = Settings(
        repetition_penalty=penalty,
        repetition_penalty_range=window,
        repetition_penalty_slope=slope,
    )
    got = penalize(logits, tokens, lengths, settings)
    for row, history in enumerate(histories):
        expected = slow_penalty(logits[row], history, penalty, window, slope)
        assert torch.allclose(got[row], expected, rtol=1e-5)
