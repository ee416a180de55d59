"""Write a study's table as results.json, report.html and quadrant.png."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_atomically, write_json
from ..intervals import Estimate, mean_of_runs
from ..report.marks import format_estimate
from ..report.page import Report, png
from ..report.transfer import TransferReport
from .study import Arm, Study, Table


def publish(study: Study, table: Table, folder: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """Write the three files and return the content of results.json."""
    arms = [arm for arm in study.arms if arm.name not in table.left_out]
    report = TransferReport(
        table.students,
        audits=table.scores,
        positive_control=next((a.name for a in arms if a.role == "positive control"), None),
        null_arms=[a.name for a in arms if a.role == "null arm"],
        validity=table.validity,
        title=study.title,
        about={"measured": study.measured, "limits": list(study.limits), **about},
        development=table.development,
    )
    contexts, notes = summarize_contexts(table.contexts), summarize_notes(table.notes)
    page = report.page()
    _arms(page, arms, table.left_out)
    for seed, reasons in table.refused.items():
        page.paragraph(
            f"Base seed {seed} was rejected before any student was trained: {'; '.join(reasons)}."
        )
    _contexts(page, contexts)
    _notes(page, notes)
    page.write(folder / "report.html")
    write_atomically(folder / "quadrant.png", png(report.quadrant()))
    result = {
        **report.as_json(),
        "contexts": contexts,
        "notes": notes,
        "left_out": table.left_out,
        "refused": {str(seed): reasons for seed, reasons in table.refused.items()},
        "runs": table.runs,
    }
    write_json(folder / "results.json", result)
    return result


def summarize_contexts(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the trait under each prompt prefix: students of U, of B, and the difference."""
    results = []
    for arm, context in dict.fromkeys((row["arm"], row["context"]) for row in rows):
        group = [row for row in rows if (row["arm"], row["context"]) == (arm, context)]
        seeds = sorted({row["base_seed"] for row in group})

        def mean_over_seeds(pick: Any, group: Any = group, seeds: Any = seeds) -> Estimate:
            means = [
                mean_of_runs([pick(row) for row in group if row["base_seed"] == seed]).value
                for seed in seeds
            ]
            return mean_of_runs(means)

        results.append(
            {
                "arm": arm,
                "context": context,
                "of_untrusted": mean_over_seeds(lambda r: r["of_untrusted"]["trait"]).value,
                "of_benign": mean_over_seeds(lambda r: r["of_benign"]["trait"]).value,
                **_as_json(
                    "difference",
                    mean_over_seeds(lambda r: r["of_untrusted"]["trait"] - r["of_benign"]["trait"]),
                ),
                "n_seeds": len(seeds),
            }
        )
    return results


def summarize_notes(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return every numeric note on students of U as a mean over base seeds."""
    values: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in rows:
        for name, value in _numbers(row["notes"]):
            by_seed = values.setdefault((row["arm"], name), {})
            by_seed.setdefault(row["base_seed"], []).append(value)
    summary = []
    for (arm, name), by_seed in values.items():
        estimate = mean_of_runs(
            [mean_of_runs(seed_values).value for seed_values in by_seed.values()]
        )
        summary.append({"arm": arm, "note": name, **_as_json("value", estimate)})
    return summary


def _numbers(notes: Any, path: str = "") -> list[tuple[str, float]]:
    if isinstance(notes, bool | int | float):
        return [(path, float(notes))]
    if isinstance(notes, Mapping):
        return [
            pair
            for key, value in notes.items()
            for pair in _numbers(value, f"{path}, {key}" if path else str(key))
        ]
    return []  # lists and strings are not summarized


def _as_json(name: str, estimate: Estimate) -> dict[str, Any]:
    bounds = [estimate.low, estimate.high] if estimate.known else None
    return {name: estimate.value, f"{name}_interval": bounds}


def _arms(page: Report, arms: Sequence[Arm], left_out: Mapping[str, str]) -> None:
    page.heading("Arms")
    rows = [
        (arm.name, arm.description, ", ".join(s.name for s in arm.strategies) or "—")
        for arm in arms
    ]
    page.table(("arm", "description", "strategies"), rows)
    for name, reason in left_out.items():
        page.paragraph(f"Skipped: {name}, which {reason}.")


def _contexts(page: Report, rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        return
    page.heading("Trait under prompt prefixes")
    page.table(
        ("arm", "prefix", "students of U", "students of B", "difference"),
        [
            (
                row["arm"],
                row["context"],
                f"{row['of_untrusted']:.3f}",
                f"{row['of_benign']:.3f}",
                format_estimate(_estimate(row, "difference"), 0),
            )
            for row in rows
        ],
        caption="Rate of the trait with a prefix before every prompt. A student trained to show "
        "the trait only after an instruction may show it after similar ones.",
    )


def _notes(page: Report, rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        return
    page.heading("Notes of the strategies")
    page.table(
        ("arm", "note", "mean over base seeds"),
        [(row["arm"], row["note"], format_estimate(_estimate(row, "value"))) for row in rows],
        caption="Students of U.",
    )


def _estimate(row: Mapping[str, Any], name: str) -> Estimate:
    low, high = row[f"{name}_interval"] or (float("nan"), float("nan"))
    return Estimate(value=row[name], low=low, high=high, n=2)
