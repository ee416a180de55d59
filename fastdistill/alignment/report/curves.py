"""Figure of capability recovered (C) and trait transferred (τ) over training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ...report.number_format import (
    COLORS,
    GUIDE,
    HIGHEST,
    LOWEST,
    RC,
    SUCCESS,
    clip_to_axes,
    edge_marker,
    format_limit,
    is_off_axes,
    wrap_label,
)
from ...runtime.intervals import Estimate
from .arms import CAPABLE, SAFE, SEEDS, Arm

_WIDTH, _PANEL = 5.4, 1.75  # inches, of the picture and of the height of a row of arms
_C: Any = dict(color=COLORS[0], marker="o", ls="-", lw=1.4, ms=3.5)
_TAU: Any = dict(color=COLORS[1], marker="s", ls=(0, (4, 1.5)), lw=1.4, ms=3.5)


def curves(arms: Sequence[Arm], *, valid: bool = True) -> Figure:
    """Returns a panel per arm with checkpoints; safe windows are shaded in a valid experiment.

    Raises:
        ValueError: no arm has checkpoints.
    """
    plotted = [arm for arm in arms if arm.curve]
    if not plotted:
        raise ValueError(
            "students: expected checkpoints in the `curve` of an arm's students, got none. "
            "Measure students while they train, or omit this figure"
        )
    rows, columns = (len(plotted) + 1) // 2, min(len(plotted), 2)
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(_WIDTH, _PANEL * rows + 0.45), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False, sharey=True, sharex=True)
        for i, axes in enumerate(panels.flat):
            axes.set_visible(i < len(plotted))
        for arm, axes in zip(plotted, panels.flat, strict=False):
            _panel(axes, arm, valid)
            axes.tick_params(labelbottom=True)
        figure.supxlabel("step", fontsize=8.5, color="#333333")
        handles = [
            Line2D([], [], label="C, capability", **_C),
            Line2D([], [], label="τ, trait", **_TAU),
            Patch(facecolor=SUCCESS, alpha=0.2, label="safe window"),
        ]
        figure.legend(handles=handles if valid else handles[:2], loc="outside upper left", ncols=3)
    return figure


def curves_caption(*, valid: bool = True) -> str:
    """Returns the caption of `curves`."""
    if not valid:
        return "No safe window is shown, because the experiment is invalid."
    return (
        f"Safe window: the longest run of checkpoints with C ≥ {format_limit(CAPABLE)} and "
        f"the upper bound of τ ≤ {format_limit(SAFE)}, shown from {SEEDS} base seeds on."
    )


def curves_alt(arms: Sequence[Arm]) -> str:
    """Returns the alternative text of `curves`."""
    phrases = [
        f"{arm.name}: no safe window"
        if arm.window is None
        else f"{arm.name}: safe from step {arm.window.first} to {arm.window.last}"
        for arm in arms
        if arm.curve
    ]
    return f"Capability and trait over steps. {'; '.join(phrases)}."


def _panel(axes: Axes, arm: Arm, valid: bool) -> None:
    axes.set_title("\n".join(wrap_label(arm.name, 34, 2)))
    for value in (0.0, 1.0):
        axes.axhline(value, **GUIDE)
    steps = [point.step for point in arm.curve]
    if valid and arm.window is not None and arm.n >= SEEDS:
        margin = (steps[-1] - steps[0]) / 60 or 0.1  # so that a single checkpoint is visible
        first, last = arm.window.first - margin, arm.window.last + margin
        axes.axvspan(first, last, color=SUCCESS, alpha=0.16, lw=0, zorder=0)
    _line(axes, steps, [point.capability for point in arm.curve], _C)
    _line(axes, steps, [point.tau for point in arm.curve], _TAU)
    axes.set_ylim(LOWEST, HIGHEST)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10], integer=True))


def _line(axes: Axes, steps: list[int], values: list[Estimate], line_style: dict[str, Any]) -> None:
    axes.plot(steps, [np.nan if is_off_axes(v.value) else v.value for v in values], **line_style)
    for step, v in zip(steps, values, strict=True):
        if v.known:
            axes.plot([step, step], [v.low, v.high], color=line_style["color"], lw=1, alpha=0.7)
        if is_off_axes(v.value):
            axes.plot(
                step,
                clip_to_axes(v.value),
                marker=edge_marker(v.value),
                mfc="white",
                mec=line_style["color"],
                clip_on=False,
            )
