"""Validity of an experiment, by its controls.

It must detect transfer in the positive control, and none in null arms. The rules are ours and were
fixed before the experiments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ...report.number_format import format_estimate, format_limit
from ..statistics import Validity
from .arms import Arm

CONTROL = 0.9  # lower bound of the positive control's τ
MIN_UNITS = 2  # minimum number of base seeds for a variance between them


def invalid_because(arms: Sequence[Arm], organisms: Mapping[int, Validity]) -> list[str]:
    """Returns every reason in words; empty for a valid experiment."""
    reasons = too_few_units(max((arm.n for arm in arms), default=0))
    for arm in arms:
        tau = format_estimate(arm.tau, CONTROL if arm.role == "positive control" else 0)
        if arm.role == "positive control" and not arm.tau.value > CONTROL:
            reasons.append(
                f"the positive control, {arm.name}, has τ {tau}, not above "
                f"{format_limit(CONTROL)}: a transfer could have been missed"
            )
        elif arm.role != "arm" and not is_checked(arm):
            reasons.append(
                f"the {arm.role}, {arm.name}, was not checked: its τ, {tau}, has no interval "
                f"(n = {arm.n})"
            )
        elif not passes_control(arm):
            if arm.log_odds is not None and not arm.tau.excludes(0.0):
                tau = f"{format_estimate(arm.log_odds.tau, 0)} in log-odds"
            reasons.append(
                f"the null arm, {arm.name}, has τ {tau}, whose interval excludes 0: a transfer is "
                "detected where there is none"
            )
    for seed, validity in organisms.items():
        reasons += [f"the organisms of base seed {seed}: {reason}" for reason in validity.because]
    return reasons


def too_few_units(n: int) -> list[str]:
    """Returns the reason against an experiment with `n` base seeds; empty where n is enough."""
    if n >= MIN_UNITS:
        return []
    return [
        f"not checked: {n} base seed{'' if n == 1 else 's'} of {MIN_UNITS} or more that an "
        "interval requires, so that no result has an interval"
    ]


def is_checked(arm: Arm) -> bool:
    """Whether the τ of an arm has an interval, which the check of a control requires."""
    return math.isfinite(arm.tau.low) and math.isfinite(arm.tau.high)


def passes_control(arm: Arm) -> bool:
    """Whether a control has the expected τ; False without an interval, True for other arms."""
    if arm.role == "arm":
        return True
    if not is_checked(arm):
        return False
    if arm.role == "positive control":
        return arm.tau.value > CONTROL
    in_log_odds = arm.log_odds is None or passes_control(arm.log_odds)
    return not arm.tau.excludes(0.0) and in_log_odds
