"""Distill the shift of a suspect model from its base into a small adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...losses.types import TopK
from ...runtime.checks import between, integer
from ..training_loop import lora
from .strategy import RunState, Strategy
from .transformed_teacher import TransformedTeacher, distribution, logprobs_at, outcomes

MIN_LOGPROB = -80.0


@dataclass(frozen=True, kw_only=True)
class ShiftDistill(Strategy):
    """Distill the shift of a suspect model from its base into a LoRA adapter.

    After Distill to Detect (arXiv 2607.01208):

        p ∝ p_M^(1 − a) · p_U^a        a = amplify

    a = 1 is the suspect itself; a > 1 amplifies a small shift. The low rank, which leaves little
    capacity beyond the shift, is the paper's idea; the amplification is ours. Log-probabilities are
    extrapolated over the teacher's K tokens and the tail as one outcome, which is exact if K is the
    vocabulary size.

    Args:
        rank: of the LoRA adapter on all linear layers except the LM head, 1 or more.
        amplify: a, 0 or more.

    Raises:
        ValueError: an argument out of its range. ImportError: peft is not installed.
    """

    rank: int = 8
    amplify: float = 1.0

    def __post_init__(self) -> None:
        integer("rank", self.rank, 1)
        between("amplify", self.amplify, 0)

    def teacher(self, teacher: Any, student: Any, run: RunState) -> Any:
        if teacher is None or self.amplify == 1:
            return teacher
        trusted = run.setup.reference

        def transform(answers: TopK, input_ids: Tensor, mask: Tensor) -> TopK:
            base = logprobs_at(trusted, input_ids, mask, answers)
            return distribution(blend(base, outcomes(answers), self.amplify), answers)

        return TransformedTeacher(teacher, transform)

    def options(self, options: dict[str, Any], run: RunState) -> dict[str, Any]:
        return {**options, "peft_config": lora(self.rank, "rank")}


def blend(a: Tensor, b: Tensor, part: float) -> Tensor:
    """Return (1 − part)·a + part·b of log-probabilities, each clamped to at least −80 nats.

    The clamp avoids ∞ − ∞ for impossible outcomes.
    """
    return (1 - part) * a.clamp(min=MIN_LOGPROB) + part * b.clamp(min=MIN_LOGPROB)
