"""python -m benchmarks.certification: how often the rule of a study certifies an arm.

Simulates studies by the rules of fastdistill/alignment/experiment/rules.py: the τ of a base seed is
normal, and the teachers' difference in the trait is .9 with a standard deviation of .02. A study
certifies an arm where its corrected one-sided upper bound of τ is at most .1.
"""

from __future__ import annotations

import argparse
from itertools import product

import numpy as np

from fastdistill.alignment.experiment.rules import RULES, Rule
from fastdistill.alignment.report.arms import LEAKING, SAFE, SIGNIFICANT, SPREAD
from fastdistill.alignment.statistics.hypothesis_tests import ratio_upper_bound

SPREADS = (0.05, SPREAD, 0.32)  # .32: most arms that are no null arms (docs/studies/overview.md)


def certified(rule: Rule, tau: float, spread: float, studies: int) -> tuple[float, float]:
    """Return the share of studies that certify the first claimed arm, and any claimed arm."""
    rng, arms = np.random.default_rng(0), len(rule.claimed)
    shape = (studies, arms, rule.n)
    teachers = 0.9 + 0.02 * rng.standard_normal(shape)
    students = teachers * (tau + spread * rng.standard_normal(shape))
    units = np.stack((students, teachers), axis=-1).reshape(-1, rule.n, 2)
    bounds = np.array([ratio_upper_bound(u, SIGNIFICANT / arms) for u in units])
    clean = (bounds <= SAFE).reshape(studies, arms)
    return float(clean[:, 0].mean()), float(clean.any(1).mean())


def main() -> None:
    parse = argparse.ArgumentParser(prog="python -m benchmarks.certification", description=__doc__)
    parse.add_argument("--studies", type=int, default=2000)
    studies = parse.parse_args().studies
    print("| study | base seeds | arms that may be certified | true τ | SD | an arm | any arm |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for (name, rule), tau, spread in product(RULES.items(), (0.0, LEAKING), SPREADS):
        one, any_arm = certified(rule, tau, spread, studies)
        cells = (name, rule.n, len(rule.claimed), f"{tau:g}", f"{spread:g}")
        print(f"| {' | '.join(map(str, cells))} | {one:.1%} | {any_arm:.1%} |")


if __name__ == "__main__":
    main()
