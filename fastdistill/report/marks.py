"""How an arm is drawn and a number written, the same in every picture, table and sentence.

Arms differ in colour and in shape, so that they stay apart for every kind of colour vision and in
grey print.
"""

from __future__ import annotations

import math
import textwrap
from typing import Any

from ..intervals import Estimate

# Okabe and Ito, without the yellow that white swallows.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
SHAPES = "osD^vPX"
SUCCESS = "#009e73"
# Beyond it a ratio says little but that its denominator is small.
LOWEST, HIGHEST = -0.5, 1.5
RC: Any = {
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelcolor": "#333333",
    "axes.edgecolor": "#888888",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "text.parse_math": False,  # names are foreign: "$" in one is a dollar
}


def style(i: int) -> tuple[str, str]:
    """Colour and shape of the i-th arm; 49 arms until one comes again."""
    return COLORS[i % len(COLORS)], SHAPES[(i + i // len(COLORS)) % len(SHAPES)]


def clip_to_axes(value: float) -> float:
    return min(max(value, LOWEST), HIGHEST)


def is_off_axes(value: float) -> bool:
    """Outside what the axes show. False for NaN, which is nowhere."""
    return value < LOWEST or value > HIGHEST


def edge_marker(value: float) -> str:
    """The shape of a mark at the edge of an upright axis, pointing to where the value is."""
    return "v" if value < LOWEST else "^"


def wrap_label(name: str, width: int, lines: int = 3) -> list[str]:
    """A name in at most so many lines; what is too long loses its middle, where names differ least.

    Drawn by matplotlib with parse_math=False: "$" in a name is a dollar.
    """
    wrapped = textwrap.wrap(name, width - 1) or [""]
    return wrapped if len(wrapped) <= lines else [*wrapped[: lines - 1], f"…{wrapped[-1]}"]


def format_number(value: float, *limits: float) -> str:
    """Two decimals, ".97" and "−.02"; more where fewer would put the value on the other side of a
    limit, or on it: .104 beside a limit of .1."""
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
    """A limit as one writes it: ".1"."""
    return f"{limit:g}".removeprefix("0")


def format_interval(estimate: Estimate, *limits: float) -> str:
    """ "[.95, .99]", or "(no interval)" where too little was measured for one."""
    if not estimate.known:
        return "(no interval)"
    return f"[{format_number(estimate.low, *limits)}, {format_number(estimate.high, *limits)}]"


def format_estimate(estimate: Estimate | None, *limits: float) -> str:
    """A value with its interval, "—" where there is none."""
    if estimate is None or math.isnan(estimate.value):
        return "—"
    return f"{format_number(estimate.value, *limits)} {format_interval(estimate, *limits)}"


def format_p_value(p: float) -> str:
    """Three decimals, "= .031"; "< .001" below what they can tell."""
    return "< .001" if p < 0.001 else "= " + f"{p:.3f}".removeprefix("0")
