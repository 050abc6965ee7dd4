"""Times lists of prompts: a part of `benchmark`.

Random prompts of random lengths, each with its own number of new tokens: all at once, where a
prompt that ends leaves its slot to the next, against groups that wait for their longest
continuation. Then how long lists wait until each prompt has its first token: of short prompts, of
some that begin alike, and of copies of one.
"""

import copy
import time
from collections.abc import Iterator
from dataclasses import replace
from random import Random
from statistics import median

from llama.generation import LLaMA
from llama.request import Request
from llama.settings import Settings

PROMPTS = 256
SLOTS = 32
FEWEST = 32  # tokens of a prompt, and of its continuation
MOST = 512
SHORT = 8  # tokens of short prompts
SHARED = 1000  # tokens that prompts begin with
OWN = 16  # tokens that each of them then has of its own
COPIES = 8
REPEATS = 5


def list_figures(llm: LLaMA) -> Iterator[tuple[str, float, str, str]]:
    """Name, value, unit and a note of each figure."""
    llm.model.args = replace(llm.model.args, max_batch_size=SLOTS)
    random = Random(1)

    def prompt(length: int) -> list[int]:
        return random.choices(range(3, llm.tokenizer.n_words), k=length)

    prompts = [prompt(random.randint(FEWEST, MOST)) for _ in range(PROMPTS)]
    limits = [random.randint(FEWEST, MOST) for _ in prompts]
    yield from rate_figures(llm, prompts, limits)

    short = [prompt(SHORT) for _ in range(SLOTS)]
    took = seconds_to_first_tokens(llm, short)
    yield first_token_figure(f"{SLOTS} prompts of {SHORT} tokens", took)

    unlike = [prompt(SHARED + OWN) for _ in range(2 * SLOTS)]
    alike = [unlike[0][:SHARED] + ids[SHARED:] for ids in unlike]
    what = f"{len(unlike)} prompts of {SHARED + OWN} tokens"
    took = seconds_to_first_tokens(llm, unlike)
    yield first_token_figure(what, took)
    of_alike = seconds_to_first_tokens(llm, alike)
    yield first_token_figure(f"{what}, {SHARED} of them shared", of_alike, took)

    one = prompt(MOST)
    took = seconds_to_first_tokens(llm, [one])
    yield first_token_figure(f"a prompt of {MOST} tokens", took)
    of_copies = seconds_to_first_tokens(llm, [one] * COPIES)
    yield first_token_figure(f"{COPIES} copies of it", of_copies, took)


def rate_figures(
    llm: LLaMA, prompts: list[list[int]], limits: list[int]
) -> Iterator[tuple[str, float, str, str]]:
    """Tokens a second of the list in groups and in slots that are filled again, and how much of the
    time all slots draw tokens."""
    for ids in sorted(prompts, key=len)[:: len(prompts) // 8 or 1]:
        seconds(llm, [ids], [3])  # compiles what prompts of such a length need
    starts = range(0, len(prompts), SLOTS)
    groups = [slice(start, start + SLOTS) for start in starts]
    in_groups = sum(seconds(llm, prompts[group], limits[group]) for group in groups)
    steps = list(timed_steps(llm, prompts, limits))
    in_slots, _ = steps[-1]
    what = f"int8: {len(prompts)} prompts of {FEWEST} to {MOST} tokens, {FEWEST} to {MOST} new ones"
    yield f"{what}, in groups of {SLOTS}", sum(limits) / in_groups, "tokens/s", ""
    ratio = f" ({in_groups / in_slots:.2f}x)"
    yield f"{what}, {SLOTS} slots", sum(limits) / in_slots, "tokens/s", ratio

    before = busy = 0
    for now, requests in steps:
        if len(requests) == SLOTS:
            busy += now - before
        before = now
        if requests[-1].index == len(prompts) - 1:  # the last prompt has begun
            break
    yield "int8: until all have begun, each slot draws a token", busy / now, "of the time", ""


def first_token_figure(
    what: str, took: float, against: float | None = None
) -> tuple[str, float, str, str]:
    note = f" ({against / took:.2f}x)" if against else ""
    return f"int8: first token of {what}", 1000 * took, "ms", note


def seconds_to_first_tokens(llm: LLaMA, prompts: list[list[int]]) -> float:
    """Until every prompt of a list has one, after a run that compiles."""
    limits = [1] * len(prompts)
    seconds(llm, prompts, limits)
    return median(seconds(llm, prompts, limits) for _ in range(REPEATS))


def seconds(llm: LLaMA, prompts: list[list[int]], limits: list[int]) -> float:
    """Until the last token of a list."""
    *_, (took, _) = timed_steps(llm, prompts, limits)
    return took


def timed_steps(
    llm: LLaMA, prompts: list[list[int]], limits: list[int]
) -> Iterator[tuple[float, list[Request]]]:
    """Seconds since the start and the requests that got a token, after each step of a list; each
    request ends at its own limit, never at a token."""
    tokenizer = copy.copy(llm.tokenizer)
    tokenizer.end_ids = ()
    requests = [
        Request(tokenizer, ids, limit, [], index=place)
        for place, (ids, limit) in enumerate(zip(prompts, limits))
    ]
    started = time.perf_counter()
    for drawn in llm._steps(requests, Settings(seed=1), False, None, ()):
        yield time.perf_counter() - started, drawn
