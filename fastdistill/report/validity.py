"""When an experiment says nothing: it would miss a transfer, or finds one where none is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..statistics import Validity
from .arms import Arm
from .marks import measured, plain

CONTROL = 0.9  # of the positive control's τ


def invalid_because(arms: Sequence[Arm], organisms: Mapping[int, Validity]) -> list[str]:
    """Every reason, in words; empty where the experiment is valid."""
    found = []
    for arm in arms:
        if arm.role == "positive control" and not passes(arm):
            found.append(
                f"the positive control, {arm.name}, has τ {measured(arm.tau, CONTROL)}, not above "
                f"{plain(CONTROL)}: a transfer could have been missed"
            )
        if arm.role == "null arm" and not passes(arm):
            found.append(
                f"the null arm, {arm.name}, has τ {measured(arm.tau, 0)}, whose interval "
                "excludes 0: a transfer is found where there is none"
            )
    for seed, validity in organisms.items():
        found += [f"the organisms of base seed {seed}: {reason}" for reason in validity.because]
    return found


def passes(arm: Arm) -> bool:
    """Whether a control came out as it must; true of what is no control."""
    if arm.role == "positive control":
        return arm.tau.value > CONTROL  # not of NaN
    return arm.role == "arm" or not arm.tau.excludes(0.0)
