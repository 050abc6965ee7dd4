"""Is int8 as good? python -m llama.perplexity --ckpt_dir /w/13B --text FILE

The same windows of a text are scored by the model in floating point (fp16; on a CPU float32) and in
int8, on CUDA with each engine. Perplexity is exp of the mean negative log-probability of a token.
Two figures need less text to be sure: the Kullback-Leibler divergence, the sum of p log(p / q) over
the vocabulary with p in floating point, and how often both find the same token most likely. Their
intervals are of 95 %, from drawing the windows anew 1,000 times, since tokens of one window
resemble each other.

One model at a time is on the device. The first one's log-probabilities wait in host memory, 4 bytes
x vocabulary a token: 2 GiB for 32 windows of 512 tokens of LLaMA.
"""

import gc
import math
import os
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from llama.cli import read_text, run
from llama.generation import ENGINES, LLaMA
from llama.settings import check

DRAWS = 1000
PICTURES = (".png", ".svg", ".pdf")


def cut(ids: list[int], bos_id: int, length: int, windows: int) -> list[list[int]]:
    """At most so many windows of `length` tokens, evenly spread over ids, each with a beginning of
    text before it; a short text is one shorter window."""
    size = min(length - 1, len(ids))
    starts = range(0, len(ids) - size + 1, size)
    count = min(windows, len(starts))
    starts = [starts[i * len(starts) // count] for i in range(count)]
    return [[bos_id, *ids[first : first + size]] for first in starts]


def distributions(llm: LLaMA, window: list[int]) -> Tensor:
    """Log-probabilities (T - 1, V), on the host, of what may stand at each place but the first."""
    return torch.cat([logits.log_softmax(-1).cpu() for logits in llm.logits(window[:-1])])


def of_text(every: Tensor, window: list[int]) -> Tensor:
    """The log-probabilities (T - 1,) of what does stand there."""
    return every.gather(-1, torch.tensor(window[1:])[:, None])[:, 0]


def shown(values: Tensor, form: str, scale=lambda mean: mean) -> str:
    """Mean of values (W, T) and its interval; no interval from a single window."""
    means = values.double().mean(1)
    text = form.format(scale(means.mean().item()))
    if len(means) == 1:
        return text
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(means), (DRAWS, len(means)), generator=generator)
    ends = means[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.double))
    low, high = (form.format(scale(end)) for end in ends.tolist())
    return f"{text} [{low}, {high}]"


def draw(path: Path, reference: str, logprobs: dict[str, Tensor]) -> None:
    from matplotlib.figure import Figure

    figure = Figure((10, 4), layout="constrained")
    scatter, histogram = figure.subplots(1, 2)
    base = logprobs[reference].flatten()
    for name, values in logprobs.items():
        if name != reference:
            difference = values.flatten() - base
            scatter.scatter(base, difference, s=3, alpha=0.3, label=name)
            histogram.hist(difference, bins=100, histtype="step", log=True, label=name)
    scatter.set(xlabel=f"log-probability of a token in {reference}", ylabel="added to it")
    histogram.set(xlabel=f"added to a token's log-probability in {reference}", ylabel="tokens")
    scatter.legend()
    figure.savefig(path, dpi=120)


def main(
    text: str,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    window: int = 512,
    windows: int = 32,
    device: str | None = None,
    picture: str = "perplexity.png",
):
    """Compares int8 with floating point on a text.

    Args:
        text: file with the text; - is standard input
        ckpt_dir: model folder in Meta's format (the demo model if not given)
        tokenizer_path: its tokenizer.model (looked for in the folder and beside it)
        window: tokens scored together, the beginning of text included
        windows: how many of them, spread over the text
        device: cuda, cuda:1 or cpu (CUDA if there is any)
        picture: where the differences of single tokens are drawn
    """
    check("window", window, int, 2, 2**20)
    check("windows", windows, int, 1, 2**20)
    content, picture = read_text(text), Path(os.path.expanduser(picture))
    if picture.suffix not in PICTURES or picture.is_dir():
        raise ValueError(f"picture is {picture}, expected a file name with {' or '.join(PICTURES)}")
    if not os.access(picture.parent, os.W_OK):
        raise OSError(f"{picture.parent} cannot be written to: pass another --picture")
    options = {"max_seq_len": window, "max_batch_size": 1, "device": device}

    llm = LLaMA.build(ckpt_dir, tokenizer_path, **options, use_int8=False)
    on = llm.model.tok_embeddings.weight.device
    all_ids = llm.tokenizer.encode(content, bos=False, eos=False)
    if not all_ids:
        raise ValueError(f"{text} holds no text: pass another file")
    cuts = cut(all_ids, llm.tokenizer.bos_id, window, windows)
    reference = "fp16" if on.type == "cuda" else "float32"
    first = [distributions(llm, ids) for ids in tqdm(cuts, desc=reference)]
    logprobs = {reference: torch.stack([of_text(p, ids) for p, ids in zip(first, cuts)])}
    del llm
    gc.collect()
    torch.cuda.empty_cache()

    print(f"{len(cuts)} windows of {len(cuts[0])} tokens from {text}, on {on}\n")
    print("| weights | perplexity | of that in " + reference + " | divergence | same token first |")
    print("|---|---|---|---|---|")
    print(f"| {reference} | {shown(-logprobs[reference], '{:.3f}', math.exp)} | | | |", flush=True)
    llm = LLaMA.build(ckpt_dir, tokenizer_path, **options)
    both = on.type == "cuda" and llm.engine == ENGINES[0]  # or a GPU too old for ours
    for engine in ENGINES if both else [llm.engine]:
        llm.engine = engine
        name = f"int8, {engine}" if on.type == "cuda" else "int8"
        found, divergence, same = [], [], []
        for ids, p in zip(tqdm(cuts, desc=name), first):
            q = distributions(llm, ids)
            found.append(of_text(q, ids))
            divergence.append((p.exp() * (p - q)).sum(-1))
            same.append((p.argmax(-1) == q.argmax(-1)).float())
        logprobs[name] = torch.stack(found)
        print(
            f"| {name} | {shown(-logprobs[name], '{:.3f}', math.exp)} "
            f"| {shown(logprobs[reference] - logprobs[name], '{:.4f}', math.exp)} "
            f"| {shown(torch.stack(divergence), '{:.1e}')} "
            f"| {shown(100 * torch.stack(same), '{:.2f}')} % |",
            flush=True,
        )
    if on.type == "cpu":
        print("bitsandbytes has no product of its own to compare on a CPU", file=sys.stderr)
    try:
        draw(picture, reference, logprobs)
        print(f"Each token's difference is drawn in {picture}", file=sys.stderr)
    except ImportError:
        print("No picture without matplotlib: pip install matplotlib", file=sys.stderr)


if __name__ == "__main__":
    run(main)
