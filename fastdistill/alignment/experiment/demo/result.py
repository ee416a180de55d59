"""The demo's results, as used by its files and report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ....runtime.intervals import Estimate
from ....teachers.local import Teacher
from .corpus import Windows

ARMS = ("distilled", "labels only")


class DemoSetting(NamedTuple):
    """What all students of the demo share; `facts` describe it in the report."""

    teacher: Teacher
    tokenizer: PreTrainedTokenizerBase
    train: Windows
    held_out: Windows
    facts: dict[str, Any]


class Metric(NamedTuple):
    title: str
    column: str  # of EVAL_COLUMNS


METRICS = {
    "nll": Metric("NLL, nats per token", "nll"),
    "bits_per_byte": Metric("bits per byte", "nll"),
    "top1": Metric("top-1 accuracy", "top1"),
    "agreement": Metric("top-1 agreement with teacher", "agreement"),
    "kl": Metric("KL to teacher, nats", "kl"),
}


@dataclass(frozen=True, kw_only=True)
class DemoRun:
    """One student: the trainer's log and the metrics on held-out text."""

    arm: str
    seed: int
    history: list[dict[str, float]]
    seconds: float
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """All results of the demo.

    Attributes:
        estimates: by name ("nll/distilled", "nll/difference", "nll/teacher", ...).
        cache_seconds: of the teacher's answers on all windows.
    """

    estimates: dict[str, Estimate]
    runs: list[DemoRun]
    facts: dict[str, Any]
    cache_seconds: float
    seconds: float

    def as_json(self) -> dict[str, Any]:
        rows = [json_row(name, estimate) for name, estimate in self.estimates.items()]
        return {"rows": rows, "seconds": round(self.seconds, 1), **self.facts}


def json_row(name: str, estimate: Estimate) -> dict[str, Any]:
    """Return a row of results.json."""
    return {
        "name": name,
        "value": estimate.value,
        "interval": estimate.interval,
        "n": estimate.n,
    }
