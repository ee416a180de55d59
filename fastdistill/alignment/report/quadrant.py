"""The quadrant plot: capability recovered (C) against trait transferred (τ)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MultipleLocator

from ...report.number_format import (
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
    style,
    wrap_label,
)
from .arms import CAPABLE, SAFE, Arm

_SIZE = 5.4, 4.0  # inches: 8.5 points are still 8 pixels on a phone
_LABELS = 6  # arms with a name and a color; the others are gray


def quadrant(arms: Sequence[Arm], *, valid: bool = True) -> Figure:
    """Returns C against τ: a small mark per seed, and a large one per arm with both intervals.

    At most six arms have a name and a color: the first, the positive control, and those with a
    verdict. The region of success is shaded in a valid experiment.
    """
    named = labelled(arms)
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        _draw_axes(axes, valid)
        for arm in arms:
            if arm not in named:
                _draw_arm(axes, arm, GRAY, "o")
        for i, arm in enumerate(named):
            _draw_arm(axes, arm, *style(i))
        handles = [_legend_entry(arm, *style(i)) for i, arm in enumerate(named)]
        figure.legend(handles=handles, loc="outside right center")
    return figure


def labelled(arms: Sequence[Arm]) -> list[Arm]:
    """Returns the arms that `quadrant` names, in their order."""

    def rank(i: int) -> tuple[bool, ...]:
        arm = arms[i]
        is_first = i == 0 or arm.role == "positive control"
        return not is_first, not arm.succeeds, not arm.transfers, arm.role != "arm"

    best = sorted(range(len(arms)), key=rank)[:_LABELS]
    return [arms[i] for i in sorted(best)]


def quadrant_caption(*, valid: bool = True) -> str:
    """Returns the caption of `quadrant`."""
    if not valid:
        return "No region is marked as a success, because the experiment is invalid."
    return (
        f"Green: C ≥ {format_limit(CAPABLE)} and τ ≤ {format_limit(SAFE)}, where an arm succeeds "
        "if its whole whisker of τ is below the line."
    )


def quadrant_notes(arms: Sequence[Arm]) -> str:
    """Returns how to read `quadrant`."""
    counts = "; ".join(f"{arm.name}: {len(arm.transfer.per_seed)}" for arm in arms)
    sentences = [
        "Each small mark is one seed (a student of U and its benign twin), each large mark an arm. "
        "Whiskers are 95 % intervals: bootstrap of base seeds together with their student seeds "
        "and prompts; n counts base seeds. An arm with one base seed has no interval. "
        f"Open triangles mark values outside the axes. Seeds drawn: {counts}."
    ]
    if len(arms) > _LABELS:
        sentences.append(f"Gray: the {len(arms) - _LABELS} arms without a name.")
    undefined = sum(
        math.isnan(seed.capability + seed.tau) for arm in arms for seed in arm.transfer.per_seed
    )
    if undefined:
        sentences.append(f"Not drawn: {undefined} seeds, for which a ratio is undefined.")
    return " ".join(sentences)


def quadrant_alt(arms: Sequence[Arm]) -> str:
    """Returns the alternative text of `quadrant`."""
    positions = "; ".join(
        f"{arm.name} at C {format_number(arm.capability.value)}, τ {format_number(arm.tau.value)}"
        for arm in arms
    )
    return f"Capability recovered against trait transferred. {positions}."


def _draw_axes(axes: Axes, valid: bool) -> None:
    if valid:
        corner, size = (CAPABLE, LOWEST), (HIGHEST - CAPABLE, SAFE - LOWEST)
        axes.add_patch(Rectangle(corner, *size, facecolor=SUCCESS, alpha=0.13, lw=0, zorder=0))
        corner = HIGHEST - 0.03, LOWEST + 0.03
        axes.text(*corner, "DFC succeeds", ha="right", va="bottom", color="#00533b", fontsize=7.5)
    for value in (0.0, 1.0):
        axes.axhline(value, **GUIDE)
        axes.axvline(value, **GUIDE)
    axes.set_xlim(LOWEST, HIGHEST)
    axes.set_ylim(LOWEST, HIGHEST)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MultipleLocator(0.5))
    axes.set_xlabel("capability recovered, C")
    axes.set_ylabel("trait transferred, τ")


def _draw_arm(axes: Axes, arm: Arm, color: str, shape: str) -> None:
    for seed in arm.transfer.per_seed:
        _draw_mark(
            axes, seed.capability, seed.tau, shape, s=13, color=color, alpha=0.6, linewidths=0.7
        )
    x, y = arm.capability, arm.tau
    if math.isnan(x.value) or math.isnan(y.value):
        return
    whiskers: Any = dict(color=color, lw=1.5, zorder=3, solid_capstyle="butt")
    if x.known:
        axes.plot([x.low, x.high], [clip_to_axes(y.value)] * 2, **whiskers)
    if y.known:
        axes.plot([clip_to_axes(x.value)] * 2, [y.low, y.high], **whiskers)
    _draw_mark(axes, x.value, y.value, shape, s=62, color=color, edgecolors="white", zorder=4)


def _draw_mark(axes: Axes, x: float, y: float, shape: str, *, color: str, **options: Any) -> None:
    """Draws a mark, or an open triangle at the edge for a point outside the axes."""
    if is_off_axes(x) or is_off_axes(y):
        sideways = "<" if x < LOWEST else ">"
        open_one = options | dict(facecolors="white", edgecolors=color, alpha=1.0, linewidths=1.1)
        open_one["s"], shape = max(options["s"], 24), edge_marker(y) if is_off_axes(y) else sideways
        axes.scatter(clip_to_axes(x), clip_to_axes(y), marker=shape, clip_on=False, **open_one)
    else:
        axes.scatter(x, y, marker=shape, **({"facecolors": color, "edgecolors": color} | options))


def _legend_entry(arm: Arm, color: str, shape: str) -> Line2D:
    drawn = ", not drawn" if math.isnan(arm.capability.value + arm.tau.value) else ""
    label = "\n".join([*wrap_label(arm.name, 18), f"n = {arm.n}{drawn}"])
    return Line2D([], [], ls="", marker=shape, color=color, label=label)
