"""What can be set for a continuation? One list, for `generate`, `stream` and the commands."""

import functools
import inspect
import numbers
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
Result = TypeVar("Result")


def check(name: str, value, kind: type, low: float, high: float) -> int | float:
    """value as Python's own int or float; ValueError unless it is a number of this kind (an int is
    a float too) within bounds."""
    kinds = numbers.Integral if kind is int else numbers.Real
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        number = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} is {value!r:.60}, expected {number}, from {low} to {high}")
    return kind(value)


def check_fields(of, **ranges: tuple[type, float, float]) -> None:
    """`check` of fields of a frozen dataclass, which keeps what comes of it; None may stay where it
    is the default."""
    for field in fields(of):
        value = getattr(of, field.name)
        if field.name in ranges and not (value is None and field.default is None):
            object.__setattr__(of, field.name, check(field.name, value, *ranges[field.name]))


@dataclass(frozen=True)
class Settings:
    """`sampling` has the formulas. ValueError for a setting out of range.

    Args:
        max_gen_len: longest continuation, in tokens
        temperature: 0 always takes the most likely token, 1 draws as the model believes
        top_p: draws from the most likely tokens that have this probability together
        repetition_penalty: above 1 makes tokens that are already there less likely
        repetition_penalty_range: how many of the last tokens count as already there
        repetition_penalty_slope: above 0 penalizes the older of them less
        seed: the same seed gives a prompt the same text in the same place of the list
        stop: text before which a continuation ends; several may be given
        top_k: draws from so many of the most likely tokens; 0 from all
        min_p: draws from tokens at least this fraction as likely as the most likely one
    """

    max_gen_len: int = 256
    temperature: float = 0.8
    top_p: float = 0.95
    repetition_penalty: float = 1.0
    repetition_penalty_range: int = 1024
    repetition_penalty_slope: float = 0.0
    seed: int | None = None
    stop: list[str] = ()
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self):
        check_fields(
            self,
            max_gen_len=(int, 1, 2**31),
            temperature=(float, 0, 1e6),
            top_p=(float, 0, 1),
            repetition_penalty=(float, 0.01, 100),
            repetition_penalty_range=(int, 1, 2**31),
            repetition_penalty_slope=(float, 0, 1e6),
            seed=(int, 0, 2**63 - 1),
            top_k=(int, 0, 2**31),
            min_p=(float, 0, 1),
        )
        texts = isinstance(self.stop, list | tuple)
        if not texts or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(
                f"stop is {self.stop!r:.60}, expected a list of strings, none of them empty"
            )


def takes(
    settings: Callable[P, Settings],
) -> Callable[[Callable[..., Result]], Callable[Concatenate[Any, Any, P], Result]]:
    """Lets a method (self, what, settings) be called with each setting as an argument of its own;
    `help` and editors show them."""

    def decorate(method):
        signature = inspect.signature(method)
        *own, _ = signature.parameters.values()
        each = inspect.signature(settings).parameters.values()
        signature = signature.replace(parameters=[*own, *each])

        @functools.wraps(method)
        def call(*args, **kwargs):
            given = signature.bind(*args, **kwargs).arguments
            first = [given.pop(parameter.name) for parameter in own]
            return method(*first, settings(**given))

        call.__signature__ = signature
        return call

    return decorate
