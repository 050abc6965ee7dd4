"""Times the model on this machine: python -m llama.benchmark --size 13B

It measures what a user waits for: the start of a process, the prefill of a prompt and the tokens
that follow, for int8 with our kernels, int8 with bitsandbytes' product and fp16, beside the rate at
which this GPU reads memory. The weights are random, made in memory, unless --ckpt_dir names a
model, whose loading is timed too. As in trained models, norm weights are below 1 except for a few
features, whose activations pass 6.0. Each figure is a line on stdout, the median of several runs;
only ratios within one run compare across machines.
"""

import gc
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from json import dump, dumps, loads

import torch
from torch import nn

from llama.benchmark_lists import list_figures
from llama.benchmark_lookup import lookup_figures
from llama.buffers import PACK_ALONE
from llama.cli import run
from llama.decode import Decoder, in_passes, make_engine
from llama.generation import LLaMA
from llama.int8 import Int8Linear, allocate
from llama.memory import args_of, size_beside
from llama.model import Transformer, rotation_table
from llama.params import DEMO
from llama.room import GIB, cache_bytes, check_cache, check_room, weight_bytes
from llama.settings import check
from llama.tokenizer import Tokenizer

OUTLIERS = [7, 300, 1021, 1333, 2047]  # 1B has a width of 2,048
OUTLIER = 8.0  # norm weight of these features
NORM = 0.5  # and of the others
LENGTHS = (128, 512, 1900)
BATCHES = (1, 8, 32)
NEW_TOKENS = 32
CONTEXT = 2048  # tokens, which LLaMA was trained with; more for longer prompts
LONGEST = 131072  # tokens, as Llama 3.1's context
DEVICE = torch.device("cuda")
REPEATS = 5
ENGINES = {  # use_int8 and engine of each
    "int8": (True, "triton"),
    "int8_bnb": (True, "bnb"),
    "fp16": (False, "triton"),
}

# A process of its own, whose start and first token are timed.
FIRST_TOKEN = """
import json, sys, time
times = [time.time()]
import torch
times.append(time.time())
from llama import benchmark
llm = benchmark.build(*json.loads(sys.argv[1]))
torch.cuda.synchronize()
times.append(time.time())
benchmark.first_token(llm)
print(json.dumps([*times, time.time()]))
"""


def random_model(size: str, max_seq_len: int, use_int8: bool, engine: str) -> LLaMA:
    """MemoryError if it does not fit."""
    args = args_of(size, max_seq_len=max_seq_len, max_batch_size=1)
    with torch.device("meta"):
        model = Transformer(args, Int8Linear if use_int8 else nn.Linear).eval()
    check_room(model, DEVICE, torch.float16)
    if use_int8:
        for group in model.linears():
            allocate(group, DEVICE)
    for module in model.modules():
        if isinstance(module, Int8Linear):
            module.state.CB.random_(-127, 128)
            # Uniform codes have a standard deviation of 73: outputs get that of the inputs.
            module.state.SCB.fill_(127 / 73 / module.in_features**0.5)
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = torch.full(parameter.shape, NORM, dtype=torch.float16, device=DEVICE)
            if parameter.dim() == 1:
                value[OUTLIERS] = OUTLIER
            else:
                is_embedding = module is model.tok_embeddings
                value.normal_(0, 1 if is_embedding else parameter.shape[1] ** -0.5)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    model.rotation = rotation_table(args, DEVICE)
    return LLaMA(model, Tokenizer(DEMO / "tokenizer.model"), engine)


def read_bandwidth() -> float:
    """Bytes a second at which a plain reduction of torch reads 4 GiB."""
    x = torch.ones(GIB, device=DEVICE)
    return x.nbytes / seconds(x.sum)


def seconds(work: Callable[[], object]) -> float:
    """The median time of several calls, after one that compiles."""
    work()
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def build(
    name: str, size: str, ckpt_dir: str | None, tokenizer_path: str | None, max_seq_len: int
) -> LLaMA:
    use_int8, engine = ENGINES[name]
    if ckpt_dir is None:
        return random_model(size, max_seq_len, use_int8, engine)
    return LLaMA.build(ckpt_dir, tokenizer_path, max_seq_len, 1, use_int8, DEVICE, engine)


@torch.inference_mode()
def prefill_seconds(llm: LLaMA, length: int) -> float:
    engine = make_engine(llm.model, llm.engine, 1, length)
    ids = torch.randint(3, llm.model.args.vocab_size, (length,)).tolist()

    def work() -> None:
        for features in in_passes(engine, ids, PACK_ALONE):
            last = features[-1:]
        engine.head(last)

    return seconds(work)


@torch.inference_mode()
def running(llm: LLaMA, batch: int, context: int, new: int) -> Decoder:
    """A batch of random prompts of `context` tokens that never end; MemoryError if it is too
    large."""

    def pick(logits, *_):
        return logits[:, 3:].argmax(-1) + 3  # never the end-of-text token

    check_cache(llm.model, batch, context + new)
    decoder = Decoder(llm.model, llm.engine, batch, context + new, pick)
    for slot in range(batch):
        ids = torch.randint(3, llm.model.args.vocab_size, (context,)).tolist()
        decoder.begin(slot, ids, torch.zeros(new))
    return decoder


@torch.inference_mode()
def step_seconds(llm: LLaMA, batch: int, context: int) -> float:
    """The median time of a decode step, in which the host reads the tokens."""
    decoder = running(llm, batch, context, NEW_TOKENS)
    while decoder.queue:
        decoder.step()
    times = []
    for _ in range(NEW_TOKENS):
        decoder.step()
        times.append(time.perf_counter())
    return statistics.median(after - before for before, after in itertools.pairwise(times[1:]))


@torch.inference_mode()
def first_token(llm: LLaMA) -> None:
    running(llm, 1, 8, 1).step()


def first_token_seconds(*model: str | int | None) -> dict[str, float]:
    """From the start of a process to its first token: in all, importing torch, making or loading
    the model, and what remains. The second of two runs, whose files and kernels are in caches."""
    for _ in range(2):
        started = time.time()
        command = [sys.executable, "-c", FIRST_TOKEN, dumps(model)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        begun, imported, built, ended = loads(done.stdout.splitlines()[-1])
    in_all, importing, building = ended - started, imported - begun, built - imported
    return {
        "in all": in_all,
        "import torch": importing,
        "model": building,
        "rest": in_all - importing - building,
    }


def main(
    size: str | None = None,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    batches: list[int] = BATCHES,
    lengths: list[int] = LENGTHS,
    engines: str = ",".join(ENGINES),
    json: str | None = None,
    lists: bool = False,
    lookup: bool = False,
):
    """Times start, prefill and decoding on CUDA, or lists of prompts, or prompt lookup.

    Args:
        size: one of llama.memory (13B if none is given), with random weights
        ckpt_dir: a model folder in Meta's format instead
        tokenizer_path: its tokenizer.model (looked for in the folder and beside it)
        batches: sequences decoded at once, as 1,8,32
        lengths: tokens of prompts; the shortest and the longest are also contexts of decoding
        engines: some of int8,int8_bnb,fp16
        json: a file that the figures are written to as well
        lists: times lists of prompts instead, in int8 (see `benchmark_lists`)
        lookup: times prompt lookup instead, in int8 (see `benchmark_lookup`)
    """
    if not torch.cuda.is_available():
        raise ValueError("the benchmark needs a CUDA GPU, torch sees none")
    if lists and lookup:
        raise ValueError("--lists and --lookup are two benchmarks: leave one of them out")
    size = size_beside(ckpt_dir, size)
    if ckpt_dir is None:
        args_of(size)  # its error before anything long
    engines = engines.split(",")
    batches = [batches] if isinstance(batches, int | str) else batches
    lengths = [lengths] if isinstance(lengths, int | str) else lengths
    if unknown := [name for name in engines if name not in ENGINES]:
        raise ValueError(f"engines has {unknown[0]!r}, expected some of {', '.join(ENGINES)}")
    for length in lengths:
        check("lengths", length, int, 1, LONGEST - NEW_TOKENS)
    for batch in batches:
        check("batches", batch, int, 1, 2**20)
    if json and not os.access(os.path.dirname(json) or ".", os.W_OK):
        raise OSError(f"{json} cannot be written: pass another --json")
    model_of = (size, ckpt_dir, tokenizer_path, max(CONTEXT, max(lengths) + NEW_TOKENS))
    bandwidth = read_bandwidth()
    torch.cuda.empty_cache()
    figures = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "read bandwidth, TB/s": bandwidth / 1e12,
    }
    for name, value in figures.items():
        print(f"{name}: {value:.2f}" if isinstance(value, float) else f"{name}: {value}")

    for name in ["int8"] if lists or lookup else engines:
        with left_out(name):
            if lookup:
                for figure in lookup_figures(build(name, *model_of), batches):
                    report(figures, *figure)
            elif lists:
                for figure in list_figures(build(name, *model_of)):
                    report(figures, *figure)
            else:
                time_engine(name, model_of, lengths, batches, bandwidth, figures)
        gc.collect()
        torch.cuda.empty_cache()
    if not (lists or lookup):
        for other in engines[1:]:
            compare(figures, engines[0], other)
        for part, took in first_token_seconds(engines[0], *model_of).items():
            report(figures, f"{engines[0]}: start to first token, {part}", took, "s")
    if json:
        with open(json, "w") as file:
            dump(figures, file, indent=1)


def time_engine(
    name: str,
    model_of: tuple[str | int | None, ...],
    lengths: list[int],
    batches: list[int],
    bandwidth: float,
    figures: dict,
) -> None:
    """Loading, prefill, memory and decoding."""
    used_before = used_bytes()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    llm = build(name, *model_of)
    torch.cuda.synchronize()
    if model_of[1]:
        report(figures, f"{name}: load", time.perf_counter() - started, "s")
    weights = weight_bytes(llm.model, torch.float16)
    read = weights - llm.model.tok_embeddings.weight.nbytes  # of which a step reads a row
    for length in lengths:
        took = prefill_seconds(llm, length)
        report(figures, f"{name}: prefill of {length} tokens", 1000 * took, "ms")
    peak = torch.cuda.max_memory_allocated() / GIB
    driver = (used_bytes() - used_before) / GIB
    what = f"{name}: GPU memory with one sequence of {max(lengths)} tokens"
    report(figures, what, peak, "GiB", f" ({driver:.2f} GiB with torch's pool)")
    for context, batch in itertools.product((min(lengths), max(lengths)), batches):
        with left_out(name):
            took = step_seconds(llm, batch, context)
            cached = cache_bytes(llm.model.args, batch, context + NEW_TOKENS // 2, torch.float16)
            rate = (read + cached) / took / bandwidth
            report(
                figures,
                f"{name}: decode at batch {batch}, {context} tokens of context",
                batch / took,
                "tokens/s",
                f" ({1000 * took:.2f} ms a step, {(read + cached) / batch / 1e9:.2f} GB read a "
                f"token, {rate:.2f} of the read bandwidth)",
            )
            figures[f"{name}: of the read bandwidth at batch {batch}, {context} tokens"] = rate


@contextmanager
def left_out(name: str) -> Iterator[None]:
    """Prints in one sentence what does not fit instead of raising an error."""
    try:
        yield
    except MemoryError as error:
        print(f"{name}: left out, {error}", flush=True)
    except torch.OutOfMemoryError:
        print(
            f"{name}: left out, the GPU ran out of memory though the estimate fits: something else "
            "takes what was free (nvidia-smi shows it)",
            flush=True,
        )


def report(figures: dict, name: str, value: float, unit: str, note: str = "") -> None:
    """Keeps a figure and prints it."""
    figures[f"{name}, {unit}"] = value
    print(f"{name}: {value:.4g} {unit}{note}", flush=True)


def used_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def compare(figures: dict, ours: str, theirs: str) -> None:
    """Prints how many times as fast ours is in each figure that both have."""
    for key, our_figure in figures.items():
        engine, _, measured = key.partition(": ")
        what, _, unit = measured.rpartition(", ")
        their_figure = figures.get(f"{theirs}: {measured}")
        if engine != ours or their_figure is None or unit not in ("tokens/s", "ms", "s"):
            continue
        faster = our_figure / their_figure if unit == "tokens/s" else their_figure / our_figure
        print(f"{ours} against {theirs}: {what}: {faster:.2f}x")


if __name__ == "__main__":
    run(main)
