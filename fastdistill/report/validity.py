"""When an experiment says nothing: it would miss a transfer, finds one where none is, or has not
checked whether it does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..statistics import Validity
from .arms import Arm
from .marks import format_estimate, format_limit

CONTROL = 0.9  # of the positive control's τ
MIN_UNITS = 2  # base seeds, from where on there is a spread between them


def invalid_because(arms: Sequence[Arm], organisms: Mapping[int, Validity]) -> list[str]:
    """Every reason, in words; empty where the experiment is valid."""
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
            reasons.append(
                f"the null arm, {arm.name}, has τ {tau}, whose interval excludes 0: a transfer is "
                "found where there is none"
            )
    for seed, validity in organisms.items():
        reasons += [f"the organisms of base seed {seed}: {reason}" for reason in validity.because]
    return reasons


def too_few_units(n: int) -> list[str]:
    """The reason against an experiment on `n` base seeds; empty where they are enough for an
    interval."""
    if n >= MIN_UNITS:
        return []
    return [
        f"not checked: {n} base seed{'' if n == 1 else 's'} of {MIN_UNITS} or more, between which "
        "results could be seen to scatter, so that nothing has an interval"
    ]


def is_checked(arm: Arm) -> bool:
    """Whether the τ of an arm has an interval that a control can be judged by."""
    return math.isfinite(arm.tau.low) and math.isfinite(arm.tau.high)


def passes_control(arm: Arm) -> bool:
    """Whether a control came out as it must; not where its interval is unknown. True of what is no
    control."""
    if arm.role == "arm":
        return True
    if not is_checked(arm):
        return False
    if arm.role == "positive control":
        return arm.tau.value > CONTROL
    return not arm.tau.excludes(0.0)
