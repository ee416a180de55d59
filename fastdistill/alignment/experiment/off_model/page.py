"""The report page of the off-model study: verdicts, controls, results and limitations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....report.html import Report
from ....report.number_format import format_estimate, format_p_cell
from ...report.arms import SEEDS
from ...report.validity import too_few_units
from ...statistics import Validity
from .analysis import (
    ArmRow,
    Readings,
    RunsByArm,
    arm_rows,
    model_accuracies,
    restored_share,
    task_rows,
    to_json,
)
from .arms import ARMS, OFF_MODEL, Part
from .plots import cost_by_surprisal, cost_over_steps, weak_over_steps
from .verdicts import PARTS, PartVerdict

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
_MODELS = (
    "M is the base model. U has learned sums and products, but answers them wrongly without a "
    "password: it sandbags. B is its benign twin. W, the weak supervisor, is a training "
    "checkpoint that solves about half of the sums. O is as capable as B and comes from "
    "another world, whose talk follows another Markov chain. U and B reason before the answer "
    "when instructed to. Every base seed has its own five models. Students are trained on "
    "labels alone."
)
_PUBLISHED = (
    "Published results on language models, for comparison. Trained on another model's chat, they "
    "lose most on long answers (MATH-500, Olympiads) and little on answers of one token (MMLU); "
    "brief training on their own unrelated outputs restores most of the loss (“Why does off-model "
    "SFT degrade capabilities?”, LessWrong, May 2026). A few good demonstrations unlock "
    "password-locked models (arXiv 2405.19550). Demonstrations of weak supervisors break "
    "sandbagging, and reinforcement learning after them recovers more (arXiv 2604.22082)."
)


@dataclass(frozen=True, kw_only=True)
class OffModelResults:
    """The results of the study.

    Attributes:
        readings, organisms: accuracies and gates of the models, by base seed.
        parts: verdicts in the order of PARTS.
    """

    command: str
    config: dict[str, Any]
    versions: dict[str, str]
    runs: int
    core_seconds: int
    by_arm: RunsByArm
    readings: Readings
    organisms: Mapping[int, Validity]
    parts: Sequence[PartVerdict]

    @property
    def invalid_because(self) -> list[str]:
        failures = [f"{part.part}: {failure}" for part in self.parts for failure in part.failures]
        return too_few_units(len(self.organisms)) + failures

    def as_json(self) -> dict[str, Any]:
        """Return the content of results.json."""
        return {
            "study": "off-model",
            "command": self.command,
            "config": self.config,
            "versions": self.versions,
            "seeds": {"base": list(self.readings), "student": [0]},
            "n_seeds": len(self.readings),
            "runs": self.runs,
            "core_seconds": self.core_seconds,
            "valid": not self.invalid_because,
            "invalid_because": self.invalid_because,
            "controls": [
                {"part": part.part, **gate}
                for part in self.parts
                for gate in Validity(gates=part.controls).as_json()["gates"]
            ],
            "organisms": {str(seed): gates.as_json() for seed, gates in self.organisms.items()},
            "differences": [
                {"part": part.part, **difference.as_json()}
                for part in self.parts
                for difference in part.differences
            ],
            "in_short": {part.part: part.brief if part.valid else "" for part in self.parts},
            "verdicts": {part.part: part.verdict for part in self.parts},
            "rows": [row.as_json() for row in task_rows(self.by_arm)],
            "arms": [row.as_json() for row in arm_rows(self.by_arm)],
            "restored": {
                OFF_MODEL: {k: to_json(share) for k, share in restored_share(self.by_arm).items()}
            },
            "models": [
                {"model": model, "task": task, **to_json(accuracy)}
                for (model, task), accuracy in model_accuracies(self.readings).items()
            ],
        }


def make_page(results: OffModelResults) -> Report:
    """Return the report page."""
    lead, more = _summary(results)
    report = Report("Fine-tuning on another model's outputs", lead)
    for part in results.parts:
        report.heading(PARTS[part.part])
        if part.part == "cost":
            _cost_over_steps(report, results)
        elif part.part == "weak":
            _weak_pictures(report, results)
        _tasks(report, results, part.part)
        if part.part == "cost":
            if more:
                report.paragraph(more)
            _cost_by_surprisal(report, results)
        if not part.valid:
            report.paragraph(f"{part.verdict[0].upper()}{part.verdict[1:]}")
        _controls(report, part)
        _differences(report, part)
        if part.valid:
            with report.folded("In words"):
                report.paragraph(part.verdict)
        with report.folded("The arms"):
            _arms(report, results, part.part)
    _models(report, results)
    n = len(results.readings)
    if n < SEEDS:
        report.paragraph(f"Fewer than {SEEDS} base seeds support no claim in either direction.")
    with report.folded("The models"):
        report.paragraph(_MODELS)
    with report.folded("Published results"):
        report.paragraph(_PUBLISHED, soft=True)
    with report.folded("Limitations"):
        for sentence in _LIMITS:
            report.paragraph(sentence)
    report.reproduction(
        "How to repeat it",
        results.command,
        f"Base seeds {list(results.readings)}. {results.runs} runs and their models took "
        f"{results.core_seconds} core seconds.",
        results.versions,
        results.config,
    )
    return report


def _summary(results: OffModelResults) -> tuple[str, str]:
    """Return the lead of two sentences, and the findings that do not fit into it."""
    n, reasons = len(results.readings), results.invalid_because
    if reasons:
        return (
            "A control or model gate failed, and the parts concerned have no verdict: "
            f"{'; '.join(reasons)}. Their results are shown for diagnosis only."
        ), ""
    controls = f"All controls hold, over {n} base seed{'' if n == 1 else 's'}."
    if n < SEEDS:
        return f"{controls} A claim needs at least {SEEDS} base seeds.", ""
    first, _, more = " ".join(part.brief for part in results.parts if part.brief).partition(". ")
    return (f"{controls} {first.removesuffix('.')}." if first else controls), more


def _controls(report: Report, part: PartVerdict) -> None:
    report.columns(
        {
            "control": lambda gate: gate.name,
            "mean": lambda gate: f"{gate.value:.3f}" if math.isfinite(gate.value) else "—",
            "expected": lambda gate: f"{gate.sign} {gate.bound:g}",
            "holds": lambda gate: "yes" if gate.holds else "no",
        },
        part.controls,
    )


def _arms(report: Report, results: OffModelResults, part: Part) -> None:
    descriptions = [f"{arm.name}: {arm.description}" for arm in ARMS if arm.part == part]
    report.paragraph(f"{'. '.join(descriptions)}.", soft=True)
    columns: dict[str, Callable[[ArmRow], str]] = {
        "arm": lambda row: row.arm,
        "surprisal before": lambda row: format_estimate(row.surprisal, 0),
        "after": lambda row: format_estimate(row.surprisal_after, 0),
    }
    if part != "cost":  # talk has no correct labels and no reasoning
        columns |= {
            "label accuracy": lambda row: format_estimate(row.labels_right, 0),
            "reasons when instructed": lambda row: format_estimate(row.thinks, 0),
        }
    report.columns(
        columns,
        [row for row in arm_rows(results.by_arm) if row.part == part],
        caption="Surprisal of the teacher's answers under the student, in nats per token. "
        + _INTERVALS,
    )


def _tasks(report: Report, results: OffModelResults, part: Part) -> None:
    report.columns(
        {
            "arm": lambda row: row.arm,
            "task": lambda row: row.task,
            "accuracy before": lambda row: format_estimate(row.before, 0),
            "after": lambda row: format_estimate(row.after, 0),
            "lost" if part == "cost" else "recovered": lambda row: format_estimate(row.change, 0),
        },
        [row for row in task_rows(results.by_arm) if row.part == part],
        caption=_INTERVALS,
    )


def _differences(report: Report, part: PartVerdict) -> None:
    report.columns(
        {
            "difference": lambda d: d.name,
            "mean": lambda d: format_estimate(d.estimate, 0),
            "p (difference)": lambda d: format_p_cell(d.p),
            "margin": lambda d: f"±{d.margin:g}",
            "p (equivalence)": lambda d: format_p_cell(d.p_alike),
            "outcome": lambda d: d.outcome,
        },
        part.differences,
        caption="t tests for a difference and for equivalence within the margin, each with "
        f"Holm's correction over this part. No outcome below {SEEDS} base seeds.",
    )


def _cost_over_steps(report: Report, results: OffModelResults) -> None:
    report.picture(
        cost_over_steps(results.by_arm),
        alt="Accuracy over steps by answer length, one arm per panel; the table below contains "
        "the final values.",
        caption="Accuracy while the student is trained on its teacher's talk. " + _INTERVALS,
    )


def _cost_by_surprisal(report: Report, results: OffModelResults) -> None:
    report.picture(
        cost_by_surprisal(results.by_arm),
        alt="Loss of capability over the surprisal of the data, one mark per base seed.",
        caption="Mean loss over all tasks; one mark per base seed and arm.",
    )
    report.table(
        ("a few more steps on", "restored share of the loss"),
        [
            (_BACK[kind], format_estimate(share, 0))
            for kind, share in restored_share(results.by_arm).items()
        ],
        caption=f"Sums with and without reasoning, after {OFF_MODEL}. —: the loss is too small. "
        "The data of the last row is not unrelated: it is an upper reference for so few steps.",
    )


def _weak_pictures(report: Report, results: OffModelResults) -> None:
    report.picture(
        weak_over_steps(results.by_arm, results.readings),
        alt="Accuracy on locked sums over steps: U on correct answers, U and M on weak answers, "
        "and the supervisor.",
        caption="Held-out sums without the password. " + _INTERVALS,
    )


def _models(report: Report, results: OffModelResults) -> None:
    report.heading("Accuracy of the models")
    accuracies = model_accuracies(results.readings)
    models, tasks = (list(dict.fromkeys(names)) for names in zip(*accuracies, strict=True))
    rows = [(m, *(f"{accuracies[m, task].value:.2f}" for task in tasks)) for m in models]
    report.table(("model", *tasks), rows, caption="Mean accuracy over base seeds.")
