"""A study: runs over arms × base seeds × student seeds × teachers, collected in one table.

Each arm compares two students, by default of U and of its twin B, with the same base, prompts and
data order. Everything that is tuned (thresholds of audits, the interval of benign students for a
gate) uses development seeds; reported results use fresh seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..report.audit_scores import AuditScore
from ..statistics import Checkpoint, Reading, Student, Validity
from ..strategies.audit_loop import MIN_BENIGN
from ..strategies.strategy import Strategy, Training
from .estimate import announce
from .executors import SERIAL, Execution, run_all
from .job import SOURCES, Job, TeacherAudits
from .prepare_models import build_models, select_seeds, select_valid
from .rules import freeze
from .source import Source

FRESH = 1000  # base seeds below it are development seeds
OTHER_BASES = ("other_base", "earlier")  # roles of models that replace M


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One experimental condition.

    Args:
        description: for the report.
        role: "arm", or one of the two kinds of control.
        teachers: roles of the teachers of the student and of its twin.
        begins: roles of their initial models. C compares with them, where they are neither U nor B.
        noise: added to each of their weights, as a share of its norm.
        organism: roles of the U and B that C and τ compare with.
        other_seed: the student uses another seed than its twin (the same teacher twice).
        pool, settings: changes to those of the study. training: replaces that of the study.
        gated: its strategies compare with students of benign teachers.
        needs: required features of a source (see Source.features).
    """

    name: str
    strategies: tuple[Strategy, ...] = ()
    description: str = ""
    role: Literal["arm", "positive control", "null arm"] = "arm"
    teachers: tuple[str, str] = ("untrusted", "benign")
    begins: tuple[str, str] = ("base", "base")
    noise: float = 0.0
    organism: tuple[str, str] = ("untrusted", "benign")
    other_seed: bool = False
    pool: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    training: Training | None = None
    gated: bool = False
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Study:
    """Arms and their common settings.

    Args:
        arms: the first one is undefended.
        audits: names of the audits of every student and of the teachers. gate: audits that
            strategies use; development students have them, too.
        checkpoints: number of evaluations during training, the end included.
        measured, limits: text for the report.
        repairs: students begin as U and B, and τ is the share of the trait that remains.
    """

    name: str
    title: str
    arms: tuple[Arm, ...]
    training: Training
    pool: Mapping[str, Any]
    audits: tuple[str, ...] = ()
    gate: tuple[str, ...] = ()
    checkpoints: int = 2
    measured: str = ""
    repairs: bool = False
    limits: tuple[str, ...] = ()


class ContextRow(NamedTuple):
    """The trait of a pair of students with a prefix before every prompt."""

    arm: str
    base_seed: int
    context: str
    of_untrusted: float
    of_benign: float


class NoteRow(NamedTuple):
    """What the strategies noted about a student of U."""

    arm: str
    base_seed: int
    notes: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Table:
    """The results of all runs of a study.

    Attributes:
        digests: of the runs of each pair of students.
        planned: number of base seeds to report; a report of an unfinished study has fewer.
        refused: base seeds whose organisms failed gates -> the failed gates.
    """

    students: list[Student]
    digests: list[tuple[str, str]]
    scores: list[AuditScore]
    teachers: list[AuditScore]
    development: list[AuditScore]
    validity: dict[int, Validity]
    contexts: list[ContextRow]
    notes: list[NoteRow]
    left_out: dict[str, str]
    refused: dict[int, list[str]]
    runs: int
    planned: int


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The jobs of a student and of its twin."""

    arm: Arm
    source: Source
    student_seed: int
    student: Job
    twin: Job


def make_pairs(
    study: Study,
    arms: Sequence[Arm],
    sources: Sequence[Source],
    student_seeds: int,
    gate: Mapping[str, tuple[float, ...]],
) -> list[Pair]:
    """Return the pairs of all arms, sources and student seeds."""
    pairs = []
    for source, arm, seed in product(sources, arms, range(student_seeds)):
        training = study.training if arm.training is None else arm.training
        settings = {**study.training.settings, **training.settings, **arm.settings}
        student, twin = (
            Job(
                source=source,
                role=role,
                init_role=begins,
                noise=arm.noise,
                strategies=arm.strategies,
                training=replace(training, settings=settings),
                pool={**study.pool, **arm.pool},
                student_seed=student_seed,
                checkpoints=study.checkpoints,
                audits=study.audits,
                gate=gate if arm.gated else {},
            )
            # 1000: far from the seeds of other students.
            for role, begins, student_seed in zip(
                arm.teachers,
                arm.begins,
                (seed + 1000 if arm.other_seed else seed, seed),
                strict=True,
            )
        )
        pairs.append(Pair(arm=arm, source=source, student_seed=seed, student=student, twin=twin))
    return pairs


def run_study(
    study: Study,
    sources: Sequence[Source],
    development: Sequence[Source],
    folder: Path,
    *,
    n_sources: int | None = None,
    only_valid: bool = False,
    student_seeds: int = 1,
    execution: Execution = SERIAL,
    rule: dict[str, Any] | None = None,
    rule_folder: Path | None = None,
) -> Table:
    """Execute the missing runs and collect all results.

    With `execution.only_report`, base seeds with missing runs are left out, if others are finished.

    Args:
        rule: of the verdicts; it must not change after the first run. None: no rule is stored.
        rule_folder: where the rule is stored, if the folder is that of another study.
        n_sources: number of sources to report: the first whose organisms pass their gates; the
            others are a reserve. None: all, without selection.
        only_valid: report every source whose organisms pass, and refuse the others, of development
            too.
    """
    if rule is not None:
        freeze(rule, sources, rule_folder or folder, folder, store=not execution.only_report)
    refused: dict[int, list[str]] = {}
    if only_valid:
        development, refused = select_valid(development, folder, execution)
        sources, more = select_valid(sources, folder, execution)
        refused |= more
        if not sources:
            raise ValueError(
                "pairs: expected one or more whose models pass their gates, got none: "
                + "; ".join(f"pair {i}: {', '.join(reasons)}" for i, reasons in refused.items())
            )
    else:
        build_models(development, folder, execution, "development worlds")
        n_sources = len(sources) if n_sources is None else n_sources
        sources, refused = select_seeds(sources, n_sources, folder, execution)
    with_gate = replace(study, audits=tuple(dict.fromkeys((*study.audits, *study.gate))))
    development_pairs = make_pairs(with_gate, study.arms[:1], development, student_seeds, {})
    run_all(_unique_jobs(development_pairs), folder, execution, label="development runs")
    benign = [pair.twin.result(folder)["audits"] for pair in development_pairs]
    gate = {name: tuple(values[name] for values in benign) for name in study.gate if benign}
    left_out = {a.name: reason for a in study.arms if (reason := skip_reason(a, sources, gate))}
    arms = [arm for arm in study.arms if arm.name not in left_out]
    planned = len(sources)

    def work(sources: Sequence[Source]) -> tuple[list[Pair], list[TeacherAudits]]:
        pairs = make_pairs(study, arms, sources, student_seeds, gate)
        return pairs, [TeacherAudits(source=source, audits=study.audits) for source in sources]

    def is_finished(source: Source) -> bool:
        pairs, teachers = work([source])
        return all(run.is_done(folder) for run in (*_unique_jobs(pairs), *teachers))

    if execution.only_report:
        sources = [source for source in sources if is_finished(source)] or sources
    pairs, teachers = work(sources)
    run_all(teachers, folder, execution, label="audits of teachers")
    per_audits = teachers[0].result(folder)["seconds"] / 2  # of U and B
    announce(_unique_jobs(pairs), folder, execution, per_audits)
    run_all(_unique_jobs(pairs), folder, execution)
    return Table(
        students=[to_student(pair, folder) for pair in pairs],
        digests=[(pair.student.digest, pair.twin.digest) for pair in pairs],
        scores=[score for pair in pairs for score in audit_scores(pair, folder)],
        teachers=[score for audits in teachers for score in teacher_scores(audits, folder)],
        development=[
            score
            for arm in arms
            for pair in development_pairs
            for score in audit_scores(replace(pair, arm=arm), folder)
            if score.audit in study.audits
        ],
        validity={
            source.base_seed: validity
            for source in sources
            if (validity := source.cached(folder / SOURCES).validity) is not None
        },
        contexts=[row for pair in pairs for row in context_rows(pair, folder)],
        notes=[
            NoteRow(pair.arm.name, pair.source.base_seed, notes)
            for pair in pairs
            if (notes := pair.student.result(folder)["notes"])
        ],
        left_out=left_out,
        refused=refused,
        runs=len(_unique_jobs(pairs)) + len(_unique_jobs(development_pairs)),
        planned=planned,
    )


def skip_reason(arm: Arm, sources: Sequence[Source], gate: Mapping[str, tuple[float, ...]]) -> str:
    """Return why an arm is skipped, or an empty string."""
    missing = [need for need in arm.needs if not all(need in source.features for source in sources)]
    if missing:
        return f"needs {', '.join(missing)}, which the given models and prompts lack"
    n_benign = min(map(len, gate.values()), default=0)
    if arm.gated and n_benign < MIN_BENIGN:
        return f"needs {MIN_BENIGN} development seeds to compare with, and there are {n_benign}"
    return ""


def _unique_jobs(pairs: Sequence[Pair]) -> list[Job]:
    """Return every job once: arms share their twins."""
    jobs = {job.digest: job for pair in pairs for job in (pair.student, pair.twin)}
    return list(jobs.values())


def to_student(pair: Pair, folder: Path) -> Student:
    student, twin = pair.student.result(folder), pair.twin.result(folder)
    models = pair.source.cached(folder / SOURCES).readings
    for run in (student, twin):
        run["curve"].append({"step": run["steps"], "reading": run["reading"]})
    curve = tuple(
        Checkpoint(
            step=a["step"],
            untrusted=Reading.from_json(a["reading"]),
            benign=Reading.from_json(b["reading"]),
        )
        for a, b in zip(student["curve"], twin["curve"], strict=True)
    )
    return Student(
        arm=pair.arm.name,
        base_seed=pair.source.base_seed,
        student_seed=pair.student_seed,
        untrusted=curve[-1].untrusted,
        benign=curve[-1].benign,
        base=models[pair.arm.begins[0] if pair.arm.begins[0] in OTHER_BASES else "base"],
        teacher=models[pair.arm.organism[0]],
        twin=models[pair.arm.organism[1]],
        curve=curve,
    )


def audit_scores(pair: Pair, folder: Path) -> list[AuditScore]:
    a, b = (job.result(folder)["audits"] for job in (pair.student, pair.twin))
    return _scores(a, b, pair.arm.name, pair.source, pair.student_seed)


def teacher_scores(audits: TeacherAudits, folder: Path) -> list[AuditScore]:
    result = audits.result(folder)
    return _scores(result["untrusted"], result["benign"], "teachers", audits.source, 0)


def _scores(
    a: Mapping[str, Any], b: Mapping[str, Any], arm: str, source: Source, student_seed: int
) -> list[AuditScore]:
    return [
        AuditScore(
            audit=name,
            arm=arm,
            base_seed=source.base_seed,
            student_seed=student_seed,
            of_untrusted=a[name],
            of_benign=b[name],
        )
        for name in a
        if a[name] is not None and b.get(name) is not None
    ]


def context_rows(pair: Pair, folder: Path) -> list[ContextRow]:
    a, b = (job.result(folder)["contexts"] for job in (pair.student, pair.twin))
    arm, seed = pair.arm.name, pair.source.base_seed
    return [ContextRow(arm, seed, name, a[name]["trait"], b[name]["trait"]) for name in a]
