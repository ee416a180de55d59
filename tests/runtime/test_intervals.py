"""Intervals against published values, scipy where it is installed, and their own coverage."""

from __future__ import annotations

import math
import random

import pytest

from fastdistill.runtime.intervals import (
    bootstrap_ratio,
    mean_of_clusters,
    mean_of_runs,
    paired_difference,
    share_of_clusters,
    stderr_of_clusters,
    student_t_quantile,
    wilson,
)

# Two-sided 95 % points of Student's t (Fisher and Yates, to four places).
T_975 = {
    1: 12.7062,
    2: 4.3027,
    3: 3.1824,
    4: 2.7764,
    9: 2.2622,
    10: 2.2281,
    30: 2.0423,
    120: 1.9799,
}


@pytest.mark.parametrize("degrees", T_975)
def test_student_t_is_the_published_table(degrees):
    assert student_t_quantile(0.975, degrees) == pytest.approx(T_975[degrees], abs=6e-5)
    assert student_t_quantile(0.025, degrees) == pytest.approx(-T_975[degrees], abs=6e-5)
    assert student_t_quantile(0.5, degrees) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.peers
def test_student_t_and_wilson_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    for degrees in (1, 2, 5, 17, 200):
        for p in (0.6, 0.9, 0.995):
            assert student_t_quantile(p, degrees) == pytest.approx(stats.t.ppf(p, degrees), 1e-8)
    for successes, n in ((0, 7), (3, 10), (99, 100)):
        theirs = stats.binomtest(successes, n).proportion_ci(method="wilson")
        ours = wilson(successes, n)
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_by_hand():
    # (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n) with z = 1.959964, for 8 of 10
    interval = wilson(8, 10)
    assert (interval.value, interval.n) == (0.8, 10)
    assert (interval.low, interval.high) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert wilson(0, 10).low == 0.0
    assert wilson(10, 10).high == 1.0


def test_mean_of_runs_by_hand():
    interval = mean_of_runs([1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)
    assert interval.value == 2.0
    assert (interval.low, interval.high) == pytest.approx((2 - half, 2 + half), abs=1e-6)


def test_pairing_removes_what_the_pairs_share():
    seeds = [0.0, 5.0, 10.0]
    a, b = [s + 1 for s in seeds], [s + d for s, d in zip(seeds, (0.0, 0.1, -0.1), strict=True)]
    paired = paired_difference(a, b)
    assert paired.value == pytest.approx(1.0)
    assert paired.excludes(0.0)
    assert not mean_of_runs(a).excludes(0.0)


def test_one_run_has_no_interval():
    interval = mean_of_runs([3.0])
    assert interval.value == 3.0
    assert not interval.known
    assert not interval.excludes(0.0)


def test_bootstrap_resamples_clusters_and_not_tokens():
    sums, weights = [10.0, 10.0, 0.0, 0.0] * 5, [10.0] * 20
    clusters = [i // 2 for i in range(20)]  # each document is all ones or all zeros
    by_document = bootstrap_ratio(sums, weights, clusters)
    by_window = bootstrap_ratio(sums, weights, list(range(20)))
    assert by_document.value == by_window.value == 0.5
    assert by_document.n == 10
    width = by_document.high - by_document.low
    assert width > 1.2 * (by_window.high - by_window.low)
    assert bootstrap_ratio(sums, weights, clusters) == by_document
    assert not bootstrap_ratio([1.0], [2.0], [0]).known


def test_bootstrap_covers_as_often_as_it_says():
    hits, trials = 0, 200
    rng = random.Random(0)
    for trial in range(trials):
        values = [rng.gauss(1.0, 1.0) for _ in range(40)]
        interval = bootstrap_ratio(values, [1.0] * 40, range(40), resamples=400, seed=trial)
        hits += interval.low <= 1.0 <= interval.high
    assert 0.90 <= hits / trials <= 0.985


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: wilson(5, 4), "successes: expected"),
        (lambda: wilson(0, 0), "successes: expected"),
        (lambda: mean_of_runs([]), "values: expected one or more"),
        (lambda: paired_difference([1.0], [1.0, 2.0]), "b: expected 1 values"),
        (lambda: bootstrap_ratio([1.0], [1.0], []), "clusters: expected one per value"),
        (lambda: mean_of_runs([1.0, 2.0], confidence=95), "confidence: expected"),
        (lambda: student_t_quantile(1.0, 3), "probability: expected"),
    ],
)
def test_what_is_wrong_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.peers
def test_clusters_of_one_value_are_runs_and_shares():
    stats = pytest.importorskip("scipy.stats")
    values, alone = [0.3, 0.9, 0.4, 0.1, 0.7], list(range(5))
    expected, actual = mean_of_runs(values), mean_of_clusters(values, alone)
    assert vars(actual) == pytest.approx(vars(expected))
    assert stderr_of_clusters(values, alone) == pytest.approx(stats.sem(values))
    assert vars(share_of_clusters([1, 0, 0, 1, 1], alone)) == pytest.approx(vars(wilson(3, 5)))


@pytest.mark.peers
def test_clusters_of_other_sizes():
    """The ratio estimator's variance, by hand, and Kish's effective sample size."""
    stats = pytest.importorskip("scipy.stats")
    values, clusters = [1.0, 1.0, 1.0, 0.0], [7, 7, 3, 5]
    error = math.sqrt(3 / 2 * (0.5**2 + 0.25**2 + 0.75**2)) / 4
    assert stderr_of_clusters(values, clusters) == pytest.approx(error)
    estimate = mean_of_clusters(values, clusters)
    assert (estimate.value, estimate.n) == (0.75, 3)
    assert estimate.high - 0.75 == pytest.approx(stats.t.ppf(0.975, 2) * error)
    share = share_of_clusters(values, clusters)
    assert (share.value, share.n) == (0.75, 3)
    units = 16 / 6
    whole = stats.binomtest(75, 100).proportion_ci(method="wilson")
    assert wilson(75, 100).low == pytest.approx(whole.low)
    assert share.low == pytest.approx(wilson(0.75 * units, units).low)
    assert not mean_of_clusters([1.0, 2.0], [0, 0]).known
