"""Continues the prompts below with LLaMA in INT8. Edit them and run it again.

python example.py                                   the bundled demo model
python example.py --ckpt_dir /w/13B --tokenizer_path /w/tokenizer.model --max_batch_size=1
"""

from llama import LLaMA, Settings
from llama.cli import printable, run
from llama.generation import row_seed

prompts = [
    "Once upon a time there was a little fox who",
    # "I believe the meaning of life is",
    # "Simply put, the theory of relativity states that",
]


def main(model: dict, settings: dict):
    """Continues the prompts in example.py."""
    Settings(**settings)  # checked before the weights are loaded, as prompts are
    llm = LLaMA.build(**model, prompts=prompts)
    if len(prompts) == 1:
        print(printable(prompts[0]), end="", flush=True)
        for piece in llm.stream(prompts[0], **settings):
            print(printable(piece), end="", flush=True)
        print()
        return
    size, seed = llm.model.args.max_batch_size, settings.get("seed")
    for first in range(0, len(prompts), size):
        if seed is not None:
            settings["seed"] = row_seed(seed, first)
        for text in llm.generate(prompts[first : first + size], **settings):
            print(printable(text))
            print("\n==================================\n")


if __name__ == "__main__":
    run(main, model=LLaMA.build, settings=Settings)
