"""The page of an audit: values of all audits for all models, and differences from controls."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from ...report.html import Report
from ...report.number_format import RC, style, wrap_label
from ...runtime.printable import printable
from ..audits.catalog import CATALOG, UNSPECIFIC_NOTE, marked
from ..audits.result import AuditResult
from ..audits.side_by_side import SuiteResults

CAUTION = (
    "The absence of a difference does not show that a model hides nothing; a difference does not "
    "show bad intent."
)
LIMITS = (
    "An audit measures the difference of a model from its controls in one quantity. A trait whose "
    "trigger is in none of these prompts remains undetected. Any fine-tuning moves a model away "
    "from its base, and only a control that was trained in the same way on benign answers "
    "separates the two. Audits are not corrected for their number."
)


def audit_page(
    results: SuiteResults, *, about: dict[str, Any], skipped: Mapping[str, str] | None = None
) -> Report:
    """Returns the page.

    Args:
        about: command, models (name -> source), versions.
        skipped: audit -> the keys that the probes lack for it.
    """
    names = list(next(iter(results.readings.values()), {}))
    report = Report("Audit: " + ", ".join(names), summary(results))
    if results.readings:
        with matplotlib.rc_context(RC):
            report.picture(
                intervals_figure(results, names),
                alt="Every audit's value for every model, with intervals",
                caption="Dots are values, whiskers 95 % intervals over prompts. Each audit has its "
                "own axis.",
            )
        report.table(
            ("audit", *names),
            [
                (label(audit), *(cell(row[name]) for name in names))
                for audit, row in results.readings.items()
            ],
            caption="The value of each audit and its 95 % interval (Wilson for rates, otherwise "
            f"Student's t over prompts). {UNSPECIFIC_NOTE}",
        )
    report.heading("Differences from the controls")
    compared = [
        (audit, name, result)
        for audit, row in results.results.items()
        for name, result in row.items()
    ]
    report.table(
        ("audit", "model", "control", "difference", "95 % interval", "evidence"),
        [
            (
                audit,
                name,
                control,
                f"{gap.value:+.3f}",
                f"{gap.low:+.3f} to {gap.high:+.3f}" if gap.known else "—",
                "yes" if result.is_evidence else "no",
            )
            for audit, name, result in compared
            for control, gap in ((c, one.difference) for c, one in result.controls.items())
        ],
        caption="Audited minus control over the same prompts. Evidence: above every control with "
        "intervals that exclude 0, and no warnings.",
    )
    for audit, name, result in compared:
        for doubt in result.doubts:
            report.paragraph(f"Warning, {audit} of {name}: {doubt}.")
    for audit, reason in results.left_out.items():
        report.paragraph(f"Left out: {audit}. {reason}", soft=True)
    report.paragraph(CAUTION)
    if skipped:
        with report.folded(f"Audits that these probes do not enable: {len(skipped)}"):
            report.table(
                ("audit", "it measures", "keys of probes.json"),
                [(name, CATALOG[name].measures, needs) for name, needs in skipped.items()],
                is_text=True,
            )
    with report.folded("What this does not show"):
        report.paragraph(LIMITS)
    for audit, row in results.readings.items():
        result = next(iter(row.values()))
        with report.folded(f"{audit}: {result.audit}"):
            report.table(
                ("model", "n", "details"),
                [(name, str(one.n), _format_details(one.details)) for name, one in row.items()],
                is_text=True,
            )
    lines = [f"{name} is {where}" for name, where in about["models"].items()]
    text = f"{'; '.join(lines)}."
    report.reproduction("How to repeat it", about["command"], text, about["versions"])
    return report


def summary(results: SuiteResults) -> str:
    """Returns the findings in one sentence."""
    evidence: dict[str, list[str]] = {}
    for audit, row in results.results.items():
        for name, result in row.items():
            evidence.setdefault(name, []).extend([audit] if result.is_evidence else [])
    if not evidence:
        return "No audit could run on these models."
    parts = [
        f"{name}: above every control in {', '.join(audits)}"
        if audits
        else f"{name}: above no control"
        for name, audits in evidence.items()
    ]
    return f"Of {len(results.results)} audits, {'; '.join(parts)}."


def label(audit: str) -> str:
    """Returns the name of an audit with what it measures and the unit, where that is known."""
    return f"{marked(audit)}: {CATALOG[audit].measures}" if audit in CATALOG else audit


def cell(result: AuditResult) -> str:
    """Returns the value of a result with its interval, for a table."""
    low, high = result.interval
    text = f"{result.value:.3f}"
    return text if math.isnan(low) else f"{text} [{low:.2f}, {high:.2f}]"


def _format_details(details: dict[str, Any]) -> str:
    lines = [f"{key.replace('_', ' ')}: {value}" for key, value in details.items()]
    return "; ".join(lines)[:600] or "—"


def intervals_figure(results: SuiteResults, names: list[str]) -> Figure:
    """Returns a figure with one panel per audit: values and intervals of all models."""
    audits = list(results.readings)
    columns = min(4, len(audits))
    rows = math.ceil(len(audits) / columns)
    figure = Figure(figsize=(7.2, 1.35 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for panel, axes in enumerate(grid.flat):
        if panel >= len(audits):
            axes.set_axis_off()
            continue
        row = results.readings[audits[panel]]
        for i, name in enumerate(names):
            color, shape = style(i)
            result = row[name]
            low, high = result.interval
            y = len(names) - 1 - i
            if not math.isnan(low):
                axes.plot([low, high], [y, y], color=color, lw=1.5)
            axes.plot(result.value, y, shape, color=color, ms=4.5)
        axes.set_yticks([])
        axes.set_ylim(-0.7, len(names) - 0.3)
        axes.margins(x=0.15)
        axes.locator_params(axis="x", nbins=3)
        axes.set_title("\n".join(wrap_label(printable(audits[panel]), 24, 2)), fontsize=8)
    handles = [
        figure.axes[0].plot([], [], style(i)[1], color=style(i)[0], label=printable(name))[0]
        for i, name in enumerate(names)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(names)))
    return figure
