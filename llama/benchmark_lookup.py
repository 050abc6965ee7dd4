"""What prompt lookup brings: a part of `benchmark`.

Random weights write no text, and how often guesses are right is a matter of the text. So both runs,
with lookup and without, are made to write the same one: the sampler draws as always, and then the
token of the text takes the place of what it drew. Guesses, steps that verify and the decision for
them are those of `Decoder`. The texts are the demo model's tales, in two cases:

- copy: the output copies every second COPIED tokens of its input, which is half of it, and has OWN
  tokens of another tale after each, as a summary or the edit of a program does: so 4 tokens of 5
  are copied.
- prose: the output goes on with the tale of its input, from which little can be guessed.
"""

import time
from collections.abc import Iterator
from functools import partial
from statistics import median

import torch
from torch import Tensor

from llama.decode import Decoder
from llama.generation import LLaMA
from llama.lookup import rows_each
from llama.sampling import next_token
from llama.settings import Settings

INPUT = 1024  # tokens
COPIED = 32  # tokens
OWN = 8  # tokens
PROSE = 256, 512  # tokens of input and output
TALES = 32  # that the demo model tells at once
TALE = 480  # tokens of each
REPEATS = 3
IDS = 2**17  # tokens of a vocabulary at most: an id divided by it is an exact float32 below 1
Text = tuple[list[int], list[int]]  # ids of an input and of its output


def lookup_figures(llm: LLaMA, batches: list[int]) -> Iterator[tuple[str, float, str, str]]:
    """Name, value, unit and a note of each figure: tokens a second with lookup and without."""
    for batch in (batch for batch in batches if rows_each(batch) > 1):
        tales = told(llm, batch, max(2 * INPUT, sum(PROSE)))
        for case, texts in (("copy", [*map(copy, tales)]), ("prose", [*map(prose, tales)])):
            forced_seconds(llm, texts, True)  # compiles
            took = {
                lookup: median(forced_seconds(llm, texts, lookup) for _ in range(REPEATS))
                for lookup in (False, True)
            }
            tokens, ratio = sum(len(output) for _, output in texts), took[False] / took[True]
            name = f"int8: {case} with lookup at batch {batch}"
            yield name, tokens / took[True], "tokens/s", f" ({ratio:.3f}x)"
            yield f"int8: {case} without, at batch {batch}", tokens / took[False], "tokens/s", ""


def told(llm: LLaMA, count: int, length: int) -> list[list[int]]:
    """Tales of the demo model, one after the other, as `count` lists of so many token ids."""
    demo = LLaMA.build(device=llm.device)
    ids, seed = [], 0
    while len(ids) < count * length:
        for text in demo.generate(["Once upon a time"] * TALES, TALE, seed=seed):
            ids += llm.tokenizer.encode(text, bos=False, eos=False)
        seed += 1
    return [ids[start : start + length] for start in range(0, count * length, length)]


def copy(tale: list[int]) -> Text:
    output, own = [], INPUT
    for start in range(0, INPUT, 2 * COPIED):
        output += tale[start : start + COPIED] + tale[own : own + OWN]
        own += OWN
    return tale[:INPUT], output


def prose(tale: list[int]) -> Text:
    given, more = PROSE
    return tale[:given], tale[given : given + more]


def take(
    logits: Tensor, tokens: Tensor, lengths: Tensor, uniform: Tensor, settings: Settings
) -> Tensor:
    """Draws, and returns the token that the uniform number stands for."""
    drawn = next_token(logits, tokens, lengths, uniform, settings)
    return torch.where(drawn < 0, drawn, (uniform * IDS).long())


@torch.inference_mode()
def forced_seconds(llm: LLaMA, texts: list[Text], lookup: bool) -> float:
    """What a user waits for, with prefill and the capture of graphs. AssertionError unless the
    outputs are what they were to be."""
    started = time.perf_counter()
    length = max(len(given) + len(output) for given, output in texts)
    pick = partial(take, settings=Settings())
    decoder = Decoder(llm.model, llm.engine, len(texts), length, pick, lookup=lookup)
    for slot, (given, output) in enumerate(texts):
        decoder.begin(slot, given, torch.tensor(output) / IDS)
    written = [[] for _ in texts]
    while any(len(own) < len(output) for own, (_, output) in zip(written, texts)):
        [drawn] = decoder.step()
        for slot in {*range(len(texts))} - {*decoder.queue}:
            lacking = len(texts[slot][1]) - len(written[slot])
            written[slot] += drawn[slot][:lacking]
    took = time.perf_counter() - started
    decoder.close()
    assert written == [output for _, output in texts]
    return took
