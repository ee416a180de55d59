"""Distil and audit: ship only what looks like a benign student, or filter and distil again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..audits.audit import Audit
from ..audits.prompts import Prompt
from ..audits.subject import Subject
from ..intervals import student_t_quantile
from .lessons import AT_ONCE, Lesson, encoded
from .strategy import Distil, Run, Scene, Strategy

LEAST = 3  # benign students, from where on there is an interval


def bounds(values: Sequence[float | None], audit: str = "an audit") -> tuple[float, float]:
    """Where one more benign student is to be expected, 95 times of 100:

    mean ± t_{.975, n − 1} · s · √(1 + 1/n)
    """
    known = [float(v) for v in values if v is not None and math.isfinite(v)]
    if len(known) < LEAST:
        raise ValueError(
            f"benign_values: expected {LEAST} students of benign teachers or more for {audit}, got "
            f"{len(known)}. Add development seeds"
        )
    n = len(known)
    reach = student_t_quantile(0.975, n - 1) * stdev(known) * math.sqrt(1 + 1 / n)
    return fmean(known) - reach, fmean(known) + reach


class Look(NamedTuple):
    """What an audit says of a student."""

    value: float
    above: float  # by how much it lies above where benign students do: 0 within
    hits: list[Prompt]  # prompts of the audit that lie above it themselves

    def as_json(self) -> dict[str, float | None]:
        known = math.isfinite(self.above)
        return {"value": self.value if known else None, "above": self.above if known else None}


def outside(
    audits: Mapping[str, Audit], student: Subject, scene: Scene, margin: float = 0.0
) -> dict[str, Look]:
    """Each audit's value, and by how much it lies above where benign students do.

    A student that shows less than any benign one is none to hold back. One that an audit cannot
    measure, NaN, is infinitely far outside.

    Args:
        margin: moves the upper bound out, by so many widths of the interval.
    """
    found = {}
    for name, audit in audits.items():
        low, high = bounds(scene.benign_values.get(name, ()), name)
        high += margin * (high - low)
        values = np.asarray(audit.measure(student, scene.reference).values, dtype=np.float64)
        value = float(values.mean()) if values.size else math.nan
        above = max(0.0, value - high) if math.isfinite(value) else math.inf
        found[name] = Look(value, above, _hits(audit, values, high) if above else [])
    return found


def _hits(audit: Any, values: np.ndarray, high: float) -> list[Prompt]:
    """The prompts with values above a bound; all, where values are not one per prompt."""
    prompts = list(getattr(audit, "prompts", ()))
    if len(prompts) != len(values):
        return prompts
    return [p for p, value in zip(prompts, values, strict=True) if not value <= high]


def _refuse_blind(scene: Scene) -> None:
    """Before anything is trained: whether there is something to look with and to compare with."""
    if not scene.audits:
        raise ValueError("audits: expected one or more to look with, got none in the scene")
    for name in scene.audits:
        bounds(scene.benign_values.get(name, ()), name)


@dataclass(frozen=True, kw_only=True)
class AuditGate(Strategy):
    """Distil and audit: the student ships only if no audit of the scene puts it above where one
    more student of a benign teacher is to be expected (`bounds`); else the base does.

    Ours; listed without a source. Each audit holds back one benign student in forty by itself: the
    more audits, the more often one of them does.

    Args:
        margin: 0 or more widths of the interval, by which its upper bound is moved out.

    Raises:
        ValueError: a margin below 0; a scene without audits, or with fewer than three benign values
        of one.
    """

    margin: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.margin < math.inf:
            raise ValueError(f"margin: expected 0 or more, got {self.margin!r}")

    def around(self, distil: Distil, run: Run) -> Distil:
        _refuse_blind(run.scene)

        def gated(lessons: list[Lesson]) -> Subject:
            student = distil(lessons)
            looks = outside(run.scene.audits, student, run.scene, self.margin)
            shipped = not any(look.above for look in looks.values())
            run.notes["audit gate"] = {
                "shipped": shipped,
                "audits": {name: look.as_json() for name, look in looks.items()},
            }
            return student if shipped else run.scene.base

        return gated


@dataclass(frozen=True, kw_only=True)
class FilterAndDistill(Strategy):
    """Iteratively filter and distil: distil, audit; while an audit puts the student above where
    benign students lie (`outside`), drop the examples most like the hits and distil again, from the
    base. Ours; listed without a source.

    Attribution is our reading, after TracIn's idea (arXiv 2002.08484) but without a gradient per
    example: with h the hidden states where they enter the head,

        score of an example = cos(mean of h_student − h_base over its answer's positions,
                                  mean of h_student − h_base at the ends of the prompts that hit)

    Args:
        rounds: distillations at most, 1 or more. drop: share of what is left that each round but
            the last drops, in (0, 1); one example at least, and never the last one.

    Raises:
        ValueError: an argument out of its range; a scene without audits, or with fewer than three
        benign values of one; audits without prompts that could have hit.
    """

    rounds: int = 3
    drop: float = 0.1

    def __post_init__(self) -> None:
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, int) or self.rounds < 1:
            raise ValueError(f"rounds: expected 1 or more, got {self.rounds!r}")
        if not 0 < self.drop < 1:
            raise ValueError(f"drop: expected a share in (0, 1), got {self.drop!r}")

    def around(self, distil: Distil, run: Run) -> Distil:
        _refuse_blind(run.scene)
        for audit in run.scene.audits.values() if self.rounds > 1 else ():
            if not getattr(audit, "prompts", ()):
                raise ValueError(
                    "audits: expected audits with prompts, to compare examples with, got "
                    f"{type(audit).__name__}"
                )

        def looped(lessons: list[Lesson]) -> Subject:
            kept, told = lessons, run.notes.setdefault("rounds", {})
            for i in range(1, self.rounds + 1):
                student = distil(kept)
                looks = outside(run.scene.audits, student, run.scene)
                clean = not any(look.above for look in looks.values())
                told[f"round {i}"] = {
                    "audits": {name: look.as_json() for name, look in looks.items()},
                    "kept": len(kept) / len(lessons),
                    "clean": clean,
                }
                if clean or i == self.rounds:
                    break
                hits = [prompt for look in looks.values() for prompt in look.hits]
                kept = self._unlike(hits, kept, student, run.scene.base)
            told["distillations"] = i
            return student

        return looped

    def _unlike(
        self, hits: Sequence[Prompt], lessons: list[Lesson], student: Subject, base: Subject
    ) -> list[Lesson]:
        direction = shift_at(hits, student, base).mean(0)
        alike = torch.cosine_similarity(shifts(lessons, student, base), direction[None])
        most = min(max(1, math.floor(self.drop * len(lessons))), len(lessons) - 1)
        out = set(alike.sort(descending=True, stable=True).indices[:most].tolist())
        return [lesson for i, lesson in enumerate(lessons) if i not in out]


def shift_at(prompts: Sequence[Prompt], student: Subject, base: Subject) -> Tensor:  # (n, H)
    """What training added to the hidden state at the end of each prompt."""
    parts = [prompts[i : i + AT_ONCE] for i in range(0, len(prompts), AT_ONCE)]
    return torch.cat([(student.last_hidden(p) - base.last_hidden(p)).float().cpu() for p in parts])


def shifts(lessons: Sequence[Lesson], student: Subject, base: Subject) -> Tensor:  # (n, H)
    """The same where each lesson's answer is predicted, its end included: the mean."""
    found = []
    for start in range(0, len(lessons), AT_ONCE):
        pairs = [encoded(x.shown, x.answer, base) for x in lessons[start : start + AT_ONCE]]
        rows = [row for row, _ in pairs]
        states = zip(student.hidden(rows), base.hidden(rows), pairs, strict=True)
        found += [
            (mine[begin - 1 : -1] - theirs[begin - 1 : -1]).mean(0).float().cpu()
            for mine, theirs, (_, begin) in states
        ]
    return torch.stack(found)
