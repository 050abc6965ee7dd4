"""How fast is it on this machine? python -m llama.benchmark --ckpt_dir FOLDER

Loads a model and times what a user waits for: loading, the prefill of a prompt, decoding at batch
1. Prints one `name: value` line each to stdout. Times are medians; the weights may be random.
"""

import statistics
import time

import torch

from llama.cli import run
from llama.generation import LLaMA
from llama.model import KVCache

PROMPTS = (128, 512)
NEW_TOKENS = 64
REPEATS = 5


def seconds(work, synchronize) -> float:
    work()
    times = []
    for _ in range(REPEATS):
        synchronize()
        started = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    use_int8: bool = True,
    device: str | None = None,
):
    """Times loading, prefill and decoding.

    Args:
        ckpt_dir: model folder in Meta's format (the demo model if not given)
        tokenizer_path: its tokenizer.model (looked for in the folder and beside it if not given)
        use_int8: False keeps the weights in fp16 (float32 on the CPU)
        device: cuda, cuda:1 or cpu (CUDA if there is any)
    """
    started = time.perf_counter()
    llm = LLaMA.build(ckpt_dir, tokenizer_path, 2048, 1, use_int8, device)
    loaded = time.perf_counter() - started
    model = llm.model
    weight = model.tok_embeddings.weight
    cuda = weight.is_cuda
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    print(f"device: {torch.cuda.get_device_name(weight.device) if cuda else 'cpu'}")
    print(f"weights: {'int8' if use_int8 else weight.dtype}")
    print(f"load: {loaded:.1f} s")

    tokens = torch.randint(3, model.args.vocab_size, (1, max(PROMPTS)), device=weight.device)
    for length in PROMPTS:
        cache = KVCache(model.args, 1, length, weight)
        took = seconds(lambda n=length, c=cache: model(tokens[:, :n], 0, c), synchronize)
        print(f"prefill of {length} tokens: {1000 * took:.1f} ms")

    ids = tokens[0, : PROMPTS[0]].tolist()

    def decode() -> None:
        for _ in llm._decode([ids], NEW_TOKENS, lambda logits, *_: logits.argmax(-1), 0):
            pass

    def prefill() -> None:
        for _ in llm._decode([ids], 1, lambda logits, *_: logits.argmax(-1), 0):
            pass

    took = seconds(decode, synchronize) - seconds(prefill, synchronize)
    print(f"decode at batch 1: {(NEW_TOKENS - 1) / took:.1f} tokens/s")
    if cuda:
        print(f"GPU memory at its peak: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


if __name__ == "__main__":
    run(main)
