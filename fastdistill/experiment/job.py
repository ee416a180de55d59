"""One run of an experiment: a student of one teacher, made and measured, kept as one file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from ..audits.subject import Subject
from ..statistics import Reading
from ..strategies.distil import distill
from ..strategies.strategy import Strategy, Training
from .kept_run import KeptRun
from .source import Opened, Source

FORMAT = 1  # of a run's file; a change of what a run does raises it
SOURCES = "sources"


@dataclass(frozen=True, kw_only=True)
class Job(KeptRun):
    """A student of `role`'s teacher.

    Args:
        source: of models and prompts. role: untrusted, benign, placebo, or base for M→M.
        strategies, training, pool: how it is distilled.
        student_seed: of answers, order and whatever strategies draw.
        begins: role of the model that the student begins as.
        checkpoints: how often it is read while it trains, the end included.
        audits: names of what it is audited with at the end.
        gate: names of the audits that strategies look with, and what they said of students of
            benign teachers with other base seeds.
    """

    keys: ClassVar[tuple[str, ...]] = (
        "reading", "curve", "audits", "contexts", "steps", "notes",
    )  # fmt: skip

    source: Source
    role: str
    strategies: tuple[Strategy, ...] = ()
    training: Training = field(default_factory=Training)
    pool: Mapping[str, Any] = field(default_factory=dict)
    student_seed: int = 0
    begins: str = "base"
    checkpoints: int = 4
    audits: tuple[str, ...] = ()
    gate: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "source": self.source.as_json(),
            "role": self.role,
            "begins": self.begins,
            "strategies": [strategy.as_json() for strategy in self.strategies],
            "training": asdict(self.training),
            "pool": dict(self.pool),
            "student_seed": self.student_seed,
            "checkpoints": self.checkpoints,
            "audits": list(self.audits),
            "gate": {name: list(values) for name, values in self.gate.items()},
        }

    def found(self, folder: Path) -> dict[str, Any]:
        """Make the student, and measure it."""
        return self._measured(_opened(self.source, folder / SOURCES))

    def _measured(self, opened: Opened) -> dict[str, Any]:
        setup = opened.setup(self.role, self.pool)
        begins = opened.models[self.begins]
        setup = replace(
            setup,
            base=begins,
            trusted=opened.models["base"],
            audits={name: opened.suite[name] for name in self.gate},
            benign_values=self.gate,
        )
        made = distill(
            setup,
            self.strategies,
            self.training,
            seed=self.student_seed,
            measure=opened.read,
            at=[i / self.checkpoints for i in range(1, self.checkpoints)],
        )
        return {
            "reading": opened.read(made.student).as_json(),
            "curve": [
                {"step": step, "reading": reading.as_json()}
                for step, reading in sorted(made.measured.items())
            ],
            "audits": audited(opened, made.student, self.audits),
            "contexts": {
                name: _rates(opened.read(made.student, before=text))
                for name, text in made.contexts.items()
            },
            "steps": made.steps,
            "lessons": len(made.examples),
            "notes": made.notes,
        }


def audited(opened: Opened, student: Subject, names: tuple[str, ...]) -> dict[str, float | None]:
    """The mean of each audit; None where it could not be made."""
    base = opened.models["base"]
    found: dict[str, float | None] = {}
    for name in names:
        if name in opened.suite:
            value = float(opened.suite[name].measure(student, base).values.mean())
            found[name] = value if math.isfinite(value) else None
    return found


def _rates(reading: Reading) -> dict[str, float]:
    parts = {"capability": reading.capability, "trait": reading.trait, "audited": reading.audited}
    return {name: sum(values) / len(values) for name, values in parts.items() if values}


@lru_cache(maxsize=2)  # several runs of a process are of one source
def _opened(source: Source, folder: Path) -> Opened:
    return source.opened(folder)
