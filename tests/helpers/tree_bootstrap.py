"""The interval of a statistic over base seeds, as `transfer` computes it from a tree."""

from __future__ import annotations

from fastdistill.alignment.statistics import Bootstrap, Estimate
from fastdistill.alignment.statistics.bootstrap import (
    DEFAULT,
    Statistic,
    Tree,
    bootstrap_of_units,
    seed_means,
)


def hierarchical_bootstrap(
    tree: Tree, statistic: Statistic, bootstrap: Bootstrap = DEFAULT
) -> Estimate:
    return bootstrap_of_units(seed_means(tree), statistic, bootstrap)
