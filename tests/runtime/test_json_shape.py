"""A record is checked once where it is read."""

from typing import Any

import pytest

from fastdistill.runtime.json_shape import has_shape


@pytest.mark.parametrize(
    ("value", "shape", "expected"),
    [
        *(("x", str, True), (1, str, False), (None, str, False), (None, None, True)),
        *((1, int, True), (True, int, False), (1.0, int, False), (1 << 60, int, False)),
        *((1, float, True), (0.5, float, True), (True, float, False), ("1", float, False)),
        *((float("nan"), float, False), (float("inf"), float, False), (10**400, float, False)),
        *((True, bool, True), (1, bool, False), ([], Any, True), (None, Any, True)),
        *((None, (int, None), True), (3, (int, None), True), ("x", (int, None), False)),
        *(([1, 2], [int], True), ([], [int], True), ([1, "x"], [int], False), ("ab", [str], False)),
        *(({"a": 1, "b": 2}, {str: int}, True), ({"a": "x"}, {str: int}, False)),
        *(({"a": 1, "more": 0}, {"a": int}, True), ({}, {"a": int}, False), ([], {}, False)),
        *(({}, {"a?": int}, True), ({"a": 1}, {"a?": int}, True), ({"a": "x"}, {"a?": int}, False)),
        *((3, lambda n: n > 2, True), (2, lambda n: n > 2, False)),
    ],
)
def test_shapes(value, shape, expected):
    assert has_shape(value, shape) is expected
