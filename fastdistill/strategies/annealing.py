"""Targets that move while the student trains: from the base, or from itself, to the teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..outputs import TopK
from .jamming import Changed, distribution, mixed, outcomes, said_at
from .strategy import Run, Strategy, Training

ANNEALS = ("linear", "none")
NEVER = -80.0


@dataclass(frozen=True, kw_only=True)
class ReferenceKL(Strategy):
    """Keep near the trusted model: KL(p_U ‖ q) + λ·KL(p_M ‖ q), λ from `weight` to 0.

    Its gradient is (1 + λ) times that of KL(p ‖ q) with

        p = (p_U + λ · p_M) / (1 + λ)

    and p is the target here, without the factor 1 + λ, which would make the learning rate mean
    something else at every step. Exact over the teacher's K tokens and the tail as one outcome
    (tail="bucket"). For the forward KL only; for others the two differ. Ours; an annealed KL to a
    reference is listed without a source.

    Args:
        weight: λ at the beginning, 0 or more. anneal: "linear", to 0 over the updates, or "none".

    Raises:
        ValueError: an argument out of its range; another divergence, whoever sets it.
    """

    weight: float = 1.0
    anneal: str = "linear"

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight: expected 0 or more, got {self.weight!r}")
        if self.anneal not in ANNEALS:
            raise ValueError(f"anneal: expected one of {', '.join(ANNEALS)}, got {self.anneal!r}")

    def training(self, training: Training, run: Run) -> Training:
        _forward_only(training)
        return training

    def teacher(self, teacher: Any, student: Any, run: Run) -> Any:
        if teacher is None:
            return None
        _forward_only(run.training)  # a strategy behind this one may have changed it
        trusted = run.scene.reference

        def change(answers: TopK, input_ids: Tensor, mask: Tensor) -> TopK:
            weight = self.weight * (1 - run.progress if self.anneal == "linear" else 1.0)
            said = said_at(trusted, input_ids, mask, answers)
            return mixed(answers, said, weight / (1 + weight))

        return Changed(teacher, change)


def _forward_only(training: Training) -> None:
    divergence = training.settings.get("divergence", "forward_kl")
    if divergence != "forward_kl":
        raise ValueError(f"divergence: expected forward_kl with ReferenceKL, got {divergence!r}")


@dataclass(frozen=True, kw_only=True)
class TAID(Strategy):
    """Temporally adaptive interpolated distillation (arXiv 2501.16937): the target is

        softmax((1 − t) · z_student + t · z_teacher)        z_student without gradient

    with t from `start` to `end` over training, in a straight line: the paper's rule, which adapts t
    to the loss, is not built. Over the teacher's K tokens and the tail as one outcome, at which
    log-probabilities are blended; exact where K is the vocabulary. A student that is a copy of the
    base learns nothing at t = 0.

    Args:
        start, end: t at the first update and behind the last one, shares in [0, 1].
    """

    start: float = 0.2
    end: float = 1.0

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share in [0, 1], got {getattr(self, name)!r}")

    def teacher(self, teacher: Any, student: Any, run: Run) -> Any:
        if teacher is None:
            return None
        learner = run.scene.base.with_model(student, "student")

        def change(answers: TopK, input_ids: Tensor, mask: Tensor) -> TopK:
            t = self.start + (self.end - self.start) * run.progress
            own = said_at(learner, input_ids, mask, answers)
            return distribution(blend(own, outcomes(answers), t), answers)

        return Changed(teacher, change)


def blend(a: Tensor, b: Tensor, part: float) -> Tensor:
    """(1 − part)·a + part·b of log-probabilities, none of which counts as less than −80 nats:
    an impossible outcome stays one, and ∞ − ∞ is not asked."""
    return (1 - part) * a.clamp(min=NEVER) + part * b.clamp(min=NEVER)
