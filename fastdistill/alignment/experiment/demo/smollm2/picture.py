"""Curves of held-out nats per token, for the report of the demo and the picture of the README."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from .....report.number_format import COLORS, GRAY, GUIDE, SHAPES
from .....runtime.intervals import Estimate


class Curve(NamedTuple):
    """The mean over seeds at each x, with its interval where there is one."""

    name: str
    x: Sequence[float]
    estimates: Sequence[Estimate]


class Panel(NamedTuple):
    title: str
    curves: Sequence[Curve]
    teacher: float


def draw(panels: Sequence[Panel], *, x: str, size: tuple[float, float] = (7, 3)) -> Figure:
    """Return a figure with a panel for each kind of text; lower is better."""
    figure = Figure(figsize=size, layout="constrained")
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, panel in zip(row, panels, strict=True):
        _draw(axes, panel)
        axes.set_xlabel(x)
    row[0].set_ylabel("nats per token")
    handles, names = row[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    return figure


def _draw(axes: Any, panel: Panel) -> None:
    for i, curve in enumerate(panel.curves):
        values = [estimate.value for estimate in curve.estimates]
        errors = [
            (estimate.high - estimate.low) / 2 if estimate.known else 0.0
            for estimate in curve.estimates
        ]
        style = {"color": COLORS[i], "marker": SHAPES[i], "ms": 4, "capsize": 2, "lw": 1.4}
        axes.errorbar(curve.x, values, yerr=errors, label=curve.name, **style)
    axes.axhline(panel.teacher, **GUIDE)
    axes.annotate(
        "teacher",
        (0.99, panel.teacher),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        color=GRAY,
    )
    axes.set_title(panel.title)
    axes.set_xlim(left=0)
