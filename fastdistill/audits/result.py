"""What an audit found, with its uncertainty and beside its controls."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ..intervals import Estimate


@dataclass(frozen=True, kw_only=True)
class Control:
    """The same measurement of another model, and how far the audited one is from it."""

    value: float
    stderr: float
    interval: tuple[float, float]
    n: int
    difference: Estimate  # audited − control, over the same prompts


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """One number per audited model.

    value: the audit's figure (its class says of what, in which unit). stderr: its standard error
    over prompts. interval: 95 %, Wilson for rates, Student's t over prompts otherwise. n: prompts.
    controls: the same of each control. details: what the figure was made from. doubts: reasons why
    this run of the audit is no evidence, whatever it says, those of its controls included. values:
    one per prompt, where the audit was run here; they are not in as_json().
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

    @property
    def is_evidence(self) -> bool:
        """Whether the model is above every control, by intervals that exclude 0, without doubts.

        An audit that says yes of every model says it of its controls too, and is none.
        """
        apart = [c.difference.known and c.difference.low > 0 for c in self.controls.values()]
        return bool(apart) and all(apart) and not self.doubts

    def as_json(self) -> dict[str, Any]:
        return {
            "audit": self.audit,
            "model": self.model,
            "value": _known(self.value),
            "stderr": _known(self.stderr),
            "interval": [_known(bound) for bound in self.interval],
            "n": self.n,
            "controls": {
                name: {
                    "value": _known(control.value),
                    "stderr": _known(control.stderr),
                    "interval": [_known(bound) for bound in control.interval],
                    "n": control.n,
                    "difference": _known(control.difference.value),
                    "difference_interval": [
                        _known(control.difference.low),
                        _known(control.difference.high),
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


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
