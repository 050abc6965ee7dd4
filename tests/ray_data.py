"""How does one run many prompts on many GPUs? python tests/ray_data.py prompts.jsonl results

Ray Data reads the prompts ({"prompt": "..."} a line), keeps one `LLaMA` on each GPU, hands them
batches as they become free and writes prompts and results as JSON lines to the folder. More
machines: `ray start` on each. Further flags go to `LLaMA.build`, --ckpt_dir for one. Without a GPU:
two actors on the CPU.
"""

import fire
import ray
import torch

from llama import LLaMA

GPUS = torch.cuda.device_count()
BATCH = 8


class Continue:
    def __init__(self, **options):
        self.llm = LLaMA.build(**options, max_batch_size=BATCH)

    def __call__(self, batch: dict) -> dict:
        prompts = [str(prompt) for prompt in batch["prompt"]]
        return {"prompt": prompts, "result": self.llm.generate(prompts, max_gen_len=64)}


def main(prompts: str, folder: str, **options) -> None:
    ray.data.read_json(prompts).map_batches(
        Continue,
        fn_constructor_kwargs=options,
        batch_size=BATCH,
        concurrency=GPUS or 2,
        **({"num_gpus": 1} if GPUS else {"num_cpus": 0.25}),  # Ray itself needs the rest to read
    ).write_json(folder)


if __name__ == "__main__":
    fire.Fire(main)
