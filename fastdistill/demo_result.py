"""What the demo measured, in the shape that its files and its report are made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .audits.side_by_side import SuiteResults
from .intervals import Estimate

ARMS = ("distilled", "labels only")


class Metric(NamedTuple):
    title: str
    column: str  # of EVAL_COLUMNS
    lower_is_better: bool


METRICS = {
    "nll": Metric("NLL, nats per token", "nll", True),
    "bits_per_byte": Metric("bits per byte", "nll", True),
    "top1": Metric("next token right", "top1", False),
    "agreement": Metric("agrees with teacher", "agreement", False),
    "kl": Metric("KL to teacher, nats", "kl", True),
}


@dataclass(frozen=True, kw_only=True)
class DemoRun:
    """One student: what the trainer logged, and how it did on held-out text."""

    arm: str
    seed: int
    history: list[dict[str, float]]
    seconds: float
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Estimates by name ("nll/distilled", "nll/difference", "nll/teacher", ...)."""

    estimates: dict[str, Estimate]
    runs: list[DemoRun]
    teacher_mass: np.ndarray  # covered teacher mass at every held-out position
    audits: SuiteResults  # teacher, students of the first seed, and the base they began from
    facts: dict[str, Any]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        rows = [
            {
                "name": name,
                "value": estimate.value,
                "interval": [estimate.low, estimate.high] if estimate.known else None,
                "n": estimate.n,
            }
            for name, estimate in self.estimates.items()
        ]
        seconds = round(self.seconds, 1)
        return {"rows": rows, "seconds": seconds, **self.audits.as_json(), **self.facts}
