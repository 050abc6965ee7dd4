"""Do the tests notice when a line of the code is another? The mutation score of a module.

    pip install cosmic-ray; python tests/mutants.py sampling [--n 200] [--seed 0] [--more]

Each mutant is the module with one change of cosmic-ray's (another operator, a number by one more or
less, a decorator gone ...), in a copy of the repository, and is noticed if the module's tests fail
or take twice as long. Those that are not are printed. --n takes so many at random, --more also
runs the tests of the whole package that start no other programs on what the module's own miss.
"""

import difflib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import fire

# Imported once: each mutant's process begins as a copy of this one.
import numpy  # noqa: F401
import pytest
import sentencepiece  # noqa: F401
import torch
import tqdm
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).parents[1]
TESTS = {  # of a module, the quickest to notice first
    "sampling": "sampling generation",
    "settings": "settings generation",
    "int8": "int8 checkpoint saved fused",
    "model": "model checkpoint",
    "request": "request tokenizer generation",
    "tokenizer": "tokenizer faults settings",
    "shards": "shards faults checkpoint load_faults",
    "checkpoint": "checkpoint saved faults load_faults",
    "decode": "generation lookup chat",
    "lookup": "lookup",
    "generation": "generation settings chat load_faults",
}
MORE = "sampling settings int8 model request tokenizer shards checkpoint saved faults "
MORE += "load_faults generation chat fused numerics perplexity memory main example package"
# X | None of an annotation would fail when it is imported, and count as noticed.
LEFT_OUT = ("core/NoOp", "core/ReplaceBinaryOperator_BitOr_")


def mutants(source: str) -> list[str]:
    """Every variant of a module, once."""
    tree, found = get_ast(source), {}
    for name in operator_names():
        operator = get_operator(name)
        if name.startswith(LEFT_OUT) or operator.arguments():
            continue
        count = sum(len([*operator().mutation_positions(node)]) for node in ast_nodes(tree))
        found |= dict.fromkeys(mutate_code(source, operator(), i) for i in range(count))
    return [*found.keys() - {source}]


def run_tests(copy: Path, names: str) -> None:
    os.setsid()
    tqdm.tqdm.set_lock(threading.RLock())  # its own is shared: killed, this would keep it for ever
    resource.setrlimit(resource.RLIMIT_DATA, (8 * 2**30, 8 * 2**30))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)
    os.chdir(copy)
    sys.path[:0] = [str(copy), str(copy / "tests")]
    files = [f"tests/test_{name}.py" for name in names.split()]
    options = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={copy}.tests"]
    os._exit(pytest.main([*options, *files]))


def passes(copy: Path, names: str, limit: float | None = None) -> bool:
    """Whether the tests pass, in so many seconds."""
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=(copy, names))
    process.start()
    process.join(limit)
    try:
        os.killpg(process.pid, signal.SIGKILL)  # and what it started
    except ProcessLookupError:
        pass
    process.join()
    return process.exitcode == 0


def changed(source: str, mutant: str) -> str:
    lines = difflib.unified_diff(source.splitlines(), mutant.splitlines(), n=0, lineterm="")
    return "\n".join([*lines][2:])


def main(module: str, n: int | None = None, seed: int = 0, more: bool = False):
    os.environ |= {"TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True  # a mutant of one second and size would be taken for the last
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "__pycache__"))
        os.environ["PYTHONPATH"] = str(copy)
        path = copy / "llama" / f"{module}.py"
        source = path.read_text()
        every = sorted(mutants(source))
        chosen = random.Random(seed).sample(every, min(n or len(every), len(every)))
        started, names = time.perf_counter(), TESTS[module]
        assert passes(copy, names), "the tests fail as it is"
        limit, survivors = 2 * (time.perf_counter() - started) + 20, []
        for mutant in tqdm.tqdm(chosen, desc=module):
            path.write_text(mutant)
            if passes(copy, names, limit) and not (more and not passes(copy, MORE, 600)):
                survivors.append(mutant)
                print(changed(source, mutant), flush=True)
        print(f"{module}: {len(chosen) - len(survivors)} of {len(chosen)} noticed, of {len(every)}")


if __name__ == "__main__":
    fire.Fire(main)
