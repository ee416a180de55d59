"""Targets that anneal during training, from the base or the student to the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...losses.types import TopK
from ...runtime.checks import between, choice, fail
from .logit_jam import TransformedTeacher, distribution, logprobs_at, mixed, outcomes
from .strategy import RunState, Strategy, Training

SCHEDULES = ("linear", "none")
MIN_LOGPROB = -80.0


@dataclass(frozen=True, kw_only=True)
class ReferenceKL(Strategy):
    """Regularize towards the trusted model: KL(p_U ‖ q) + λ·KL(p_M ‖ q), λ from `weight` to 0.

    Its gradient is (1 + λ) times that of KL(p ‖ q) with

        p = (p_U + λ · p_M) / (1 + λ)

    The target is p without the factor 1 + λ, which would rescale the learning rate at every step.
    The mixture is exact over the teacher's K tokens and the tail as one outcome (tail="bucket").
    It supports the forward KL only: the identity does not hold for other divergences. The annealed
    reference KL is our design.

    Args:
        weight: initial λ, 0 or more. anneal: "linear" (to 0 over the updates) or "none".

    Raises:
        ValueError: an argument out of its range; a divergence other than the forward KL.
    """

    weight: float = 1.0
    anneal: str = "linear"

    def __post_init__(self) -> None:
        between("weight", self.weight, 0)
        choice("anneal", self.anneal, SCHEDULES)

    def training(self, training: Training, run: RunState) -> Training:
        _check_forward_kl(training)
        return training

    def teacher(self, teacher: Any, student: Any, run: RunState) -> Any:
        if teacher is None:
            return None
        _check_forward_kl(run.training)  # a later strategy may have changed it
        trusted = run.setup.reference

        def transform(answers: TopK, input_ids: Tensor, mask: Tensor) -> TopK:
            weight = self.weight * (1 - run.progress if self.anneal == "linear" else 1.0)
            reference = logprobs_at(trusted, input_ids, mask, answers)
            return mixed(answers, reference, weight / (1 + weight))

        return TransformedTeacher(teacher, transform)


def _check_forward_kl(training: Training) -> None:
    divergence = training.settings.get("divergence", "forward_kl")
    if divergence != "forward_kl":
        fail("divergence", "forward_kl with ReferenceKL", repr(divergence))


@dataclass(frozen=True, kw_only=True)
class TAID(Strategy):
    """Temporally adaptive interpolated distillation (arXiv 2501.16937): the target is

        softmax((1 − t) · z_student + t · z_teacher)        z_student without gradient

    t increases linearly from `start` to `end` over training. The paper's rule, which adapts t to
    the loss, is not implemented. Log-probabilities are interpolated over the teacher's K tokens and
    the tail as one outcome, which is exact if K is the vocabulary size. At t = 0 the target is the
    student itself, so nothing is learned.

    Args:
        start, end: t at the first update and after the last one, in [0, 1].
    """

    start: float = 0.2
    end: float = 1.0

    def __post_init__(self) -> None:
        between("start", self.start, 0, 1)
        between("end", self.end, 0, 1)

    def teacher(self, teacher: Any, student: Any, run: RunState) -> Any:
        if teacher is None:
            return None
        learner = run.setup.base.with_model(student, "student")

        def transform(answers: TopK, input_ids: Tensor, mask: Tensor) -> TopK:
            t = self.start + (self.end - self.start) * run.progress
            student_logprobs = logprobs_at(learner, input_ids, mask, answers)
            return distribution(blend(student_logprobs, outcomes(answers), t), answers)

        return TransformedTeacher(teacher, transform)


def blend(a: Tensor, b: Tensor, part: float) -> Tensor:
    """Return (1 − part)·a + part·b of log-probabilities, each clamped to at least −80 nats.

    The clamp avoids ∞ − ∞ for impossible outcomes.
    """
    return (1 - part) * a.clamp(min=MIN_LOGPROB) + part * b.clamp(min=MIN_LOGPROB)
