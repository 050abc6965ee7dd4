"""How do the commands behave on a command line?

A flag nobody knows is refused before anything runs (fire alone would run first), and what a user
can get wrong is one line on stderr and exit status 1, without a traceback.
"""

import difflib
import functools
import inspect
import sys
from collections.abc import Callable

import fire


def run(command: Callable[..., None]) -> None:
    """Calls command with the flags of the command line."""
    check_flags(sys.argv[1:], list(inspect.signature(command).parameters))
    calls = []

    @functools.wraps(command)
    def record(*args, **kwargs):
        calls.append((args, kwargs))

    fire.Fire(record)  # exits itself, after --help or with an argument too many
    try:
        for args, kwargs in calls:
            command(*args, **kwargs)
    except (ValueError, OSError, MemoryError, ImportError, FloatingPointError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted")


def check_flags(arguments: list[str], names: list[str]) -> None:
    for argument in arguments:
        name = argument.partition("=")[0].lstrip("-").replace("-", "_")
        known = [*names, *(f"no{n}" for n in names), "help"]
        if not argument.startswith("--") or name in known:
            continue
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean --{near[0]}?" if near else "see --help"
        fail(f"unknown flag --{name}: {hint}")


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)
