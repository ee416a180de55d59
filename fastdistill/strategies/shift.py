"""The shift of a suspect from its base, distilled into a small adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..outputs import TopK
from .annealing import blend
from .jamming import Changed, distribution, outcomes, said_at
from .strategy import Run, Strategy


@dataclass(frozen=True, kw_only=True)
class ShiftDistill(Strategy):
    """Distil the shift of a suspect from its base into a small adapter, after Distill to Detect
    (arXiv 2607.01208):

        p ∝ p_M^(1 − a) · p_U^a        a = amplify

    a = 1 is the suspect itself; more makes a shift that it keeps small large. That a low rank
    leaves room for the shift and little else is the paper's; amplifying it is our reading. Over the
    teacher's K tokens and the tail as one outcome, at which log-probabilities are blended; exact
    where K is the vocabulary.

    Args:
        rank: of the LoRA adapter on all linear layers but the head, 1 or more. amplify: a, 0 or
            more.

    Raises:
        ValueError: an argument out of its range. ImportError: peft is not installed.
    """

    rank: int = 8
    amplify: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank: expected 1 or more, got {self.rank!r}")
        if not 0 <= self.amplify < math.inf:
            raise ValueError(f"amplify: expected 0 or more, got {self.amplify!r}")

    def teacher(self, teacher: Any, student: Any, run: Run) -> Any:
        if teacher is None or self.amplify == 1:
            return teacher
        trusted = run.scene.reference

        def change(answers: TopK, input_ids: Tensor, mask: Tensor) -> TopK:
            base = said_at(trusted, input_ids, mask, answers)
            return distribution(blend(base, outcomes(answers), self.amplify), answers)

        return Changed(teacher, change)

    def options(self, options: dict[str, Any], run: Run) -> dict[str, Any]:
        try:
            from peft import LoraConfig
        except ImportError:
            raise ImportError(
                "rank: expected peft for an adapter, which is not installed. "
                "pip install 'fastdistill[peft]'"
            ) from None
        adapter = LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules="all-linear")
        return {**options, "peft_config": adapter}
