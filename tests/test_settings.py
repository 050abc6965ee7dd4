"""Does any prompt and any setting either work or get a sentence? Up to the ends of their ranges."""

import contextlib
import json
import math
import re
import shlex
import subprocess
import sys
import time
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import DEMO, ROOT

from llama import LLaMA, Settings, __main__, cli, generation, quantize

RANGES = {
    "max_gen_len": (1, 2**31),
    "temperature": (0, 1e6),
    "top_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "repetition_penalty_range": (1, 2**31),
    "repetition_penalty_slope": (0, 1e6),
    "seed": (0, 2**63 - 1),
    "top_k": (0, 2**31),
    "min_p": (0, 1),
}
WHOLE = {"max_gen_len", "repetition_penalty_range", "seed", "top_k"}
LIMITS = {"max_seq_len": (1, 2**20), "max_batch_size": (1, 2**20)}


def ends():
    for name, (low, high) in RANGES.items():
        yield from ((name, low), (name, high))
        if name not in WHOLE:
            yield from ((name, math.nextafter(low, high)), (name, math.nextafter(high, low)))


def beyond():
    for name, (low, high) in (RANGES | LIMITS).items():
        whole = name in WHOLE or name in LIMITS
        yield from ((name, x) for x in (math.nan, math.inf, -math.inf, "1", [1], True, 1j))
        yield name, low - 1 if whole else math.nextafter(low, -math.inf)
        yield name, high + 1 if whole else math.nextafter(high, math.inf)
        if whole:
            yield name, 1.5


def test_every_number_is_here():
    others = {"stop", "lookup"}
    assert set(Settings.__dataclass_fields__) - others == set(RANGES)


@pytest.mark.parametrize("name, value", list(ends()), ids=str)
def test_ends_of_a_range(name, value, demo):
    settings = {"max_gen_len": 3, "temperature": 1.0, "seed": 1, "repetition_penalty": 1.2}
    prompt = "The king " * 250 if name == "max_gen_len" else "The king"
    [text] = demo.generate([prompt], **settings | {name: value})
    assert text.startswith(prompt) and len(text) > len(prompt)


@pytest.mark.parametrize("name, value", list(beyond()), ids=str)
def test_beyond_a_range(name, value):
    number = "a whole number" if name in WHOLE | LIMITS.keys() else "a number"
    low, high = (RANGES | LIMITS)[name]
    message = rf"^{name} is .*, expected {number}, from {low} to {re.escape(str(high))}$"
    with pytest.raises(ValueError, match=message) as caught:
        if name in LIMITS:
            LLaMA.build(device="cpu", **{name: value})
        else:
            Settings(**{"max_gen_len": 3} | {name: value})
    assert "\n" not in str(caught.value)


PROMPTS = {
    "empty": "",
    "a space": " ",
    "spaces": " " * 50,
    "lines": "\n\n\r\n",
    "NUL": "a\0b\0",
    "escape codes": "\x1b[31mred\x1b[0m\x9b2J\r\b\x7f",
    "right to left": "שלום עולם \u202eabc\u202c مرحبا",
    "accents apart": "e\u0301 e\u0301\u0323",
    "emoji joined": "\U0001f469\u200d\U0001f680 \U0001f1e9\U0001f1ea",
    "end of planes": "\ufffe\uffff\U0010ffff\U0001ffff",
    "byte order mark": "\ufeffa",
    "the tokenizer's space": "a▁b ▁",
    "names of tokens": "<s> </s> <unk> <0x41> <|endoftext|>",
    "ends in half a word": "Once upon a ti",
    "ends in a space": "Once upon a ",
    "a long word": "a" * 300,
    "spaces within": "  Two  spaces \n\n\ttab \N{FOX FACE} ",
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompt(name, demo):
    prompt = PROMPTS[name]
    [text] = demo.generate([prompt], 5, seed=1)
    assert text.startswith(prompt)
    assert prompt + "".join(demo.stream(prompt, 5, seed=1)) == text
    tokenizer = demo.tokenizer
    ids = tokenizer.encode(prompt, bos=False, eos=False)
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)  # no text is a control token
    assert len(demo.score([prompt])[0]) == len(ids)


@pytest.mark.parametrize(
    "prompt", ["a" * 2**20, " " * 2**20, "\n" * 2**20, "日" * 2**20, "\0" * 2**20]
)
def test_a_megabyte_is_too_long_and_said_to_be_so_at_once(prompt, demo):
    started = time.perf_counter()
    with pytest.raises(ValueError, match=r"^prompt 1 has \d+ tokens, max_seq_len is 512") as caught:
        demo.generate([prompt], 5)
    assert len(str(caught.value)) < 200 and time.perf_counter() - started < 5


@pytest.fixture
def run(monkeypatch, run_command):
    """run(*arguments) -> stdout and stderr of a model that says nothing but escape codes."""

    def say(logits, *_, **__):
        codes = [0x1B, ord("["), ord("2"), ord("J"), 0x07, 0x0D, 0xC2, 0x9B]
        said.append(codes[len(said) % len(codes)])
        return torch.full((len(logits),), 3 + said[-1])

    def call(*arguments, stdin=b""):
        said.clear()
        monkeypatch.setattr(generation, "next_token", say)
        words = "--device=cpu", "--max_gen_len=16", *arguments
        return run_command(__main__.main, *words, stdin=stdin)[1:]

    said = []
    return call


@pytest.mark.parametrize("prompts", [b"\x1b[5mA", b"\x1b[5mA\nB"], ids=["one", "two"])
def test_a_terminal_gets_no_control_codes(run, prompts):
    out, err = run("--prompt_file=-", stdin=prompts)
    assert r"\x1b[5mA" in out and r"\x1b[2J\x07\r\x9b" in out
    assert not re.search(r"[^\n\t -~]", out)


def test_json_has_control_codes_exactly(run):
    out, _ = run("--prompt=A", "--json")
    assert json.loads(out)["text"].endswith("\x1b[2J\x07\r\x9b") and out[:-1].isprintable()


def test_errors_show_no_control_codes(run):
    out, err = run("--prompt=A", "--ckpt_dir=/nowhere/\x1b[2J")
    assert err.startswith(r"error: /nowhere/\x1b[2J does not exist: pass the model folder")


@pytest.mark.parametrize(
    "surroundings",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: default_dtype(torch.float16),
        pytest.param(lambda: default_dtype(torch.float64), marks=pytest.mark.slow),
        pytest.param(lambda: torch.device("meta"), marks=pytest.mark.slow),
        torch.inference_mode,
    ],
    ids=["autocast", "float16", "float64", "meta", "inference"],
)
def test_results_do_not_depend_on_what_a_program_has_set(surroundings, demo, demo_float, tmp_path):
    settings = {"max_gen_len": 20, "seed": 3, "temperature": 1.5, "repetition_penalty": 1.3}
    settings["repetition_penalty_slope"] = 2.0

    def results():
        texts = [llm.generate(["The king"], **settings) for llm in (demo, demo_float)]
        return texts, [llm.score(["The king said"]) for llm in (demo, demo_float)]

    expected = results()
    with surroundings():
        assert results() == expected
        llm = LLaMA.build(device="cpu")
        quantize.main(str(DEMO), str(tmp_path / "int8"))
    assert llm.generate(["The king"], **settings) == expected[0][0]
    saved, wq = torch.load(tmp_path / "int8" / "consolidated.01.pth"), "layers.0.attention.wq"
    assert saved[f"{wq}.SCB"].dtype == torch.float32 and saved[f"{wq}.weight"].dtype == torch.int8


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


def test_numbers_of_numpy_are_numbers(demo):
    expected = demo.generate(["The king"], 50, seed=3, temperature=0.5)
    settings = {"max_gen_len": np.uint8(50), "seed": np.int64(3)}
    for half in (Fraction(1, 2), np.float64(0.5)):
        assert demo.generate(["The king"], temperature=half, **settings) == expected
    llm = LLaMA.build(device="cpu", max_seq_len=np.int16(300), max_batch_size=np.uint8(4))
    assert llm.model.args.max_seq_len == 300 and llm.generate(["A"] * 3, 5)


@pytest.mark.slow
def test_commands_without_streams_or_docstrings():
    """With a shell's >&- and with python -OO."""
    command = [sys.executable, "-m", "llama", "--prompt=a", "--max_gen_len=2"]
    for closing in (">&-", "<&-", "2>&-"):
        for line, status in ((command, 0), ([*command, "--bogus"], 1)):
            line = f"{shlex.join(line)} {closing}"
            done = subprocess.run(line, shell=True, capture_output=True, text=True, cwd=ROOT)
            assert done.returncode == status and "Traceback" not in done.stderr
    command.insert(1, "-OO")
    assert subprocess.run(command, capture_output=True, cwd=ROOT).returncode == 0


def test_text_of_every_language_is_printed_as_it_is():
    text = "naïve café\tשלום\n日本 \U0001f469\u200d\U0001f680\xa0"
    assert cli.printable(text) == text
    assert cli.printable("\x00\x1b\x7f\x85\x9f\r") == r"\x00\x1b\x7f\x85\x9f\r"
