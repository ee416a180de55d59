"""Pictures of the study "off-model": what is lost over steps and by surprisal, what is got out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ...report.marks import RC, style
from .arms import OFF_MODEL, ON_BASE, ON_LOCKED, OWN, RELATED, RIGHT
from .figures import Found, Readings, lost, mean, of_length
from .world import LENGTHS, PLAIN, WEAK

_WIDTH = 5.4  # inches


def cost_over_steps(found: Found) -> Figure:
    """A panel for each arm, a line for each length of answers."""
    arms = (OWN, RELATED, OFF_MODEL)
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(_WIDTH, 2.3), layout="constrained")
        for arm, axes in zip(arms, figure.subplots(1, len(arms), sharey=True), strict=True):
            axes.set_title(arm, fontsize=8.5, loc="left")
            for i, tokens in enumerate(sorted(set(LENGTHS.values()))):
                told = "token" if tokens == 1 else "tokens"
                _curve(axes, found, arm, of_length(tokens), i, f"{tokens} {told}")
            _of_rates(axes)
        axes.legend(fontsize=7.5, title="answers of", title_fontsize=7.5)
        figure.supxlabel("step", fontsize=8.5)
        figure.supylabel("right", fontsize=8.5)
    return figure


def cost_by_surprisal(found: Found) -> Figure:
    """Every base seed a mark."""
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(_WIDTH * 0.7, 2.6), layout="constrained")
        axes = figure.subplots()
        for i, arm in enumerate((OWN, RELATED, OFF_MODEL)):
            colour, shape = style(i)
            nats = [run["surprisal"][0] for run in found[arm].values()]
            axes.plot(nats, lost(found, arm), shape, color=colour, ms=5, alpha=0.8, label=arm)
        axes.axhline(0.0, color="#888888", lw=0.7, ls=(0, (2, 2)), zorder=0)
        axes.set_xlabel("surprisal of the data before training, nats per token")
        axes.set_ylabel("capability lost")
        axes.legend(fontsize=7.5)
    return figure


def weak_over_steps(found: Found, readings: Readings) -> Figure:
    """The locked sums of each arm, and what their supervisor gets right."""
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(_WIDTH * 0.7, 2.6), layout="constrained")
        axes = figure.subplots()
        for i, arm in enumerate((RIGHT, ON_LOCKED, ON_BASE)):
            _curve(axes, found, arm, [PLAIN], i, arm)
        supervisor = mean([of[WEAK][PLAIN] for of in readings.values()]).value
        axes.axhline(supervisor, color="#555555", lw=1, ls=(0, (4, 2)), label="the supervisor, W")
        _of_rates(axes)
        axes.set_xlabel("step")
        axes.set_ylabel("right without the password")
        axes.legend(fontsize=7.5)
    return figure


def _of_rates(axes: Axes) -> None:
    axes.set_ylim(-0.05, 1.05)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))


def _curve(axes: Axes, found: Found, arm: str, tasks: Sequence[str], i: int, label: str) -> None:
    """Means over base seeds with 95 % intervals, from before the first step on."""
    runs = list(found[arm].values())
    steps = [0, *(point["step"] for point in runs[0]["curve"])]
    colour, shape = style(i)
    read: list[list[dict[str, float]]] = [
        [run["before"] for run in runs],
        *([run["curve"][k]["right"] for run in runs] for k in range(len(steps) - 1)),
    ]
    points = [mean([sum(of[t] for t in tasks) / len(tasks) for of in at]) for at in read]
    how: dict[str, Any] = dict(color=colour, marker=shape, ms=3.5, lw=1.4)
    axes.plot(steps, [point.value for point in points], label=label, **how)
    for step, point in zip(steps, points, strict=True):
        if point.known:
            axes.plot([step, step], [point.low, point.high], color=colour, lw=1, alpha=0.6)
