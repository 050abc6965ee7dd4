"""Continues many prompts on many GPUs with Ray Data, which keeps one `LLaMA` on each GPU.

python tests/ray_data.py prompts.jsonl results --ckpt_dir /w/13B

The folder gets files with a line of JSON for each prompt, in any order. To use several machines,
run `ray start` on each of them first. Without a GPU, two models run on the CPU.
"""

from pathlib import Path

import ray

from llama import LLaMA, Settings
from llama.__main__ import read_prompts
from llama.cli import run
from llama.generation import check_prompts

# Most prompts in one call, whose last ones leave slots empty; if it is interrupted, all are lost.
BATCH = 512


class Continue:
    """What each GPU does: Ray makes one of these there and calls it with batches of prompts."""

    def __init__(self, max_gen_len: int, **options):
        self.llm, self.max_gen_len = LLaMA.build(**options), max_gen_len

    def __call__(self, batch: dict) -> dict:
        prompts = batch["prompt"].tolist()
        return {**batch, "result": self.llm.generate(prompts, self.max_gen_len)}


def main(
    prompt_file: str,
    out_dir: str,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    max_seq_len: int = 512,
    max_gen_len: int = 64,
):
    """Continues the prompts of a file on all GPUs; `index` is the place of each, from 0.

    Args:
        prompt_file: file with a prompt a line, as JSON if it ends in .jsonl
        out_dir: the folder to write, which must not be there yet
        ckpt_dir: model folder in Meta's format (the demo model if not given)
        tokenizer_path: its tokenizer.model (looked for in the folder and beside it)
        max_seq_len: longest sequence, prompt and continuation, in tokens
        max_gen_len: longest continuation, in tokens
    """
    if Path(out_dir).exists():
        raise ValueError(f"{out_dir} is there already: pass another --out_dir")
    options = {"ckpt_dir": ckpt_dir, "tokenizer_path": tokenizer_path, "max_seq_len": max_seq_len}
    prompts = [record["prompt"] for record in read_prompts(prompt_file)]
    check_prompts(prompts, **options)  # a mistake is one line here, and pages from Ray
    Settings(max_gen_len)
    ray.init()
    gpus = int(ray.cluster_resources().get("GPU", 0))
    models = gpus or 2
    records = [{"index": index, "prompt": prompt} for index, prompt in enumerate(prompts)]
    ray.data.from_items(records).map_batches(
        Continue,
        fn_constructor_kwargs={"max_gen_len": max_gen_len, **options},
        batch_size=min(BATCH, -(-len(prompts) // models)),
        compute=ray.data.ActorPoolStrategy(size=models),
        **({"num_gpus": 1} if gpus else {"num_cpus": 0.25}),  # leaves Ray CPUs to write with
    ).write_json(out_dir)


if __name__ == "__main__":
    run(main)
