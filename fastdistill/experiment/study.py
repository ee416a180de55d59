"""A study: arms × base seeds × student seeds × teachers, run, and put together as one table.

Every arm is a pair of students, of U and of B unless its teachers are others, from the same base
on the same prompts in the same order. Whatever is decided by looking (thresholds of audits, the
interval of benign students that a gate compares with) comes from development seeds, and what is
reported from fresh ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..report.incrimination import AuditScore
from ..statistics import Checkpoint, Reading, Student, Validity
from ..strategies.strategy import Strategy, Training
from .executors import do
from .job import SOURCES, Job
from .preparing import chosen, prepared
from .source import Source

FRESH = 1000  # base seeds below it are for development
LEAST_BENIGN = 3  # values of students of benign teachers, from where on a gate has an interval


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to distil.

    Args:
        says: what it does, for the report.
        role: "arm", or one of the two kinds of control.
        teachers: of the student and of its twin.
        other_seed: the student has another seed than its twin: the same teacher twice.
        pool, settings: changes to the study's.
        gated: its strategies compare with students of benign teachers.
        needs: what a source has to have for it (see Source.has).
    """

    name: str
    strategies: tuple[Strategy, ...] = ()
    says: str = ""
    role: Literal["arm", "positive control", "null arm"] = "arm"
    teachers: tuple[str, str] = ("untrusted", "benign")
    other_seed: bool = False
    pool: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    gated: bool = False
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Study:
    """Arms, and what they have in common.

    Args:
        arms: the first is the undefended one.
        audits: names of the audits that every student gets. gate: those that strategies use.
    """

    name: str
    title: str
    arms: tuple[Arm, ...]
    training: Training
    pool: Mapping[str, Any]
    audits: tuple[str, ...] = ()
    gate: tuple[str, ...] = ()
    checkpoints: int = 4
    measured: str = ""
    limits: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Table:
    """What the runs of a study came to."""

    students: list[Student]
    scores: list[AuditScore]
    development: list[AuditScore]
    validity: dict[int, Validity]
    contexts: list[dict[str, Any]]
    notes: list[dict[str, Any]]
    left_out: dict[str, str]
    refused: dict[int, list[str]]  # base seeds whose organisms miss a gate, and which
    runs: int


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two jobs: of a student, and of its twin."""

    arm: Arm
    source: Source
    student_seed: int
    student: Job
    twin: Job


def pairs_of(
    study: Study,
    arms: Sequence[Arm],
    sources: Sequence[Source],
    student_seeds: int,
    gate: Mapping[str, tuple[float, ...]],
) -> list[Pair]:
    found = []
    for source in sources:
        for arm in arms:
            for seed in range(student_seeds):
                jobs = [
                    Job(
                        source=source,
                        role=role,
                        strategies=arm.strategies,
                        training=replace(
                            study.training, settings={**study.training.settings, **arm.settings}
                        ),
                        pool={**study.pool, **arm.pool},
                        # Far from the seeds of other students.
                        student_seed=seed + (1000 if arm.other_seed and i == 0 else 0),
                        checkpoints=study.checkpoints,
                        audits=study.audits,
                        gate=gate if arm.gated else {},
                    )
                    for i, role in enumerate(arm.teachers)
                ]
                found.append(Pair(arm=arm, source=source, student_seed=seed,
                                  student=jobs[0], twin=jobs[1]))  # fmt: skip
    return found


def carry_out(
    study: Study,
    sources: Sequence[Source],
    development: Sequence[Source],
    folder: Path,
    *,
    wanted: int | None = None,
    student_seeds: int = 1,
    executor: str = "processes",
    processes: int = 1,
    only_report: bool = False,
) -> Table:
    """Do what is not done yet, and read it all.

    Args:
        wanted: how many sources to report on: the first whose organisms pass their gates; the
            others are in reserve. None: all, whatever they pass.
        only_report: do nothing, and raise where something is missing.
    """
    how: dict[str, Any] = {
        "executor": executor,
        "processes": processes,
        "only_report": only_report,
    }
    prepared(development, folder, "development worlds", **how)
    sources, refused = chosen(sources, len(sources) if wanted is None else wanted, folder, **how)
    first = pairs_of(study, study.arms[:1], development, student_seeds, {})
    do(_jobs(first), folder, what="development runs", **how)
    gate = _gate(study, first, folder)
    arms = [arm for arm in study.arms if not why_not(arm, sources, gate)]
    pairs = pairs_of(study, arms, sources, student_seeds, gate)
    do(_jobs(pairs), folder, what="runs", **how)
    told = [
        score
        for arm in arms
        for pair in first
        for score in scores_of(replace(pair, arm=arm), folder)
    ]
    return Table(
        students=[student_of(pair, folder) for pair in pairs],
        scores=[score for pair in pairs for score in scores_of(pair, folder)],
        development=told,
        validity={
            source.base_seed: validity
            for source in sources
            if (validity := source.kept(folder / SOURCES).validity) is not None
        },
        contexts=[row for pair in pairs for row in contexts_of(pair, folder)],
        notes=[
            {"arm": pair.arm.name, "base_seed": pair.source.base_seed, "notes": notes}
            for pair in pairs
            if (notes := pair.student.result(folder)["notes"])
        ],
        left_out={arm.name: why for arm in study.arms if (why := why_not(arm, sources, gate))},
        refused=refused,
        runs=len(_jobs(pairs)) + len(_jobs(first)),
    )


def why_not(arm: Arm, sources: Sequence[Source], gate: Mapping[str, tuple[float, ...]]) -> str:
    """Why an arm is left out; empty where it is not."""
    missing = [need for need in arm.needs if not all(need in source.has for source in sources)]
    if missing:
        return f"needs {', '.join(missing)}, which the models and prompts given do not have"
    few = min(map(len, gate.values()), default=0)
    if arm.gated and few < LEAST_BENIGN:
        return f"needs {LEAST_BENIGN} development seeds to compare with, and there are {few}"
    return ""


def _jobs(pairs: Sequence[Pair]) -> list[Job]:
    """Each once: arms share their twins."""
    found = {job.digest: job for pair in pairs for job in (pair.student, pair.twin)}
    return list(found.values())


def _gate(study: Study, first: Sequence[Pair], folder: Path) -> dict[str, tuple[float, ...]]:
    """What audits say of the students of benign teachers, on development seeds."""
    benign = [pair.twin.result(folder)["audits"] for pair in first]
    return {name: tuple(values[name] for values in benign) for name in study.gate if benign}


def student_of(pair: Pair, folder: Path) -> Student:
    made, twin = pair.student.result(folder), pair.twin.result(folder)
    models = pair.source.kept(folder / SOURCES).readings
    return Student(
        arm=pair.arm.name,
        base_seed=pair.source.base_seed,
        student_seed=pair.student_seed,
        untrusted=Reading.from_json(made["reading"]),
        benign=Reading.from_json(twin["reading"]),
        base=models["base"],
        teacher=models["untrusted"],
        twin=models["benign"],
        curve=tuple(
            Checkpoint(
                step=a["step"],
                untrusted=Reading.from_json(a["reading"]),
                benign=Reading.from_json(b["reading"]),
            )
            for a, b in zip(_curve(made), _curve(twin), strict=True)
        ),
    )


def _curve(run: Mapping[str, Any]) -> list[Any]:
    """The last point is the student."""
    end = {"step": run["steps"], "reading": run["reading"]}
    return [*run["curve"], end]


def scores_of(pair: Pair, folder: Path) -> list[AuditScore]:
    a, b = (job.result(folder)["audits"] for job in (pair.student, pair.twin))
    return [
        AuditScore(
            audit=name,
            arm=pair.arm.name,
            base_seed=pair.source.base_seed,
            student_seed=pair.student_seed,
            of_untrusted=a[name],
            of_benign=b[name],
        )
        for name in a
        if a[name] is not None and b.get(name) is not None
    ]


def contexts_of(pair: Pair, folder: Path) -> list[dict[str, Any]]:
    a, b = (job.result(folder)["contexts"] for job in (pair.student, pair.twin))
    return [
        {
            "arm": pair.arm.name,
            "base_seed": pair.source.base_seed,
            "context": name,
            "of_untrusted": a[name],
            "of_benign": b[name],
        }
        for name in a
    ]
