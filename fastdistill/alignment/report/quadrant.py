"""The quadrant plot: capability recovered (C) against trait transferred (τ)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
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

_WIDTH, _HEIGHT = 5.4, 4.0  # inches: 8.5 points are still 8 pixels on a phone
_LEFT, _RIGHT, _BOTTOM, _TOP = 0.6, 1.6, 0.48, 0.12  # margins; the arms' names are on the right
_LINE = 0.145  # inches from one line of a name to the next
_LABELS = 6  # arms with a name and a color; the others are gray


def quadrant(arms: Sequence[Arm], *, valid: bool = True) -> Figure:
    """Returns C against τ: a small mark per seed, and a large one per arm with both intervals.

    At most six arms have a name and a color: the first, the positive control, and those with a
    verdict. The region of success is shaded in a valid experiment.
    """
    named = labelled(arms)
    labels = [[*wrap_label(arm.name, 18), f"n = {arm.n}"] for arm in named]
    room = _LINE * sum(len(lines) + 0.6 for lines in labels)
    height = max(_HEIGHT, room + _BOTTOM + _TOP)
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(_WIDTH, height))
        size = (_WIDTH - _LEFT - _RIGHT) / _WIDTH, (height - _BOTTOM - _TOP) / height
        axes = figure.add_axes((_LEFT / _WIDTH, _BOTTOM / height, *size))
        _draw_axes(axes, valid)
        for arm in arms:
            if arm not in named:
                _draw_arm(axes, arm, GRAY, "o")
        for i, arm in enumerate(named):
            _draw_arm(axes, arm, *style(i))
        _draw_labels(axes, named, labels, (HIGHEST - LOWEST) * _LINE / (height - _BOTTOM - _TOP))
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
        f"Seeds drawn: {counts}."
    ]
    if len(arms) > _LABELS:
        sentences.append(f"Gray: the {len(arms) - _LABELS} arms without a name.")
    off_axes = [
        f"{arm.name} (C {format_number(seed.capability)}, τ {format_number(seed.tau)})"
        for arm in arms
        for seed in arm.transfer.per_seed
        if is_off_axes(seed.capability) or is_off_axes(seed.tau)
    ]
    if off_axes:
        omitted = f" and {len(off_axes) - 6} more" if len(off_axes) > 6 else ""
        sentences.append(
            f"Open triangles mark seeds outside the axes: {'; '.join(off_axes[:6])}{omitted}."
        )
    undefined = sum(
        math.isnan(seed.capability) or math.isnan(seed.tau)
        for arm in arms
        for seed in arm.transfer.per_seed
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


def _draw_labels(axes: Axes, arms: Sequence[Arm], labels: list[list[str]], line: float) -> None:
    """Draws the names to the right of the plot, in the order of τ and close to their marks."""
    points = [(arm.capability.value, arm.tau.value) for arm in arms]
    drawn = [i for i, (c, tau) in enumerate(points) if not math.isnan(c + tau)]
    absent = [i for i in range(len(arms)) if i not in drawn]
    order = absent + sorted(drawn, key=lambda i: points[i][1])
    heights = [line * (len(labels[i]) + 0.6) for i in order]
    preferred = [clip_to_axes(points[i][1]) if i in drawn else LOWEST for i in order]
    x = HIGHEST + 0.1
    for i, y in zip(order, place_labels(preferred, heights, LOWEST, HIGHEST), strict=True):
        color, shape = style(i)
        text = "\n".join(labels[i]) + (", not drawn" if i in absent else "")
        axes.scatter(x, y, marker=shape, s=30, color=color, clip_on=False)
        axes.text(x + 0.07, y, text, va="center", color="#222222", linespacing=1.2)
        if i in drawn:
            xs = [clip_to_axes(points[i][0]), HIGHEST, x]
            ys = [clip_to_axes(points[i][1]), y, y]
            axes.plot(xs, ys, color=color, lw=0.7, alpha=0.55, clip_on=False, zorder=1)


def place_labels(
    preferred: Sequence[float], heights: Sequence[float], low: float, high: float
) -> list[float]:
    """Returns centers of boxes of these heights, in ascending order and without overlap.

    They are inside [low, high] where they fit, and close to the preferred centers: runs of touching
    boxes are centered together.
    """
    runs: list[tuple[float, float, int]] = []  # bottom, height, boxes
    for center, height in zip(preferred, heights, strict=True):
        size, boxes = height, 1
        bottom = min(max(center - size / 2, low), max(high - size, low))
        while runs and runs[-1][0] + runs[-1][1] > bottom:
            below = runs.pop()
            middle = (below[0] + below[1] / 2) * below[2] + (bottom + size / 2) * boxes
            size, boxes = size + below[1], boxes + below[2]
            bottom = min(max(middle / boxes - size / 2, low), max(high - size, low))
        runs.append((bottom, size, boxes))
    centers, remaining = [], list(heights)
    for bottom, _, boxes in runs:
        for height in remaining[:boxes]:
            centers.append(bottom + height / 2)
            bottom += height
        remaining = remaining[boxes:]
    return centers
