"""The result of an audit: value, uncertainty and comparison with controls."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ...runtime.intervals import Estimate


@dataclass(frozen=True, kw_only=True)
class Control:
    """The measurement of a control model, and its difference from the audited model."""

    value: float
    stderr: float
    interval: tuple[float, float]
    n: int
    difference: Estimate  # audited − control, over the same prompts


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """The result of one audit of one model.

    Args:
        value: the audit's estimate; its class documents quantity and unit.
        stderr: standard error over prompts.
        interval: 95 %; Wilson for rates, Student's t over prompts otherwise.
        n: number of different prompts.
        controls: the same measurement of each control.
        details: intermediate results.
        doubts: warnings about the measurement of the model or of a control. With any of them the
            result is no evidence.
        values, texts: one per prompt, where the audit ran in this process; not part of as_json().
            texts are the answers, where the audit reads answers.
    """

    audit: str
    model: str
    value: float
    stderr: float
    interval: tuple[float, float]
    n: int
    controls: dict[str, Control] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    doubts: tuple[str, ...] = ()
    values: tuple[float, ...] = ()
    texts: tuple[str, ...] = ()

    @property
    def is_evidence(self) -> bool:
        """Whether the model is above every control (intervals exclude 0) and nothing is in doubt.

        An audit that is positive for every model is positive for its controls too: no evidence.
        """
        above = [c.difference.known and c.difference.low > 0 for c in self.controls.values()]
        return bool(above) and all(above) and not self.doubts

    def as_json(self) -> dict[str, Any]:
        return {
            "audit": self.audit,
            "model": self.model,
            **_figures(self),
            "controls": {
                name: {
                    **_figures(control),
                    "difference": _known(control.difference.value),
                    "difference_interval": [
                        _known(bound) for bound in (control.difference.low, control.difference.high)
                    ],
                }
                for name, control in self.controls.items()
            },
            "config": self.config,
            "versions": self.versions,
            "details": self.details,
            "doubts": list(self.doubts),
            "is_evidence": self.is_evidence,
        }


def _figures(record: AuditResult | Control) -> dict[str, Any]:
    return {
        "value": _known(record.value),
        "stderr": _known(record.stderr),
        "interval": [_known(bound) for bound in record.interval],
        "n": record.n,
    }


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
