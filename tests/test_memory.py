"""Is what a model takes known before it is loaded?"""

import re

import pytest
import torch

from llama import LLaMA, Transformer, memory, room
from llama.int8 import Int8Linear
from llama.model import KVCache

GIB = 2**30


@pytest.mark.parametrize(
    "size, weights, with_sequence",
    [
        ("7B", 6.4, 7.4),
        ("13b", 12.3, 13.9),
        ("65B", 61.1, 66.1),
        ("2-70B", 64.5, 65.1),
        ("8B", 8.0, 8.25),
    ],
)
def test_published_sizes(size, weights, with_sequence):
    """Worked out by hand, 320 KiB a token for the grouped 70B; torch's pool adds up to 1.2 %."""
    with torch.device("meta"):
        model = Transformer(memory.args_of(size), Int8Linear)
    need = room.need(model, 1, 2048, torch.float16)
    assert weights - 0.05 < need.weights / GIB < weights * 1.012 + 0.05
    assert with_sequence - 0.05 < (need.weights + need.cache) / GIB < with_sequence * 1.012 + 0.05
    assert 0.05 < need.work / GIB < 1


def test_cache_bytes_are_those_of_the_cache(demo):
    cache = KVCache(demo.model.args, 3, 50, torch.float32, "cpu")
    counted = room.cache_bytes(demo.model.args, 3, 50, torch.float32)
    assert counted == cache.k.nbytes + cache.v.nbytes


def test_it_prints_both_kinds_beside_what_is_free(capsys):
    memory.main("7B", max_batch_size=2, max_seq_len=1024)
    printed = capsys.readouterr().out
    assert printed.startswith("7B, 2 sequences of 1024 tokens, in GiB\n")
    rows = dict(re.findall(r"^(\w+).*?((?: +\d+\.\d\d){2})", printed, re.M))
    for column in (0, 1):
        parts = {name: float(values.split()[column]) for name, values in rows.items()}
        together = parts["weights"] + parts["keys"] + parts["work"] + parts["CUDA"]
        assert parts["together"] == pytest.approx(together, abs=0.03)
    assert rows["keys"].split() == ["1.00", "1.00"]
    assert ("free" in rows) == torch.cuda.is_available()


def test_of_a_folder(make_folder, run_command):
    folder, _, _ = make_folder()
    _, out, _ = run_command(memory.main, f"--ckpt_dir={folder}")
    assert "tiny, 1 sequence of 2048 tokens" in out
    status, out, err = run_command(memory.main, folder)
    assert (status, out) == (1, "") and "write --size=13B or --ckpt_dir=FOLDER, see" in err
    status, out, err = run_command(memory.main, "--size=7B", f"--ckpt_dir={folder}")
    assert (status, out) == (1, "") and err == (
        "error: --size and --ckpt_dir are two models, expected one: leave one of them out\n"
    )


def test_a_size_that_is_none():
    with pytest.raises(ValueError, match="size is '14B', expected one of 7B, 13B, 30B, 34B, 65B, "):
        memory.main("14B")


@pytest.mark.cuda
@pytest.mark.parametrize("use_int8", [True, False], ids=["int8", "fp16"])
def test_the_estimate_is_within_3_percent(large_folder, use_int8):
    """Of what torch's pool takes from the driver for weights, and two segments of 20 MiB for small
    tensors, which is nothing in real models: tests/fits.py measures those, all of it."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    llm = LLaMA.build(large_folder, max_seq_len=512, max_batch_size=1, use_int8=use_int8)
    needed = room.need(llm.model, 1, 512, torch.float16)
    loaded = torch.cuda.memory_reserved() - before
    assert loaded == pytest.approx(needed.weights, abs=0.03 * needed.weights + 40 * 2**20)
