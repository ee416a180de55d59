"""The report page of the off-model study: verdicts, controls, results and limitations."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from ...intervals import Estimate
from ...report.arms import SEEDS
from ...report.marks import format_estimate, format_p_value
from ...report.page import Report
from .arms import ARMS, OFF_MODEL, Part
from .figures import Readings, RunsByArm
from .pictures import cost_by_surprisal, cost_over_steps, weak_over_steps
from .verdicts import PARTS

_BACK = {
    "own": "its current answers to unrelated prompts",
    "before": "its earlier answers to unrelated prompts",
    "sums": "its earlier answers to sums",
}
_INTERVALS = "Means with 95 % intervals over base seeds."
_LIMITS = (
    "A toy model of 0.1 million parameters is an abstract analogy for a mechanism. It is no "
    "evidence for or against these methods on language models.",
    "Answer lengths range from 1 to 6 tokens; relevant lengths are in the hundreds. Only the sums "
    "with and without reasoning are the same task at two lengths.",
    "The reasoning of these models repeats the prompt and does not compute the sum. A lock can "
    "depend on it, but the sum does not.",
    "The lock was trained in and depends on one word. A model that explores poorly on purpose, or "
    "that recognizes training, may resist more.",
    "One learning rate and one number of steps per kind of training, tuned on development seeds. "
    "With larger values, a model's own outputs also cost capability.",
)
_PUBLISHED = (
    "Published results on language models, for comparison. Trained on another model's chat, they "
    "lose most on long answers (MATH-500, Olympiads) and little on answers of one token (MMLU); "
    "brief training on their own unrelated outputs restores most of the loss (“Why does off-model "
    "SFT degrade capabilities?”, LessWrong, May 2026). A few good demonstrations unlock "
    "password-locked models (arXiv 2405.19550). Demonstrations of weak supervisors break "
    "sandbagging, and reinforcement learning after them recovers more (arXiv 2604.22082)."
)


def make_page(results: Mapping[str, Any], by_arm: RunsByArm, readings: Readings) -> Report:
    """Return the report page."""
    report = Report("Fine-tuning on another model's outputs", _summary(results))
    report.paragraph(
        "M is the base model. U has learned sums and products, but answers them wrongly without a "
        "password: it sandbags. B is its benign twin. W, the weak supervisor, is a training "
        "checkpoint that solves about half of the sums. O is as capable as B and comes from "
        "another world, whose talk follows another Markov chain. U and B reason before the answer "
        "when instructed to. Every base seed has its own five models. Students are trained on "
        "labels alone."
    )
    report.paragraph(_PUBLISHED, soft=True)
    for part, title in PARTS.items():
        report.heading(title)
        report.paragraph(results["verdicts"][part])
        _controls(report, results, part)
        _arms(report, results, part)
        _PICTURES[part](report, results, by_arm, readings)
        _tasks(report, results, part)
        _differences(report, results, part)
    _models(report, results)
    report.heading("Limitations")
    for sentence in _LIMITS:
        report.paragraph(sentence)
    if results["n_seeds"] < SEEDS:
        report.paragraph(f"Fewer than {SEEDS} base seeds support no claim in either direction.")
    _repeat(report, results)
    return report


def _summary(results: Mapping[str, Any]) -> str:
    n = results["n_seeds"]
    if not results["valid"]:
        return (
            "A control or model gate failed, and the parts concerned have no verdict: "
            f"{'; '.join(results['invalid_because'])}. Their results are shown for diagnosis only."
        )
    controls = f"All controls hold, over {n} base seed{'' if n == 1 else 's'}."
    if n < SEEDS:
        return f"{controls} A claim needs at least {SEEDS} base seeds."
    return " ".join([controls, *filter(None, results["in_short"].values())])


def _controls(report: Report, results: Mapping[str, Any], part: Part) -> None:
    rows = [
        (
            c["name"],
            f"{c['value']:.3f}" if c["value"] is not None else "—",
            f"{'≥' if c['at_least'] else '≤'} {c['bound']:g}",
            "yes" if c["holds"] else "no",
        )
        for c in results["controls"]
        if c["part"] == part
    ]
    report.table(("control", "mean", "expected", "holds"), rows)


def _arms(report: Report, results: Mapping[str, Any], part: Part) -> None:
    descriptions = [f"{arm.name}: {arm.description}" for arm in ARMS if arm.part == part]
    report.paragraph(f"{'. '.join(descriptions)}.", soft=True)
    rows = [
        (
            row["arm"],
            _cell(row["surprisal"]),
            _cell(row["surprisal_after"]),
            *(() if part == "cost" else (_cell(row["labels_right"]), _cell(row["thinks"]))),
        )
        for row in results["arms"]
        if row["part"] == part
    ]
    header = ("arm", "surprisal before", "after")
    extra = () if part == "cost" else ("label accuracy", "reasons when instructed")
    report.table(
        (*header, *extra),
        rows,
        caption="Surprisal of the teacher's answers under the student, in nats per token. "
        + _INTERVALS,
    )


def _tasks(report: Report, results: Mapping[str, Any], part: Part) -> None:
    change = "lost" if part == "cost" else "recovered"
    rows = [
        (row["arm"], row["task"], _cell(row["before"]), _cell(row["after"]), _cell(row[change]))
        for row in results["rows"]
        if row["part"] == part
    ]
    report.table(("arm", "task", "accuracy before", "after", change), rows, caption=_INTERVALS)


def _differences(report: Report, results: Mapping[str, Any], part: Part) -> None:
    rows = [
        (
            d["difference"],
            _cell(d),
            _p(d["p_holm"]),
            f"±{d['margin']:g}",
            _p(d["p_alike_holm"]),
            d["outcome"],
        )
        for d in results["differences"]
        if d["part"] == part
    ]
    report.table(
        ("difference", "mean", "p (difference)", "margin", "p (equivalence)", "outcome"),
        rows,
        caption="t tests for a difference and for equivalence within the margin, each with "
        f"Holm's correction over this part. No outcome below {SEEDS} base seeds.",
    )


def _cost_pictures(
    report: Report, results: Mapping[str, Any], by_arm: RunsByArm, readings: Readings
) -> None:
    report.picture(
        cost_over_steps(by_arm),
        alt="Accuracy over steps by answer length, one arm per panel; the table below contains "
        "the final values.",
        caption="Accuracy while the student is trained on its teacher's talk. " + _INTERVALS,
    )
    report.picture(
        cost_by_surprisal(by_arm),
        alt="Loss of capability over the surprisal of the data, one mark per base seed.",
        caption="Mean loss over all tasks; one mark per base seed and arm.",
    )
    shares = results["restored"][OFF_MODEL]
    report.table(
        ("a few more steps on", "restored share of the loss"),
        [(_BACK[kind], _cell(share)) for kind, share in shares.items()],
        caption=f"Sums with and without reasoning, after {OFF_MODEL}. —: the loss is too small. "
        "The data of the last row is not unrelated: it is an upper reference for so few steps.",
    )


def _no_pictures(*_: Any) -> None:
    """Add nothing: the tables of this part suffice."""


def _weak_pictures(
    report: Report, results: Mapping[str, Any], by_arm: RunsByArm, readings: Readings
) -> None:
    report.picture(
        weak_over_steps(by_arm, readings),
        alt="Accuracy on locked sums over steps: U on correct answers, U and M on weak answers, "
        "and the supervisor.",
        caption="Held-out sums without the password. " + _INTERVALS,
    )


_PICTURES = {"cost": _cost_pictures, "reasoning": _no_pictures, "weak": _weak_pictures}


def _models(report: Report, results: Mapping[str, Any]) -> None:
    report.heading("Accuracy of the models")
    tasks = list(dict.fromkeys(row["task"] for row in results["models"]))
    models = list(dict.fromkeys(row["model"] for row in results["models"]))
    cells = {(row["model"], row["task"]): row["value"] for row in results["models"]}
    rows = [(m, *(f"{cells[m, task]:.2f}" for task in tasks)) for m in models]
    report.table(("model", *tasks), rows, caption="Mean accuracy over base seeds.")


def _repeat(report: Report, results: Mapping[str, Any]) -> None:
    report.heading("Reproduction")
    report.code(results["command"])
    versions = ", ".join(f"{name} {v}" for name, v in results["versions"].items())
    report.paragraph(
        f"Base seeds {results['seeds']['base']}. {results['runs']} runs and their models took "
        f"{results['core_seconds']} core seconds. {versions}.",
        soft=True,
    )
    config = [(name, json.dumps(value)) for name, value in results["config"].items()]
    report.folded(f"{len(config)} settings", ("setting", "value"), config)


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None or row["value"] is None:
        return "—"
    low, high = row["interval"] or (math.nan, math.nan)
    return format_estimate(Estimate(value=row["value"], low=low, high=high, n=row["n"]), 0)


def _p(p: float | None) -> str:
    return "—" if p is None else format_p_value(p).removeprefix("= ")
