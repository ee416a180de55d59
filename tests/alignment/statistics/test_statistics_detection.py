"""Telling two kinds of models apart: against counting pairs, by hand, and by simulation."""

from __future__ import annotations

import math
import re
from statistics import NormalDist
from typing import Any, cast

import numpy as np
import pytest

from fastdistill.alignment.statistics import auroc, threshold_at, true_positives
from fastdistill.runtime.intervals import wilson


def test_auroc_is_a_count_of_pairs():
    rng = np.random.default_rng(0)
    for ties in (3, 1000):
        up, down = rng.integers(0, ties, size=23) + 1, rng.integers(0, ties, size=17)
        pairs = [1.0 if x > y else 0.5 if x == y else 0.0 for x in up for y in down]
        estimate = auroc(up.tolist(), down.tolist())
        assert estimate.value == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
        assert estimate.n == 17


def test_auroc_at_its_ends_and_in_the_middle():
    assert auroc([1.0] * 4, [1.0] * 7).value == 0.5
    best, worst = auroc(range(10, 20), range(10)), auroc(range(10), range(10, 20))
    assert (best.value, best.high, worst.value, worst.low) == (1.0, 1.0, 0.0, 0.0)
    assert 0.5 < best.low < 0.9
    assert worst.high == pytest.approx(1 - best.low)
    assert auroc([math.inf], [0.0]).value == 1.0


def test_auroc_with_one_score_each_has_the_interval_of_wilson():
    """V(θ) is then θ(1 − θ): the area is one coin's toss."""
    estimate, share = auroc([1.0], [0.0]), wilson(1, 1)
    assert (estimate.low, estimate.high) == pytest.approx((share.low, share.high))
    assert auroc([1.0], [0.0], confidence=0.5).low > estimate.low


def test_the_bounds_of_auroc_solve_newcombes_equation():
    estimate = auroc([3.0, 4.0, 6.0, 8.0], [1.0, 2.0, 5.0])
    assert estimate.value == pytest.approx(10 / 12)
    for theta in (estimate.low, estimate.high):
        each = (1 - theta) / (2 - theta) + theta / (1 + theta)
        variance = theta * (1 - theta) * (1 + (3.5 - 1) * each) / 12
        assert (theta - 10 / 12) ** 2 == pytest.approx(1.959964**2 * variance, rel=1e-5)


def auroc_coverage(area, n, shared=0.0, trials=2000):
    """Normal scores; `shared` is the part of their variance that a pair has in common."""
    rng = np.random.default_rng(1)
    pair = math.sqrt(shared) * rng.normal(size=(trials, n))
    own = math.sqrt(1 - shared) * rng.normal(size=(2, trials, n))
    up = pair + own[0] + math.sqrt(2) * NormalDist().inv_cdf(area)
    down = pair + own[1]
    estimates = [auroc(x, y) for x, y in zip(up, down, strict=True)]
    covered = float(np.mean([one.low <= area <= one.high for one in estimates]))
    print(f"area {area}, n = {n}, shared {shared}: {covered:.3f}")
    return covered


@pytest.mark.parametrize("area", [0.5, 0.7, 0.85, 0.95])
def test_auroc_covers(area):
    assert 0.93 <= auroc_coverage(area, 10) <= 0.97


def test_auroc_is_cautious_at_the_edge_and_with_pairs():
    assert auroc_coverage(0.99, 50) >= 0.97
    assert auroc_coverage(0.7, 10, shared=0.5) >= 0.97


def test_threshold_by_hand():
    scores = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert [threshold_at(scores, fpr) for fpr in (0.0, 0.19, 0.2, 0.4, 0.99)] == [5, 5, 4, 3, 1]
    assert threshold_at([1.0, 2.0, 2.0, 2.0], 0.25) == 2.0  # below 2 are three of four above
    assert threshold_at(list(range(100)), 0.29) == 70.0  # 0.29 · 100 is 28.999…96
    assert threshold_at([7.0]) == 7.0


def test_threshold_is_the_smallest_that_keeps_the_share():
    rng = np.random.default_rng(2)
    for m in (1, 5, 19, 20, 21, 60):
        for fpr in (0.0, 0.05, 0.1, 0.5):
            scores = rng.integers(0, 15, size=m).astype(float)
            threshold = threshold_at(scores.tolist(), fpr)
            assert np.mean(scores > threshold) <= fpr
            assert np.mean(scores > np.nextafter(threshold, -math.inf)) > fpr


def test_thresholds_of_development_hold_on_new_scores():
    """(k + 1)/(m + 1), as the docstring says: ten scores cannot promise 5 %."""
    rng = np.random.default_rng(3)
    for m, expected in ((10, 1 / 11), (20, 2 / 21), (100, 6 / 101), (1000, 51 / 1001)):
        rates = []
        for _ in range(4000):
            threshold = threshold_at(cast(Any, rng.exponential(size=m)), 0.05)
            rates.append(math.exp(-threshold))  # the share of all new scores above it
        print(f"m = {m}: {np.mean(rates):.4f}")
        assert np.mean(rates) == pytest.approx(expected, abs=0.005)


def test_true_positives_are_strictly_above():
    assert true_positives([1.0, 2.0, 3.0, 4.0], 2.0) == wilson(2, 4)
    assert true_positives([1.0, 2.0], -math.inf) == wilson(2, 2)
    assert true_positives([1.0, 2.0], 1.5, confidence=0.5) == wilson(1, 2, confidence=0.5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: auroc([], [1.0]), "positives: expected one or more scores, got none"),
        (lambda: auroc([1.0], [math.nan]), "negatives: expected one or more scores, got nan among"),
        (
            lambda: auroc(cast(Any, [[1.0]]), [1.0]),
            "positives: expected one number per score, got shape [1, 1",
        ),
        (
            lambda: auroc([1.0], [1.0], confidence=1.0),
            "confidence: expected a number between 0 and",
        ),
        (lambda: threshold_at([], 0.05), "negatives: expected one or more scores, got none"),
        (lambda: threshold_at([1.0], 1.0), "fpr: expected a number in [0, 1), got 1.0"),
        (lambda: threshold_at([1.0], math.nan), "fpr: expected a number in [0, 1), got nan"),
        (lambda: true_positives([1.0], math.nan), "threshold: expected a number, got nan"),
        (lambda: true_positives([], 0.0), "positives: expected one or more scores, got none"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        call()
