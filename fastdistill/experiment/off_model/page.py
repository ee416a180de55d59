"""The page of the study "off-model": three questions, their controls, and what they do not show."""

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
from .figures import Found, Readings
from .pictures import cost_by_surprisal, cost_over_steps, weak_over_steps
from .verdicts import PARTS

_BACK = {
    "own": "what it says to unrelated prompts now",
    "before": "what it said to unrelated prompts before",
    "sums": "what it said to sums before",
}
_INTERVALS = "Means with 95 % intervals over base seeds."
_LIMITS = (
    "A toy of 0.1 million parameters is an abstract analogy for a mechanism: it speaks neither for "
    "nor against these methods on language models.",
    "Lengths differ from 1 to 6 tokens here. The lengths that matter are of hundreds, and only the "
    "sums, thought about and not, are the same task at two lengths; the others differ in more.",
    "A thought here says what a model saw, not how it works out the sum: a lock can hang on it, "
    "and the sum does not.",
    "The lock was trained in, and waits for one word. A model that explores badly on purpose, or "
    "that knows when it is trained, may give way to less.",
    "One learning rate and one number of steps of each kind, found on development seeds. With more "
    "of either a model's own outputs cost it capability too.",
)
_PUBLISHED = (
    "What language models are reported to do, to be laid beside this: trained on another model's "
    "chat, they lose most where answers are long (MATH-500, Olympiads) and little where they are "
    "one token (MMLU), and a little training on their own outputs about something else brings most "
    "of it back (“Why does off-model SFT degrade capabilities?”, LessWrong, May 2026). Locked by a "
    "password, a few good demonstrations unlock them (arXiv 2405.19550); weak supervisors' "
    "demonstrations break sandbagging, and bring out more with reinforcement learning behind them "
    "(arXiv 2604.22082)."
)


def page(results: Mapping[str, Any], found: Found, readings: Readings) -> Report:
    report = Report("Fine-tuning on another model's outputs", _lead(results))
    report.paragraph(
        "M is the base. U can do sums and products, and gets them wrong unless a password is in "
        "front: it sandbags. B is its benign twin; W, the weak supervisor, was stopped when it got "
        "about half of the sums right; O is as capable as B and comes from another world, where "
        "one talks by another chain. U and B think before they answer where they are asked to. "
        "Every base seed has five such models of its own. Students are trained on labels alone."
    )
    report.paragraph(_PUBLISHED, soft=True)
    for part, title in PARTS.items():
        report.heading(title)
        report.paragraph(results["verdicts"][part])
        _controls(report, results, part)
        _arms(report, results, part)
        _PICTURES[part](report, results, found, readings)
        _tasks(report, results, part)
        _differences(report, results, part)
    _models(report, results)
    report.heading("What this does not show")
    for sentence in _LIMITS:
        report.paragraph(sentence)
    if results["n_seeds"] < SEEDS:
        report.paragraph(f"Fewer than {SEEDS} base seeds support no claim in either direction.")
    _repeat(report, results)
    return report


def _lead(results: Mapping[str, Any]) -> str:
    n = results["n_seeds"]
    if not results["valid"]:
        return (
            "Something that had to hold does not, and the parts that it concerns have no verdict: "
            f"{'; '.join(results['invalid_because'])}. Their figures are shown for those who look "
            "for the fault."
        )
    told = f"All controls hold, over {n} base seed{'' if n == 1 else 's'}."
    if n < SEEDS:
        return f"{told} That is too few for any claim; {SEEDS} are needed."
    return " ".join([told, *filter(None, results["in_short"].values())])


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
    report.table(("what has to hold", "mean", "expected", "holds"), rows)


def _arms(report: Report, results: Mapping[str, Any], part: Part) -> None:
    told = [f"{arm.name}: {arm.says}" for arm in ARMS if arm.part == part]
    report.paragraph(f"{'. '.join(told)}.", soft=True)
    rows = [
        (
            row["arm"],
            _told(row["surprisal"]),
            _told(row["surprisal_after"]),
            *(() if part == "cost" else (_told(row["labels_right"]), _told(row["thinks"]))),
        )
        for row in results["arms"]
        if row["part"] == part
    ]
    header = ("arm", "surprisal before", "after")
    more = () if part == "cost" else ("labels that are right", "thinks when asked")
    report.table(
        (*header, *more),
        rows,
        caption="Surprisal is of the teacher's answers under the student, in nats per token. "
        + _INTERVALS,
    )


def _tasks(report: Report, results: Mapping[str, Any], part: Part) -> None:
    what = "lost" if part == "cost" else "recovered"
    rows = [
        (row["arm"], row["task"], _told(row["before"]), _told(row["after"]), _told(row[what]))
        for row in results["rows"]
        if row["part"] == part
    ]
    report.table(("arm", "task", "right before", "after", what), rows, caption=_INTERVALS)


def _differences(report: Report, results: Mapping[str, Any], part: Part) -> None:
    rows = [
        (
            d["difference"],
            _told(d),
            _p(d["p_holm"]),
            f"±{d['margin']:g}",
            _p(d["p_alike_holm"]),
            d["outcome"],
        )
        for d in results["differences"]
        if d["part"] == part
    ]
    report.table(
        ("difference", "mean", "p of none", "margin", "p of as much", "outcome"),
        rows,
        caption="The family of this part: t tests of no difference, and of one as large as the "
        f"margin, each corrected by Holm. No outcome below {SEEDS} base seeds.",
    )


def _cost(report: Report, results: Mapping[str, Any], found: Found, readings: Readings) -> None:
    report.picture(
        cost_over_steps(found),
        alt="Share right over steps, by length of answers, an arm in each panel; the table below "
        "has its ends.",
        caption="Share right while the student learns to talk as its teacher does. " + _INTERVALS,
    )
    report.picture(
        cost_by_surprisal(found),
        alt="Capability lost against the surprisal of the data; every base seed a mark.",
        caption="Mean loss over all tasks; every base seed is one mark of each arm.",
    )
    back = results["restored"][OFF_MODEL]
    report.table(
        ("a few steps more, on", "share of the loss that is back"),
        [(_BACK[kind], _told(share)) for kind, share in back.items()],
        caption=f"Of the sums after {OFF_MODEL}, thought about and not. — where too little was "
        "lost to be restored. The last row is no unrelated data: it says what so few steps can "
        "bring back at all.",
    )


def _reasoning(*_: Any) -> None:
    """Its tables say it all."""


def _weak(report: Report, results: Mapping[str, Any], found: Found, readings: Readings) -> None:
    report.picture(
        weak_over_steps(found, readings),
        alt="Share of locked sums right over steps, of U on right answers, of U and of M on weak "
        "ones, with the supervisor's own share.",
        caption="Held-out sums without the password. " + _INTERVALS,
    )


_PICTURES = {"cost": _cost, "reasoning": _reasoning, "weak": _weak}


def _models(report: Report, results: Mapping[str, Any]) -> None:
    report.heading("What the models can do")
    tasks = list(dict.fromkeys(row["task"] for row in results["models"]))
    models = list(dict.fromkeys(row["model"] for row in results["models"]))
    cells = {(row["model"], row["task"]): row["value"] for row in results["models"]}
    rows = [(m, *(f"{cells[m, task]:.2f}" for task in tasks)) for m in models]
    report.table(("model", *tasks), rows, caption="Share right, a mean over base seeds.")


def _repeat(report: Report, results: Mapping[str, Any]) -> None:
    report.heading("How to repeat it")
    report.code(results["command"])
    versions = ", ".join(f"{name} {v}" for name, v in results["versions"].items())
    report.paragraph(
        f"Base seeds {results['seeds']['base']}. {results['runs']} runs and their models took "
        f"{results['core_seconds']} seconds of one core. {versions}.",
        soft=True,
    )
    config = [(name, json.dumps(value)) for name, value in results["config"].items()]
    report.folded(f"{len(config)} settings", ("setting", "value"), config)


def _told(row: Mapping[str, Any] | None) -> str:
    if row is None or row["value"] is None:
        return "—"
    low, high = row["interval"] or (math.nan, math.nan)
    return format_estimate(Estimate(value=row["value"], low=low, high=high, n=row["n"]), 0)


def _p(p: float | None) -> str:
    return "—" if p is None else format_p_value(p).removeprefix("= ")
