"""Continues the prompts below with LLaMA in INT8. Edit them and run it again.

python example.py                                   the bundled demo model
python example.py --ckpt_dir /w/13B --tokenizer_path /w/tokenizer.model --max_batch_size=1
"""

from llama import LLaMA, Settings
from llama.cli import printable, run
from llama.generation import check_prompts

prompts = [
    "Once upon a time there was a little fox who",
    # "I believe the meaning of life is",
    # "Simply put, the theory of relativity states that",
]


def main(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    max_seq_len: int = 512,
    max_batch_size: int = 32,
    use_int8: bool = True,
    device: str | None = None,
    engine: str = "triton",
    verify: bool = False,
    max_gen_len: int = 256,
    temperature: float = 0.8,
    top_p: float = 0.95,
    repetition_penalty: float = 1.0,
    repetition_penalty_range: int = 1024,
    repetition_penalty_slope: float = 0.0,
    seed: int | None = None,
    stop: str | list[str] = (),
    top_k: int = 0,
    min_p: float = 0.0,
    lookup: bool = False,
):
    """Continues the prompts in this script. `python -m llama --help` explains the flags."""
    penalty = repetition_penalty, repetition_penalty_range, repetition_penalty_slope
    settings = max_gen_len, temperature, top_p, *penalty, seed, stop, top_k, min_p, lookup
    if not prompts:
        raise ValueError("the list `prompts` in this script is empty: write a prompt into it")
    Settings(*settings)  # checked before the weights are loaded, as the prompts are
    check_prompts(prompts, ckpt_dir, tokenizer_path, max_seq_len)
    llm = LLaMA.build(
        ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, use_int8, device, engine, verify
    )
    if len(prompts) == 1:
        print(printable(prompts[0]), end="", flush=True)
        for piece in llm.stream(prompts[0], *settings):
            print(printable(piece), end="", flush=True)
        print()
        return
    for text in llm.generate(prompts, *settings):
        print(f"{printable(text)}\n\n==================================\n")


if __name__ == "__main__":
    run(main)
