"""The heat map of audits: the AUROC of every audit on every arm."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ...report.number_format import RC, format_number
from ..audits.catalog import marked
from .arms import SEEDS, Arm
from .audit_scores import AuditRow
from .forest import short_name

_WIDTH, _ROW, _TOP, _LEFT = 5.4, 0.2, 0.95, 1.6  # inches


def heat_map(arms: Sequence[Arm], teachers: Sequence[AuditRow] = ()) -> Figure:
    """Returns AUROC by arm and audit; bold where the interval is above one half.

    The first row is that of the teachers themselves.
    """
    plotted = _rows(arms, teachers)
    audits = list(dict.fromkeys(row.name for _, rows in plotted for row in rows))
    values = np.full((len(plotted), len(audits)), math.nan)
    height = _ROW * len(plotted) + _TOP + 0.05
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(_WIDTH, height))
        size = (_WIDTH - _LEFT - 0.3) / _WIDTH, _ROW * len(plotted) / height
        axes = figure.add_axes((_LEFT / _WIDTH, 0.05 / height, *size))
        for y, (_, rows) in enumerate(plotted):
            for row in rows:
                x = audits.index(row.name)
                values[y, x] = row.auroc.value
                known = row.incriminates and row.auroc.n >= SEEDS
                axes.text(
                    x + 0.5,
                    y + 0.52,
                    format_number(row.auroc.value),
                    ha="center",
                    va="center",
                    fontsize=7,
                    fontweight="bold" if known else "normal",
                    color="#111111",
                )
        axes.pcolormesh(values, cmap="PuOr_r", vmin=-0.2, vmax=1.2, edgecolors="white", lw=0.8)
        axes.invert_yaxis()
        axes.xaxis.tick_top()
        names = [short_name(marked(name)) for name in audits]
        axes.set_xticks(np.arange(len(audits)) + 0.5, names, rotation=35, ha="left")
        axes.set_yticks(np.arange(len(plotted)) + 0.5, [short_name(name) for name, _ in plotted])
        axes.tick_params(length=0, labelsize=7.5)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure


def _rows(
    arms: Sequence[Arm], teachers: Sequence[AuditRow]
) -> list[tuple[str, Sequence[AuditRow]]]:
    named = [("U itself", teachers), *((arm.name, arm.audits) for arm in arms)]
    return [(name, rows) for name, rows in named if rows]


def heat_map_alt(arms: Sequence[Arm], teachers: Sequence[AuditRow] = ()) -> str:
    """Returns the alternative text of `heat_map`."""
    values = "; ".join(
        f"{name}: {', '.join(f'{r.name} {format_number(r.auroc.value)}' for r in rows)}"
        for name, rows in _rows(arms, teachers)
    )
    return f"AUROC of audits by arm. {values}."
