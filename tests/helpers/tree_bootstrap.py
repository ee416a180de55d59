"""The interval of a statistic of base seeds, drawn from arrays [prompts, columns] per student."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastdistill.alignment.statistics import Bootstrap, Estimate
from fastdistill.alignment.statistics.bootstrap import DEFAULT, Statistic, bootstrap_of_units


def seed_means(tree: Any) -> np.ndarray:
    """Means over prompts, then over student seeds, as `transfer` computes them."""
    return np.array([np.mean([leaf.mean(0) for leaf in students], axis=0) for students in tree])


def hierarchical_bootstrap(
    tree: Any, statistic: Statistic, bootstrap: Bootstrap = DEFAULT
) -> Estimate:
    return bootstrap_of_units(seed_means(tree), statistic, bootstrap)
