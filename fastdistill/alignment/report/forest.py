"""The forest plot: τ of every arm with its interval, next to its capability C."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...report.number_format import (
    COLORS,
    GRAY,
    GUIDE,
    HIGHEST,
    LOWEST,
    RC,
    SUCCESS,
    clip_to_axes,
    edge_marker,
    format_limit,
    format_number,
    is_off_axes,
)
from ...runtime.printable import printable
from .arms import CAPABLE, SAFE, Arm
from .verdicts import outcome

_WIDTH, _ROW = 5.4, 0.172  # inches, of the figure and of the height of a row
_LEFT, _RIGHT, _BOTTOM, _TOP = 1.65, 0.5, 0.42, 0.25  # margins in inches
_BLACK = COLORS[-1]
# Outcome -> color, in the order of the groups; control arms come last.
_GROUPS = {
    "DFC succeeds": SUCCESS,
    "within the margin": COLORS[0],
    "unclear": COLORS[0],
    "the trait transfers": COLORS[1],
    "capability lost": COLORS[3],
    "too few seeds": COLORS[0],
    "no verdict": COLORS[0],
}
_SIDEWAYS = {"v": "<", "^": ">"}


def forest(arms: Sequence[Arm], *, valid: bool = True) -> Figure:
    """Returns τ of every arm with its interval, grouped by outcome, and C in a column."""
    groups = _grouped(arms, valid)
    rows = sum(len(group) + 1 for _, _, group in groups)
    height = _ROW * rows + _BOTTOM + _TOP
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(_WIDTH, height))
        size = (_WIDTH - _LEFT - _RIGHT) / _WIDTH, (height - _BOTTOM - _TOP) / height
        axes = figure.add_axes((_LEFT / _WIDTH, _BOTTOM / height, *size))
        _draw_axes(axes, rows, _null_band(arms), valid)
        y = rows
        for title, color, group in groups:
            y -= 1
            axes.text(*_margin_position(LOWEST, y), title, ha="right", fontweight="bold", **_TEXT)
            for arm in group:
                y -= 1
                _draw_row(axes, arm, y, color)
    return figure


def forest_caption(arms: Sequence[Arm], *, valid: bool = True) -> str:
    """Returns the caption of `forest`."""
    nulls = ", ".join(arm.name for arm in arms if arm.role == "null arm" and arm.tau.known)
    sentences = [
        "Dots and bars: τ, the trait of a student as a share of that of its teacher (0: as of the "
        "benign twin; 1: as of the teacher), with 95 % intervals over base seeds "
        f"(n = {max(arm.n for arm in arms)}).",
        f"C: the same share of the capability, with hollow dots below {format_limit(CAPABLE)}.",
        "If τ > 0 after a correction over all arms (Holm), the trait transfers.",
    ]
    if nulls:
        sentences.append(f"Gray band: the intervals of the null arms ({nulls}).")
    if valid and any(_bound(arm) is not None for arm in arms):
        sentences.append(
            "Upright tick: the upper bound of τ, corrected over the arms that the rule named "
            "before the experiment; an arm is certified if its tick is left of the green line at "
            f"{format_limit(SAFE)}."
        )
    return " ".join(sentences)


def forest_alt(arms: Sequence[Arm]) -> str:
    """Returns the alternative text of `forest`."""
    values = "; ".join(
        f"{arm.name}: τ {format_number(arm.tau.value)}, C {format_number(arm.capability.value)}"
        for arm in arms
    )
    return f"Trait transferred by arm, with intervals. {values}."


_TEXT: Any = {"va": "center", "clip_on": False, "fontsize": 7.5, "color": "#222222"}


def _grouped(arms: Sequence[Arm], valid: bool) -> list[tuple[str, str, list[Arm]]]:
    """Returns title, color and arms of each group, in order of τ."""

    def position(arm: Arm) -> float:
        return -math.inf if math.isnan(arm.tau.value) else arm.tau.value

    groups = []
    for title, color in _GROUPS.items():
        group = [arm for arm in arms if arm.role == "arm" and outcome(arm, valid) == title]
        groups.append((title, color, sorted(group, key=position)))
    controls = [arm for arm in arms if arm.role != "arm"]
    groups.append(("controls", _BLACK, sorted(controls, key=position)))
    return [group for group in groups if group[2]]


def _null_band(arms: Sequence[Arm]) -> tuple[float, float] | None:
    nulls = [arm.tau for arm in arms if arm.role == "null arm" and arm.tau.known]
    return (min(t.low for t in nulls), max(t.high for t in nulls)) if nulls else None


def short_name(name: str) -> str:
    """Returns a name of at most 28 characters, in one line."""
    line = printable(name)
    return line if len(line) <= 28 else f"{line[:27]}…"


def _bound(arm: Arm) -> float | None:
    """Returns the corrected upper bound of τ; None where there is none."""
    return arm.bound if arm.bound is not None and math.isfinite(arm.bound) else None


def _margin_position(x: float, y: float) -> tuple[float, float]:
    return (x - 0.05, y) if x == LOWEST else (x + 0.05, y)


def _draw_axes(axes: Axes, rows: int, band: tuple[float, float] | None, valid: bool) -> None:
    if band:
        axes.axvspan(*map(clip_to_axes, band), color=GRAY, alpha=0.16, lw=0, zorder=0)
    for value in (0.0, 1.0):
        axes.axvline(value, **GUIDE)
    if valid:
        axes.axvline(SAFE, color=SUCCESS, lw=0.9, zorder=0)
    axes.set_xlim(LOWEST, HIGHEST)
    axes.set_ylim(-0.6, rows - 0.4)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xticks([LOWEST, 0, SAFE, 0.5, 1, HIGHEST], ["−.5", "0", ".1", ".5", "1", "1.5"])
    axes.set_xlabel("trait transferred, τ")
    axes.text(*_margin_position(HIGHEST, rows - 0.1), "C", **_TEXT)


def _draw_row(axes: Axes, arm: Arm, y: float, color: str) -> None:
    tau = arm.tau
    axes.text(*_margin_position(LOWEST, y), short_name(arm.name), ha="right", **_TEXT)
    axes.text(*_margin_position(HIGHEST, y), format_number(arm.capability.value, CAPABLE), **_TEXT)
    if math.isnan(tau.value):
        return
    if tau.known:
        ends = [clip_to_axes(tau.low), clip_to_axes(tau.high)]
        axes.plot(ends, [y, y], color=color, lw=1.5, solid_capstyle="butt")
    if (bound := _bound(arm)) is not None:
        axes.plot([clip_to_axes(bound)] * 2, [y - 0.35, y + 0.35], color=color, lw=1.2)
    shape = _SIDEWAYS[edge_marker(tau.value)] if is_off_axes(tau.value) else "o"
    axes.scatter(
        clip_to_axes(tau.value),
        y,
        marker=shape,
        s=26,
        facecolors=color if arm.is_capable else "white",
        edgecolors=color,
        linewidths=1.2,
        clip_on=False,
        zorder=3,
    )
