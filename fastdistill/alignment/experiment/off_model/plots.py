"""Figures of the off-model study: accuracy over steps and loss by surprisal."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ....report.number_format import GUIDE, RC, style
from ...statistics import mean_of_units
from .analysis import Readings, RunsByArm, capability_drop, tasks_of_length
from .arms import OFF_MODEL, ON_BASE, ON_LOCKED, OWN, RELATED, RIGHT
from .world import LENGTHS, PLAIN, WEAK

_WIDTH = 5.4  # inches


def cost_over_steps(by_arm: RunsByArm) -> Figure:
    """Plot accuracy over steps: one panel per arm, one line per answer length."""
    arms = (OWN, RELATED, OFF_MODEL)
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(_WIDTH, 2.3), layout="constrained")
        for arm, axes in zip(arms, figure.subplots(1, len(arms), sharey=True), strict=True):
            axes.set_title(arm)
            for i, tokens in enumerate(sorted(set(LENGTHS.values()))):
                unit = "token" if tokens == 1 else "tokens"
                _curve(axes, by_arm, arm, tasks_of_length(tokens), i, f"{tokens} {unit}")
            _of_rates(axes)
        axes.legend(fontsize=7.5, title="answers of", title_fontsize=7.5)
        figure.supxlabel("step", fontsize=8.5)
        figure.supylabel("accuracy", fontsize=8.5)
    return figure


def cost_by_surprisal(by_arm: RunsByArm) -> Figure:
    """Plot the capability loss over surprisal, one mark per base seed."""
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(_WIDTH * 0.7, 2.6), layout="constrained")
        axes = figure.subplots()
        for i, arm in enumerate((OWN, RELATED, OFF_MODEL)):
            color, shape = style(i)
            nats = [run["surprisal"][0] for run in by_arm[arm].values()]
            axes.plot(
                nats, capability_drop(by_arm, arm), shape, color=color, ms=5, alpha=0.8, label=arm
            )
        axes.axhline(0.0, **GUIDE)
        axes.set_xlabel("surprisal of the data before training, nats per token")
        axes.set_ylabel("capability lost")
        axes.legend(fontsize=7.5)
    return figure


def weak_over_steps(by_arm: RunsByArm, readings: Readings) -> Figure:
    """Plot the accuracy on locked sums of each arm and of the supervisor."""
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(_WIDTH * 0.7, 2.6), layout="constrained")
        axes = figure.subplots()
        for i, arm in enumerate((RIGHT, ON_LOCKED, ON_BASE)):
            _curve(axes, by_arm, arm, [PLAIN], i, arm)
        supervisor = mean_of_units([reading[WEAK][PLAIN] for reading in readings.values()]).value
        axes.axhline(supervisor, color="#555555", lw=1, ls=(0, (4, 2)), label="the supervisor, W")
        _of_rates(axes)
        axes.set_xlabel("step")
        axes.set_ylabel("accuracy without the password")
        axes.legend(fontsize=7.5)
    return figure


def _of_rates(axes: Axes) -> None:
    axes.set_ylim(-0.05, 1.05)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))


def _curve(
    axes: Axes, by_arm: RunsByArm, arm: str, tasks: Sequence[str], i: int, label: str
) -> None:
    """Plot means over base seeds with 95 % intervals, from step 0."""
    runs = list(by_arm[arm].values())
    steps = [0, *(point["step"] for point in runs[0]["curve"])]
    color, shape = style(i)
    read = [
        [run["before"] for run in runs],
        *([run["curve"][k]["right"] for run in runs] for k in range(len(steps) - 1)),
    ]
    points = [
        mean_of_units([sum(reading[t] for t in tasks) / len(tasks) for reading in readings_at_step])
        for readings_at_step in read
    ]
    values = [point.value for point in points]
    axes.plot(steps, values, label=label, color=color, marker=shape, ms=3.5, lw=1.4)
    for step, point in zip(steps, points, strict=True):
        if point.known:
            axes.plot([step, step], [point.low, point.high], color=color, lw=1, alpha=0.6)
