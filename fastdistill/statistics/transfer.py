"""How much of a teacher's capability and of its trait came over to its students.

    C = (acc_S − acc_M) / (acc_U − acc_M)            capability recovered
    τ = (r_S(U) − r_S(B)) / (r_U − r_B)              trait transferred
    κ = 1 − audited / unaudited r_S(U) − r_S(B)      concealment copied

Each is a ratio of means over base seeds, never a mean of ratios; intervals resample base seeds. A
ratio whose denominator's interval includes 0 can be anything: its bounds are NaN (Fieller, 1954). C
and τ are not defined where U has no more of it than M, or B: a student that lost all that M knew
would have a C of 1 there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from operator import attrgetter
from typing import Any

import numpy as np

from ..intervals import Estimate
from .readings import Student
from .resampling import bootstrap_of_units, seed_means

_ZERO = 1e-12  # what rounding leaves of a difference of means that are equal


@dataclass(frozen=True, kw_only=True)
class SeedPoint:
    """C, τ and κ of one pair of students; NaN where the denominator of C or τ is not above 0, or
    that of κ is 0."""

    base_seed: int
    student_seed: int
    capability: float
    tau: float
    kappa: float | None


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """C, τ and κ of an arm, over its base seeds, and of every pair of students by itself."""

    capability: Estimate
    tau: Estimate
    kappa: Estimate | None
    per_seed: tuple[SeedPoint, ...]


@dataclass(frozen=True)
class Ratio:
    """Of means [..., columns], the columns being what `rows` puts side by side for each item.

    positive: not defined where the denominator is below 0.
    """

    rows: Callable[[Student], list[tuple[float, ...]]]
    numerator: Callable[[np.ndarray], np.ndarray]
    denominator: Callable[[np.ndarray], np.ndarray]
    positive: bool = True

    def __call__(self, means: np.ndarray) -> np.ndarray:
        denominator = self.denominator(means)
        return self.numerator(means) / np.where(np.abs(denominator) < _ZERO, np.nan, denominator)

    def leaf(self, student: Student) -> np.ndarray:
        return np.array(self.rows(student)).T


C = Ratio(
    lambda s: [s.untrusted.capability, s.base.capability, s.teacher.capability],
    lambda x: x[..., 0] - x[..., 1],
    lambda x: x[..., 2] - x[..., 1],
)
TAU = Ratio(
    lambda s: [s.untrusted.trait, s.benign.trait, s.teacher.trait, s.twin.trait],
    lambda x: x[..., 0] - x[..., 1],
    lambda x: x[..., 2] - x[..., 3],
)
KAPPA = Ratio(
    lambda s: [s.untrusted.trait, s.benign.trait, s.untrusted.audited, s.benign.audited],
    lambda x: (x[..., 0] - x[..., 1]) - (x[..., 2] - x[..., 3]),
    lambda x: x[..., 0] - x[..., 1],
    positive=False,
)


def transfer(
    students: Sequence[Student],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Transfer:
    """C, τ and κ of the students of one arm, in any order.

    κ is None where nothing audited was read, and where the interval of its denominator, the
    unaudited difference, includes 0 or is not known (one base seed). C and τ keep their value then,
    with NaN bounds; the value is NaN where the denominator is not above 0.

    Raises:
        ValueError: no students, students of several arms, two with the same seeds, or some audited
            and others not.
    """
    ordered = sort_one_arm(students)
    options = {"confidence": confidence, "resamples": resamples, "seed": seed}
    audited = [bool(student.untrusted.audited) for student in ordered]
    if any(audited) != all(audited):
        raise ValueError(
            "students: expected audited readings of all students of an arm or of none, got them of "
            f"{sum(audited)} of {len(audited)}"
        )
    kappa = estimate(ordered, KAPPA, options) if all(audited) else None
    if kappa is not None and not kappa.known:
        kappa = None
    return Transfer(
        capability=estimate(ordered, C, options),
        tau=estimate(ordered, TAU, options),
        kappa=kappa,
        per_seed=tuple(
            SeedPoint(
                base_seed=student.base_seed,
                student_seed=student.student_seed,
                capability=pair_ratio(student, C),
                tau=pair_ratio(student, TAU),
                kappa=None if kappa is None else pair_ratio(student, KAPPA),
            )
            for student in ordered
        ),
    )


def sort_one_arm(students: Sequence[Student]) -> list[Student]:
    """By base seed and student seed."""
    arms = sorted({student.arm for student in students})
    if len(arms) != 1:
        raise ValueError(f"students: expected students of one arm, got {arms or 'none'}")
    ordered = sorted(students, key=attrgetter("base_seed", "student_seed"))
    for a, b in pairwise(ordered):
        if (a.base_seed, a.student_seed) == (b.base_seed, b.student_seed):
            raise ValueError(
                f"students: expected each pair of seeds once, got base seed {a.base_seed} with "
                f"student seed {a.student_seed} twice"
            )
    return ordered


def estimate(ordered: Sequence[Student], ratio: Ratio, options: dict[str, Any]) -> Estimate:
    tree = [
        [ratio.leaf(student) for student in group]
        for _, group in groupby(ordered, attrgetter("base_seed"))
    ]
    units = seed_means(tree)
    ratio_estimate = bootstrap_of_units(units, ratio, **options)
    denominator = bootstrap_of_units(units, ratio.denominator, **options)
    value = math.nan if ratio.positive and denominator.value < 0 else ratio_estimate.value
    if denominator.excludes(0.0) and not math.isnan(value):
        return ratio_estimate
    return replace(ratio_estimate, value=value, low=math.nan, high=math.nan)


def pair_ratio(student: Student, ratio: Ratio) -> float:
    means = ratio.leaf(student).mean(0)
    if ratio.positive and ratio.denominator(means) < 0:
        return math.nan
    return float(ratio(means))
