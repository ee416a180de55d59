"""Baselines without a defense: distillation on distributions, and on sampled text alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .strategy import RunState, Strategy


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
