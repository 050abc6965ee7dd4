"""Continues prompts and talks on a command line: python -m llama --prompt "Once upon a time"

Texts and JSON go to stdout (with --resume, JSON to a file), everything else to stderr. Texts have
control characters escaped, JSON has them as they are.
"""

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Container
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from inspect import getdoc
from json import dumps, loads
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm

import llama
from llama.chat import Chat
from llama.cli import printable, read_text, run, say
from llama.generation import LLaMA, check_prompts
from llama.params import LIMITS
from llama.room import readable
from llama.settings import Settings, check

CHAT_LENGTH = 4096  # tokens of a conversation, as many as Llama 2 was trained with
BEGINNING = '{"index": '  # of each line of results


def read_prompts(path: str) -> list[dict]:
    """The "prompt" of each line of a file: text, or JSON in a .jsonl file and in standard input
    whose first line is a JSON object or whose lines are all JSON. An object keeps its other keys.
    """
    lines = {n: line for n, line in enumerate(read_text(path).split("\n"), 1) if line.strip()}
    source = "standard input" if path == "-" else path
    if not lines:
        raise ValueError(f"{source} holds no prompt: pass a file with a prompt per line")
    values = [parsed(line) for line in lines.values()]
    is_json = path == "-" and (isinstance(values[0], dict) or None not in values)
    if not (is_json or path.endswith(".jsonl")):
        return [{"prompt": line} for line in lines.values()]
    records = [value if isinstance(value, dict) else {"prompt": value} for value in values]
    for record, (n, line) in zip(records, lines.items()):
        if not isinstance(record.get("prompt"), str):
            expected = 'expected a JSON string or {"prompt": "..."}'
            raise ValueError(f"{source}, line {n} is {line!r:.60}, {expected}")
    return records


def parsed(line: str) -> str | dict | None:
    """The text or object in a line of JSON, or None."""
    try:
        value = loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, str | dict) else None


def peak_memory(device: torch.device) -> int:
    """Bytes: of tensors on CUDA, of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def open_results(path: str, records: list[dict]) -> tuple[TextIO, set[int]]:
    """Opens a file of results to append to; returns it and the indices of the records whose results
    it has. A last line that was cut short, by a killed run, is removed. ValueError for others."""
    file = Path(path).expanduser()
    if file.is_dir() or not file.parent.is_dir():
        raise OSError(f"--resume is {path!r:.160}: expected a file in a folder that exists")
    content = file.read_bytes() if file.exists() else b""
    *lines, cut = content.decode(errors="replace").split("\n")
    done = set()
    for n, line in enumerate(lines, 1):
        result = parsed(line)
        index = result.get("index") if isinstance(result, dict) else None
        within = isinstance(index, int) and 0 <= index < len(records)
        if not within or result.get("prompt") != records[index]["prompt"]:
            raise ValueError(
                f"{path}, line {n} is {line!r:.60}, expected the result of one of these prompts: "
                "pass the prompts it was made from, or another --resume"
            )
        done.add(index)
    if not cut.startswith(BEGINNING[: len(cut)]):
        raise ValueError(
            f"{path} ends in {cut!r:.60}, expected a line that --resume wrote: pass another file"
        )
    results = file.open("a")
    results.truncate(content.rfind(b"\n") + 1)
    return results, done


def continue_prompts(
    llm: LLaMA,
    records: list[dict],
    settings: Settings,
    json: bool,
    logprobs: bool,
    results: TextIO | None = None,
    done: Container[int] = (),
) -> None:
    """Continues the prompts of records, except those at places `done`. Prints a single text as it
    grows, of several each as soon as it and those before it have ended. Lines of JSON come as soon
    as their own has, and go to a file of results if there is one. Timing goes to stderr."""
    prompts = [record["prompt"] for record in records]
    json = json or results is not None
    single, texts, shown = len(prompts) == 1 and not json, {}, 0
    prompt_tokens, new, first = 0, {}, 0  # new: tokens of each prompt's text so far
    started = time.perf_counter()
    steps = llm.steps(prompts, settings, logprobs, skip=done)  # errors before anything is printed
    if single:
        print(printable(prompts[0]), end="", flush=True)
    total, before = len(prompts), sum(place in done for place in range(len(prompts)))
    with tqdm(total=total, initial=before, unit="prompt", disable=total == 1) as bar:
        for requests in steps:
            first = first or requests[0].seconds_to_first_token
            new |= {request.index: len(request.ids) for request in requests}
            if single:
                print(printable(requests[0].read()), end="", flush=True)
            ended = [request for request in requests if request.finish_reason]
            for request in ended:
                prompt_tokens += len(request.prompt_ids)
                index = request.index
                if json:
                    line = {"index": index} | records[index] | asdict(request.completion())
                    tqdm.write(dumps(line), file=results or sys.stdout)
                elif not single:
                    texts[index] = printable(request.prompt + request.text)
            while shown in texts:
                tqdm.write(f"{texts.pop(shown)}\n\n==================================\n")
                shown += 1
            if ended:
                (results or sys.stdout).flush()
                took = time.perf_counter() - started
                bar.set_postfix_str(f"{sum(new.values()) / took:.1f} tokens/s", refresh=False)
                bar.update(len(ended))
    if single:
        print()
    tokens = sum(new.values())
    say(
        f"{prompt_tokens} prompt tokens, {tokens} new tokens, {first:.2f} s to the first token, "
        f"{tokens / (time.perf_counter() - started):.1f} tokens/s, "
        f"peak memory {readable(peak_memory(llm.device))}"
    )


def converse(talk: Chat, line: str) -> None:
    """Prints the answer to a line as it grows, and why it was cut; or obeys a command."""
    if line.rstrip() == "/new":
        talk.restart()
        say("A new conversation begins.")
        return
    if line.startswith("/"):
        say(
            f"{line:.60} is no command: /new begins again, Ctrl-D leaves. To say it to the model, "
            "begin the line with a space."
        )
        return
    with contextlib.closing(talk.answer(line)) as pieces:
        for piece in pieces:
            print(printable(piece), end="", flush=True)
    print()
    if talk.request.finish_reason == "length":
        if talk.request.limit == talk.settings.max_gen_len:
            say(f"The answer was cut at {talk.request.limit} tokens: raise --max_gen_len.")
        else:
            say(
                "The answer was cut, as the conversation has reached "
                f"{talk.llm.model.args.max_seq_len} tokens: raise --max_seq_len, or begin a new "
                "one with /new."
            )


def interact(respond: Callable[[str], None], json: bool) -> None:
    """Calls respond with each line that is typed. With json, nothing else goes to stdout."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys and history in input()
    while True:
        line = ""
        try:
            line = input("> " if sys.stdout.isatty() else "")
            if line:
                respond(line)
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            if line and not json:
                print()
            print("stopped" if line else "\nCtrl-D leaves.", file=sys.stderr)
        except UnicodeDecodeError as error:
            say(f"error: that is not {error.encoding} text: type it again")
        except (ValueError, MemoryError, FloatingPointError) as error:
            say(f"error: {error}")


def main(
    prompt: str | None = None,
    prompt_file: str | None = None,
    interactive: bool = False,
    chat: bool = False,
    system: str | None = None,
    json: bool = False,
    resume: str | None = None,
    logprobs: bool = False,
    version: bool = False,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    max_seq_len: int | None = None,
    max_batch_size: int = 32,
    use_int8: bool = True,
    device: str | None = None,
    engine: str = "triton",
    verify: bool = False,
    max_gen_len: int | None = None,
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
    """Continues prompts with LLaMA in INT8, or talks (--chat).

    Args:
        prompt: text to continue; - is all of standard input
        prompt_file: file with a prompt a line, as JSON if it ends in .jsonl; - is standard input
        interactive: keeps the model loaded and continues each line that is typed
        chat: talks with a Llama 2 Chat or Llama 3 Instruct model, which answers each line that is
            typed and remembers those before, up to a line /new
        system: with --chat, tells the model how to answer before the conversation begins
        json: prints a line of JSON for each prompt as soon as it has ended: its index in the list,
            from 0, other keys of its own line unless one of these has its name, the prompt, the
            text that was added, its tokens (with those of a stop string), finish_reason, which is
            stop, length or eos, how many seconds it took, and its logprobs
        resume: file that these lines are added to instead; prompts that are in it are left out, so
            an interrupted run continues when it is started again (with the same texts if it has a
            --seed)
        logprobs: with --json or --resume, adds the log-probability of each new token
        version: prints the version of this program
    """
    if version:
        print(f"llama-int8 {llama.__version__}")
        return
    if max_seq_len is None:
        max_seq_len = CHAT_LENGTH if chat else 512
    check("max_seq_len", max_seq_len, *LIMITS["max_seq_len"])
    if max_gen_len is None:
        max_gen_len = max_seq_len if chat else 256
    penalty = repetition_penalty, repetition_penalty_range, repetition_penalty_slope
    settings = Settings(max_gen_len, temperature, top_p, *penalty, seed, stop, top_k, min_p, lookup)
    others = {"prompt": prompt, "prompt_file": prompt_file, "interactive": interactive}
    others |= {"json": json, "resume": resume, "logprobs": logprobs}
    given = [name for name, value in others.items() if value not in (None, False)]
    if chat and given:
        raise ValueError(
            f"--chat answers what is typed, --{given[0]} is for continuing prompts: "
            "leave one of them out"
        )
    if logprobs and not (json or resume):
        raise ValueError("--logprobs is a part of what --json prints: add --json")
    if system is not None and not chat:
        raise ValueError("--system is for conversations: add --chat")
    if [prompt, prompt_file, "-" if interactive else None].count("-") > 1:
        raise ValueError("- is all of standard input, which can be read once: pass it alone")
    records = [] if prompt is None else [{"prompt": read_text("-") if prompt == "-" else prompt}]
    if prompt_file is not None:
        records += read_prompts(prompt_file)
    if not (records or interactive or chat):
        raise ValueError(
            "there is no prompt: pass --prompt TEXT, --prompt_file FILE, --interactive or --chat"
        )
    prompts = [record["prompt"] for record in records]
    check_prompts(prompts, ckpt_dir, tokenizer_path, max_seq_len)
    results, done = (None, ()) if resume is None else open_results(resume, records)
    files, limits = (ckpt_dir, tokenizer_path), (max_seq_len, 1 if chat else max_batch_size)
    llm = LLaMA.build(*files, *limits, use_int8, device, engine, verify)
    if records:
        with results or nullcontext():
            continue_prompts(llm, records, settings, json, logprobs, results, done)
    if interactive:
        say("Type a beginning. Ctrl-C stops a text, Ctrl-D leaves.")
        interact(
            lambda line: continue_prompts(llm, [{"prompt": line}], settings, json, logprobs), json
        )
    if chat:
        talk = Chat(llm, settings, system)
        say("Say something. Ctrl-C ends an answer, /new begins again, Ctrl-D leaves.")
        interact(partial(converse, talk), json=False)


def command_line() -> None:
    for method in (LLaMA.build, LLaMA.generate) if main.__doc__ else ():  # they explain flags
        main.__doc__ = getdoc(main) + getdoc(method).partition("Args:")[2]
    run(main)


if __name__ == "__main__":
    command_line()
