"""How numbers and names are written, and that arms look different."""

from __future__ import annotations

import math

from fastdistill.report.number_format import (
    clip_to_axes,
    format_estimate,
    format_interval,
    format_limit,
    format_number,
    format_p_value,
    is_off_axes,
    style,
    wrap_label,
)
from fastdistill.runtime.intervals import Estimate

NAN = math.nan


def estimate(value, low=NAN, high=NAN):
    return Estimate(value=value, low=low, high=high, n=12)


def test_numbers_in_words():
    assert [format_number(x) for x in (0.974, -0.021, 1, -0.001, NAN, math.inf, -math.inf)] == [
        ".97",
        "−.02",
        "1.00",
        ".00",
        "—",
        "∞",
        "−∞",
    ]
    assert [format_number(x, 0.1) for x in (0.1, 0.104, 0.0996)] == [".10", ".104", ".0996"]
    assert [format_number(x, 0.0) for x in (0.001, -0.0004)] == [".001", "−.0004"]
    assert format_interval(estimate(0.5, 0.104, 0.9), 0.1) == "[.104, .90]"
    assert format_estimate(None) == format_estimate(estimate(NAN)) == "—"
    assert [format_p_value(p) for p in (0.0009, 0.0496, 1.0)] == ["< .001", "= .050", "= 1.000"]
    assert [format_limit(limit) for limit in (0.1, 0.95, 1)] == [".1", ".95", "1"]


def test_long_names_lose_what_is_before_their_last_line():
    assert wrap_label("short", 18) == ["short"]
    assert wrap_label(" ", 18) == [""]
    assert wrap_label("one two three four five six", 6, 2) == ["one", "…six"]
    assert all(len(line) <= 18 for line in wrap_label("x" * 100, 18))


def test_arms_stay_apart():
    assert len({style(i) for i in range(49)}) == 49


def test_what_is_beyond_the_axes():
    values = (-0.6, -0.5, 1.5, 1.6, math.inf, NAN)
    assert [is_off_axes(v) for v in values] == [True, False, False, True, True, False]
    assert [clip_to_axes(v) for v in values[:5]] == [-0.5, -0.5, 1.5, 1.5, 1.5]
