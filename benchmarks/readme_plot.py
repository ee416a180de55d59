"""python -m benchmarks plot: the picture of docs/benchmarks/cpu.md, from the committed rows."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, NamedTuple

from fastdistill.runtime.atomic_files import write_atomically

from .registry import Missing
from .rows import RESULTS

PICTURE = RESULTS.parents[1] / "docs" / "pictures" / "loss.svg"
PEER, OURS = "#9aa4b2", "#2563eb"


class Group(NamedTuple):
    """Bars of one measurement, relative to the first.

    bars: (name in the picture, `impl` of the row).
    """

    title: str
    file: str
    op: str
    dtype: str
    bars: tuple[tuple[str, str], ...]


GROUPS = (
    Group(
        "Loss and both gradients: 1024 tokens, bf16 head of 151,936 × 1024",
        "sparse_loss",
        "topk_loss",
        "bfloat16",
        (
            ("PyTorch, eager", "eager"),
            ("PyTorch, compiled", "compiled"),
            ("fastdistill, fused", "torch fused"),
            ("fastdistill, recompute", "torch recompute"),
        ),
    ),
    Group(
        "Training step with stored top-64 answers: 2048 tokens, fp32",
        "train_step",
        "train_step",
        "float32",
        (
            ("transformers, logits", "materialised"),
            ("fastdistill", "ours"),
            ("fastdistill, recompute", "ours, recompute"),
        ),
    ),
    Group(
        "Training step with a teacher in memory and TRL's loss: 2048 tokens, fp32",
        "train_step",
        "train_step_teacher",
        "float32",
        (("TRL 1.16, GKDTrainer", "TRL GKDTrainer"), ("fastdistill", "ours")),
    ),
)


def shares(group: Group, results: Path = RESULTS) -> list[tuple[float, float]]:
    """Return time and memory of each bar relative to the first.

    Raises:
        ValueError: the results have no row of a bar.
    """
    path = results / f"{group.file}.json"
    figures = {
        row["impl"]: (row["ms_median"], row["peak_mb"])
        for row in json.loads(path.read_text(encoding="utf-8"))
        if (row["op"], row["dtype"]) == (group.op, group.dtype)
    }
    absent = [impl for _, impl in group.bars if impl not in figures]
    if absent:
        raise ValueError(
            f"results: expected rows of {group.op} by {', '.join(absent)}, got none in {path}; "
            f"run python -m benchmarks {group.file}"
        )
    time, memory = figures[group.bars[0][1]]
    return [(figures[impl][0] / time, figures[impl][1] / memory) for _, impl in group.bars]


def write(path: Path = PICTURE, results: Path = RESULTS) -> Path:
    """Draw time and memory of every group as SVG, and return the path.

    Raises:
        Missing: matplotlib is not installed. ValueError: a row is not there.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Missing(f"no picture: {error} (pip install matplotlib)") from None
    heights = [len(group.bars) for group in GROUPS]
    figure = Figure(figsize=(8, 4.9), layout="constrained")
    FigureCanvasSVG(figure)
    panels: Any = figure.subfigures(len(GROUPS), 1, height_ratios=[n + 1.9 for n in heights])
    for group, panel in zip(GROUPS, panels, strict=True):
        panel.suptitle(group.title, x=0.01, ha="left", fontsize=10)
        left, right = panel.subplots(1, 2, sharey=True)
        relative = shares(group, results)
        for column, (axis, quantity) in enumerate(((left, "time"), (right, "memory"))):
            axis.set_title(f"{quantity}, relative", loc="left", fontsize=8, color="#6b7280")
            for y, ((name, _), pair) in enumerate(zip(group.bars, relative, strict=True)):
                value = pair[column]
                color = OURS if name.startswith("fastdistill") else PEER
                axis.barh(y, value, color=color, height=0.62)
                axis.text(value + 0.015, y, f"{value:.2f}", va="center", fontsize=8)
            axis.set_xlim(0, 1.5)
            axis.set_xticks([])
            axis.spines[:].set_visible(False)
            axis.tick_params(length=0, labelsize=8.5)
        left.set_yticks(range(len(group.bars)), [name for name, _ in group.bars])
        left.set_ylim(len(group.bars) - 0.5, -0.5)
    picture = io.BytesIO()
    options: Any = {"svg.fonttype": "none", "svg.hashsalt": "fastdistill"}
    with matplotlib.rc_context(options):
        figure.savefig(picture, format="svg", metadata={"Date": None})
    write_atomically(path, picture.getvalue())
    return path
