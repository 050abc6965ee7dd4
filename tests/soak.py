"""Does a model still work as on its first call after thousands of others?

    python tests/soak.py calls [CALLS] [--ckpt_dir FOLDER] [--device cuda]
    python tests/soak.py prompts [PROMPTS] [--ckpt_dir FOLDER] [--device cuda]

Random calls, each known by its number, in one process. Host and GPU memory must not grow, and some
calls are made again, each alone in a fresh process, where they must give the same. A quarter of the
calls is a stream that is left half-way, one in eight is refused, one in eight asks for scores.

Or lists of prompts, which take each other's slots: after half of them the GPU's tensors must take
the same bytes after each list, and host memory stay within HOST.
"""

import ctypes
import gc
import json
import os
import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import fire
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from llama import LLaMA
from llama.room import anonymous_bytes

WORDS = "the king Fox, said\n that 日本 \N{FOX FACE} an  old (bear) . 1891 queen's É".split(" ")
# Of the calls, until every buffer that stays has been taken: on CUDA host memory rises by 36 MiB
# from call 200 to call 1,600, each kernel's variants being loaded, and by none to call 2,400.
WARM_UP = 0.5
HOST = 20 * 2**20  # bytes


def call(llm: LLaMA, number: int) -> list:
    """What the random call of this number returns, or the error that it raises."""
    chance = random.Random(number)
    most = min(8, llm.model.args.max_batch_size)
    prompts = [
        " ".join(chance.choices(WORDS, k=chance.choice([0, 1, 3, 10, 40])))
        for _ in range(chance.randint(1, most))
    ]
    settings = {
        "max_gen_len": chance.choice([1, 2, 5, 10, 30]),
        "temperature": chance.choice([0, 0.5, 0.8, 1.5]),
        "top_p": chance.choice([0.1, 0.95, 1.0]),
        "repetition_penalty": chance.choice([1.0, 1.0, 1.2]),
        "repetition_penalty_range": chance.choice([5, 1024]),
        "repetition_penalty_slope": chance.choice([0.0, 2.0]),
        "top_k": chance.choice([0, 0, 1, 40]),
        "min_p": chance.choice([0.0, 0.1]),
        "stop": chance.choice([[], ["the"], ["a", "."]]),
        "seed": number,
    }
    kind = number % 8
    if kind == 7:
        return [[round(score, 3) for score in scores] for scores in llm.score(prompts)]
    if kind == 6:
        bad = chance.choice([{"top_p": 2}, {"max_gen_len": 0}, {"stop": ""}, {"seed": -1}])
        with suppress(ValueError):
            return llm.generate(prompts, **settings | bad)
        return ["refused"]
    if kind in (4, 5):
        stream = llm.stream(prompts[0], **settings)
        return [piece for _, piece in zip(range(3), stream)]
    return llm.generate(prompts, **settings)


def alone(number: int, ckpt_dir: str | None, device: str) -> list:
    """That of a fresh process."""
    code = f"""
import json, soak
print(json.dumps(soak.call(soak.LLaMA.build({ckpt_dir!r}, device={device!r}), {number})))
"""
    tests = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([tests, *sys.path])},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def taken(device: torch.device) -> tuple[int, int]:
    """Bytes, on the host and on the GPU. What glibc keeps of freed memory goes back first: it comes
    and goes by 10 MiB, of the demo's 170."""
    gc.collect()
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    gpu = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    return anonymous_bytes(), gpu


def grown(llm: LLaMA, results: dict[int, list], calls: int) -> tuple[int, int]:
    """Makes the calls, the results of those in results into it; bytes by which host and GPU memory
    grew after the warm-up."""
    device = llm.device
    for number in range(calls):
        if number == int(WARM_UP * calls):
            before = taken(device)
        result = call(llm, number)
        if number in results:
            results[number] = result
    return tuple(after - b for after, b in zip(taken(device), before))


def prompts(prompts: int = 10_000, ckpt_dir: str | None = None, device: str = "cpu", lists=20):
    llm, chance, levels = LLaMA.build(ckpt_dir, device=device), random.Random(1), []
    for number in range(lists):
        count = range(prompts // lists)
        some = [" ".join(chance.choices(WORDS, k=chance.randint(1, 12))) for _ in count]
        results = llm.generate(some, 12, stop=["the", "."], seed=number)
        assert len(results) == len(some) and all(map(str.startswith, results, some))
        levels.append(taken(llm.device))
    host, gpu = zip(*levels[int(WARM_UP * lists) :])
    print(
        f"{prompts} prompts: in the second half host memory rose by {max(host) - host[0]:,} bytes"
    )
    print(f"and the tensors of the GPU took {min(gpu):,} to {max(gpu):,} bytes")
    assert max(host) - host[0] < HOST and min(gpu) == max(gpu)


def main(calls: int = 4000, ckpt_dir: str | None = None, device: str = "cpu", again: int = 8):
    results = dict.fromkeys(random.Random(1).sample(range(calls), again))
    host, gpu = grown(LLaMA.build(ckpt_dir, device=device), results, calls)
    print(f"after {calls} calls host memory is {host / 2**20:.1f} MiB above that after half")
    print(f"and the tensors of the GPU {gpu} bytes")
    for number, result in results.items():
        same = alone(number, ckpt_dir, device) == result
        print(f"call {number} alone in a fresh process: {'the same' if same else 'ANOTHER RESULT'}")


if __name__ == "__main__":
    fire.Fire({"calls": main, "prompts": prompts})
