"""Does the benchmark say what it times? Its own code, on the CPU in place of a GPU: figures mean
nothing here, lines and ratios do."""

import json
from functools import partial

import pytest
import torch

from llama import benchmark, benchmark_lists, benchmark_lookup, decode, lookup, memory, room


@pytest.fixture
def run(monkeypatch, run_command):
    """run(*arguments) -> exit status, stdout, stderr."""
    cpu, none = torch.device("cpu"), lambda *_: None
    monkeypatch.setattr(benchmark, "DEVICE", cpu)
    monkeypatch.setattr(benchmark, "OUTLIERS", [3])
    monkeypatch.setattr(benchmark, "REPEATS", 1)
    monkeypatch.setattr(benchmark, "read_bandwidth", lambda: 4e12)
    monkeypatch.setattr(benchmark, "used_bytes", lambda: 0)
    monkeypatch.setattr(benchmark, "first_token_seconds", lambda *_: {"in all": 2.5})
    monkeypatch.setitem(memory.SIZES, "7B", {"dim": 64, "n_layers": 1, "n_heads": 4})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no GPU")
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, none)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30)

    return partial(run_command, benchmark.main)


SHORT = ["--size=7B", "--lengths=4,9", "--batches=1,2", "--engines=int8,fp16"]


def test_figures(run, tmp_path):
    status, out, err = run(*SHORT, f"--json={tmp_path / 'figures.json'}")
    assert (status, err) == (0, "")
    figures = json.loads((tmp_path / "figures.json").read_text())
    for engine in ("int8", "fp16"):
        for batch, context in ((1, 4), (2, 4), (1, 9), (2, 9)):
            name = f"{engine}: decode at batch {batch}, {context} tokens of context, tokens/s"
            assert figures[name] > 0 and name.rpartition(",")[0] in out
    faster = [line for line in out.splitlines() if line.startswith("int8 against fp16: ")]
    assert len(faster) == 6  # of decoding, two of prefill; memory is no speed
    name = "prefill of 9 tokens, ms"
    ratio = figures[f"fp16: {name}"] / figures[f"int8: {name}"]
    assert f"int8 against fp16: prefill of 9 tokens: {ratio:.2f}x" in faster
    assert out.endswith("int8: start to first token, in all: 2.5 s\n")


def test_what_does_not_fit_is_left_out(run, monkeypatch):
    need = room.need

    def for_fp16(model, *of):
        fits = isinstance(model.output, benchmark.Int8Linear)
        return need(model, *of) if fits else room.Need(2**60, 0, 0)

    monkeypatch.setattr(room, "need", for_fp16)
    status, out, _ = run(*SHORT)
    assert status == 0 and "fp16: left out, the model needs" in out
    assert "int8: decode at batch 2, 9 tokens" in out and "against" not in out


def test_running_out_of_memory_is_one_sentence(run, monkeypatch):
    """In spite of the estimate; what comes after goes on."""
    prefill, lacking = benchmark.prefill_seconds, iter([True])

    def out_of_memory(*of):
        if next(lacking, False):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has")
        return prefill(*of)

    monkeypatch.setattr(benchmark, "prefill_seconds", out_of_memory)
    status, out, _ = run(*SHORT)
    assert status == 0 and "fp16: prefill of 9 tokens" in out and "int8: prefill" not in out
    assert out.count("int8: left out, the GPU ran out of memory though the estimate fits: ") == 1


def test_lists(run, monkeypatch, tmp_path):
    small = {"PROMPTS": 7, "SLOTS": 2, "FEWEST": 2, "MOST": 9, "SHARED": 40, "OWN": 3}
    for name, value in (small | {"REPEATS": 1}).items():
        monkeypatch.setattr(benchmark_lists, name, value)
    monkeypatch.setattr(decode, "PACK", 9)
    monkeypatch.setattr(decode, "PACK_ALONE", 9)
    file = tmp_path / "figures.json"
    status, out, err = run("--size=7B", "--lists", f"--json={file}")
    assert (status, err) == (0, "")
    figures = json.loads(file.read_text())
    list_of = "int8: 7 prompts of 2 to 9 tokens, 2 to 9 new ones"
    ratio = (
        figures[f"{list_of}, 2 slots, tokens/s"] / figures[f"{list_of}, in groups of 2, tokens/s"]
    )
    assert f" tokens/s ({ratio:.2f}x)\n" in out
    share = figures["int8: until all have begun, each slot draws a token, of the time"]
    assert 0.3 < share < 1  # not in the first pass
    for what in (
        "2 prompts of 8 tokens",
        "4 prompts of 43 tokens",
        "4 prompts of 43 tokens, 40 of them shared",
        "a prompt of 9 tokens",
        "8 copies of it",
    ):
        assert figures[f"int8: first token of {what}, ms"] > 0


def test_lookup(run, monkeypatch, plain_engine_verifies):
    """Here the watch believes that steps which verify cost little."""
    small = {"INPUT": 60, "COPIED": 12, "OWN": 2, "PROSE": (20, 9), "TALES": 2, "TALE": 60}
    for name, value in (small | {"REPEATS": 1}).items():
        monkeypatch.setattr(benchmark_lookup, name, value)
    gained, spend = [], lookup.Watch.spend
    plain_engine_verifies(cost=1.2)
    monkeypatch.setattr(lookup.Watch, "spend", lambda *of: gained.extend(of[2]) or spend(*of))
    status, out, err = run("--size=7B", "--lookup", "--batches=1,2")
    assert status == 0
    for case in ("copy", "prose"):
        for batch in (1, 2):
            assert f"int8: {case} with lookup at batch {batch}: " in out
            assert f"int8: {case} without, at batch {batch}: " in out
    assert max(gained) == 8


def test_prompts_longer_than_2048_tokens(run):
    status, out, err = run("--size=7B", "--lengths=4,3000", "--batches=1", "--engines=int8")
    assert (status, err) == (0, "") and "int8: decode at batch 1, 3000 tokens of context" in out


def test_it_needs_a_gpu(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, err = run("--size=13B")
    assert (status, out) == (1, "")
    assert err == "error: the benchmark needs a CUDA GPU, torch sees none\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--size=5B"], "size is '5B', expected one of 7B, 13B, 30B, 34B, 65B, 70B"),
        (["--size=7B", "--ckpt_dir=."], "--size and --ckpt_dir are two models, expected one: "),
        (["--engines=fp8"], "engines has 'fp8', expected some of int8, int8_bnb, fp16"),
        (["--lengths=4,0"], "lengths is 0, expected a whole number, from 1 to 131040"),
        (["--batches=x"], "batches is 'x', expected a whole number"),
    ],
    ids=str,
)
def test_mistakes(run, arguments, message):
    status, out, err = run(*arguments)
    assert (status, out) == (1, "")
    assert err.startswith(f"error: {message}") and err.count("\n") == 1
