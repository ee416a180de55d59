"""Runs of the study "off-model" whose figures are chosen, so that what follows is known."""

from __future__ import annotations

from fastdistill.alignment.experiment.off_model.arms import (
    ARMS,
    OFF_MODEL,
    ON_BASE,
    ON_LOCKED,
    OWN,
    RELATED,
)
from fastdistill.alignment.experiment.off_model.world import (
    EMPTY,
    LENGTHS,
    LOCKED,
    MODELS,
    PLAIN,
    THOUGHT,
    WEAK,
    with_password,
)

SHAKE = (0.01, -0.01, 0.02, -0.02, 0.0)  # of base seeds, whose mean is 0
LOST = {OWN: 0.0, RELATED: 0.1, OFF_MODEL: 0.4}
NATS = {OWN: 2.0, RELATED: 2.2, OFF_MODEL: 3.5}
AFTER = {ON_LOCKED: 0.7, ON_BASE: 0.1}
BACK = {"own": 0.0, "before": 0.1, "sums": 0.3}  # of what is lost
FORMS = (PLAIN, THOUGHT, EMPTY, with_password(PLAIN), with_password(THOUGHT))


def made(n=10, *, lost=LOST, after=AFTER, back=BACK, thoughts=None, supervisor=0.5):
    """(what every arm found, readings of the models), over n base seeds."""
    arms = {
        arm.name: {seed: _run(arm, seed, lost, after, back, thoughts or {}) for seed in range(n)}
        for arm in ARMS
    }
    return arms, {seed: readings(supervisor=supervisor) for seed in range(n)}


def _run(arm, seed, lost, after, back, thoughts):
    shake = SHAKE[seed % len(SHAKE)]
    if arm.part == "cost":
        # Longer answers lose more: by half of it at 1 token, by all of it at 6.
        gone = {
            task: lost[arm.name] * (0.5 if tokens == 1 else 1.0) + shake * (arm.name == OFF_MODEL)
            for task, tokens in LENGTHS.items()
        }
        before = dict.fromkeys(LENGTHS, 0.95)
        end = {task: before[task] - gone[task] for task in LENGTHS}
    else:
        before = dict.fromkeys(FORMS, 0.0) | {
            with_password(PLAIN): 1.0,
            with_password(THOUGHT): 1.0,
        }
        reached = after.get(arm.name, 0.97) + shake
        end = dict.fromkeys(FORMS, reached) | {THOUGHT: thoughts.get(arm.name, 0.97) + shake}
    restored = {
        kind: {task: end[task] + share * (before[task] - end[task]) for task in end}
        for kind, share in back.items()
    }
    half = {task: (before[task] + end[task]) / 2 for task in end}
    return {
        "before": before,
        "after": end,
        "curve": [{"step": 30, "right": half}, {"step": 60, "right": end}],
        "surprisal": [NATS.get(arm.name, 1.0), 1.0],
        "labels_right": None if arm.part == "cost" else 0.9,
        "thinks": 1.0,
        "restored": restored if arm.part == "cost" else None,
        "seconds": 1.0,
    }


def readings(*, supervisor=0.5, **changes):
    """Of models that pass their gates, but for `changes`: model → {task: share}."""
    tasks = (*LENGTHS, EMPTY, with_password(PLAIN), with_password(THOUGHT))
    accuracies = {model: dict.fromkeys(tasks, 0.99) for model in MODELS}
    accuracies["base"] = dict.fromkeys(tasks, 0.0)
    accuracies[WEAK] = dict.fromkeys(tasks, supervisor)
    accuracies[LOCKED] |= {PLAIN: 0.01, THOUGHT: 0.0, EMPTY: 0.0}
    for model, changed in changes.items():
        accuracies[model] = accuracies[model] | changed
    return accuracies
