"""How do the commands behave on a command line?

Flags are the parameters that a docstring describes under `Args:`. Fire reads numbers and prints the
help. It runs a program before it finds that a flag is misspelt; here nothing runs until all are
understood, and text is taken as it stands (fire makes a number of 13). What a user can get wrong is
one line on stderr and exit status 1, with a traceback only after `--debug`. A terminal gets no
control code that a model or a file made up, wherever the text goes first: `printable` shows them.
"""

import contextlib
import difflib
import io
import os
import re
import sys
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from inspect import Parameter, Signature, getdoc, signature
from pathlib import Path
from typing import Any, get_args

import fire
from fire.parser import DefaultParseValue as literal

Flags = Mapping[str, Parameter]
HOST_IS_FULL = "the host has no memory left: lower --max_batch_size or --max_seq_len"
DEBUG = Parameter("debug", Parameter.KEYWORD_ONLY, default=False, annotation=bool)


def run(command: Callable[..., None], **groups: Callable) -> None:
    """Calls command with the flags of the command line. The parameters of a group, a function or a
    class, are flags too: command gets those that were given as a dict of the group's name. Every
    command has --debug."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as by >&-
            setattr(sys, name, open(os.devnull, mode))
    if sys.flags.optimize > 1:
        fail("flags are read from docstrings, which python -OO drops: run it without")
    flags, sentences = {}, {}
    for source in (command, *groups.values()):
        for about in fire.docstrings.parse(getdoc(source)).args or ():
            parameter = signature(source).parameters[about.name]
            flags[about.name] = parameter.replace(kind=Parameter.KEYWORD_ONLY)
            sentences[about.name] = about.description
    flags["debug"] = DEBUG
    sentences["debug"] = "prints the traceback of an error before its one line"
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack a character
    debug = False
    try:
        given = read(sys.argv[1:], flags, getdoc(command).split("\nArgs:")[0], sentences)
        debug = given.pop("debug", False)
        for group, function in groups.items():
            names = [name for name in given if name in signature(function).parameters]
            given[group] = {name: given.pop(name) for name in names}
        with warnings.catch_warnings():
            warnings.showwarning = say
            command(**given)
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads on: head -1, say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, MemoryError, ImportError, FloatingPointError) as error:
        if debug:
            traceback.print_exc()
        fail(str(error) or HOST_IS_FULL)
    except RuntimeError as error:
        if debug or "DefaultCPUAllocator" not in str(error):
            raise
        fail(HOST_IS_FULL)
    except KeyboardInterrupt:
        fail("interrupted", 130)


def read(
    arguments: list[str], flags: Flags, summary: str, sentences: Mapping[str, str]
) -> dict[str, Any]:
    """The flags that were given and their values; prints the help where it is asked for."""
    short, words, given = one_letter(flags), deque(arguments), {}
    while words:
        word = words.popleft()
        if word in ("--help", "-h"):
            print_help(flags, summary, sentences)
            sys.stdout.flush()
            sys.exit(0)
        flag = re.fullmatch(r"--?([a-z][\w-]*)(?:=(.*))?", word, re.I | re.S)
        if flag is None:
            fail(f"{word!r:.60} belongs to no flag: write --NAME=VALUE, see --help")
        name, value = flag[1].replace("-", "_"), flag[2]
        name = short.get(name, name)
        if value is None and name.startswith("no") and name[2:] in flags:
            name, value = name[2:], "False"
        if name not in flags:
            near = difflib.get_close_matches(name, flags, n=1)
            hint = f"did you mean --{near[0]}?" if near else "see --help"
            fail(f"unknown flag --{name}: {hint}")
        kind = flags[name].annotation
        if value is None and words and not words[0].startswith("-" if kind is bool else "--"):
            value = words.popleft()
        elif value is None and kind is bool:
            value = "True"
        elif value is None:
            fail(f"--{name} has no value: write --{name}=VALUE")
        if kind == list[str]:
            given.setdefault(name, []).append(value)
        elif kind == list[int]:
            given.setdefault(name, []).extend(map(literal, value.split(",")))
        else:
            given[name] = value if str in (kind, *get_args(kind)) else literal(value)
        if kind is bool and not isinstance(given[name], bool):
            fail(f"{name} is {value!r}, expected True or False")
    for name, flag in flags.items():
        if name not in given and flag.default is Parameter.empty:
            fail(f"--{name} is missing: write --{name}=VALUE, see --help")
    return given


def print_help(flags: Flags, summary: str, sentences: Mapping[str, str]) -> None:
    def command():
        pass

    about = [f"    {name}: {sentence}" for name, sentence in sentences.items()]
    command.__doc__ = "\n".join([summary, "", "Args:", *about])
    command.__signature__ = Signature(list(flags.values()))
    module = sys.modules["__main__"].__spec__  # None for a script
    name = f"python -m {module.name.removesuffix('.__main__')}" if module else None
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.suppress(fire.core.FireExit):
        fire.Fire(command, ["--help"], name)
    text = said.getvalue().partition("\n\n")[2].replace(f"'{name}'", f"{name}")
    # Types that fire cuts short, and a letter for each of two flags that begin with it.
    text = re.sub(r"^ +Type: .*\n", "", text, flags=re.M)
    print(re.sub(rf"-[^-{''.join(one_letter(flags))}], --", "--", text))


def one_letter(flags: Flags) -> dict[str, str]:
    """The flags that their first letter is enough for."""
    return {name[0]: name for name in flags if sum(n[0] == name[0] for n in flags) == 1}


def read_text(path: str) -> str:
    """The text of a file, or of standard input for -, without the line end that is its last."""
    file = Path(os.path.expanduser(path))
    if path != "-" and (file.is_dir() or not file.exists()):
        found = "is a folder" if file.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path!r} {found}: pass a text file, or - for standard input")
    content = sys.stdin.buffer.read() if path == "-" else file.read_bytes()
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text (byte {error.start}): convert it") from None


def printable(text: str) -> str:
    """Text with its control characters, all but line ends and tabs, as escapes: \\x1b."""
    return re.sub(r"[^\n\t -~\xa0-\U0010ffff]", lambda c: repr(c[0])[1:-1], text)


def say(message: Warning | str, *_) -> None:
    """A warning as one line, without the place in the code that Python shows."""
    print(printable(f"warning: {' '.join(str(message).split())}"), file=sys.stderr)


def fail(message: str, status: int = 1) -> None:
    """Ends the process with one line on stderr."""
    print(printable(f"error: {message}").replace("\n", r"\n"), file=sys.stderr)
    sys.exit(status)
