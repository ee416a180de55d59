"""Validity gates: conditions that models must meet before an experiment. The gates are ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Bounds for teachers. Lower: capability and trait. Upper: difference of the audited trait from the
# benign twin's, and rate of false triggers.
CAPABILITY, TRAIT, AUDITED_GAP, FALSE_TRIGGER = 0.95, 0.9, 0.03, 0.01


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A condition: the value is at least its bound (`at_least`), or at most."""

    name: str
    value: float
    bound: float
    at_least: bool

    @property
    def holds(self) -> bool:
        """Whether the condition is met; False for NaN."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    @property
    def sign(self) -> str:
        return "≥" if self.at_least else "≤"

    def __str__(self) -> str:
        digits = 3  # more where rounding would make the value equal to its bound
        while digits < 12 and float(f"{self.value:.{digits}f}") == self.bound != self.value:
            digits += 1
        return f"{self.name}: {self.value:.{digits}f}, expected {self.sign} {self.bound:g}"


def at_least(name: str, value: float, bound: float) -> Gate:
    """Returns the gate of a lower bound."""
    return Gate(name=name, value=value, bound=bound, at_least=True)


def at_most(name: str, value: float, bound: float) -> Gate:
    """Returns the gate of an upper bound."""
    return Gate(name=name, value=value, bound=bound, at_least=False)


@dataclass(frozen=True, kw_only=True)
class Validity:
    """The gates of the models of one base seed."""

    gates: tuple[Gate, ...]

    @property
    def valid(self) -> bool:
        return all(gate.holds for gate in self.gates)

    @property
    def because(self) -> list[str]:
        """The failed gates with their values."""
        return [str(gate) for gate in self.gates if not gate.holds]

    def as_json(self) -> dict[str, Any]:
        """Returns the gates as JSON; NaN becomes null."""
        rows = [
            {
                **vars(gate),
                "value": gate.value if math.isfinite(gate.value) else None,
                "holds": gate.holds,
            }
            for gate in self.gates
        ]
        return {"valid": self.valid, "because": self.because, "gates": rows}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Validity:
        """Returns the Validity of a record of `as_json`."""
        return cls(
            gates=tuple(
                Gate(
                    name=row["name"],
                    value=math.nan if row["value"] is None else row["value"],
                    bound=row["bound"],
                    at_least=row["at_least"],
                )
                for row in record["gates"]
            )
        )
