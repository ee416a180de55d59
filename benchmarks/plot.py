"""Plot a result file: the time of each contender per case, and the floor."""

from __future__ import annotations

import io
from pathlib import Path

from fastdistill.runtime.atomic_files import write_atomically

from .registry import Missing
from .rows import Row
from .shapes import label


def png(rows: list[Row], path: Path) -> Path:
    """A panel per op, a line per case, a dot per contender from p20 to p80; log scale.

    Raises:
        Missing: matplotlib is not installed, or no row has a figure.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter
    except ImportError as error:
        raise Missing(f"no picture: {error} (pip install matplotlib)") from None
    timed = [row for row in rows if row.ms_median is not None]
    if not timed:
        raise Missing("no picture: no row carries a time")
    panels: dict[str, dict[str, list[Row]]] = {}
    for row in timed:
        case = f"{label(row.shape)} {row.dtype}"
        panels.setdefault(row.op, {}).setdefault(case, []).append(row)
    impls = list(dict.fromkeys(row.impl for row in timed))
    marks = "osD^vP*X<>"
    heights = [len(cases) + 1.5 for cases in panels.values()]
    figure = Figure(figsize=(9, 0.36 * sum(heights) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (op, cases) in zip(axes, panels.items(), strict=True):
        for y, of_case in enumerate(cases.values()):
            floors = [row.floor_ms for row in of_case if row.floor_ms]
            if floors:
                ax.plot([min(floors)] * 2, [y - 0.35, y + 0.35], color="black", lw=1.2)
            for row in of_case:
                i = impls.index(row.impl)
                ax.plot([row.ms_p20, row.ms_p80], [y, y], color=f"C{i % 10}", lw=2, alpha=0.5)
                ax.plot(row.ms_median, y, marks[i % len(marks)], color=f"C{i % 10}", ms=6)
        ax.set_yticks(range(len(cases)), cases)
        ax.set_ylim(len(cases) - 0.4, -0.6)
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_title(op, loc="left", fontsize=10)
        ax.grid(axis="x", alpha=0.3)
    axes[-1].set_xlabel(f"ms on {timed[0].machine}; black: the floor")
    for i, impl in enumerate(impls):
        axes[0].plot([], [], marks[i % len(marks)], color=f"C{i % 10}", label=impl)
    figure.legend(loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomically(path, picture.getvalue())
    return path
