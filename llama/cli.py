"""How do the commands behave on a command line?

Fire runs a program before it finds that a flag is misspelt; here nothing runs until all are
understood. What a user can get wrong is one line on stderr and exit status 1, without a traceback.
"""

import contextlib
import difflib
import functools
import inspect
import io
import itertools
import os
import re
import sys
from collections.abc import Callable, Mapping

import fire


def run(command: Callable[..., None]) -> None:
    """Calls command with the flags of the command line."""
    parameters = inspect.signature(command).parameters
    check_flags(sys.argv[1:], parameters)
    calls = []

    @functools.wraps(command)
    def record(*args, **kwargs):
        calls.append((args, kwargs))

    text = [p.name for p in parameters.values() if p.annotation in (str, str | None)]
    fire.decorators.SetParseFns(**dict.fromkeys(text, str))(record)  # a folder may be called 13
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack a character
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            fire.Fire(record)
    except fire.core.FireExit as exit:
        if exit.code == 0:  # --help
            print(said.getvalue())
            sys.exit(0)
        fail(said.getvalue().splitlines()[0].removeprefix("ERROR: ") + " (see --help)")
    try:
        for args, kwargs in calls:
            command(*args, **kwargs)
            sys.stdout.flush()
    except BrokenPipeError:  # nobody reads on: head -1, say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, MemoryError, ImportError, FloatingPointError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted", 130)


def check_flags(arguments: list[str], parameters: Mapping[str, inspect.Parameter]) -> None:
    names = list(parameters)
    initials = [name[0] for name in names]
    short = [initial for initial in initials if initials.count(initial) == 1]
    known = [*names, *(f"no{name}" for name in names), *short, "help", "h"]
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue="--"):
        flag = re.match(r"--?([a-z][\w-]*)", argument, re.I)
        if flag is None:
            continue
        name = flag[1].replace("-", "_")
        if name in names and "=" not in argument and following.startswith("--"):
            if parameters[name].annotation is not bool:
                fail(f"--{name} has no value: write --{name}=VALUE")
        if name in known:
            continue
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean --{near[0]}?" if near else "see --help"
        fail(f"unknown flag --{name}: {hint}")


def fail(message: str, status: int = 1) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)
