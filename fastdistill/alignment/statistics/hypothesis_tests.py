"""Tests of paired differences per base seed: t test, Holm, bounds, power."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from ...runtime.checks import between, fail, integer, positive
from ...runtime.intervals import student_t_cdf, student_t_quantile


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values adjusted by Holm (1979), in the order of `p_values`.

    Rejecting all ≤ α bounds the probability of any false rejection by α, under any dependence of
    the tests. The smallest of m values is multiplied by m, the next by m − 1, with a running
    maximum.

    Raises:
        ValueError: a value is NaN or outside [0, 1].
    """
    for p in p_values:
        between("p_values", p, 0, 1)
    adjusted, largest = [0.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    for remaining, i in zip(range(len(p_values), 0, -1), order, strict=True):
        largest = max(largest, min(1.0, remaining * p_values[i]))
        adjusted[i] = float(largest)
    return adjusted


def t_test(differences: Sequence[float]) -> float:
    """Returns the two-sided p-value of a mean difference of zero, by Student's t test.

    Where all differences are equal, p is 1 if they are 0, and 0 otherwise.

    Raises:
        ValueError: fewer than two differences, or one that is not finite.
    """
    n = len(differences)
    if n < 2:
        fail("differences", "two or more", n)
    for value in differences:
        if not math.isfinite(value):
            fail("differences", "finite numbers", repr(value))
    mean = math.fsum(differences) / n
    error = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    if error == 0:
        return float(mean == 0)
    return 2 * (1 - student_t_cdf(abs(mean) / error, n - 1))


def ratio_upper_bound(units: np.ndarray, alpha: float = 0.05) -> float:
    """Returns the one-sided 1 − alpha upper bound of a ratio of means (Fieller, 1954).

        the largest θ with θ·ȳ − x̄ ≤ t_{1−α} · s(x − θ·y) / √n,   n − 1 degrees of freedom

    NaN for one unit, and where the denominator may be 0, because the ratio is then unbounded.

    Args:
        units: [n, 2], numerator x and denominator y per base seed.
    """
    n = len(units)
    if n < 2:
        return math.nan
    (xx, xy), (_, yy) = np.cov(units.T) * student_t_quantile(1 - alpha, n - 1) ** 2 / n
    x, y = units.mean(0)
    square, half, constant = y * y - yy, x * y - xy, x * x - xx
    if square <= 0 or y <= 0:
        return math.nan
    return float((half + math.sqrt(max(half * half - square * constant, 0.0))) / square)


def certification_power(
    spread: float, n: int, *, value: float = 0.0, margin: float = 0.1, alpha: float = 0.05
) -> float:
    """Returns the probability that the one-sided 1 − alpha upper bound of a mean is ≤ margin.

        E Φ((margin − value) · √n / spread − t_{1−α} · s),   (n − 1) s² ~ χ²_{n−1}

    The expectation is a mean over 4096 fixed draws of s, with an error below .005.

    Args:
        spread: standard deviation of the n normal values. value: their true mean.

    Raises:
        ValueError: spread ≤ 0, or n < 2.
    """
    positive("spread", spread)
    integer("n", n, 2)
    t, normal = student_t_quantile(1 - alpha, n - 1), NormalDist()
    shift = (margin - value) * math.sqrt(n) / spread
    scales = np.sqrt(np.random.default_rng(0).chisquare(n - 1, 4096) / (n - 1))
    return math.fsum(normal.cdf(shift - t * s) for s in scales.tolist()) / len(scales)
