"""Tests against scipy and by hand, and by simulation: false alarms and power are as stated."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest

from fastdistill.alignment.statistics import holm, t_test
from fastdistill.runtime.intervals import student_t_cdf


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.02, 0.9, 0.8]) == pytest.approx([0.06, 1.0, 1.0])
    assert holm([0.5]) == [0.5]
    assert holm([]) == []


def test_holm_keeps_the_order_and_never_lowers_a_p_value():
    rng = np.random.default_rng(0)
    for m in (2, 5, 12):
        raw = rng.random(m) ** 3
        adjusted = np.array(holm(raw.tolist()))
        assert (adjusted >= raw).all()
        assert (np.diff(adjusted[np.argsort(raw)]) >= 0).all()
        assert (
            adjusted <= np.minimum(1, m * raw) + 1e-15
        ).all()  # at least as strong as Bonferroni
        shuffled = rng.permutation(m)
        assert holm(raw[shuffled].tolist()) == pytest.approx(adjusted[shuffled])


@pytest.mark.parametrize("shared", [0.0, 0.7, 1.0])
def test_false_alarms_over_twelve_arms(shared):
    """No arm differs; `shared` is how much of the variance the arms have in common."""
    rng, trials = np.random.default_rng(1), 2500
    of_all = rng.normal(size=(trials, 1, 10)) * math.sqrt(shared)
    data = of_all + rng.normal(size=(trials, 12, 10)) * math.sqrt(1 - shared)
    alarms = [min(holm([t_test(arm) for arm in trial])) <= 0.05 for trial in data]
    print(f"shared {shared}: {np.mean(alarms):.4f}")
    assert np.mean(alarms) <= 0.06  # 5 % and two standard errors
    if shared == 0:
        assert np.mean(alarms) >= 0.035
        alone = [min(t_test(arm) for arm in trial) <= 0.05 for trial in data]
        assert np.mean(alone) > 0.4  # what is corrected for


@pytest.mark.parametrize("shared", [0.0, 0.7])
def test_false_alarms_beside_true_effects(shared):
    rng, trials = np.random.default_rng(2), 2000
    of_all = rng.normal(size=(trials, 1, 10)) * math.sqrt(shared)
    data = of_all + rng.normal(size=(trials, 12, 10)) * math.sqrt(1 - shared)
    data[:, :4] += 2.0
    adjusted = np.array([holm([t_test(arm) for arm in trial]) for trial in data])
    print(f"shared {shared}: {np.mean(adjusted[:, 4:].min(1) <= 0.05):.4f}")
    assert np.mean(adjusted[:, 4:].min(1) <= 0.05) <= 0.06
    assert np.mean(adjusted[:, :4] <= 0.05) > 0.9


@pytest.mark.peers
def test_t_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(3)
    for n in (2, 3, 10, 41):
        data: Any = rng.normal(0.3, 1.0, size=n)
        assert t_test(data) == pytest.approx(stats.ttest_1samp(data, 0).pvalue, abs=1e-12)


@pytest.mark.peers
def test_students_t_on_both_sides():
    stats = pytest.importorskip("scipy.stats")
    for degrees in (1, 2, 9, 30):
        for t in (-40.0, -1.5, 0.0, 0.3, 5.0):
            assert student_t_cdf(t, degrees) == pytest.approx(stats.t.cdf(t, degrees), abs=1e-12)
    assert student_t_cdf(math.inf, 3) == pytest.approx(1.0)
    assert student_t_cdf(-math.inf, 3) == pytest.approx(0.0)


def test_differences_without_spread():
    assert t_test([0.0, 0.0, 0.0]) == 1.0
    assert t_test([0.5, 0.5]) == t_test([-0.5, -0.5]) == 0.0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: holm([0.1, math.nan]), "p_values: expected a number in [0, 1], got nan"),
        (lambda: holm([1.2]), "p_values: expected a number in [0, 1], got 1.2"),
        (lambda: t_test([1.0]), "differences: expected two or more, got 1"),
        (lambda: t_test([1.0, math.inf]), "differences: expected finite numbers, got inf"),
        (
            lambda: student_t_cdf(math.nan, 3),
            "t: expected a number, with 1 degree of freedom or mo",
        ),
        (lambda: student_t_cdf(0.0, 0), "got 0.0 and 0"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        call()
