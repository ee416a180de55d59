"""Figures of a run and their alternative texts: curves, and histograms of token scores.

Lines differ in color, dash and marker, so they can be distinguished with any color vision and in
gray print.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ...runtime.printable import printable
from ..number_format import COLORS, GUIDE, RC, style

_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
_DIVERGED_ABOVE = 1e6  # a larger loss or perplexity is not printed
_LARGEST_DRAWN = 1e12  # values are clipped here, because axes overflow near the largest float
_MOST_MARKED = 30  # lines with at most this many points have markers
_LOG_SCALE_FROM = 20.0  # ratio of largest to smallest value with a logarithmic axis
_RC = RC | {"legend.fontsize": 8, "legend.handlelength": 2.6}


@dataclass(frozen=True, kw_only=True)
class Line:
    """Values over steps."""

    label: str
    points: list[tuple[int, float]]

    @property
    def first(self) -> float:
        return self.points[0][1]

    @property
    def last(self) -> float:
        return self.points[-1][1]


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts below the first edge, between edges, and above the last edge."""

    label: str
    edges: list[float]
    counts: list[int]

    def median(self) -> str:
        """Return the bin that contains the median token, as text."""
        cumulative = list(accumulate(self.counts))
        i = bisect_left(cumulative, cumulative[-1] / 2)
        if i == 0:
            return f"below {self.edges[0]:.2g} nats"
        if i == len(self.edges):
            return f"above {self.edges[-1]:.2g} nats"
        return f"between {self.edges[i - 1]:.2g} and {self.edges[i]:.2g} nats"


class Picture(NamedTuple):
    figure: Figure
    alt: str
    caption: str


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """How a metric is named, formatted and drawn.

    share: in percent. falls: decreases toward 0 during training, so its axis may be logarithmic.
    grounded: the axis starts at 0.
    """

    title: str
    unit: str = ""
    share: bool = False
    falls: bool = False
    grounded: bool = False

    def text(self, value: float) -> str:
        if self.share:
            return f"{value * 100:.1f} %"
        if self.falls and value > _DIVERGED_ABOVE:
            return "> 1e6"
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e12 else f"{value:.4g}"


def curves(quantity: Quantity, lines: Sequence[Line], *, resumed: Sequence[int] = ()) -> Picture:
    """Return a figure of one quantity; `resumed` are the steps at which the run was resumed."""
    with matplotlib.rc_context(_RC):
        figure, axes = _canvas(len(lines))
        for i, line in enumerate(lines):
            steps, values = zip(*line.points, strict=True)
            factor = 100.0 if quantity.share else 1.0
            color, shape = style(i)
            axes.plot(
                steps,
                [min(value * factor, _LARGEST_DRAWN) for value in values],
                label=printable(line.label),
                color=color,
                ls=_DASHES[i % len(_DASHES)],
                lw=1.4,
                marker=shape,
                ms=3.5 if len(steps) <= _MOST_MARKED else 0,
            )
        for step in resumed:
            axes.axvline(step, **GUIDE)
        axes.set_xlabel("step")
        axes.set_ylabel(quantity.unit)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        if len({step for line in lines for step, _ in line.points}) == 1:
            axes.set_xlim(steps[0] - 1, steps[0] + 1)
        if quantity.share or quantity.grounded:
            axes.set_ylim(bottom=0)
        drawn = [value for line in lines for _, value in line.points]
        if quantity.falls and min(drawn) > 0 and max(drawn) / min(drawn) > _LOG_SCALE_FROM:
            axes.set_yscale("log")
            _plain_ticks(axes.yaxis)
        if len(lines) > 1:
            _legend(figure, axes)
    alt = " ".join([f"{quantity.title} over steps.", *(_alt(quantity, line) for line in lines)])
    return Picture(figure, alt, _caption(quantity, lines))


def histogram(title: str, histograms: Sequence[Histogram]) -> Picture:
    """Return a figure of shares of tokens; only the last histogram is filled."""
    with matplotlib.rc_context(_RC):
        figure, axes = _canvas(2)
        for i, bins in enumerate(histograms):
            total, last = sum(bins.counts), i == len(histograms) - 1
            shares = [100.0 * count / total for count in bins.counts]
            color, dash = (COLORS[0], _DASHES[0]) if last else (COLORS[1], _DASHES[1])
            if last:
                axes.stairs(shares, _ends(bins), fill=True, alpha=0.25, color=color)
            label = printable(bins.label)
            axes.stairs(shares, _ends(bins), label=label, lw=1.4, ls=dash, color=color)
        axes.set_xscale("log")
        axes.set_xlim(*_range(histograms))
        _plain_ticks(axes.xaxis)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("nats")
        axes.set_ylabel("% of tokens")
        _legend(figure, axes)
    medians = "; ".join(f"{bins.label}: median {bins.median()}" for bins in histograms)
    caption = f"{title}, median {histograms[-1].median()}"
    return Picture(figure, f"Histogram. {title}. {medians}.", caption)


def _canvas(lines: int) -> tuple[Figure, Axes]:
    rows = (lines + 1) // 2 if lines > 1 else 0
    figure = Figure(figsize=(3.6, 2.3 + 0.17 * rows), layout="constrained")
    return figure, figure.subplots()


def _plain_ticks(axis: Axis) -> None:
    """Label ticks as plain numbers, such as 0.01; within two decades at 2 and 5 too."""
    low, high = axis.get_view_interval()
    is_narrow = high / low < 100
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if is_narrow else (1.0,), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, axes: Axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=2)


def _alt(quantity: Quantity, line: Line) -> str:
    text, points = quantity.text, line.points
    if len(points) == 1:
        return f"{line.label}: {text(line.last)} at step {points[0][0]}."
    values = [value for _, value in points]
    return (
        f"{line.label}: from {text(line.first)} at step {points[0][0]} to {text(line.last)} at "
        f"step {points[-1][0]}, between {text(min(values))} and {text(max(values))}."
    )


def _caption(quantity: Quantity, lines: Sequence[Line]) -> str:
    if len(lines) > 2:
        return quantity.title
    line = lines[-1]
    prefix = f"{quantity.title}, {line.label} " if len(lines) > 1 else f"{quantity.title}, "
    if len(line.points) == 1 or quantity.text(line.first) == quantity.text(line.last):
        return prefix + quantity.text(line.last)
    return f"{prefix}{quantity.text(line.first)} → {quantity.text(line.last)}"


def _ends(bins: Histogram) -> list[float]:
    """Return the edges with an outer edge for the first and the last bin."""
    low, high = bins.edges[:2], bins.edges[-2:]
    return [low[0] * low[0] / low[1], *bins.edges, high[1] * high[1] / high[0]]


def _range(histograms: Sequence[Histogram]) -> tuple[float, float]:
    """Return the range of scores that have tokens."""
    lows, highs = [], []
    for bins in histograms:
        ends = _ends(bins)
        non_empty = [i for i, count in enumerate(bins.counts) if count]
        lows.append(ends[max(non_empty[0] - 1, 0)])
        highs.append(ends[min(non_empty[-1] + 2, len(ends) - 1)])
    return min(lows), max(highs)
