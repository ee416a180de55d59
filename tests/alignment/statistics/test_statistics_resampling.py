"""The bootstrap by hand and at its edges; how often its intervals are right is in coverage."""

from __future__ import annotations

import math
import re
from typing import Any, cast

import numpy as np
import pytest

from fastdistill.alignment.statistics import Bootstrap, paired_bootstrap
from fastdistill.runtime.intervals import paired_difference
from helpers.tree_bootstrap import hierarchical_bootstrap


def first(means):
    return means[..., 0]


def ratio(means):
    return means[..., 0] / means[..., 1]


def tree_of(*seeds):
    """A base seed per argument: its students, each a list of numbers, one per prompt."""
    return [[np.array(prompts)[:, None] for prompts in students] for students in seeds]


def test_two_values_by_hand():
    # Means of two draws from {0, 2} are 0, 1, 1, 2, drawn out by √2 · 12.7062 / 1.959964 from 1.
    estimate = paired_bootstrap([0.0, 2.0], [0.0, 0.0])
    reach = math.sqrt(2) * 12.7062 / 1.959964
    assert (estimate.low, estimate.high) == pytest.approx((1 - reach, 1 + reach), rel=1e-4)


def test_near_students_t_for_a_mean():
    rng = np.random.default_rng(0)
    for n in (10, 100, 1000):
        a, b = cast(Any, (rng.normal(size=n), rng.normal(size=n)))
        ours = paired_bootstrap(a, b, Bootstrap(resamples=20_000))
        exact = paired_difference(a.tolist(), b.tolist())
        assert ours.value == pytest.approx(exact.value)
        assert ours.n == n
        width = exact.high - exact.low
        assert (ours.low, ours.high) == pytest.approx((exact.low, exact.high), abs=0.06 * width)


def test_a_ratio_has_the_interval_of_fieller():
    rng = np.random.default_rng(1)
    below = rng.normal(1.0, 0.6, size=10)  # the mean is 5 standard errors from 0
    above = 0.5 * below + rng.normal(0.0, 0.3, size=10)
    # All ρ with |mean(above − ρ·below)| ≤ t₉ · se: between the roots of a quadratic.
    (v, cross), (_, w) = np.cov(above, below) / 10 * 2.262157**2
    x, y = above.mean(), below.mean()
    fieller = np.sort(np.roots([y * y - w, -2 * (x * y - cross), x * x - v]))
    tree = [[np.array([[a, b]])] for a, b in zip(above, below, strict=True)]
    estimate = hierarchical_bootstrap(tree, ratio, Bootstrap(resamples=20_000))
    width = fieller[1] - fieller[0]
    assert (estimate.low, estimate.high) == pytest.approx(tuple(fieller), abs=0.1 * width)


def test_shuffled_pairs_widen_the_interval():
    rng = np.random.default_rng(2)
    prompt = rng.normal(size=200)  # easy and hard prompts: what the pair shares
    a: Any = prompt + 0.1 * rng.normal(size=200)
    b: Any = prompt + 0.1 * rng.normal(size=200)
    paired, shuffled = paired_bootstrap(a, b), paired_bootstrap(a, cast(Any, rng.permutation(b)))
    assert paired.value == pytest.approx(shuffled.value)
    assert shuffled.high - shuffled.low > 5 * (paired.high - paired.low)


def test_the_unit_is_the_base_seed():
    """A hundred times the prompts of the same ten seeds know no more about other seeds."""
    rng = np.random.default_rng(3)
    few = [[rng.normal(seed, 0.01, size=(5, 1))] for seed in range(10)]
    many = [[np.repeat(leaf, 100, axis=0) for leaf in students] for students in few]
    a, b = (hierarchical_bootstrap(tree, first) for tree in (few, many))
    assert b.high - b.low == pytest.approx(a.high - a.low)
    assert a.n == b.n == 10


def test_the_same_seed_draws_the_same():
    tree = tree_of(*([[float(i)]] for i in range(10)))
    estimate = hierarchical_bootstrap(tree, first, Bootstrap(seed=4))
    assert estimate == hierarchical_bootstrap(tree, first, Bootstrap(seed=4))
    assert estimate != hierarchical_bootstrap(tree, first, Bootstrap(seed=5))
    narrow = hierarchical_bootstrap(tree, first, Bootstrap(seed=4, confidence=0.5))
    assert estimate.low < narrow.low < estimate.value < narrow.high < estimate.high


def test_many_units_are_drawn_in_parts(monkeypatch):
    a: Any = np.random.default_rng(5).normal(size=50)
    whole = paired_bootstrap(a, a**2, Bootstrap(resamples=300))
    monkeypatch.setattr("fastdistill.alignment.statistics.bootstrap._MAX_DRAWS", 1000)
    assert paired_bootstrap(a, a**2, Bootstrap(resamples=300)) == whole


def test_one_unit_has_no_interval():
    for estimate in (
        hierarchical_bootstrap(tree_of([[1.0, 2.0], [3.0]]), first),
        paired_bootstrap([2.25], [0.0]),
    ):
        assert (estimate.value, estimate.n) == (2.25, 1)
        assert math.isnan(estimate.low)
        assert math.isnan(estimate.high)


def test_units_that_are_all_alike_have_an_interval_without_width():
    estimate = paired_bootstrap([0.75] * 8, [0.25] * 8)
    assert (estimate.low, estimate.value, estimate.high, estimate.n) == (0.5, 0.5, 0.5, 8)


def test_a_statistic_that_is_not_finite_somewhere_has_no_bounds():
    zero = [[np.array([[1.0, 0.0]])], [np.array([[2.0, 0.0]])]]
    estimate = hierarchical_bootstrap(zero, ratio)
    assert estimate.value == math.inf
    assert not estimate.known
    nothing = [[np.zeros((3, 2))] for _ in range(4)]
    estimate = hierarchical_bootstrap(nothing, ratio)
    assert math.isnan(estimate.value)
    assert not estimate.known


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: paired_bootstrap([1.0], []), "b: expected 1 numbers, one per number of a, got 0"),
        (lambda: paired_bootstrap([], []), "a, b: expected finite numbers, got none"),
        (lambda: paired_bootstrap([math.nan], [0.0]), "a, b: expected finite numbers, got nan"),
        (
            lambda: paired_bootstrap([1.0], [0.0], Bootstrap(confidence=95)),
            "confidence: expected a number be",
        ),
        (
            lambda: paired_bootstrap([1.0], [0.0], Bootstrap(resamples=0)),
            "resamples: expected an integer of",
        ),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        call()
