"""Compares int8 with floating point: python -m llama.perplexity --ckpt_dir /w/13B --text FILE

Windows of a text are scored in floating point (fp16, on a CPU float32) and in int8, on CUDA with
each engine. Perplexity is exp of the mean negative log-probability of a token. The Kullback-Leibler
divergence (p log(p / q) summed over the vocabulary, p in floating point) and the share of tokens
that both rank first need less text to show a difference. Intervals of 95 % come from resampling
whole windows. Host memory holds the distributions in floating point: 2 GiB for 32 windows of 512
tokens.
"""

import gc
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from llama.cli import read_text, run, say
from llama.generation import LLaMA
from llama.settings import check

RESAMPLES = 1000
COLUMNS = {  # title: how a mean of `compare` is shown
    "perplexity": lambda mean: f"{math.exp(mean):.3f}",
    "ratio": lambda mean: f"{math.exp(mean):.4f}",
    "divergence": "{:.1e}".format,
    "same token first": "{:.2%}".format,
}


def cut(ids: list[int], bos_id: int, length: int, count: int) -> list[list[int]]:
    """At most `count` windows of `length` tokens, spread evenly over ids, each opened by bos_id."""
    size = min(length - 1, len(ids))
    whole = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
    count = min(count, len(whole))
    return [[bos_id, *whole[i * len(whole) // count]] for i in range(count)]


def distributions(llm: LLaMA, window: list[int]) -> Tensor:
    """Log-probabilities (T - 1, V) of every token at each position but the first, on the host."""
    return torch.cat([logits.log_softmax(-1).cpu() for logits in llm.logits(window[:-1])])


def compare(p: Tensor, q: Tensor, window: list[int]) -> Tensor:
    """What COLUMNS show, (4, T - 1), of log-probabilities p in floating point and q in int8."""
    tokens = torch.tensor(window[1:])[:, None]
    loss, change = -q.gather(-1, tokens)[:, 0], (p - q).gather(-1, tokens)[:, 0]
    divergence = (p.exp() * (p - q)).sum(-1)
    return torch.stack([loss, change, divergence, p.argmax(-1) == q.argmax(-1)])


def with_interval(values: Tensor, show: Callable[[float], str]) -> str:
    """The mean of values (W, T), and its 95 % interval if W > 1."""
    means = values.double().mean(1)
    if len(means) == 1:
        return show(means.item())
    generator = torch.Generator().manual_seed(0)
    resampled = torch.randint(len(means), (RESAMPLES, len(means)), generator=generator)
    ends = means[resampled].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.double))
    low, high = map(show, ends.tolist())
    return f"{show(means.mean().item())} [{low}, {high}]"


def draw(path: Path, title: str, base: str, found: dict[str, Tensor]) -> None:
    """Saves a picture of how much int8 changes the log-probability of each token."""
    from matplotlib.figure import Figure

    figure = Figure((8, 5), layout="constrained")
    axes = figure.subplots()
    for name, values in found.items():
        loss, change = values.flatten(1)[:2]
        axes.scatter(change - loss, -change, s=3, alpha=0.3, label=name)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_title(title, parse_math=False)
    axes.set(xlabel=f"log-probability of a token in {base}", ylabel="added by int8")
    axes.legend()
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
    content, path = read_text(text), Path(os.path.expanduser(picture))
    if path.suffix not in (".png", ".svg", ".pdf") or not os.access(path.parent, os.W_OK):
        raise ValueError(f"picture is {path}, expected a .png, .svg or .pdf that can be written")

    options = {"max_seq_len": window, "max_batch_size": 1, "device": device}
    llm = LLaMA.build(ckpt_dir, tokenizer_path, **options, use_int8=False)
    target = llm.device
    base = "fp16" if target.type == "cuda" else "float32"
    ids = llm.tokenizer.encode(content, bos=False, eos=False)
    if not ids:
        raise ValueError(f"{text} holds no text: pass another file")
    cuts = cut(ids, llm.tokenizer.bos_id, window, windows)
    expected = [distributions(llm, ids) for ids in tqdm(cuts, desc=base)]
    loss = torch.stack([compare(p, p, ids)[0] for ids, p in zip(cuts, expected)])
    del llm  # one model at a time is on the device
    gc.collect()
    torch.cuda.empty_cache()
    print(f"{len(cuts)} windows of {len(cuts[0])} tokens from {text}, on {target}\n")
    print(f"| weights | {' | '.join(COLUMNS)} |\n|---|---|---|---|---|")
    print(f"| {base} | {with_interval(loss, COLUMNS['perplexity'])} | | | |", flush=True)

    llm, found = LLaMA.build(ckpt_dir, tokenizer_path, **options), {}
    for engine in dict.fromkeys([llm.engine, "bnb"]) if target.type == "cuda" else [llm.engine]:
        llm.engine = engine
        name = f"int8, {engine}" if target.type == "cuda" else "int8"
        scored = zip(tqdm(cuts, desc=name), expected)
        values = [compare(p, distributions(llm, ids), ids) for ids, p in scored]
        found[name] = torch.stack(values, 1)  # (4, W, T - 1)
        row = map(with_interval, found[name], COLUMNS.values())
        print(f"| {name} | {' | '.join(row)} |", flush=True)
    try:
        model = Path(ckpt_dir or "demo").resolve().name
        draw(path, f"{model}, int8 against {base}, on {Path(text).name}", base, found)
        say(f"Each token's difference is drawn in {path}")
    except ImportError:
        say("No picture without matplotlib: pip install matplotlib")


if __name__ == "__main__":
    run(main)
