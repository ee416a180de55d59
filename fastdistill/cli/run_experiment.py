"""fastdistill experiment: a study on the synthetic world, or on checkpoints."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from typing import Any

from ..backend import versions
from ..experiment import double_bind, leak_knobs
from ..experiment.checkpoint_source import CheckpointSource
from ..experiment.executors import workers
from ..experiment.outcome import publish
from ..experiment.source import Source
from ..experiment.study import FRESH, Study, Table, carry_out, pairs_of, why_not
from ..experiment.world_source import WorldSource
from ..report.validity import too_few_units
from ..strategies.strategy import Training
from .opening import quiet, running
from .printing import say
from .verbs import DoubleBind, LeakKnobs

STUDIES = {DoubleBind: double_bind.study, LeakKnobs: leak_knobs.study}
PRESETS = {"quick": (2, 0), "full": (10, 4)}  # base seeds, and others for development
RESERVE = 2  # times as many seeds, for those whose organisms miss a gate
# The first base seed: of a quick look one for development, too, since whoever looks tunes.
FIRST = {DoubleBind: {"quick": 900, "full": 1200}, LeakKnobs: {"quick": 900, "full": 1300}}


def dry(own: DoubleBind, more: dict[str, Any]) -> dict[str, Any]:
    workers(own.executor, own.processes)
    study, sources, development, wanted = _planned(own)
    sources = sources[:wanted]
    # What development students will have said is not known yet: that they are enough is.
    some = dict.fromkeys(study.gate, (0.0,) * len(development))
    left_out = {a.name: why for a in study.arms if (why := why_not(a, sources, some))}
    kept = [arm for arm in study.arms if arm.name not in left_out]
    pairs = pairs_of(study, kept, sources, own.student_seeds, {})
    digests = {job.digest for pair in pairs for job in (pair.student, pair.twin)}
    return {
        "arms": [arm.name for arm in kept],
        "base_seeds": [source.base_seed for source in sources],
        "development_seeds": [source.base_seed for source in development],
        "left_out": left_out,
        "runs": len(digests),
        "invalid_because": too_few_units(len(sources)),
        "out": str(own.out),
    }


def run(own: DoubleBind, more: dict[str, Any]) -> dict[str, Any]:
    quiet()
    processes = workers(own.executor, own.processes)
    study, sources, development, wanted = _planned(own)
    with running("experiment"):
        own.out.mkdir(parents=True, exist_ok=True)
        table = carry_out(
            study,
            sources,
            development,
            own.out,
            wanted=wanted,
            student_seeds=own.student_seeds,
            executor=own.executor,
            processes=processes,
            only_report=own.only_report,
        )
        result = publish(study, table, own.out, _about(own, study, table, sources[0], development))
    return {**result, "report": str(own.out / "report.html")}


def tell(found: dict[str, Any]) -> None:
    if "report" not in found:
        say(f"{found['runs']} runs of {len(found['arms'])} arms: {', '.join(found['arms'])}")
        say(f"base seeds {found['base_seeds']}, for development {found['development_seeds']}")
        for reason in found["invalid_because"]:
            say(f"will be invalid: {reason}")
        return
    for seed, because in found["refused"].items():
        say(f"base seed {seed} refused: {'; '.join(because)}")
    for reason in found["invalid_because"]:
        say(f"invalid: {reason}")
    for arm in found["arms"]:
        say(f"  {arm['name']}: {arm['verdict']}")
    say(f"The report is {found['report']}")


def _planned(own: DoubleBind) -> tuple[Study, list[Source], list[Source], int]:
    """The study, its sources with those in reserve, those for development, and how many to report
    on."""
    if own.preset not in PRESETS:
        raise ValueError(f"preset: expected quick or full, got {own.preset!r}")
    checkpoints, make = _checkpoints(own), STUDIES[type(own)]
    fresh, tuned = PRESETS[own.preset]
    if own.seeds is not None and own.seeds < 1:
        raise ValueError(f"seeds: expected 1 or more, got {own.seeds}")
    fresh = own.seeds or fresh
    if checkpoints is not None:
        if own.seeds not in (None, 1):
            raise ValueError(
                f"seeds: expected none with checkpoints, of which there is one base, got "
                f"{own.seeds}. student_seeds=N repeats on that base, and gives no interval"
            )
        training = Training(
            steps=own.steps,
            batch_size=own.batch_size,
            learning_rate=own.learning_rate,
            max_new_tokens=own.answer_tokens,
        )
        there = make(own.preset, n=checkpoints.prompts, training=training)
        return _chosen(there, own.arms), [checkpoints], [], 1
    first = FIRST[type(own)][own.preset] if own.first_seed is None else own.first_seed
    if own.preset == "full" and first < FRESH:
        raise ValueError(
            f"first_seed: expected {FRESH} or more, since seeds below it are for development, got "
            f"{first}"
        )
    return (
        _chosen(make(own.preset), own.arms),
        [WorldSource(seed=first + i) for i in range(RESERVE * fresh)],
        [WorldSource(seed=i) for i in range(tuned)],
        fresh,
    )


def _chosen(study: Study, names: tuple[str, ...]) -> Study:
    """Only some arms, beside the undefended one and the controls."""
    if not names:
        return study
    known = [arm.name for arm in study.arms]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"arms: expected names among {', '.join(known)}, got {', '.join(unknown)}")
    arms = (study.arms[0], *(a for a in study.arms[1:] if a.role != "arm" or a.name in names))
    return replace(study, arms=arms)


def _checkpoints(own: DoubleBind) -> CheckpointSource | None:
    given = {
        name: getattr(own, name) for name in ("teacher", "base", "pool", "probes", "capability")
    }
    if not any(given.values()):
        return None
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise ValueError(
            f"{missing[0]}: expected one, since an experiment on checkpoints needs teacher, base, "
            "pool, probes and capability, got none"
        )
    return CheckpointSource(
        **given,
        benign=own.benign,
        eliciting=own.eliciting,
        near_misses=own.near_misses,
        max_new_tokens=own.max_new_tokens,
    )


def _about(
    own: DoubleBind, study: Study, table: Table, source: Source, development: list[Source]
) -> dict[str, Any]:
    return {
        "command": shlex.join(["fastdistill", *sys.argv[1:]]),
        "config": {
            "study": study.name,
            "preset": own.preset,
            "pool": dict(study.pool),
            "training": {
                key: value for key, value in vars(study.training).items() if key != "settings"
            },
            "arms": {arm.name: [s.as_json() for s in arm.strategies] for arm in study.arms},
            "settings": {arm.name: dict(arm.settings) for arm in study.arms if arm.settings},
            "source": source.as_json(),
        },
        "versions": versions(),
        "seeds": {
            "base": sorted({student.base_seed for student in table.students}),
            "development": [source.base_seed for source in development],
            "student": list(range(own.student_seeds)),
        },
    }
