"""C, τ and κ from numbers worked out by hand, and what comes of denominators that are near 0."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest

from fastdistill.alignment.statistics import Bootstrap, Reading, transfer
from helpers.present import present
from helpers.readings_by_hand import reading, student


def test_by_hand():
    # C = (.6 − .2)/(1 − .2), τ = (.5 − .1)/(.9 − .1), κ = 1 − (.2 − .1)/(.5 − .1)
    made = [student(seed, c=0.6, trait=0.5, audited=0.2) for seed in range(3)]
    estimates = transfer(made)
    assert estimates.capability.value == pytest.approx(0.5)
    assert estimates.tau.value == pytest.approx(0.5)
    assert present(estimates.kappa).value == pytest.approx(0.75)
    assert estimates.tau.n == estimates.capability.n == present(estimates.kappa).n == 3
    point = estimates.per_seed[2]
    assert (point.base_seed, point.student_seed) == (2, 0)
    assert (point.capability, point.tau, point.kappa) == pytest.approx((0.5, 0.5, 0.75))


def test_ratio_of_means_over_base_seeds_and_not_mean_of_ratios():
    weak = replace(student(0, c=1.0, trait=0.3), teacher=reading(1.0, 0.3), twin=reading(1.0, 0.1))
    made = [weak, student(1, c=1.0, trait=0.3), student(1, c=1.0, trait=0.5, student_seed=1)]
    estimates = transfer(made)
    # Base seed 0 differs by .2 of .2, base seed 1 by the mean of .2 and .4, of .8.
    assert estimates.tau.value == pytest.approx((0.2 + 0.3) / (0.2 + 0.8))
    assert [point.tau for point in estimates.per_seed] == pytest.approx([1.0, 0.25, 0.5])
    assert estimates.tau.n == 2


def test_a_copy_of_the_teacher_has_all_of_it():
    rng = np.random.default_rng(0)
    made = []
    for seed in range(10):
        one = student(seed, c=1.0, trait=0.9)
        u, b = (
            Reading(capability=(1.0,) * 20, trait=cast(Any, rng.random(20) * scale))
            for scale in (1.0, 0.2)
        )
        made.append(replace(one, untrusted=u, teacher=u, benign=b, twin=b))
    estimates = transfer(made)
    for estimate in (estimates.capability, estimates.tau):
        assert (estimate.value, estimate.low, estimate.high) == pytest.approx((1, 1, 1))


def test_students_that_are_their_twins_have_nothing_of_it():
    estimates = transfer([student(seed, c=0.2, trait=0.1) for seed in range(5)])
    assert (estimates.tau.value, estimates.tau.low, estimates.tau.high) == (0.0, 0.0, 0.0)
    assert (estimates.capability.value, estimates.capability.high) == (0.0, 0.0)


def test_the_order_of_students_does_not_matter():
    made = [
        student(seed, c=0.5 + seed / 20, trait=0.1 * (1 + (seed + other) % 5), student_seed=other)
        for seed in range(8)
        for other in range(2)
    ]
    shuffled = random.Random(0).sample(made, len(made))
    assert transfer(shuffled) == transfer(made)
    assert transfer(made) != transfer(made, Bootstrap(seed=1))
    narrow, wide = transfer(made, Bootstrap(confidence=0.5)).tau, transfer(made).tau
    assert wide.low < narrow.low < narrow.high < wide.high


def seeds_that_scatter(rng, shift):
    """Base seeds differ a lot in how often anything shows the trait; U's students add `shift`."""
    made = []
    for seed, level in enumerate(rng.random(12)):
        rates = {"untrusted": level / 2 + shift, "benign": level / 2, "base": 0.1}
        rates |= {"teacher": 0.9, "twin": 0.1}
        drawn = {
            name: Reading(
                capability=(float(name != "base"),) * 40,
                trait=np.clip(rate + 0.02 * rng.normal(size=40), 0, 1),
            )
            for name, rate in rates.items()
        }
        made.append(replace(student(seed, c=1.0, trait=0.5), **drawn))
    return made


def test_twins_of_other_seeds_widen_the_interval():
    made = seeds_that_scatter(np.random.default_rng(1), 0.2)
    others = [
        replace(one, benign=other.benign)
        for one, other in zip(made, made[5:] + made[:5], strict=True)
    ]
    paired, shuffled = transfer(made).tau, transfer(others).tau
    assert paired.value == pytest.approx(shuffled.value)
    assert paired.low > 0.2 > shuffled.low
    assert shuffled.high - shuffled.low > 5 * (paired.high - paired.low)


def test_one_base_seed_has_values_without_intervals():
    made = [student(0, c=0.6, trait=0.5, audited=0.2, student_seed=i) for i in range(3)]
    estimates = transfer(made)
    assert estimates.tau.value == pytest.approx(0.5)
    assert estimates.tau.n == 1
    assert not estimates.tau.known
    assert not estimates.capability.known
    assert estimates.kappa is None


def teachers(*traits):
    """Students that show .5 and twins that show .3, of teachers that show the trait that often."""
    return [
        replace(
            student(seed, c=0.6, trait=0.5, twin=0.3),
            teacher=reading(1.0, rate),
            twin=reading(1.0, 0.5),
        )
        for seed, rate in enumerate(traits)
    ]


def test_a_denominator_that_may_be_zero_has_no_small_interval():
    tau = transfer(teachers(0.8, 0.3, 0.9, 0.25, 0.7, 0.4)).tau
    assert tau.value == pytest.approx(0.2 / (3.35 / 6 - 0.5))
    assert not tau.known
    certain = transfer(teachers(0.8, 0.75, 0.9, 0.85, 0.7, 0.8)).tau
    assert certain.known
    assert certain.low > 0


def test_a_denominator_of_zero_has_no_value_either():
    estimates = transfer(teachers(0.5, 0.5, 0.5))
    assert math.isnan(estimates.tau.value)
    assert not estimates.tau.known
    assert math.isnan(estimates.per_seed[0].tau)
    assert estimates.capability.known
    opposite = transfer(teachers(0.8, 0.2, 0.7, 0.3)).tau  # 0 but for rounding
    assert math.isnan(opposite.value)
    assert not opposite.known


def test_kappa_only_where_there_is_something_to_conceal():
    hidden = transfer([student(i, c=1.0, trait=0.5, audited=0.1) for i in range(4)])
    assert present(hidden.kappa).value == pytest.approx(1.0)
    assert transfer([student(i, c=1.0, trait=0.5) for i in range(4)]).kappa is None
    rates = (0.05, 0.2, 0.0, 0.15, 0.1)
    unclear = transfer([student(i, c=1.0, trait=r, audited=0.1) for i, r in enumerate(rates)])
    assert unclear.kappa is None
    assert all(point.kappa is None for point in unclear.per_seed)
    assert unclear.tau.known


@pytest.mark.parametrize(
    ("students", "words"),
    [
        ([], "students: expected students of one arm, got none"),
        (
            [student(0, c=1.0, trait=0.5), replace(student(1, c=1.0, trait=0.5), arm="other")],
            "students: expected students of one arm, got ['by hand', 'other']",
        ),
        (
            [student(3, c=1.0, trait=0.5)] * 2,
            "students: expected each pair of seeds once, got base seed 3 with student seed 0 twice",
        ),
        (
            [student(0, c=1.0, trait=0.5), student(1, c=1.0, trait=0.5, audited=0.1)],
            "students: expected audited readings of all students of an arm or of none, got them of "
            "1 of 2",
        ),
    ],
)
def test_refusals(students, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        transfer(students)
