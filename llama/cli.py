"""Runs the commands: fire makes flags out of a signature, and every error is one line on stderr.

Fire finds a misspelt flag only after the program has run, takes the last of two equal flags and
guesses types. So `arguments` checks the command line first and writes each flag as --name=value.
"""

import ast
import contextlib
import difflib
import functools
import inspect
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import fire

OTHER_NAMES = {  # what other programs call our flags
    **dict.fromkeys(("max_new_tokens", "max_tokens", "n_predict", "n"), "max_gen_len"),
    **dict.fromkeys(("max_length", "max_model_len", "ctx_size", "n_ctx"), "max_seq_len"),
    **dict.fromkeys(("model", "model_path", "model_dir", "m", "c"), "ckpt_dir"),
    **{"temp": "temperature", "p": "prompt", "f": "prompt_file", "output_dir": "out_dir"},
}


def run(command: Callable[..., None]) -> None:
    """Calls command with the flags of the command line, or prints its help."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as by >&-
            setattr(sys, name, open(os.devnull, mode))
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack a character
    warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
    flags = inspect.signature(command).parameters
    module = sys.modules["__main__"].__spec__  # None for a script
    name = module.name.removesuffix(".__main__") if module else None
    try:
        if {"--help", "-h"} & set(sys.argv):
            with contextlib.redirect_stderr(sys.stdout), contextlib.suppress(fire.core.FireExit):
                fire.Fire(command, ["--", "--help"], name)
        else:
            parsers = {name: functools.partial(parse, flag) for name, flag in flags.items()}
            fire.decorators.SetParseFns(**parsers)(command)
            fire.Fire(command, arguments(sys.argv[1:], flags), name)
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads on, head -1 for one
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, MemoryError, ImportError, FloatingPointError) as error:
        say(f"error: {str(error) or 'the host has no memory left: lower --max_batch_size'}")
        sys.exit(1)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one more would be a traceback at the end
        say("error: interrupted")
        sys.exit(130)


def arguments(words: list[str], flags: Mapping[str, inspect.Parameter]) -> list[str]:
    """The words of a command line, each flag as --name=value; ValueError for a mistake."""
    words, given = list(words), {}
    required = [name for name, flag in flags.items() if flag.default is flag.empty]
    while words:
        word = words.pop(0)
        if required and not word.startswith("-"):
            word = f"--{required[0]}={word}"
        elif word.startswith("--no") and word[4:] in flags:  # as fire has it
            word = f"--{word[4:]}=False"
        written, equals, value = word.partition("=")
        name = flag_of(written, flags)
        if not equals:
            switch = flags[name].annotation is bool
            follows = words and not words[0].startswith("-" if switch else "--")
            if not (follows or switch):
                raise ValueError(f"--{name} has no value: write --{name}=VALUE")
            value = words.pop(0) if follows else "True"
        if name in given:
            several = {
                "prompt": "; several are lines of a --prompt_file",
                "stop": """; several are --stop='["a", "b"]'""",
            }
            raise ValueError(f"--{name} is given twice: give it once{several.get(name, '')}")
        given[name] = value
        required = [name for name in required if name not in given]
    if required:
        raise ValueError(f"--{required[0]} is missing: write --{required[0]}=VALUE, see --help")
    return [f"--{name}={value}" for name, value in given.items()]


def flag_of(written: str, flags: Mapping[str, inspect.Parameter]) -> str:
    """The flag that a word such as --max-gen-len names, or -c if no other begins with c."""
    name = written.lstrip("-").replace("-", "_")
    if not (name and written.startswith("-")):
        values = {"prompt": "TEXT", "size": "13B", "ckpt_dir": "FOLDER"}
        likely = (f"--{name}={value}" for name, value in values.items() if name in flags)
        instead = " or ".join(likely) or "--NAME=VALUE"
        raise ValueError(f"{written!r:.60} belongs to no flag: write {instead}, see --help")
    named = [name] if name in flags else [flag for flag in flags if flag[0] == name]
    if len(named) == 1:
        return named[0]
    others = {other: flag for other, flag in OTHER_NAMES.items() if flag in flags}
    near = difflib.get_close_matches(name, [*flags, *others], n=1)
    hint = f"did you mean --{others.get(near[0], near[0])}?" if near else "see --help"
    raise ValueError(f"unknown flag {written:.60}: {hint}")


def parse(flag: inspect.Parameter, value: str) -> Any:
    """The value of a flag: text where its type is str, a Python literal elsewhere."""
    kinds = get_args(flag.annotation) or (flag.annotation,)
    if bool in kinds:
        if value.lower() not in ("true", "false"):
            raise ValueError(f"{flag.name} is {value!r:.60}, expected True or False")
        return value.lower() == "true"
    if str in kinds and not (list[str] in kinds and value.startswith("[")):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        if str in kinds:
            raise ValueError(f"{flag.name} is {value!r:.60}, which is not a whole list") from None
        return value


def read_text(path: str) -> str:
    """The text of a file, or of standard input for -, without a line end at its end."""
    file = Path(os.path.expanduser(path))
    if path != "-" and (file.is_dir() or not file.exists()):
        found = "is a folder" if file.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path!r} {found}: pass a text file, or - for standard input")
    content = sys.stdin.buffer.read() if path == "-" else file.read_bytes()
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): convert it") from None


def printable(text: str) -> str:
    """Text with its control characters, except line ends and tabs, as escapes: \\x1b."""
    return re.sub(r"[^\n\t -~\xa0-\U0010ffff]", lambda c: repr(c[0])[1:-1], text)


def say(message: str) -> None:
    """Prints one line, not too long, to stderr, if that can be written to."""
    line = printable(message).replace("\n", r"\n")
    line = line if len(line) < 600 else f"{line[:300]} [...] {line[-300:]}"
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)
