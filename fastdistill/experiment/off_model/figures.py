"""What the runs of the study "off-model" came to, with intervals whose unit is the base seed.

    lost = before − after        recovered = (after − locked) / (unlocked − locked)

A family of differences is tested at once: different by t tests, alike (within a margin) by two
one-sided ones, each corrected by Holm over the family.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...intervals import Estimate
from ...report.arms import SEEDS, SIGNIFICANT
from ...statistics import equivalence, hierarchical_bootstrap, holm, paired_bootstrap, t_test
from .arms import OFF_MODEL, ON_BASE, ON_LOCKED, OWN, RELATED, WHOLE, names
from .run import KINDS
from .world import EMPTY, LENGTHS, PLAIN, THOUGHT, WEAK, behind

Found = Mapping[str, Mapping[int, Mapping[str, Any]]]  # arm → base seed → what its run kept
Readings = Mapping[int, Mapping[str, Mapping[str, float]]]  # base seed → model → task → right
ALIKE = {"cost": 0.05, "reasoning": 0.1, "weak": 0.1}  # margins
LOST = 0.1  # of what is right, from where on there is something to restore or to recover
FORMS = (PLAIN, THOUGHT, EMPTY)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One claim that could be made: values by base seed, and what their mean is.

    p, p_alike: Holm-adjusted over the family; None where one base seed tells no spread.
    """

    name: str
    values: tuple[float, ...]
    margin: float
    p: float | None
    p_alike: float | None

    @property
    def estimate(self) -> Estimate:
        return mean(self.values)

    @property
    def outcome(self) -> str:
        """more, less, alike (within the margin), unclear; too few below 10 base seeds."""
        if len(self.values) < SEEDS or self.p is None or self.p_alike is None:
            return "too few base seeds"
        if self.p_alike <= SIGNIFICANT:
            return "alike"
        if self.p <= SIGNIFICANT:
            return "more" if self.estimate.value > 0 else "less"
        return "unclear"

    def as_json(self) -> dict[str, Any]:
        return {
            "difference": self.name,
            **plain(self.estimate),
            "margin": self.margin,
            "p_holm": self.p,
            "p_alike_holm": self.p_alike,
            "outcome": self.outcome,
        }


def mean(values: Sequence[float]) -> Estimate:
    return paired_bootstrap(values, [0.0] * len(values))


def ratio(over: Sequence[float], under: Sequence[float]) -> Estimate:
    """Of means over base seeds; not known where what is under it may be 0, or is below LOST."""
    unknown = Estimate(value=math.nan, low=math.nan, high=math.nan, n=len(under))
    if sum(under) / len(under) < LOST or (len(under) > 1 and not mean(under).excludes(0.0)):
        return unknown
    tree = [[np.array([[a, b]])] for a, b in zip(over, under, strict=True)]
    return hierarchical_bootstrap(tree, lambda m: m[..., 0] / m[..., 1])


def plain(estimate: Estimate) -> dict[str, Any]:
    """As JSON: None for what is not known."""
    value = estimate.value if math.isfinite(estimate.value) else None
    bounds = [estimate.low, estimate.high] if estimate.known else None
    return {"value": value, "interval": bounds, "n": estimate.n}


def family(values: Mapping[str, Sequence[float]], margin: float) -> list[Difference]:
    enough = all(len(v) > 1 for v in values.values())
    p = holm([t_test(v) for v in values.values()]) if enough else [None] * len(values)
    alike = (
        holm([equivalence(v, margin).p for v in values.values()])
        if enough
        else [None] * len(values)
    )
    return [
        Difference(name=name, values=tuple(v), margin=margin, p=a, p_alike=b)
        for (name, v), a, b in zip(values.items(), p, alike, strict=True)
    ]


def right(found: Found, arm: str, task: str, when: str = "after") -> list[float]:
    return [run[when][task] for run in found[arm].values()]


# What off-model data costs.


def lost(found: Found, arm: str, tasks: Sequence[str] = tuple(LENGTHS)) -> list[float]:
    """The mean over tasks, by base seed."""
    return [
        sum(run["before"][task] - run["after"][task] for task in tasks) / len(tasks)
        for run in found[arm].values()
    ]


def of_length(tokens: int) -> list[str]:
    return [task for task, length in LENGTHS.items() if length == tokens]


def costs(found: Found) -> list[Difference]:
    """Beside the student's own outputs: by arm and length; by length of the same sums; by nat."""
    values: dict[str, list[float]] = {}
    for arm in (OFF_MODEL, RELATED):
        for tokens in sorted(set(LENGTHS.values())):
            told = "token" if tokens == 1 else "tokens"
            values[f"{arm}, answers of {tokens} {told}, lost beyond {OWN}"] = minus(
                lost(found, arm, of_length(tokens)), lost(found, OWN, of_length(tokens))
            )
    values[f"{OFF_MODEL}, the same sums, lost at 6 tokens beyond at 3"] = minus(
        lost(found, OFF_MODEL, [THOUGHT]), lost(found, OFF_MODEL, [PLAIN])
    )
    values["lost per nat of surprisal"] = per_nat(found)
    return family(values, ALIKE["cost"])


def per_nat(found: Found) -> list[float]:
    """By base seed: the slope of what is lost over the surprisal of the data, of the three arms."""
    arms = (OWN, RELATED, OFF_MODEL)
    nats = np.array([[run["surprisal"][0] for run in found[arm].values()] for arm in arms])
    gone = np.array([lost(found, arm) for arm in arms])
    nats, gone = nats - nats.mean(0), gone - gone.mean(0)
    return ((nats * gone).sum(0) / (nats**2).sum(0)).tolist()


def restored(found: Found) -> dict[str, Estimate]:
    """The share of what the sums lost that a few steps bring back, by what they are on."""
    runs = found[OFF_MODEL].values()
    gone = lost(found, OFF_MODEL, (PLAIN, THOUGHT))
    back = {
        kind: [
            sum(run["restored"][kind][task] - run["after"][task] for task in (PLAIN, THOUGHT)) / 2
            for run in runs
        ]
        for kind in KINDS
    }
    return {kind: ratio(gain, gone) for kind, gain in back.items()}


# What reasoning that nobody can read leaves to be taught.


def recovered(found: Found, arm: str, form: str) -> Estimate:
    """The empty thoughts have no lock of their own: beside the thought ones."""
    locked = right(found, arm, form, "before")
    unlocked = right(found, arm, behind(PLAIN if form == PLAIN else THOUGHT), "before")
    return ratio(minus(right(found, arm, form), locked), minus(unlocked, locked))


def reasons(found: Found) -> list[Difference]:
    """Every variant beside whole answers, of sums that are thought about and that are not."""
    values = {
        f"{arm}, {form}, right beyond {WHOLE}": minus(
            right(found, arm, form), right(found, WHOLE, form)
        )
        for arm in names("reasoning")
        if arm != WHOLE
        for form in (PLAIN, THOUGHT)
    }
    return family(values, ALIKE["reasoning"])


# What a weak supervisor gets out of a model that holds back.


def weak(found: Found, readings: Readings) -> list[Difference]:
    supervisor = [readings[seed][WEAK][PLAIN] for seed in found[ON_LOCKED]]
    end = right(found, ON_LOCKED, PLAIN)
    first = [run["curve"][0]["right"][PLAIN] for run in found[ON_LOCKED].values()]
    return family(
        {
            "U, right beyond its supervisor": minus(end, supervisor),
            "U, right beyond M taught alike": minus(end, right(found, ON_BASE, PLAIN)),
            "U, right at the first checkpoint beyond the end": minus(first, end),
        },
        ALIKE["weak"],
    )


def minus(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]
