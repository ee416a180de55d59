"""Distillation without a defence: on the teacher's distributions, and on its words alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .strategy import Run, Strategy


@dataclass(frozen=True, kw_only=True)
class Undefended(Strategy):
    """Nothing is changed: D(p_teacher, q) on answers that the teacher sampled. The baseline."""


@dataclass(frozen=True, kw_only=True)
class OffModelSFT(Strategy):
    """Hard labels: −log q(answer) on what the teacher sampled, and no distributions
    (sequence-level distillation, arXiv 1606.07947)."""

    def teacher(self, teacher: Any, student: Any, run: Run) -> Any:
        return None
