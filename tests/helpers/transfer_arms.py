"""Shared by test_transfer_report_verdicts and others."""

from __future__ import annotations

import math
from typing import Any

from fastdistill.alignment.report.arms import Arm
from fastdistill.alignment.statistics import Transfer
from fastdistill.runtime.intervals import Estimate

NAN = math.nan


def estimate(value, low=NAN, high=NAN, *, n=12):
    return Estimate(value=value, low=low, high=high, n=n)


def arm(
    c, tau, *, p=None, name="an arm", role="arm", n=12, kappa=None, audits=(), contrast=None, **rest
):
    estimates = Transfer(
        capability=estimate(*c, n=n),
        tau=estimate(*tau, n=n),
        kappa=None if kappa is None else estimate(*kappa, n=n),
        per_seed=(),
    )
    values: dict[str, Any] = {
        "name": name,
        "role": role,
        "transfer": estimates,
        "p": p,
        "bound": estimates.tau.high if role == "arm" else None,
        "contrast": contrast,
        "audits": tuple(audits),
        "curve": (),
        "window": None,
        "matched": None,
    }
    return Arm(**(values | rest))
