"""The demo's report: a figure, a table and limitations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from ....report import Report
from ....report.number_format import COLORS, RC
from ....runtime.intervals import Estimate
from .result import ARMS, METRICS, DemoResult

_COLOR = dict(zip(ARMS, COLORS, strict=False))
_HEADER = ("held-out text", "teacher", "distilled", "labels only", "difference")


def table_rows(result: DemoResult) -> list[tuple[str, ...]]:
    """Return the cells of the result table: values with half the width of their intervals."""
    rows = []
    for name, metric in METRICS.items():
        cells = [
            result.estimates.get(f"{name}/{column}") for column in ("teacher", *ARMS, "difference")
        ]
        texts = [cell_of(cell, name, signed=i == 3) for i, cell in enumerate(cells)]
        rows.append((metric.title, *texts))
    return rows


def verdict(result: DemoResult) -> str:
    """Return the conclusion in one sentence."""
    difference = result.estimates["nll/difference"]
    gain = -difference.value
    if not difference.known:
        return (
            "One seed gives no interval and no conclusion. The distilled student's held-out NLL is "
            f"{abs(gain):.3f} nats {'lower' if gain > 0 else 'higher'}."
        )
    interval = f"95 % interval {difference.low:+.3f} to {difference.high:+.3f}, n = {difference.n}"
    if not difference.excludes(0.0):
        return f"No clear difference in held-out NLL: {difference.value:+.3f} nats ({interval})."
    side = "predicts held-out text better" if gain > 0 else "predicts held-out text worse"
    return (
        f"The distilled student {side} than its twin trained on labels: {difference.value:+.3f} "
        f"nats per token ({interval} seeds)."
    )


def print_table(result: DemoResult, console: Any) -> None:
    """Print the result table and the conclusion."""
    print_rows(console, "fastdistill demo", _HEADER, table_rows(result), verdict(result))


def print_rows(
    console: Any,
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    conclusion: str,
) -> None:
    """Print a table and a sentence."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for index, name in enumerate(header):
        # Numbers are never cut: in 80 columns, the names of the rows wrap.
        table.add_column(name, justify="right" if index else "left", no_wrap=index > 0)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(conclusion, soft_wrap=True)


def demo_report(result: DemoResult) -> Report:
    """Return the report page."""
    facts = result.facts["setting"]
    report = Report("Distillation compared with labels, measured on this machine", verdict(result))
    with matplotlib.rc_context(RC):
        report.picture(
            _curves(result),
            alt="Training NLL over steps, for every seed of both kinds of student",
            caption="Training NLL by step, one line per seed.",
        )
    report.table(_HEADER, table_rows(result), caption=_caption(result))
    with report.folded("What was compared"):
        report.paragraph(
            f"Text: {facts['text']}. Per seed, two students of {facts['student_parameters']:,} "
            "parameters start from the same weights and read the same "
            f"{facts['train_tokens']:,} tokens in the same order, {facts['steps']} steps each. One "
            f"learns from the top {facts['k']} tokens of a teacher with "
            f"{facts['teacher_parameters']:,} parameters ({facts['teacher']}), by forward KL with "
            "the remaining mass as one additional outcome; the other learns from labels. The "
            "teacher's answers are computed once and read from a cache, which stores their "
            "log-probabilities in fp16."
        )
        seconds = {arm: result.estimates[f"train_seconds/{arm}"].value for arm in ARMS}
        report.paragraph(
            f"Training one student took {seconds['distilled']:.1f} s with distillation and "
            f"{seconds['labels only']:.1f} s on labels, and the cache of the teacher's answers "
            f"{result.cache_seconds:.1f} s. Total: {result.seconds:.0f} s.",
            soft=True,
        )
    with report.folded("What this does not show"):
        report.paragraph(
            "The demo shows what a teacher's top k adds at equal steps on equal text, on held-out "
            f"{'modules' if facts['text'].startswith('Python') else 'files'} that neither teacher "
            "nor students were trained on. It does not show that distillation is free (the teacher "
            "was trained on more text, and its answers cost a forward pass), that the gap persists "
            "in longer training, or anything about large models."
        )
    report.reproduction(
        "How to repeat it",
        result.facts["command"],
        f"{result.facts['machine']}.",
        result.facts["versions"],
    )
    return report


def _caption(result: DemoResult) -> str:
    facts = result.facts["setting"]
    n = result.estimates["nll/difference"].n
    return (
        f"{facts['held_out_tokens']:,} tokens of {facts['held_out_documents']} held-out documents. "
        f"± is half of a 95 % interval: Student's t over {n} seeds for students and their paired "
        "difference, bootstrap over documents for the teacher."
    )


def cell_of(estimate: Estimate | None, metric: str, *, signed: bool = False) -> str:
    """Return a value with half the width of its interval, in nats or percent."""
    if estimate is None:
        return "—"
    share = metric in ("top1", "agreement")
    digits, factor, unit = (1, 100.0, " %") if share else (3, 1.0, "")
    text = f"{estimate.value * factor:{'+' if signed else ''}.{digits}f}"
    if estimate.known:
        text += f" ± {(estimate.high - estimate.low) / 2 * factor:.{digits}f}"
    return text + unit


def _curves(result: DemoResult) -> Figure:
    figure = Figure(figsize=(7, 3))
    axes = figure.subplots()
    for run in result.runs:
        steps = [entry["step"] for entry in run.history]
        nll = [entry["nll"] for entry in run.history]
        label = run.arm if run.seed == 0 else None
        axes.plot(steps, nll, color=_COLOR[run.arm], lw=1, alpha=0.75, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("training NLL (nats per token)")
    axes.legend()
    return figure
