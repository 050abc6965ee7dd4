"""Does a LLaMA keep to itself? After many calls, after Ctrl-C and errors, beside another one, and
with threads that call it at once. python tests/test_long_running.py 2000 20: a job of so many
prompts is killed so many times."""

import gc
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import fire
import pytest
import soak
import torch
from conftest import DEVICES

from llama import LLaMA, generation
from llama.decode import TorchEngine
from llama.device import use_cores
from llama.model import KVCache

pytestmark = pytest.mark.slow

PROMPTS = ["Once upon a time there was a little", "The king"]


def caches() -> int:
    gc.collect()
    return sum(type(thing) is KVCache for thing in gc.get_objects())


def test_hundreds_of_random_calls_keep_no_memory(make_folder):
    """2 MiB is 4 KiB a call, less than one takes for its cache. `soak.py` makes more calls."""
    llm = LLaMA.build(make_folder()[0], device="cpu")
    last = {749: None}
    host, _ = soak.grown(llm, last, 750)
    assert host < 2 * 2**20 and caches() == 0
    assert last[749] == soak.call(llm, 749)


def test_a_call_after_others_gives_what_it_gives_in_a_fresh_process(demo):
    results = {number: soak.call(demo, number) for number in range(16)}
    for number in (12, 15):  # a stream and scores
        assert results[number] == soak.alone(number, None, "cpu")
    assert results[3] == soak.call(demo, 3)


INTERRUPTED = """
import sys
from contextlib import suppress
import torch
from test_long_running import PROMPTS, LLaMA, caches
llm = LLaMA.build(sys.argv[1], device=sys.argv[3])
expected = llm.generate(PROMPTS, 8, seed=1)
for turn in range(int(sys.argv[2])):
    try:
        print("working", flush=True)
        while True:
            llm.generate(PROMPTS, 40)
            list(llm.stream(PROMPTS[0], 40, stop=["the"]))
            llm.score(PROMPTS)
    except KeyboardInterrupt as error:
        kept = error  # as a notebook keeps it
    assert caches() == 0
    assert not torch.is_inference_mode_enabled()
    assert llm.generate(PROMPTS, 8, seed=1) == expected
print("usable")
"""


@pytest.mark.parametrize("device", DEVICES)
def test_ctrl_c_at_50_moments_leaves_a_model_usable(make_folder, device):
    """Real signals to a real process; the memory of the call is free though the error is kept. On
    CUDA they come while a graph is captured, too."""
    chance = random.Random(1)
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, make_folder()[0], "50", device],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        for _ in range(50):
            assert process.stdout.readline() == "working\n", process.stderr.read()
            time.sleep(chance.random() * 0.1)
            process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "usable\n", process.stderr.read()
        assert process.wait(30) == 0


def killed_job(folder, prompts, kills):
    """Continues so many prompts, killed so many times; whether each result is there once, as from a
    run that nobody disturbed."""
    chance, words = random.Random(1), soak.WORDS
    lines = [" ".join(chance.choices(words, k=1 + i % 9)) for i in range(prompts)]
    (folder / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-m", "llama", "--prompt_file=p.jsonl", "--device=cpu", "--seed=1"]
    command += ["--max_gen_len=6", "--max_batch_size=8"]
    options = {"cwd": folder, "env": {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}}
    options |= {"stderr": subprocess.DEVNULL}
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    subprocess.run([*command, "--resume=whole"], check=True, **options)

    killed = folder / "killed"
    killed.touch()
    for least in sorted(chance.choices(range(prompts * 9 // 10), k=kills)):
        with subprocess.Popen([*command, "--resume=killed"], **options) as process:
            if killed.read_bytes().count(b"\n") > least:  # early, before its first result perhaps
                time.sleep(chance.random() * 5)
            while killed.read_bytes().count(b"\n") <= least:
                assert process.poll() is None
                time.sleep(0.01)
            time.sleep(chance.random() * 0.1)
            process.send_signal(chance.choice([signal.SIGKILL, signal.SIGINT]))
            assert process.wait(30) in (-signal.SIGKILL, 130)
    subprocess.run([*command, "--resume=killed"], check=True, **options)

    def results(name):
        found = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for result in found:
            del result["seconds"], result["seconds_to_first_token"]
        return sorted(found, key=lambda result: result["index"])

    return [result["prompt"] for result in results("whole")] == lines and (
        results("killed") == results("whole")
    )


def test_a_job_that_is_killed_again_and_again_has_every_result_once(tmp_path):
    assert killed_job(tmp_path, 200, 4)


@pytest.mark.parametrize("step", [1, 2, 8])
def test_out_of_memory_names_the_flags_and_a_smaller_call_works(demo, monkeypatch, step):
    expected = demo.generate(PROMPTS[:1], 8, seed=1)
    compute, steps = TorchEngine.step, itertools.count(1)

    def failing(*args):
        if next(steps) == step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")
        return compute(*args)

    monkeypatch.setattr(TorchEngine, "step", failing)
    with pytest.raises(MemoryError, match="lower --max_batch_size, --max_gen_len or"):
        demo.generate(PROMPTS, 20)
    assert sys.exc_info()[0] is None and caches() == 0  # though a notebook keeps the error
    assert demo.generate(PROMPTS[:1], 8, seed=1) == expected


@pytest.mark.cuda
@pytest.mark.parametrize("engine", ["triton", "bnb"])
def test_a_gpu_that_is_full_names_the_flags_and_a_smaller_call_works(monkeypatch, engine):
    """Torch itself runs out, since the count of free bytes beforehand is made to lie."""
    llm, before = LLaMA.build(device="cuda", max_seq_len=20000, engine=engine), caches()
    expected = llm.generate(PROMPTS[:1], 8, seed=1)
    room = llm.model.tok_embeddings.weight.nbytes + torch.cuda.memory_reserved() + 2**28
    total = torch.cuda.get_device_properties(0).total_memory
    monkeypatch.setattr(generation.room, "free_bytes", lambda device: 2**60)
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        with pytest.raises(MemoryError, match="--max_batch_size.* --max_gen_len") as caught:
            llm.generate(PROMPTS * 16, 19000)
        assert caught.value.__traceback__ and caches() == before
        assert llm.generate(PROMPTS[:1], 8, seed=1) == expected
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("device", DEVICES)
def test_two_models_do_not_disturb_each_other(make_folder, device):
    """Of other sizes, one in int8, their calls interleaved step by step."""
    one = LLaMA.build(device=device)
    other = LLaMA.build(make_folder(n_heads=8)[0], device=device, use_int8=False)
    settings = {"max_gen_len": 20, "seed": 1, "stop": ["the"]}
    alone = [list(llm.stream(PROMPTS[0], **settings)) for llm in (one, other)]
    a, b = (llm.stream(PROMPTS[0], **settings) for llm in (one, other))
    together = [[], []]
    for pieces, stream in [(together[0], a), (together[1], b)] * 20:
        pieces += [piece for _, piece in zip(range(1), stream)]
    assert together == alone
    expected = other.score(PROMPTS)
    del one, a
    gc.collect()
    assert other.score(PROMPTS) == expected


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("use_int8", [True, False])
def test_a_model_works_on_a_gpu_that_is_not_the_current_one(use_int8):
    first, second = (LLaMA.build(device=f"cuda:{i}", use_int8=use_int8) for i in range(2))
    assert first.generate(PROMPTS, 40, seed=1) == second.generate(PROMPTS, 40, seed=1)
    assert first.score(PROMPTS) == second.score(PROMPTS)
    assert torch.cuda.current_device() == 0


def in_threads(work, count):
    """What work(i) returns in each of some threads that begin together."""
    start, results = threading.Barrier(count), [None] * count

    def run(i):
        start.wait()
        results[i] = work(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    return results


@pytest.mark.parametrize("device", DEVICES)
def test_threads_that_share_a_model_each_get_what_they_would_alone(device):
    """Generating, streaming, leaving a stream half-way and scoring at once."""
    llm = LLaMA.build(device=device)
    expected = [soak.call(llm, number) for number in range(16)]
    left = llm.stream(PROMPTS[0], 40)
    next(left)
    got = in_threads(lambda i: [soak.call(llm, number) for number in range(i, 16, 4)], 4)
    assert got == [expected[i::4] for i in range(4)]
    next(left)


@pytest.mark.cuda
def test_another_threads_own_work_on_the_gpu_does_not_disturb_a_capture():
    """It takes and frees memory of the driver, which ends a capture that all threads share."""
    llm, over = LLaMA.build(device="cuda"), threading.Event()
    expected = llm.generate(PROMPTS, 20, seed=1)

    def work(i):
        if i == 0:
            results = [llm.generate(PROMPTS, 20, seed=1) for _ in range(20)]
            over.set()
            return results == [expected] * 20
        while not over.is_set():
            torch.ones(2**24, device="cuda").sum().item()
            torch.cuda.empty_cache()

    assert in_threads(work, 2) == [True, None]


def test_threads_take_turns_a_step_at_a_time(demo, monkeypatch):
    """None waits for the end of another's text, and no two are in the model at once."""
    compute, inside, order, most = TorchEngine.step, [], [], set()

    def watched(*args):
        inside.append(1)
        order.append(threading.get_ident())
        time.sleep(0.001)
        most.add(len(inside))
        result = compute(*args)
        inside.pop()
        return result

    monkeypatch.setattr(TorchEngine, "step", watched)
    in_threads(lambda i: demo.generate(PROMPTS, 30, seed=i), 3)
    changes = sum(one != other for one, other in zip(order, order[1:]))
    assert most == {1}
    assert len(set(order)) == 3 and changes > 3  # 46 to 71 were seen, of 92


def test_loading_in_two_threads_changes_no_ones_thread_count(set_threads):
    """Nor that of a thread that begins meanwhile, of one that begins later, or the callers'."""
    counts, loaded = set(), threading.Event()

    def look_again_and_again():
        while not loaded.is_set():
            in_threads(lambda _: counts.add(torch.get_num_threads()), 1)

    set_threads(3)
    looking = threading.Thread(target=look_again_and_again)
    looking.start()
    try:
        in_threads(lambda _: [LLaMA.build(device="cpu") for _ in range(3)], 2)
        counts |= set(in_threads(lambda _: torch.get_num_threads(), 2))
    finally:
        loaded.set()
        looking.join()
    assert counts == {3}


def test_a_loaders_thread_works_on_one_core(set_threads):
    set_threads(3)
    assert in_threads(lambda _: use_cores(1) and torch.get_num_threads(), 2) == [1, 1]
    assert torch.get_num_threads() == 3


def main(prompts: int, kills: int):
    with tempfile.TemporaryDirectory() as folder:
        same = killed_job(Path(folder), prompts, kills)
    print(f"{prompts} prompts, {kills} kills: {'each result once, the same' if same else 'WRONG'}")


if __name__ == "__main__":
    fire.Fire(main)
