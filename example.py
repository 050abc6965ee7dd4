"""Continues the prompts below with LLaMA in INT8. Edit them and run it again.

python example.py                                   the bundled demo model
python example.py --ckpt_dir /w/13B --tokenizer_path /w/tokenizer.model --max_batch_size=1
"""

from llama import LLaMA
from llama.cli import run
from llama.generation import check_settings

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
    max_gen_len: int = 256,
    temperature: float = 0.8,
    top_p: float = 0.95,
    repetition_penalty: float = 1.0,
    repetition_penalty_range: int = 1024,
    repetition_penalty_slope: float = 0.0,
    seed: int | None = None,
    use_int8: bool = True,
    device: str | None = None,
):
    """Continues the prompts in example.py.

    Args:
        ckpt_dir: model folder in Meta's format (the demo model if not given)
        tokenizer_path: its tokenizer.model (looked for in the folder and beside it if not given)
        max_seq_len: longest sequence, prompt and continuation, in tokens
        max_batch_size: most prompts continued at once
        max_gen_len: longest continuation, in tokens
        temperature: 0 always takes the most likely token, 1 draws as the model believes
        top_p: draws from the most likely tokens that have this probability together
        repetition_penalty: above 1 makes tokens that are already there less likely
        repetition_penalty_range: how many of the last tokens count as already there
        repetition_penalty_slope: above 0 penalizes the older of them less
        seed: the same seed gives the same text
        use_int8: False keeps the weights in fp16 (float32 on the CPU)
        device: cuda, cuda:1 or cpu (CUDA if there is any)
    """
    settings = {
        "max_gen_len": max_gen_len,
        "temperature": temperature,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "repetition_penalty_range": repetition_penalty_range,
        "repetition_penalty_slope": repetition_penalty_slope,
        "seed": seed,
    }
    check_settings(**settings)  # before the weights are loaded, as the prompts are by build
    llm = LLaMA.build(
        ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, use_int8, device, prompts=prompts
    )
    for first in range(0, len(prompts), max_batch_size):
        results = llm.generate(prompts[first : first + max_batch_size], **settings)
        for result in results:
            print(result)
            print("\n==================================\n")


if __name__ == "__main__":
    run(main)
