"""Checks of scalar arguments. Each error names the argument, what was expected and what came.

integer("k", k, 1)                      an integer of 1 or more
between("top_p", top_p, 0, 1)           a number in [0, 1]
choice("tail", tail, ("bucket", ...))   one of these
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NoReturn

from .printable import printable_lines


def fail(name: str, expected: str, got: Any, hint: str = "") -> NoReturn:
    """Raise ValueError "name: expected …, got …; hint"."""
    text = f"{name}: expected {expected}, got {got}" + (f"; {hint}" if hint else "")
    raise ValueError(printable_lines(text))


def integer(
    name: str,
    value: Any,
    least: int | None = None,
    most: int | None = None,
    *,
    optional: bool = False,
    hint: str = "",
) -> None:
    """Check an integer in [least, most]; a bool does not count. With `optional`, None passes."""
    if optional and value is None:
        return
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    too_small = is_integer and least is not None and value < least
    too_large = is_integer and most is not None and value > most
    if is_integer and not too_small and not too_large:
        return
    if most is None:
        expected = "an integer" if least is None else f"an integer of {least} or more"
    else:
        expected = f"an integer of at most {most}" if least is None else f"{least} to {most}"
    fail(name, expected + (" or None" if optional else ""), repr(value), hint)


def number(name: str, value: Any) -> None:
    """Check a real number; NaN and infinity pass. The error is a TypeError."""
    if isinstance(value, (str, bool)) or value is None or not hasattr(value, "__float__"):
        raise TypeError(printable_lines(f"{name}: expected a number, got {value!r}"))


def positive(name: str, value: Any, *, optional: bool = False) -> None:
    """Check a finite number above 0."""
    if optional and value is None:
        return
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and value > 0):
        fail(name, "a finite number above 0" + (" or None" if optional else ""), repr(value))


def between(name: str, value: Any, low: float, high: float = math.inf, below: bool = False) -> None:
    """Check a number in [low, high], or in [low, high) with `below`; infinity never passes."""
    number(name, value)
    if not (low <= value < high or (value == high and not below and math.isfinite(high))):
        if math.isinf(high):
            fail(name, f"a finite number of {low:g} or more", repr(value))
        fail(name, f"a number in [{low:g}, {high:g}{')' if below else ']'}", repr(value))


def choice(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Check that the value is one of `allowed`."""
    values = list(allowed)
    if value not in values:
        fail(name, f"one of {', '.join(map(repr, values))}", repr(value))


def boolean(name: str, value: Any) -> None:
    """Check True or False."""
    if value is not True and value is not False:
        fail(name, "True or False", repr(value))
