"""C and τ where U has no more than M, or its twin: not defined, and no success."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fastdistill.alignment.report import TransferReport
from fastdistill.alignment.statistics import (
    Checkpoint,
    Reading,
    Student,
    matched_capability,
    safe_window,
    transfer,
)
from helpers.made_students import ABOUT

SEEDS = range(12)


def student(seed, **of):
    """(capability, trait) of each model, on three items."""
    rates = {"untrusted": (1, 0), "benign": (1, 0), "base": (0, 0), "teacher": (1, 1)}
    rates = rates | {"twin": (1, 0)} | of
    read = {n: Reading(capability=(c,) * 3, trait=(t,) * 3) for n, (c, t) in rates.items()}
    point = Checkpoint(step=1, untrusted=read["untrusted"], benign=read["benign"])
    return Student(arm="an arm", base_seed=seed, student_seed=0, curve=(point,), **read)


def row(students):
    (row_of_arm,) = TransferReport(students, about=ABOUT).table()
    return row_of_arm


def test_a_student_that_succeeds_does():
    assert row([student(seed) for seed in SEEDS])["outcome"] == "DFC succeeds"


@pytest.mark.parametrize("lost", [0.1, 0.5])
def test_losing_what_the_base_knew_is_no_capability(lost):
    students = [student(s, base=(0.9, 0), teacher=(0.1, 1), untrusted=(lost, 0)) for s in SEEDS]
    estimates = transfer(students)
    assert math.isnan(estimates.capability.value)
    assert not estimates.capability.known
    assert all(math.isnan(point.capability) for point in estimates.per_seed)
    assert matched_capability(students, 0.5) is None
    assert safe_window(students) is None
    row_here = row(students)
    assert (row_here["C"], row_here["C_interval"], row_here["outcome"]) == (None, None, "unclear")
    assert "its capability could not be measured" in row_here["verdict"]


@pytest.mark.parametrize("rates", [(1, 0), (0, 0), (0.5, 0.5)])
def test_a_teacher_without_the_trait_shows_no_clean_student(rates):
    (u, b), teachers = rates, {"teacher": (1, 0.2), "twin": (1, 0.7)}
    students = [student(s, untrusted=(1, u), benign=(1, b), **teachers) for s in SEEDS]
    estimates = transfer(students)
    assert math.isnan(estimates.tau.value)
    assert not estimates.tau.known
    row_here = row(students)
    assert (row_here["tau"], row_here["outcome"]) == (None, "unclear")
    assert "U shows no more of the trait than its benign twin" in row_here["verdict"]


def test_a_capability_without_an_interval_is_none():
    """On the mean the teachers know a little more than the bases, and on half of the seeds less."""
    bases = (0.1, 0.95)
    students = [
        student(s, base=(bases[s % 2], 0), teacher=(0.55, 1), untrusted=(0.7, 0)) for s in SEEDS
    ]
    estimates = transfer(students)
    assert estimates.capability.value > 0.8
    assert not estimates.capability.known
    row_here = row(students)
    assert row_here["outcome"] == "unclear"
    assert (
        "has no interval, because the teacher knows hardly more than the base"
        in row_here["verdict"]
    )
    assert safe_window(students) is None


def test_rounding_is_no_difference():
    traits = {"untrusted": (0.9, 0.9, 0.3), "benign": (0.7, 0.7, 0.7)}  # .7 and .7 − 2.2e-16
    read = {name: Reading(capability=(1, 1, 1), trait=trait) for name, trait in traits.items()}
    students = []
    for seed in SEEDS:
        plain = student(seed)
        names = ("base", "teacher", "twin")
        models: dict[str, Any] = read | {name: getattr(plain, name) for name in names}
        students.append(Student(arm="a", base_seed=seed, student_seed=0, **models))
    (arm,) = TransferReport(students, about=ABOUT).arms
    assert arm.p == 1.0
    assert not arm.transfers
