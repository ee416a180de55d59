"""Matched capability and the safe window on curves made by hand."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from fastdistill.alignment.statistics import (
    Bootstrap,
    SafeWindow,
    curve,
    matched_capability,
    safe_window,
    transfer,
)
from helpers.present import present
from helpers.readings_by_hand import student, trained

# An accuracy of .2 is C = 0, .6 is .5, .8 is .75 and 1.0 is 1; showing .1 is τ = 0, .5 is .5.
CS, TRAITS = [0.2, 0.6, 1.0], [0.1, 0.3, 0.9]


def arm(cs, traits, n=4, **options):
    return [trained(seed, cs=cs, traits=traits, **options) for seed in range(n)]


def test_the_curve_is_transfer_at_every_checkpoint():
    points = curve(arm(CS, TRAITS))
    assert [point.step for point in points] == [10, 20, 30]
    assert [point.capability.value for point in points] == pytest.approx([0.0, 0.5, 1.0])
    assert [point.tau.value for point in points] == pytest.approx([0.0, 0.25, 1.0])
    middle = {0: 0.2, 1: 0.5, 2: 0.3}  # what each base seed shows at step 20
    mixed = [trained(seed, cs=CS, traits=[0.1, trait, 0.9]) for seed, trait in middle.items()]
    then = [student(seed, c=0.6, trait=trait) for seed, trait in middle.items()]
    assert curve(mixed)[1].tau == transfer(then).tau


@pytest.mark.parametrize(
    ("level", "tau"),
    [
        (0.5, 0.25),  # at a checkpoint
        (0.75, 0.625),  # half way between two
        (0.6, 0.4),  # a fifth of the way
        (1.0, 1.0),  # at the last
        (0.0, 0.0),  # at the first
        (-1.0, 0.0),  # before the first: as at the first
    ],
)
def test_matched_capability(level, tau):
    estimate = present(matched_capability(arm(CS, TRAITS), level))
    assert estimate.value == pytest.approx(tau)
    assert estimate.n == 4


def test_matched_capability_at_each_seeds_own_time():
    early = trained(0, cs=[0.8, 1.0, 1.0], traits=[0.3, 0.7, 0.9])  # .75 at the first, τ = .25
    late = trained(1, cs=[0.2, 0.6, 1.0], traits=[0.1, 0.1, 0.9])  # .75 half way, τ = .5
    estimate = present(matched_capability([early, late], 0.75))
    assert estimate.value == pytest.approx((0.25 + 0.5) / 2)
    assert estimate.known


def test_matched_capability_where_it_is_never_reached():
    low = trained(9, cs=[0.2, 0.6, 0.8], traits=TRAITS)
    assert matched_capability([low], 0.75) is not None
    assert matched_capability([*arm(CS, TRAITS), low], 0.8) is None


def test_matched_capability_takes_the_first_crossing():
    # Up to .5 at the second checkpoint, down, and up again.
    students = arm([0.2, 0.6, 0.3, 1.0], [0.1, 0.3, 0.9, 0.9])
    assert present(matched_capability(students, 0.5)).value == pytest.approx(0.25)
    assert present(matched_capability(students, 0.25)).value == pytest.approx(0.125)


def test_the_twin_is_taken_at_the_same_time():
    estimate = present(matched_capability(arm(CS, [0.1, 0.5, 0.9], twin=0.3), 0.75))
    assert estimate.value == pytest.approx((0.7 - 0.3) / 0.8)


def test_safe_window():
    able, clean = 1.0, 0.1
    students = arm([0.2, able, able, able], [clean, clean, clean, 0.9])
    assert safe_window(students) == SafeWindow(first=20, last=30)
    assert safe_window(students, capability=0.0) == SafeWindow(first=10, last=30)
    assert safe_window(students, tau=1.0) == SafeWindow(first=20, last=40)
    assert safe_window(students, capability=1.1) is None


def test_the_longest_of_several_windows_and_the_first_of_equals():
    clean, leaks = 0.1, 0.9

    def window(*traits):
        return safe_window(arm([1.0] * 6, traits))

    assert window(clean, leaks, clean, clean, leaks, clean) == SafeWindow(first=30, last=40)
    assert window(clean, leaks, clean, leaks, leaks, clean) == SafeWindow(first=10, last=10)
    assert window(*[leaks] * 6) is None


def test_a_level_that_rounding_hides_is_reached():
    """C of an accuracy of .6 is .5 − 6e-17."""
    assert curve(arm([0.6], [0.1]))[0].capability.value < 0.5
    assert matched_capability(arm([0.6], [0.1]), 0.5) is not None
    assert safe_window(arm([0.6], [0.1]), capability=0.5) == SafeWindow(first=10, last=10)


def test_the_window_asks_for_the_upper_bound():
    """τ = .05 on average, but not for certain below .1."""
    rates = (0.1, 0.3, 0.1, 0.1, 0.1, 0.15)  # the mean is .1417: τ = .052
    students = [trained(i, cs=[1.0], traits=[rate]) for i, rate in enumerate(rates)]
    tau = curve(students)[0].tau
    assert tau.value < 0.1 < tau.high
    assert safe_window(students) is None
    assert safe_window(students, tau=tau.high) == SafeWindow(first=10, last=10)


def test_one_base_seed_has_no_window():
    students = arm([1.0, 1.0], [0.1, 0.1], n=1)
    assert math.isnan(curve(students)[0].tau.high)
    assert safe_window(students) is None


def test_intervals_take_their_options():
    students = [
        trained(i, cs=[1.0], traits=[share])
        for i, share in enumerate(np.linspace(0.1, 0.9, 9).round(1))
    ]
    options = (Bootstrap(), Bootstrap(confidence=0.5), Bootstrap(seed=1))
    for wide, narrow, other in (
        [curve(students, bootstrap)[0].tau for bootstrap in options],
        [present(matched_capability(students, 0.5, bootstrap)) for bootstrap in options],
    ):
        assert wide.low < narrow.low < narrow.high < wide.high
        assert other != wide


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: curve([student(2, c=1.0, trait=0.5)]),
            "students: expected checkpoints in every `curve`, got none of base seed 2. Measure",
        ),
        (
            lambda: curve([*arm(CS, TRAITS, n=1), trained(5, cs=CS, traits=TRAITS, every=20)]),
            "students: expected checkpoints at steps [10, 20, 30] of all students of an arm, got "
            "[20, 40, 60] of base seed 5",
        ),
        (lambda: curve([]), "students: expected students of one arm, got none"),
        (
            lambda: matched_capability([student(2, c=1.0, trait=0.5)], 0.5),
            "students: expected checkpoints in every `curve`, got none of base seed 2",
        ),
        (
            lambda: matched_capability(arm(CS, TRAITS), math.nan),
            "level: expected a finite number, got nan",
        ),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        call()
