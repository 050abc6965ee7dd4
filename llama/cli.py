"""How do the commands behave on a command line?

Flags are the parameters that a docstring describes under `Args:`. Fire runs a program before it
finds that a flag is misspelt; here nothing runs until all are understood, and text is taken as it
stands (fire makes a number of 13). What a user can get wrong is one line on stderr and exit status
1, with a traceback only after `--debug`. A terminal gets no control code that a model or a file
made up, wherever the text goes first: `printable` shows them.
"""

import contextlib
import difflib
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from inspect import Parameter, Signature, getdoc, signature
from pathlib import Path
from typing import Any, get_args

import fire

Flags = Mapping[str, Parameter]
DEBUG = Parameter("debug", Parameter.KEYWORD_ONLY, default=False, annotation=bool)


def run(command: Callable[..., None], **groups: Callable) -> None:
    """Calls command with the flags of the command line. The parameters of a group, a function or a
    class, are flags too: command gets those that were given as a dict of the group's name. Of two
    flags of one name, command's own counts. Every command has --debug."""
    own = signature(command).parameters
    flags, sentences = {}, {}
    for source in (command, *groups.values()):
        for about in fire.docstrings.parse(getdoc(source)).args:
            if about.name not in flags:
                flags[about.name] = signature(source).parameters[about.name]
                sentences[about.name] = about.description
    if groups:  # whose order means nothing
        flags = {name: p.replace(kind=Parameter.KEYWORD_ONLY) for name, p in flags.items()}
    flags["debug"] = DEBUG
    sentences["debug"] = "prints the traceback of an error before its one line"
    given = read(sys.argv[1:], flags, getdoc(command).split("\nArgs:")[0], sentences)
    debug = given.pop("debug", False)
    for group, function in groups.items():
        names = [n for n in given if n in signature(function).parameters and n not in own]
        given[group] = {name: given.pop(name) for name in names}
    try:
        command(**given)
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads on: head -1, say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, MemoryError, ImportError, FloatingPointError) as error:
        if debug:
            traceback.print_exc()
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted", 130)


def read(
    arguments: list[str], flags: Flags, summary: str, sentences: Mapping[str, str]
) -> dict[str, Any]:
    """The flags that were given and their values; prints the help where it is asked for."""
    given = {}

    def record(*args, **kwargs):
        given.update(record.__signature__.bind(*args, **kwargs).arguments)

    about = [f"    {name}: {sentence}" for name, sentence in sentences.items()]
    record.__doc__ = "\n".join([summary, "", "Args:", *about])
    record.__signature__ = Signature(list(flags.values()))
    module = sys.modules["__main__"].__spec__  # None for a script
    name = f"python -m {module.name.removesuffix('.__main__')}" if module else None
    arguments = tidy(arguments, flags)
    if {"--help", "-h"} & set(arguments):
        arguments = ["--help"]  # fire would show the other flags in it
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack a character
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            fire.Fire(record, arguments, name)
    except fire.core.FireExit as exit:
        if exit.code == 0:  # --help
            print(said.getvalue().partition("\n\n")[2].replace(f"'{name}'", f"{name}"))
            sys.exit(0)
        fail(said.getvalue().splitlines()[0].removeprefix("ERROR: ") + " (see --help)")
    for name, value in given.items():
        if flags[name].annotation is bool and not isinstance(value, bool):
            fail(f"{name} is {value!r}, expected True or False")
    return given


def tidy(arguments: list[str], flags: Flags) -> list[str]:
    """The arguments as fire cannot mistake them: each flag with its value in one, text in quotes,
    the texts of a flag that may be repeated in one list."""
    short = {name[0]: name for name in flags if sum(n[0] == name[0] for n in flags) == 1}
    known = [*flags, *(f"no{name}" for name in flags), "help", "h"]
    tidied, lists, words = [], {}, iter(arguments)
    for word in words:
        flag = re.match(r"--?([a-z][\w-]*)(?:=(.*))?", word, re.I | re.S)
        if flag is None:
            tidied.append(word)
            continue
        name, value = flag[1].replace("-", "_"), flag[2]
        name = short.get(name, name)
        if name not in known:
            near = difflib.get_close_matches(name, flags, n=1)
            hint = f"did you mean --{near[0]}?" if near else "see --help"
            fail(f"unknown flag --{name}: {hint}")
        kind = flags[name].annotation if name in flags else bool
        if kind is bool:
            tidied.append(word)
            continue
        if value is None:
            value = next(words, "--")
            if value.startswith("--"):
                fail(f"--{name} has no value: write --{name}=VALUE")
        if kind == list[str]:
            lists.setdefault(name, []).append(value)
        else:
            is_text = str in (kind, *get_args(kind))
            tidied.append(f"--{name}={value!r}" if is_text else f"--{name}={value}")
    return tidied + [f"--{name}={values!r}" for name, values in lists.items()]


def read_text(path: str) -> str:
    """The text of a file, or of standard input for -."""
    file = Path(path).expanduser()
    if path != "-" and not file.is_file():
        found = "is a folder" if file.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {found}: pass a text file, or - for standard input")
    content = sys.stdin.buffer.read() if path == "-" else file.read_bytes()
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text (byte {error.start}): convert it") from None


def printable(text: str) -> str:
    """Text with its control characters, all but line ends and tabs, as escapes: \\x1b."""
    return re.sub(r"[^\n\t -~\xa0-\U0010ffff]", lambda c: repr(c[0])[1:-1], text)


def fail(message: str, status: int = 1) -> None:
    print(printable(f"error: {message}"), file=sys.stderr)
    sys.exit(status)
