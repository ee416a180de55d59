"""The demo's report: a table, three figures and limitations."""

from __future__ import annotations

from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ....report import Report
from ....report.number_format import COLORS, GRAY, RC, wrap_label
from ....runtime.intervals import Estimate
from ...report.audit_page import cell
from .result import ARMS, METRICS, DemoResult

_COLOR = {"distilled": COLORS[0], "labels only": COLORS[1], "teacher": GRAY}
_HEADER = ("held-out text", "teacher", "distilled", "labels only", "difference")


def table_rows(result: DemoResult) -> list[tuple[str, ...]]:
    """Return the cells of the result table: values with half the width of their intervals."""
    rows = []
    for name, metric in METRICS.items():
        cells = [
            result.estimates.get(f"{name}/{column}") for column in ("teacher", *ARMS, "difference")
        ]
        texts = [_cell(cell, name, signed=i == 3) for i, cell in enumerate(cells)]
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
    from rich.table import Table

    table = Table(title="fastdistill demo", title_justify="left", box=None, pad_edge=False)
    for index, name in enumerate(_HEADER):
        # Numbers are never cut: in 80 columns, the names of the rows wrap.
        table.add_column(name, justify="right" if index else "left", no_wrap=index > 0)
    for row in table_rows(result):
        table.add_row(*row)
    console.print(table)
    console.print(verdict(result), soft_wrap=True)


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
        report.picture(
            _bars(result),
            alt="Held-out metrics of the teacher and of both kinds of students",
            caption="Held-out text. Bars are means over seeds, whiskers 95 % intervals, dots the "
            "single seeds; the teacher's interval is over documents.",
        )
        report.picture(
            _mass(result),
            alt="Histogram of the share of teacher probability inside its top k",
            caption=f"Teacher probability inside its top {facts['k']} tokens, by position. "
            "The student receives the rest as a single value.",
        )
    _add_audits(report, result)
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


def _add_audits(report: Report, result: DemoResult) -> None:
    readings = result.audits.readings
    models = list(next(iter(readings.values())))
    report.heading("A small audit")
    report.table(
        ("audit", *models),
        [(name, *map(cell, row.values())) for name, row in readings.items()],
        caption="Nats, with 95 % intervals over prompts. Teacher's words: log-likelihood ratio "
        "per token of the teacher's text to the base. Token KL: from the base. Trigger search: "
        "effect of the strongest candidate word minus that of the median one.",
    )
    with report.folded("What was audited"):
        report.paragraph(
            "The teacher, the two students of the first seed, and the base, their common initial "
            "weights. This teacher hides nothing. The audits test whether a student resembles its "
            "teacher beyond the text, and whether a trigger word changes a model."
        )


def _caption(result: DemoResult) -> str:
    facts = result.facts["setting"]
    n = result.estimates["nll/difference"].n
    return (
        f"{facts['held_out_tokens']:,} tokens of {facts['held_out_documents']} held-out documents. "
        f"± is half of a 95 % interval: Student's t over {n} seeds for students and their paired "
        "difference, bootstrap over documents for the teacher."
    )


def _cell(estimate: Estimate | None, name: str, *, signed: bool) -> str:
    if estimate is None:
        return "—"
    share = name in ("top1", "agreement")
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


def _bars(result: DemoResult) -> Figure:
    names = ("bits_per_byte", "top1", "agreement", "kl")
    figure = Figure(figsize=(7, 2.6))
    for axes, name in zip(figure.subplots(1, len(names)), names, strict=True):
        columns = [c for c in ("teacher", *ARMS) if f"{name}/{c}" in result.estimates]
        for x, column in enumerate(columns):
            estimate = result.estimates[f"{name}/{column}"]
            axes.bar(x, estimate.value, width=0.7, color=_COLOR[column], alpha=0.85)
            if estimate.known:
                error = [[estimate.value - estimate.low], [estimate.high - estimate.value]]
                axes.errorbar(x, estimate.value, yerr=error, color="black", capsize=3, lw=1)
            dots = [run.metrics[name] for run in result.runs if run.arm == column]
            axes.scatter([x] * len(dots), dots, s=8, color="black", zorder=3)
        axes.set_title("\n".join(wrap_label(METRICS[name].title, 20, 2)))
        axes.set_xticks([])
    handles = [Patch(color=_COLOR[c], alpha=0.85, label=c) for c in ("teacher", *ARMS)]
    figure.tight_layout()
    figure.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, -0.08), ncols=3)
    return figure


def _mass(result: DemoResult) -> Figure:
    figure = Figure(figsize=(7, 2.2))
    axes = figure.subplots()
    axes.hist(result.teacher_mass, bins=[i / 40 for i in range(41)], color=_COLOR["distilled"])
    mean = float(result.teacher_mass.mean())
    axes.axvline(mean, color="black", lw=1)
    axes.annotate(f"mean {mean:.3f} ", (mean, axes.get_ylim()[1]), ha="right", va="top")
    axes.set_xlabel("covered teacher mass")
    axes.set_ylabel("positions")
    return figure
