"""How does it talk on a command line? python -m llama --prompt "Once upon a time"

A single prompt streams; of several, each batch is printed when it is done. Texts and JSON go to
stdout, all else to stderr. In texts control codes are shown as escapes, JSON has them exactly.
"""

import contextlib
import sys
import time
from dataclasses import replace
from json import dumps, loads

import torch
from tqdm import tqdm

from llama.cli import printable, read_text, run
from llama.generation import LLaMA, row_seed
from llama.room import size
from llama.settings import Settings


def read_prompts(path: str) -> list[str]:
    """The prompts of a file: its lines, or in a .jsonl file strings or objects with a "prompt"."""
    prompts = []
    for n, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        if path.endswith(".jsonl"):
            try:
                line = loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {n}, is not JSON ({error}): mend it") from None
            line = line.get("prompt") if isinstance(line, dict) else line
            if not isinstance(line, str):
                raise ValueError(f'{path}, line {n}: expected a string or {{"prompt": "..."}}')
        prompts.append(line)
    if not prompts:
        raise ValueError(f"{path} holds no prompt: pass a file with a prompt a line")
    return prompts


def peak_memory(device: torch.device) -> int:
    """Bytes: of tensors on CUDA, of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # Unix alone has it

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def answer(llm: LLaMA, prompts: list[str], settings: Settings, json: bool, logprobs: bool) -> None:
    """Prints the continuations, and to stderr what they took."""
    batch, stream = llm.model.args.max_batch_size, len(prompts) == 1 and not json
    done, starts, first_token = [], time.perf_counter(), None
    with tqdm(total=len(prompts), unit="prompt", disable=len(prompts) <= batch) as bar:
        for first in range(0, len(prompts), batch):
            some = prompts[first : first + batch]
            seed = None if settings.seed is None else row_seed(settings.seed, first)
            times = [time.perf_counter()]
            steps = llm.steps(some, replace(settings, seed=seed), logprobs)
            if stream:
                print(printable(some[0]), end="", flush=True)
            for rows in steps:
                times.append(time.perf_counter())
                if stream:
                    print(printable(rows[0].read()), end="", flush=True)
            first_token = first_token or times[1] - times[0]
            for prompt, row in zip(some, rows):
                if json:
                    result = {
                        "prompt": prompt,
                        "text": row.text,
                        "tokens": row.ids,
                        "finish_reason": row.finish_reason,
                        "seconds": round(times[-1] - times[0], 4),
                        "seconds_to_first_token": round(times[1] - times[0], 4),
                    }
                    tqdm.write(dumps(result | ({"logprobs": row.logprobs} if logprobs else {})))
                elif not stream:
                    text = printable(prompt + row.text)
                    tqdm.write(f"{text}\n\n==================================\n")
            sys.stdout.flush()
            done += rows
            bar.update(len(some))
    if stream:
        print()
    new, took = sum(len(row.ids) for row in done), time.perf_counter() - starts
    print(
        f"{sum(len(row.prompt_ids) for row in done)} prompt tokens, {new} new tokens, "
        f"{first_token:.2f} s to the first token, {new / took:.1f} tokens/s, "
        f"peak memory {size(peak_memory(llm.model.tok_embeddings.weight.device))}",
        file=sys.stderr,
    )


def interact(llm: LLaMA, settings: Settings, json: bool, logprobs: bool) -> None:
    """Continues what is typed, until its end."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys and history in input()
    print("Type a beginning. Ctrl-C stops a text, Ctrl-D leaves.", file=sys.stderr)
    while True:
        try:
            prompt = input("> " if sys.stdout.isatty() else "")
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print("\nCtrl-D leaves.", file=sys.stderr)
            continue
        except UnicodeDecodeError as error:
            print(f"error: that is no {error.encoding} text: type it again", file=sys.stderr)
            continue
        try:
            if prompt:
                answer(llm, [prompt], settings, json, logprobs)
        except KeyboardInterrupt:
            if not json:
                print()
            print("stopped", file=sys.stderr)
        except (ValueError, MemoryError, FloatingPointError) as error:
            print(printable(f"error: {error}"), file=sys.stderr)


def main(
    model: dict,
    settings: dict,
    prompt: list[str] = (),
    prompt_file: str | None = None,
    interactive: bool = False,
    json: bool = False,
    logprobs: bool = False,
):
    """Continues prompts with LLaMA in INT8.

    Args:
        prompt: text to continue; several may be given; - is all of standard input
        prompt_file: file with a prompt a line, as JSON if it ends in .jsonl; - is standard input
        interactive: keeps the model loaded and continues what is typed
        json: a line of JSON for each prompt: text is what was added, tokens its ids with those of
            a stop string, finish_reason stop, length or eos, seconds that its batch took
        logprobs: with --json, adds the log-probability of each new token
    """
    settings = Settings(**settings)
    if logprobs and not json:
        raise ValueError("--logprobs is a part of what --json prints: add --json")
    reads = [*prompt, prompt_file].count("-")
    if reads and reads + interactive > 1:
        raise ValueError("- is all of standard input, which can be read once: pass it alone")
    prompts = [read_text("-") if text == "-" else text for text in prompt]
    if prompt_file:
        prompts += read_prompts(prompt_file)
    if not prompts and not interactive:
        raise ValueError(
            "there is no prompt: pass --prompt TEXT, --prompt_file FILE, --interactive"
        )
    llm = LLaMA.build(**model, prompts=prompts)
    if prompts:
        answer(llm, prompts, settings, json, logprobs)
    if interactive:
        interact(llm, settings, json, logprobs)


if __name__ == "__main__":
    run(main, model=LLaMA.build, settings=Settings)
