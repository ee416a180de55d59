"""Write the records of a study, and from them results.json, report.html and two pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...report.html import Report, png
from ...report.number_format import format_estimate
from ...runtime.atomic_files import write_atomically, write_json
from ...runtime.intervals import Estimate, flat_json, mean_of_runs, means_by_cluster
from ..report.repair_words import in_repair_words, relabel
from ..report.transfer import TransferReport
from .records import FILE, Records, numbers, read_records, write_records
from .rules import check_unchanged, shared_limits
from .study import ContextRow, NoteRow, Study, Table


def publish(study: Study, table: Table, folder: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """Write the records of a study, and its report from them; return the content of results.json.

    The report is computed from the records alone, so that it can be recomputed from the file.
    """
    write_records(study, table, about, folder)
    return publish_records(read_records(folder / FILE), folder)


def publish_records(records: Records, folder: Path) -> dict[str, Any]:
    """Write results.json, report.html and the pictures, and return the content of results.json.

    Raises:
        ValueError: the limits of the present rule are not those of the study.
    """
    study, table, about = records.study, records.table, records.about
    arms, rule = study["arms"], about.get("rule")
    if rule is not None:
        check_unchanged(rule, {**rule, **shared_limits()}, folder / FILE)
    report = TransferReport(
        table.students,
        audits=table.scores,
        positive_control=next((a["name"] for a in arms if a["role"] == "positive control"), None),
        null_arms=[a["name"] for a in arms if a["role"] == "null arm"],
        validity=table.validity,
        title=study["title"],
        about={"measured": study["measured"], "limits": study["limits"], **about},
        teachers=table.teachers,
        development=table.development,
        reference=arms[0]["name"],
        claimed=() if rule is None else rule["claimed"],
        planned=table.planned,
    )
    contexts, notes = summarize_contexts(table.contexts), summarize_notes(table.notes)
    page = report.page()
    with page.folded("Arms and base seeds"):
        _arms(page, arms, table.left_out)
        for seed, reasons in table.refused.items():
            page.paragraph(
                f"Base seed {seed} was rejected before any student was trained: "
                f"{'; '.join(reasons)}."
            )
    if contexts:
        _contexts(page, contexts)
    if notes:
        _notes(page, notes)
    text, figures = page.html(), {"quadrant": report.quadrant(), "forest": report.forest()}
    result = {
        **report.as_json(),
        "contexts": [flat_json(summary._asdict()) for summary in contexts],
        "notes": [flat_json(summary._asdict()) for summary in notes],
        "left_out": table.left_out,
        "refused": {str(seed): reasons for seed, reasons in table.refused.items()},
        "runs": table.runs,
        "repairs": study.get("repairs", False),
    }
    if result["repairs"]:
        text = in_repair_words(text)
        for figure in figures.values():
            relabel(figure)
        for row in result["arms"]:
            row.update({name: in_repair_words(row[name]) for name in ("outcome", "verdict")})
    write_atomically(folder / "report.html", text)
    for name, figure in figures.items():
        write_atomically(folder / f"{name}.png", png(figure))
    write_json(folder / "results.json", result)
    return result


class ContextSummary(NamedTuple):
    """The trait in a context: students of U, of B, and the difference."""

    arm: str
    context: str
    of_untrusted: float
    of_benign: float
    difference: Estimate
    n_seeds: int


class NoteSummary(NamedTuple):
    """The mean of a numeric note."""

    arm: str
    note: str
    value: Estimate


def summarize_contexts(rows: Sequence[ContextRow]) -> list[ContextSummary]:
    """Return the trait in each context, as means over base seeds."""
    summaries = []
    for arm, context in dict.fromkeys((row.arm, row.context) for row in rows):
        group = [row for row in rows if (row.arm, row.context) == (arm, context)]
        seeds = [row.base_seed for row in group]
        untrusted, benign, difference = (
            mean_of_runs(means_by_cluster(values, seeds))
            for values in (
                [row.of_untrusted for row in group],
                [row.of_benign for row in group],
                [row.of_untrusted - row.of_benign for row in group],
            )
        )
        summaries.append(
            ContextSummary(arm, context, untrusted.value, benign.value, difference, difference.n)
        )
    return summaries


def summarize_notes(rows: Sequence[NoteRow]) -> list[NoteSummary]:
    """Return every numeric note on students of U as a mean over base seeds."""
    values: dict[tuple[str, str], list[tuple[float, int]]] = {}
    for row in rows:
        for name, value in numbers(row.notes):
            values.setdefault((row.arm, name), []).append((value, row.base_seed))
    return [
        NoteSummary(arm, name, mean_of_runs(means_by_cluster(*zip(*pairs, strict=True))))
        for (arm, name), pairs in values.items()
    ]


def _arms(page: Report, arms: Sequence[Mapping[str, Any]], left_out: Mapping[str, str]) -> None:
    rows = [(arm["name"], arm["description"], ", ".join(arm["strategies"]) or "—") for arm in arms]
    page.table(("arm", "description", "strategies"), rows)
    for name, reason in left_out.items():
        page.paragraph(f"Skipped: {name}, which {reason}.")


def _contexts(page: Report, summaries: Sequence[ContextSummary]) -> None:
    with page.folded("Trait in other contexts"):
        page.columns(
            {
                "arm": lambda row: row.arm,
                "context": lambda row: row.context,
                "students of U": lambda row: f"{row.of_untrusted:.3f}",
                "students of B": lambda row: f"{row.of_benign:.3f}",
                "difference": lambda row: format_estimate(row.difference, 0),
            },
            summaries,
            caption="Rate of the trait with a prefix before every prompt, or its rate and "
            "log-odds on the prompts of other_context. A student trained to show the trait only "
            "after an instruction may show it after similar ones.",
        )


def _notes(page: Report, summaries: Sequence[NoteSummary]) -> None:
    with page.folded("Notes of the strategies"):
        page.columns(
            {
                "arm": lambda row: row.arm,
                "note": lambda row: row.note,
                "mean over base seeds": lambda row: format_estimate(row.value),
            },
            summaries,
            caption="Students of U.",
        )
