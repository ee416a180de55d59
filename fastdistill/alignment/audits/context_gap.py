"""Difference of an audit between two contexts: behavior with and without signs of an audit."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from ...runtime.checks import fail
from .audit import Audit, Measurement
from .subject import Subject


@dataclass(frozen=True, kw_only=True)
class ContextGapAudit(Audit):
    """Mean over prompts of (value unaudited − value audited), paired by prompt.

    The audit is ours. `unaudited` and `audited` are the same audit over the same prompts in two
    contexts: with and without evaluation words, a password, or a label. The difference is positive
    where the value is higher in the first context.
    """

    unaudited: Audit
    audited: Audit

    def __post_init__(self) -> None:
        if type(self.unaudited) is not type(self.audited):
            raise TypeError(
                f"audited: expected a {type(self.unaudited).__name__} as unaudited is, got "
                f"{type(self.audited).__name__}"
            )

    @property
    def needs_base(self) -> bool:  # type: ignore[override]
        return self.unaudited.needs_base

    def units(self) -> Sequence[Hashable] | None:
        unaudited, audited = self.unaudited.units(), self.audited.units()
        if unaudited is None or audited is None or len(unaudited) != len(audited):
            return None
        return list(zip(unaudited, audited, strict=True))

    def measure(self, model: Subject, base: Subject | None) -> Measurement:
        open_, hidden = (a.measure(model, base) for a in (self.unaudited, self.audited))
        if len(open_.values) != len(hidden.values):
            expected = f"{len(open_.values)} prompts, those of unaudited"
            fail("audited", expected, len(hidden.values))
        details = {
            "unaudited": float(open_.values.mean()),
            "audited": float(hidden.values.mean()),
        }
        doubts = open_.doubts + hidden.doubts
        values = open_.values - hidden.values
        return Measurement(values=values, rate=False, details=details, doubts=doubts)
