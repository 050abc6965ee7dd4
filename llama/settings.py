"""The settings of a continuation, and the check of numbers that a user gives."""

import numbers
from dataclasses import dataclass, fields


def check(name: str, value, kind: type, low: float, high: float) -> int | float:
    """The value as Python's int or float; ValueError unless it is a number within the bounds."""
    is_number = isinstance(value, numbers.Integral if kind is int else numbers.Real)
    if not is_number or isinstance(value, bool) or not low <= value <= high:
        number = "a whole number" if kind is int else "a number"
        raise ValueError(f"{name} is {value!r:.60}, expected {number}, from {low} to {high}")
    return kind(value)


def check_bool(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r:.60}, expected True or False")


def check_fields(record, **ranges: tuple[type, float, float]) -> None:
    """Checks fields of a frozen dataclass, and stores them as Python's own numbers. None passes
    where it is the default."""
    for field in fields(record):
        value = getattr(record, field.name)
        if field.name in ranges and not (value is None and field.default is None):
            object.__setattr__(record, field.name, check(field.name, value, *ranges[field.name]))


@dataclass(frozen=True)
class Settings:
    """How a prompt is continued: see `LLaMA.generate`, and `sampling` for the formulas. ValueError
    for a value out of range."""

    max_gen_len: int = 256
    temperature: float = 0.8
    top_p: float = 0.95
    repetition_penalty: float = 1.0
    repetition_penalty_range: int = 1024
    repetition_penalty_slope: float = 0.0
    seed: int | None = None
    stop: list[str] | str = ()
    top_k: int = 0
    min_p: float = 0.0
    lookup: bool = False

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
        check_bool("lookup", self.lookup)
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, list | tuple) or not all(isinstance(s, str) and s for s in stop):
            raise ValueError(
                f"stop is {self.stop!r:.60}, expected a text or a list of texts, none of them empty"
            )
        object.__setattr__(self, "stop", tuple(stop))
