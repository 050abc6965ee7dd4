"""How was the demo model made?

python -m llama.demo.train --corpus FOLDER --out_dir FOLDER

The corpus folder holds `stories-train.txt.xz` and `stories-valid.txt.xz`: one paragraph a line, a
line `<|story|>` between two stories (SOURCES.md lists the books). The script trains a sentencepiece
tokenizer with LLaMA's own settings, then `llama.model.Transformer` itself with dropout on the
embeddings and on what each sub-layer adds, and writes Meta's files in two shards. Minutes on an
H100; on a CPU only for trying it out. The defaults are what won on the held-out stories;
MODEL_CARD.md has the figures.
"""

import io
import json
import lzma
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceTrainer
from torch import Tensor, nn

from llama.cli import run
from llama.model import ModelArgs, Transformer
from llama.tokenizer import Tokenizer

CONTEXT = 512
SHARDS = 2
# The dimension on which Meta splits a weight (out, in) of LLaMA; norms are the same in every shard.
SPLIT_DIM = dict(wq=0, wk=0, wv=0, wo=1, w1=0, w2=1, w3=0, output=0, tok_embeddings=1)


def read_stories(path: Path) -> list[str]:
    text = lzma.open(path, "rt", encoding="utf-8").read()
    return [story.strip() for story in text.split("<|story|>\n")]


def train_tokenizer(stories: list[str], vocab_size: int, path: Path) -> Tokenizer:
    """LLaMA's kind (arXiv 2302.13971, section 2.1): BPE, digits apart, bytes for the unknown."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(line for story in stories for line in story.splitlines()),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return Tokenizer(path)


def encode(stories: list[str], tokenizer: Tokenizer) -> Tensor:
    ids = [i for story in stories for i in tokenizer.encode(story, bos=True, eos=True)]
    return torch.tensor(ids)


def add_dropout(model: Transformer, p: float) -> None:
    def drop(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        return F.dropout(output, p, module.training)

    for layer in model.layers:
        layer.attention.register_forward_hook(drop)
        layer.feed_forward.register_forward_hook(drop)
    model.tok_embeddings.register_forward_hook(drop)


def initialize(model: Transformer) -> None:
    """Normal(0, 0.02); what a sub-layer adds starts smaller, since n_layers of them add up."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            adds = name.endswith(("wo.weight", "w2.weight"))
            nn.init.normal_(
                parameter, std=0.02 / math.sqrt(2 * model.args.n_layers) if adds else 0.02
            )


def nats(model: Transformer, windows: Tensor) -> Tensor:
    """Cross entropy of each token but the first of windows (N, T): (N, T - 1)."""
    logits = model.output(model.features(windows[:, :-1])).float()
    return F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")


@torch.no_grad()
def held_out_loss(loss, ids: Tensor) -> float:
    """Mean nats a token over ids. Windows overlap by half, and a token is scored where it has at
    least half a window before it."""
    step = CONTEXT // 2
    windows = ids[: len(ids) // step * step].unfold(0, CONTEXT, step)
    scored = torch.cat([loss(batch) for batch in windows.split(64)])
    return torch.cat([scored[0], scored[1:, step - 1 :].flatten()]).mean().item()


def main(
    corpus: str,
    out_dir: str,
    vocab_size: int = 4096,
    dim: int = 256,
    n_layers: int = 7,
    n_heads: int = 8,
    epochs: int = 36,
    dropout: float = 0.2,
    batch: int = 32,
    lr: float = 3e-3,
    weight_decay: float = 0.1,
    seed: int = 0,
):
    """Trains the demo model and writes its folder.

    Args:
        corpus: folder with stories-train.txt.xz and stories-valid.txt.xz
        out_dir: where params.json, tokenizer.model and the shards go
        vocab_size: pieces of the tokenizer
        dim: width
        n_layers: blocks
        n_heads: attention heads
        epochs: times that each story is seen
        dropout: share of each sub-layer's output that is dropped
        batch: sequences of 512 tokens a step
        lr: peak of the learning rate
        weight_decay: on matrices
        seed: of everything random
    """
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    train_stories = read_stories(Path(corpus) / "stories-train.txt.xz")
    valid_stories = read_stories(Path(corpus) / "stories-valid.txt.xz")
    tokenizer = train_tokenizer(train_stories, vocab_size, folder / "tokenizer.model")
    train_ids = encode(train_stories, tokenizer).to(device)
    valid_ids = encode(valid_stories, tokenizer).to(device)
    valid_characters = sum(map(len, valid_stories))

    args = ModelArgs(
        dim, n_layers, n_heads, None, vocab_size, 64, norm_eps=1e-5, max_seq_len=CONTEXT
    )
    with torch.device(device):
        model = Transformer(args, nn.Linear)
    initialize(model)
    add_dropout(model, dropout)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(train_ids):,} training tokens", file=sys.stderr)

    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": norms, "weight_decay": 0},
    ]
    optimizer = torch.optim.AdamW(groups, lr, betas=(0.9, 0.95), fused=True)
    per_epoch = (len(train_ids) - CONTEXT - 1) // (CONTEXT * batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, epochs * per_epoch, pct_start=0.02, cycle_momentum=False, div_factor=100
    )
    loss = torch.compile(nats, dynamic=False) if device == "cuda" else nats
    mixed = torch.autocast(device, torch.bfloat16)
    window = torch.arange(CONTEXT + 1, device=device)
    started = time.perf_counter()
    for epoch in range(epochs):
        model.train()
        shift = torch.randint(CONTEXT, (), device=device)  # windows fall elsewhere each time
        starts = torch.randperm(per_epoch * batch, device=device) * CONTEXT + shift
        for first in starts.clamp(max=len(train_ids) - CONTEXT - 1).split(batch):
            with mixed:
                mean = loss(model, train_ids[first[:, None] + window]).mean()
            mean.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if epoch % 5 == 4 or epoch == epochs - 1:
            model.eval()
            with mixed:
                held_out = held_out_loss(lambda windows: nats(model, windows), valid_ids)
            bits = held_out * len(valid_ids) / math.log(2) / valid_characters
            print(
                f"epoch {epoch + 1}: training {mean.item():.3f}, "
                f"held out {held_out:.4f} nats a token, "
                f"perplexity {math.exp(held_out):.2f}, {bits:.4f} bits a character, "
                f"{time.perf_counter() - started:.0f} s",
                flush=True,
            )
    write(model, folder)


def write(model: Transformer, folder: Path) -> None:
    keys = ("dim", "multiple_of", "n_heads", "n_layers", "norm_eps")
    params = {key: asdict(model.args)[key] for key in keys} | {"vocab_size": -1}
    (folder / "params.json").write_text(json.dumps(params) + "\n")
    for shard in range(SHARDS):
        tensors = {}
        for name, tensor in model.state_dict().items():
            dim = SPLIT_DIM.get(name.split(".")[-2])
            piece = tensor if dim is None else tensor.chunk(SHARDS, dim)[shard]
            tensors[name] = piece.half().cpu().contiguous()
        torch.save(tensors, folder / f"consolidated.{shard:02d}.pth")


if __name__ == "__main__":
    run(main)
