"""Confidence intervals for reported figures, with the number of units behind each.

Wilson for shares, Student's t for a few independent runs, the bootstrap over clusters if the tokens
of a document are correlated. Implemented here (and compared with scipy in the tests), so that
reports need only numpy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from .checks import fail


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value, its interval, and the number of independent units.

    low and high are NaN if n is too small (one run has no spread).
    """

    value: float
    low: float
    high: float
    n: int

    @property
    def known(self) -> bool:
        return not (math.isnan(self.low) or math.isnan(self.high))

    @property
    def interval(self) -> list[float] | None:
        """[low, high] for a JSON file; None if one is not finite."""
        finite = math.isfinite(self.low) and math.isfinite(self.high)
        return [self.low, self.high] if finite else None

    @property
    def finite_value(self) -> float | None:
        """The value for a JSON file; None if it is not finite."""
        return self.value if math.isfinite(self.value) else None

    def excludes(self, value: float) -> bool:
        return self.known and not self.low <= value <= self.high


UNKNOWN = Estimate(value=math.nan, low=math.nan, high=math.nan, n=0)


def flat_json(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record for a JSON file, with two entries for an estimate e: e and e_interval."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Estimate):
            flat |= {name: value.finite_value, f"{name}_interval": value.interval}
        else:
            flat[name] = value
    return flat


def wilson(successes: float, n: float, *, confidence: float = 0.95) -> Estimate:
    """Wilson interval of a share; valid for small n and near 0 and 1.

    n may be an effective number of units, and successes a share of it.
    """
    if not 0 <= successes <= n or n < 1:
        fail("successes", "0 ≤ successes ≤ n and n ≥ 1", f"{successes} of {n}")
    z = NormalDist().inv_cdf(0.5 + check_confidence(confidence) / 2)
    share = successes / n
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends the bound is exact; rounding must not push it past the share.
    low = 0.0 if successes == 0 else center - half
    high = 1.0 if successes == n else center + half
    return Estimate(value=share, low=low, high=high, n=int(n))


def share_of_clusters(
    values: Sequence[float], clusters: Sequence[int], *, confidence: float = 0.95
) -> Estimate:
    """Wilson interval of the mean of values in 0..1, with clusters of equal values as units.

    Clusters of m values count as (Σ m)² / Σ m² units; `n` is the number of clusters.
    """
    units = effective_size(clusters)
    share = math.fsum(values) / len(values)
    estimate = wilson(share * units, units, confidence=confidence)
    return replace(estimate, value=share, n=len(set(clusters)))


def effective_size(clusters: Sequence[int]) -> float:
    """Kish's effective sample size: the number of clusters where all have one size."""
    sizes = _by_cluster([1.0] * len(clusters), clusters)
    return float(sizes.sum() ** 2 / np.square(sizes).sum())


def mean_of_clusters(
    values: Sequence[float], clusters: Sequence[int], *, confidence: float = 0.95
) -> Estimate:
    """Student's t interval of the mean of values, with clusters as units.

    The cluster-robust variance: with one value per cluster it is `mean_of_runs`.
    """
    mean = math.fsum(values) / len(values)
    return _student_t(mean, stderr_of_clusters(values, clusters), len(set(clusters)), confidence)


def stderr_of_clusters(values: Sequence[float], clusters: Sequence[int]) -> float:
    """The cluster-robust standard error of a mean; NaN for one cluster."""
    deviations = np.asarray(values, dtype=np.float64) - math.fsum(values) / len(values)
    totals = _by_cluster(deviations.tolist(), clusters)
    n = len(totals)
    if n == 1:
        return math.nan
    return math.sqrt(n / (n - 1) * float(np.square(totals).sum())) / len(values)


def means_by_cluster(values: Iterable[float], clusters: Iterable[int]) -> list[float]:
    """The mean of each cluster, in the order of their first values."""
    by_cluster: dict[int, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        by_cluster.setdefault(cluster, []).append(value)
    return [math.fsum(group) / len(group) for group in by_cluster.values()]


def mean_of_runs(values: Sequence[float], *, confidence: float = 0.95) -> Estimate:
    """Student's t interval of the mean of independent runs (seeds)."""
    n = len(values)
    if n == 0:
        fail("values", "one or more", "none")
    mean = math.fsum(values) / n
    variance = math.fsum((value - mean) ** 2 for value in values) / max(n - 1, 1)
    return _student_t(mean, math.sqrt(variance / n), n, confidence)


def _student_t(mean: float, error: float, n: int, confidence: float) -> Estimate:
    """Student's t interval of the mean of n units, with this standard error."""
    if n == 1:
        return Estimate(value=mean, low=math.nan, high=math.nan, n=1)
    half = student_t_quantile(0.5 + check_confidence(confidence) / 2, n - 1) * error
    return Estimate(value=mean, low=mean - half, high=mean + half, n=n)


def paired_difference(
    a: Sequence[float], b: Sequence[float], *, confidence: float = 0.95
) -> Estimate:
    """mean(a − b) for pairs a[i], b[i] with the same seed: shared variation cancels."""
    if len(a) != len(b):
        fail("b", f"{len(a)} values, one per value of a", len(b))
    return mean_of_runs([x - y for x, y in zip(a, b, strict=True)], confidence=confidence)


def rate_difference(a: Estimate, b: Estimate) -> Estimate:
    """a − b of two shares or AUROCs, by Newcombe's hybrid score interval (1998, method 10).

    The interval combines both as if they were independent. Valid if both shares are 0 or 1, where a
    paired t has no width; conservative for pairs that agree more than by chance.
    """
    low = math.hypot(a.value - a.low, b.high - b.value)
    high = math.hypot(a.high - a.value, b.value - b.low)
    value = a.value - b.value
    return Estimate(value=value, low=value - low, high=value + high, n=min(a.n, b.n))


def bootstrap_ratio(
    sums: Sequence[float],
    weights: Sequence[float],
    clusters: Sequence[int],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Σ sums / Σ weights with resampled clusters: a mean per token, with documents as units."""
    totals, counts = _by_cluster(sums, clusters), _by_cluster(weights, clusters)
    n = len(totals)
    value = float(totals.sum() / counts.sum())
    if n < 2:
        return Estimate(value=value, low=math.nan, high=math.nan, n=n)
    picks = np.random.default_rng(seed).integers(0, n, size=(resamples, n))
    ratios = totals[picks].sum(1) / counts[picks].sum(1)
    low, high = np.quantile(ratios, [0.5 - check_confidence(confidence) / 2, 0.5 + confidence / 2])
    return Estimate(value=value, low=float(low), high=float(high), n=n)


def _by_cluster(values: Sequence[float], clusters: Sequence[int]) -> np.ndarray:
    if len(values) != len(clusters) or len(values) == 0:
        fail("clusters", "one per value", f"{len(clusters)} for {len(values)} values")
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    return np.bincount(index.ravel(), weights=np.asarray(values, dtype=np.float64))


def check_confidence(confidence: float) -> float:
    if not 0 < confidence < 1:
        fail("confidence", "a number between 0 and 1", repr(confidence))
    return confidence


def student_t_quantile(probability: float, degrees: int) -> float:
    """The inverse of Student's t distribution function, to about 1e-12."""
    if not 0 < probability < 1 or degrees < 1:
        expected = "0 < probability < 1 with 1 degree of freedom or more"
        fail("probability", expected, f"{probability!r} and {degrees!r}")
    if probability < 0.5:
        return -student_t_quantile(1 - probability, degrees)
    low, high = 0.0, 1.0
    while student_t_cdf(high, degrees) < probability:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if student_t_cdf(middle, degrees) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def student_t_cdf(t: float, degrees: int) -> float:
    """P(T ≤ t), by the finite sums for integer degrees (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    if degrees < 1 or math.isnan(t):
        fail("t", "a number, with 1 degree of freedom or more", f"{t!r} and {degrees!r}")
    theta = math.atan2(t, math.sqrt(degrees))
    cos2 = math.cos(theta) ** 2
    if degrees % 2 == 0:
        term = total = 1.0
        for i in range(1, degrees // 2):
            term *= (2 * i - 1) / (2 * i) * cos2
            total += term
        return 0.5 + 0.5 * math.sin(theta) * total
    total, term = 0.0, math.cos(theta)
    for i in range((degrees - 1) // 2):
        if i:
            term *= 2 * i / (2 * i + 1) * cos2
        total += term
    return 0.5 + (theta + math.sin(theta) * total) / math.pi
