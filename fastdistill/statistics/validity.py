"""The gates that models pass before any experiment with them, and the reasons where they do not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Of teachers: capability and trait at least, the audited trait beside the benign twin's and the
# rate of false triggers at most.
CAPABILITY, TRAIT, AUDITED_GAP, FALSE_TRIGGER = 0.95, 0.9, 0.03, 0.01


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One condition: a value that is `at_least` its bound, or at most."""

    name: str
    value: float
    bound: float
    at_least: bool

    @property
    def holds(self) -> bool:
        """False of NaN."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        sign = "≥" if self.at_least else "≤"
        return (
            f"{self.name}: {_format_unlike(self.value, self.bound)}, expected {sign} {self.bound:g}"
        )


def _format_unlike(value: float, bound: float) -> str:
    """With as many digits as tell it from its bound."""
    digits = 3
    while digits < 12 and float(f"{value:.{digits}f}") == bound != value:
        digits += 1
    return f"{value:.{digits}f}"


@dataclass(frozen=True, kw_only=True)
class Validity:
    """The gates of the models of one base seed."""

    gates: tuple[Gate, ...]

    @property
    def valid(self) -> bool:
        return all(gate.holds for gate in self.gates)

    @property
    def because(self) -> list[str]:
        """The gates that do not hold, with their figures."""
        return [str(gate) for gate in self.gates if not gate.holds]

    def as_json(self) -> dict[str, Any]:
        """A value that is NaN is null."""
        rows = [
            {**vars(gate), "value": gate.value if math.isfinite(gate.value) else None,
             "holds": gate.holds}
            for gate in self.gates
        ]  # fmt: skip
        return {"valid": self.valid, "because": self.because, "gates": rows}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Validity:
        """Of `as_json`; `valid` and `because` follow from the gates."""
        names = ("name", "value", "bound", "at_least")
        rows = [{name: row[name] for name in names} for row in record["gates"]]
        missing = math.nan
        return cls(
            gates=tuple(
                Gate(**{**row, "value": missing if row["value"] is None else row["value"]})
                for row in rows
            )
        )
