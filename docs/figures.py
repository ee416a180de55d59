"""Draws the figures of the pages about losses: python docs/figures.py [folder]."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

import fastdistill as fd

TEACHER, STUDENT = "#4269d0", "#efb118"
SETTINGS = {
    "svg.hashsalt": "fastdistill",
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw_tails(path: Path) -> None:
    """The outcomes that each tail compares, for K = 3 tokens of five."""
    p, q = torch.tensor([0.45, 0.25, 0.1, 0.12, 0.08]), torch.tensor([0.3, 0.2, 0.2, 0.16, 0.14])
    ids = ["A", "B", "C"]
    inside = [p[:3], q[:3]]
    panels = {
        "bucket": ([torch.cat([x[:3], x[3:].sum()[None]]) for x in (p, q)], [*ids, "rest"]),
        "truncate": (inside, ids),
        "renorm_teacher": ([p[:3] / p[:3].sum(), q[:3]], ids),
        "renorm_both": ([x / x.sum() for x in inside], ids),
    }
    figure, axes = plt.subplots(1, 4, figsize=(9, 2.4), sharey=True, layout="constrained")
    for axis, (tail, (sides, names)) in zip(axes, panels.items(), strict=True):
        _draw_pair(axis, sides, names)
        axis.set_title(f'"{tail}"')
    axes[0].set_ylabel("probability")
    axes[-1].legend(["teacher", "student"], frameon=False)
    _save(figure, path)


def _draw_pair(axis: Axes, sides: list[torch.Tensor], names: list[str]) -> None:
    places = torch.arange(len(names))
    for side, color, offset in zip(sides, (TEACHER, STUDENT), (-0.2, 0.2), strict=True):
        axis.bar(places + offset, side, 0.4, color=color)
    axis.set_xticks(places, names)


def draw_support(path: Path) -> None:
    """The reverse KL that each support sees, relative to the whole vocabulary."""
    generator = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = (torch.randn(256, 32, generator=generator) for _ in "st")
    weight, teacher_weight = (torch.randn(1000, 32, generator=generator) / 2 for _ in "st")
    options: dict[str, Any] = {"divergence": "reverse_kl"}
    heads = (hidden, weight, teacher_hidden, teacher_weight)
    whole = fd.linear_distill_loss(*heads, **options)
    sizes = [2, 4, 8, 16, 32, 64, 128]
    supports = {"teacher": "teacher's top k", "student": "student's top k", "union": "both"}
    curves = {
        name: [
            float(fd.linear_distill_loss(*heads, k=k, support=support, **options) / whole)
            for k in sizes
        ]
        for support, name in supports.items()
    }
    figure, axis = plt.subplots(figsize=(5.4, 3), layout="constrained")
    for (name, values), color in zip(curves.items(), (TEACHER, STUDENT, "#3ca951"), strict=True):
        axis.plot(sizes, values, "o-", color=color, label=name)
    axis.set(xscale="log", xlabel="k", ylabel="reverse KL / whole vocabulary", ylim=(0, 1.02))
    axis.set_xticks(sizes, [str(k) for k in sizes])
    axis.minorticks_off()
    axis.legend(frameon=False)
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    print(path)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "losses"
    with plt.rc_context(SETTINGS):
        draw_tails(folder / "tails.svg")
        draw_support(folder / "support.svg")
