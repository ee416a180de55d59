"""Baselines: distillation on distributions, on sampled text alone, and no training at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .strategy import DistillLoop, RunState, Strategy


@dataclass(frozen=True, kw_only=True)
class Undefended(Strategy):
    """The baseline without a defense: D(p_teacher, q) on answers that the teacher sampled."""


@dataclass(frozen=True, kw_only=True)
class OffModelSFT(Strategy):
    """Sequence-level distillation (arXiv 1606.07947): −log q(answer) on hard labels.

    It trains on sampled answers only and uses no distributions of the teacher.
    """

    def teacher(self, teacher: Any, student: Any, run: RunState) -> Any:
        return None


@dataclass(frozen=True, kw_only=True)
class Untrained(Strategy):
    """No training: the student is the base itself, the positive control of a repair."""

    def wrap_loop(self, distill: DistillLoop, run: RunState) -> DistillLoop:
        return lambda examples: run.setup.base
