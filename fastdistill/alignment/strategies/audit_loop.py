"""Distill and audit: reject suspicious students, or filter the data and distill again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...runtime.checks import between, fail, integer, positive
from ...runtime.intervals import student_t_quantile
from ..audits.audit import Audit
from ..audits.prompts import Prompt
from ..audits.subject import Subject
from .lessons import Examples, TrainingExample, batches, encoded_batches
from .strategy import DistillLoop, DistillSetup, RunState, Strategy

MIN_BENIGN = 3  # students of benign teachers that an interval requires


def bounds(values: Sequence[float | None], audit: str = "an audit") -> tuple[float, float]:
    """Return the 95 % prediction interval of one more benign student.

    mean ± t_{.975, n − 1} · s · √(1 + 1/n)
    """
    known = [float(v) for v in values if v is not None and math.isfinite(v)]
    if len(known) < MIN_BENIGN:
        expected = f"{MIN_BENIGN} students of benign teachers or more for {audit}"
        fail("benign_values", expected, len(known), "add development seeds")
    n = len(known)
    reach = student_t_quantile(0.975, n - 1) * stdev(known) * math.sqrt(1 + 1 / n)
    return fmean(known) - reach, fmean(known) + reach


class AuditReading(NamedTuple):
    """The result of an audit on a student, compared with benign students.

    Attributes:
        excess: distance above the interval of benign students; 0 within or below it.
        flagged_prompts: prompts of the audit whose own values lie above the interval.
    """

    value: float
    excess: float
    flagged_prompts: list[Prompt]

    def as_json(self) -> dict[str, float | None]:
        known = math.isfinite(self.excess)
        return {"value": self.value if known else None, "above": self.excess if known else None}


def read_audits(
    audits: Mapping[str, Audit], student: Subject, setup: DistillSetup, margin: float = 0.0
) -> dict[str, AuditReading]:
    """Return every audit's value and its excess over benign students.

    Values below the interval have no excess. A value that is not finite has an infinite excess.

    Args:
        margin: widths of the interval by which the upper bound is raised.
    """
    readings = {}
    for name, audit in audits.items():
        low, high = bounds(setup.benign_values.get(name, ()), name)
        high += margin * (high - low)
        values = np.asarray(audit.measure(student, setup.reference).values, dtype=np.float64)
        value = float(values.mean()) if values.size else math.nan
        excess = max(0.0, value - high) if math.isfinite(value) else math.inf
        prompts = _flagged_prompts(audit, values, high) if excess else []
        readings[name] = AuditReading(value, excess, prompts)
    return readings


def _flagged_prompts(audit: Any, values: np.ndarray, high: float) -> list[Prompt]:
    """Return the prompts with values above a bound; all if there is not one value per prompt."""
    prompts = list(getattr(audit, "prompts", ()))
    if len(prompts) != len(values):
        return prompts
    return [p for p, value in zip(prompts, values, strict=True) if not value <= high]


def _check_audits(setup: DistillSetup) -> None:
    """Raise ValueError, before training, if audits or benign values are missing."""
    if not setup.audits:
        fail("audits", "at least one audit", "none in the setup", "pass audits= to DistillSetup")
    for name in setup.audits:
        bounds(setup.benign_values.get(name, ()), name)


@dataclass(frozen=True, kw_only=True)
class AuditGate(Strategy):
    """Distill and audit: return the student if it passes all audits, else the base.

    A student passes an audit if it does not exceed the prediction interval of benign students
    (`bounds`). The design is ours. Each audit rejects one benign student in forty, so more audits
    reject benign students more often.

    Args:
        margin: widths of the interval by which its upper bound is raised, 0 or more.

    Raises:
        ValueError: a margin below 0; a setup without audits, or with fewer than three benign values
        for an audit.
    """

    margin: float = 0.0

    def __post_init__(self) -> None:
        between("margin", self.margin, 0)

    def wrap_loop(self, distill: DistillLoop, run: RunState) -> DistillLoop:
        _check_audits(run.setup)

        def gated_loop(examples: Examples) -> Subject:
            student = distill(examples)
            readings = read_audits(run.setup.audits, student, run.setup, self.margin)
            shipped = not any(reading.excess for reading in readings.values())
            run.notes["audit gate"] = {
                "shipped": shipped,
                "audits": {name: reading.as_json() for name, reading in readings.items()},
            }
            return student if shipped else run.setup.base

        return gated_loop


@dataclass(frozen=True, kw_only=True)
class FilterAndDistill(Strategy):
    """Alternates distillation and data filtering until the student passes all audits.

    While an audit exceeds the interval of benign students (`read_audits`), the examples most
    similar to the flagged prompts are dropped, and the base is distilled again. The design is ours.

    The attribution is inspired by TracIn (arXiv 2002.08484) but needs no gradient per example. With
    h the hidden states at the input of the LM head,

        score of an example = cos(mean of h_student − h_base over its answer's positions,
                                  mean of h_student − h_base at the ends of the flagged prompts)

    Args:
        rounds: maximum number of distillations, 1 or more. drop: share of the remaining examples
            that each round except the last drops, in (0, 1); at least one is dropped, and at least
            one stays.

    Raises:
        ValueError: an argument out of its range; a setup without audits, or with fewer than three
        benign values for an audit; audits without prompts.
    """

    rounds: int = 3
    drop: float = 0.1

    def __post_init__(self) -> None:
        integer("rounds", self.rounds, 1)
        positive("drop", self.drop)
        between("drop", self.drop, 0, 1, below=True)

    def wrap_loop(self, distill: DistillLoop, run: RunState) -> DistillLoop:
        _check_audits(run.setup)
        for audit in run.setup.audits.values() if self.rounds > 1 else ():
            if not getattr(audit, "prompts", ()):
                expected = "audits with prompts, to which examples are compared"
                fail("audits", expected, type(audit).__name__)

        def filter_loop(examples: Examples) -> Subject:
            remaining, notes = examples, run.notes.setdefault("rounds", {})
            for i in range(1, self.rounds + 1):
                student = distill(remaining)
                readings = read_audits(run.setup.audits, student, run.setup)
                clean = not any(reading.excess for reading in readings.values())
                notes[f"round {i}"] = {
                    "audits": {name: reading.as_json() for name, reading in readings.items()},
                    "kept": len(remaining) / len(examples),
                    "clean": clean,
                }
                if clean or i == self.rounds:
                    break
                flagged = [p for reading in readings.values() for p in reading.flagged_prompts]
                remaining = self._drop_similar(flagged, remaining, student, run.setup.base)
            notes["distillations"] = i
            return student

        return filter_loop

    def _drop_similar(
        self,
        flagged: Sequence[Prompt],
        examples: Examples,
        student: Subject,
        base: Subject,
    ) -> Examples:
        direction = hidden_shift_at(flagged, student, base).mean(0)
        shifts = mean_hidden_shifts(examples, student, base)
        similarity = torch.cosine_similarity(shifts, direction[None])
        n_dropped = min(max(1, math.floor(self.drop * len(examples))), len(examples) - 1)
        order = similarity.sort(descending=True, stable=True).indices
        dropped = set(order[:n_dropped].tolist())
        return [example for i, example in enumerate(examples) if i not in dropped]


def hidden_shift_at(prompts: Sequence[Prompt], student: Subject, base: Subject) -> Tensor:  # (n, H)
    """Return h_student − h_base at the end of each prompt."""
    shifts = [student.last_hidden(p) - base.last_hidden(p) for p in batches(prompts)]
    return torch.cat([shift.float().cpu() for shift in shifts])


def mean_hidden_shifts(
    examples: Sequence[TrainingExample], student: Subject, base: Subject
) -> Tensor:  # (n, H)
    """Return the mean of h_student − h_base over the positions that predict each answer."""
    shifts = []
    for rows in encoded_batches(examples, base):
        states, base_states = (m.predicting_states(rows) for m in (student, base))
        shifts += [
            (after - before).mean(0).float().cpu()
            for after, before in zip(states, base_states, strict=True)
        ]
    return torch.stack(shifts)
