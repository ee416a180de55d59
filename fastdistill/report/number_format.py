"""Marker styles of arms and formats of numbers, for all figures, tables and sentences.

Arms differ in color and in shape, so that they remain distinct for every color vision and in gray.
"""

from __future__ import annotations

import math
import textwrap
from typing import Any

from ..runtime.intervals import Estimate

# The palette of Okabe and Ito, without yellow, which is hard to see on white.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
SHAPES = "osD^vPX"
SUCCESS = COLORS[2]
GRAY = "#888888"
GUIDE: Any = {"color": GRAY, "lw": 0.7, "ls": (0, (2, 2)), "zorder": 0}  # lines at 0 and 1
# Limits of the axes. A ratio beyond them mostly shows that its denominator is small.
LOWEST, HIGHEST = -0.5, 1.5
RC: Any = {
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelcolor": "#333333",
    "axes.edgecolor": GRAY,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "text.parse_math": False,  # names are untrusted text: "$" is a dollar sign
}


def style(i: int) -> tuple[str, str]:
    """Returns color and shape of the i-th arm; the first 49 are distinct."""
    return COLORS[i % len(COLORS)], SHAPES[(i + i // len(COLORS)) % len(SHAPES)]


def clip_to_axes(value: float) -> float:
    """Returns a value clipped to the limits of the axes."""
    return min(max(value, LOWEST), HIGHEST)


def is_off_axes(value: float) -> bool:
    """Whether a value is outside the axes; False for NaN."""
    return value < LOWEST or value > HIGHEST


def edge_marker(value: float) -> str:
    """Returns the marker at the edge of a vertical axis that points to a value outside."""
    return "v" if value < LOWEST else "^"


def wrap_label(name: str, width: int, lines: int = 3) -> list[str]:
    """Wraps a name to at most `lines` lines; a longer name loses its middle.

    Draw it with parse_math=False, because "$" in a name is a dollar sign.
    """
    wrapped = textwrap.wrap(name, width - 1) or [""]
    return wrapped if len(wrapped) <= lines else [*wrapped[: lines - 1], f"…{wrapped[-1]}"]


def format_number(value: float, *limits: float) -> str:
    """Returns a number with two decimals, ".97" or "−.02".

    Uses more decimals where rounding would move it to or across a limit: .104 for a limit of .1.
    """
    if math.isnan(value):
        return "—"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    for digits in range(2, 9):
        rounded = round(value, digits)
        if all(
            (rounded > limit, rounded < limit) == (value > limit, value < limit) for limit in limits
        ):
            break
    text = f"{abs(rounded):.{digits}f}"
    return ("−" if rounded < 0 else "") + (text[1:] if text.startswith("0") else text)


def format_limit(limit: float) -> str:
    """Returns a limit without trailing digits: ".1"."""
    return f"{limit:g}".removeprefix("0")


def format_interval(estimate: Estimate, *limits: float) -> str:
    """Returns "[.95, .99]", or "(no interval)" where the interval is unknown."""
    if not estimate.known:
        return "(no interval)"
    return f"[{format_number(estimate.low, *limits)}, {format_number(estimate.high, *limits)}]"


def format_estimate(estimate: Estimate | None, *limits: float) -> str:
    """Returns a value with its interval, or "—" where there is no value."""
    if estimate is None or math.isnan(estimate.value):
        return "—"
    return f"{format_number(estimate.value, *limits)} {format_interval(estimate, *limits)}"


def format_p_value(p: float) -> str:
    """Returns a p-value with three decimals, "= .031", or "< .001"."""
    return "< .001" if p < 0.001 else "= " + f"{p:.3f}".removeprefix("0")


def format_p_cell(p: float | None) -> str:
    """Returns a p-value for a table, ".031" or "< .001", or "—" where there is none."""
    return "—" if p is None else format_p_value(p).removeprefix("= ")
