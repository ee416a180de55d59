"""Shapes of JSON values, to check a record once where it is read.

str, bool, int, float, None    a value of this type; int and float are finite, below 2⁵³ and 10³⁰⁸
(shape, ...)                   one of these
[shape]                        a list
{str: shape}                   an object with any names
{"name": shape, "x?": shape}   an object with these names, maybe without x; others are ignored
function                       what it returns True for
"""

from __future__ import annotations

from typing import Any

_LARGEST = {int: 1 << 53, float: 1e308}


def has_shape(value: Any, shape: Any) -> bool:
    """Return whether a JSON value has a shape.

    >>> has_shape({"step": 3, "loss": None}, {"step": int, "loss?": (float, None)})
    True
    """
    if shape is None or shape is Any:
        return shape is Any or value is None
    if shape in (str, bool):
        return type(value) is shape
    if shape in (int, float):
        is_number = type(value) is int or type(value) is shape
        return is_number and -_LARGEST[shape] <= value <= _LARGEST[shape]  # NaN is not
    if isinstance(shape, tuple):
        return any(has_shape(value, one) for one in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(has_shape(part, shape[0]) for part in value)
    if not isinstance(shape, dict):
        return bool(shape(value))
    if not isinstance(value, dict):
        return False
    if str in shape:
        return all(has_shape(part, shape[str]) for part in value.values())
    return all(
        has_shape(value[name], part) if (name := key.removesuffix("?")) in value else name != key
        for key, part in shape.items()
    )
