"""How fast is it on this machine? python -m llama.benchmark --size 13B

Times what a user waits for: the prefill of a prompt and the tokens that follow, for int8 with our
kernels, int8 with bitsandbytes' product and fp16, beside the rate at which this GPU reads memory.
The weights are random, made in memory, unless --ckpt_dir names a model; a few features have norm
weights of 8, so that activations beyond 6.0 occur as in trained models. One line a figure to
stdout, medians of several runs; only ratios within one run compare across machines.
"""

import gc
import itertools
import statistics
import time

import torch
from torch import nn

from llama.cli import run
from llama.generation import DEMO, LLaMA
from llama.int8 import Int8Linear, allocate
from llama.memory import SIZES, VOCABULARY
from llama.model import KVCache, ModelArgs, Transformer, rotation_table
from llama.room import GIB, weight_bytes
from llama.tokenizer import Tokenizer

OUTLIERS = [7, 300, 1021, 2049, 3333]
OUTLIER = 8.0
LENGTHS = (128, 512, 1900)
BATCHES = (1, 8, 32)
NEW_TOKENS = 32
REPEATS = 5
ENGINES = {"int8": (True, "triton"), "int8 bnb": (True, "bnb"), "fp16": (False, "triton")}


def random_model(size: str, use_int8: bool, engine: str) -> LLaMA:
    args = ModelArgs(**{"norm_eps": 1e-6} | SIZES[size], vocab_size=VOCABULARY, max_seq_len=2048)
    with torch.device("meta"):
        model = Transformer(args, Int8Linear if use_int8 else nn.Linear).eval()
    device = torch.device("cuda")
    for group in model.linears() if use_int8 else ():
        allocate(group, device)
    for module in model.modules():
        if isinstance(module, Int8Linear):
            module.state.CB.random_(-127, 128)
            # Uniform codes have a standard deviation of 73: outputs get that of the inputs.
            module.state.SCB.fill_(127 / 73 / module.in_features**0.5)
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = torch.ones(parameter.shape, dtype=torch.float16, device=device)
            if parameter.dim() == 1:
                value[OUTLIERS] = OUTLIER
            else:
                embedding = module is model.tok_embeddings
                value.normal_(0, 1 if embedding else parameter.shape[1] ** -0.5)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    model.rotation = rotation_table(args, device)
    return LLaMA(model, Tokenizer(DEMO / "tokenizer.model"), engine)


def read_bandwidth() -> float:
    """Bytes a second at which a plain reduction of torch reads 4 GiB."""
    x = torch.ones(GIB, device="cuda")
    return x.nbytes / seconds(lambda: x.sum())


def seconds(work) -> float:
    work()
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def prefill_seconds(llm: LLaMA, length: int) -> float:
    weight = llm.model.tok_embeddings.weight
    cache = KVCache(llm.model.args, 1, length, weight)
    tokens = torch.randint(3, len(weight), (1, length), device=weight.device)
    return seconds(lambda: llm.model(tokens, 0, cache))


def step_seconds(llm: LLaMA, batch: int, context: int) -> float:
    """Of one decode step as `generate` runs it, the host's reading of the tokens included."""
    vocabulary = len(llm.model.tok_embeddings.weight)
    prompts = torch.randint(3, vocabulary, (batch, context)).tolist()
    times = []

    def choose(logits, *_):
        return logits[:, 3:].argmax(-1) + 3  # never the end-of-text token

    for _ in llm._decode(prompts, NEW_TOKENS, choose, 0):
        times.append(time.perf_counter())
    return statistics.median(b - a for a, b in itertools.pairwise(times[1:]))


def main(
    size: str = "13B",
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    batches: tuple = BATCHES,
    lengths: tuple = LENGTHS,
    engines: tuple = tuple(ENGINES),
):
    """Times prefill and decoding on CUDA.

    Args:
        size: 7B, 13B, 30B or 65B with random weights
        ckpt_dir: a model folder in Meta's format instead
        tokenizer_path: its tokenizer.model (looked for in the folder and beside it if not given)
        batches: sequences decoded at once
        lengths: tokens of prompts; the shortest and the longest are also contexts of decoding
        engines: int8, int8 bnb, fp16
    """
    if not torch.cuda.is_available():
        raise ValueError("the benchmark needs a CUDA GPU, torch sees none")
    if ckpt_dir is None and size not in SIZES:
        raise ValueError(f"size is {size!r}, expected one of {', '.join(SIZES)}")
    bandwidth = read_bandwidth()
    print(f"GPU: {torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"read bandwidth: {bandwidth / 1e12:.2f} TB/s")
    for name in engines:
        use_int8, engine = ENGINES[name]
        torch.cuda.reset_peak_memory_stats()
        if ckpt_dir is None:
            llm = random_model(size, use_int8, engine)
        else:
            llm = LLaMA.build(ckpt_dir, tokenizer_path, 2048, 32, use_int8, "cuda", engine)
        model = llm.model
        embedding = model.tok_embeddings.weight.nbytes
        read = weight_bytes(model, torch.float16) - embedding  # of which a step reads a row
        for length in lengths:
            took = prefill_seconds(llm, length)
            print(f"{name}: prefill of {length} tokens: {1000 * took:.1f} ms", flush=True)
        for context, batch in itertools.product((min(lengths), max(lengths)), batches):
            took = step_seconds(llm, batch, context)
            cache = KVCache(model.args, 1, 1, model.norm.weight)
            nbytes = read + batch * (context + NEW_TOKENS / 2) * 2 * cache.k.nbytes
            print(
                f"{name}: decode at batch {batch}, {context} tokens of context: "
                f"{batch / took:.1f} tokens/s, {1000 * took:.2f} ms a step, {nbytes / 1e9:.2f} GB "
                f"read = {nbytes / took / bandwidth:.2f} of the read bandwidth",
                flush=True,
            )
        print(f"{name}: GPU memory at its peak: {torch.cuda.max_memory_allocated() / GIB:.2f} GiB")
        del llm, model, cache
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    run(main)
