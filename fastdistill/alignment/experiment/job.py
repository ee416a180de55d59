"""One run of an experiment: distill and evaluate a student; cached as one file."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from ..audits.subject import Subject
from ..statistics import Reading
from ..strategies.distil import distill
from ..strategies.strategy import Strategy, Training
from .cached_run import CachedRun
from .source import LoadedSource, Source
from .stored_answers import StoredAnswers, StoredTopK

FORMAT = 2  # of a run's file; increase it when a run computes something else
SOURCES = "sources"


@dataclass(frozen=True, kw_only=True)
class Job(CachedRun):
    """A student of one teacher.

    Args:
        source: of models and prompts.
        role: of the teacher: untrusted, benign, placebo, or base for M→M.
        strategies, training, pool: the distillation.
        student_seed: for answers, data order and random strategies, together with the base seed.
        init_role: role of the model from which the student starts. noise: see Arm.
        checkpoints: number of evaluations during training, the end included.
        audits: names of the audits of the final student.
        gate: audits that strategies use -> their values on students of benign teachers with other
            base seeds.
    """

    keys: ClassVar[tuple[str, ...]] = (
        "reading",
        "curve",
        "audits",
        "contexts",
        "steps",
        "notes",
    )

    source: Source
    role: str
    strategies: tuple[Strategy, ...] = ()
    training: Training = field(default_factory=Training)
    pool: Mapping[str, Any] = field(default_factory=dict)
    student_seed: int = 0
    init_role: str = "base"
    noise: float = 0.0
    checkpoints: int = 4
    audits: tuple[str, ...] = ()
    gate: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "source": self.source.as_json(),
            "role": self.role,
            "begins": self.init_role,
            **({"noise": self.noise} if self.noise else {}),
            "strategies": [strategy.as_json() for strategy in self.strategies],
            "training": self.training.as_json(),
            "pool": dict(self.pool),
            "student_seed": self.student_seed,
            "checkpoints": self.checkpoints,
            "audits": list(self.audits),
            "gate": {name: list(values) for name, values in self.gate.items()},
        }

    @property
    def random_seed(self) -> int:
        """The seed of the run: that of its twin, and independent of those of other base seeds.

        Base seeds are the units of a study. With one seed for all, whatever that seed does to a
        student would not average out over them.
        """
        seeds = np.random.SeedSequence([self.source.base_seed, self.student_seed])
        return int(seeds.generate_state(1)[0])

    def compute(self, folder: Path) -> dict[str, Any]:
        """Distill the student and evaluate it."""
        loaded = load(self.source, folder / SOURCES)
        cache = self.source.cache(folder / SOURCES)
        base, seed = loaded.models[self.init_role], self.random_seed
        setup = replace(
            loaded.setup(self.role, self.pool),
            base=perturbed(base, self.noise, seed) if self.noise else base,
            trusted=loaded.models["base"],
            generate=StoredAnswers(
                teacher=loaded.models[self.role], folder=cache / "answers" / self.role
            ),
            top_k=StoredTopK(folder=cache / "top-k" / self.role),
            audits={name: loaded.suite[name] for name in self.gate},
            benign_values=self.gate,
        )
        result = distill(
            setup,
            self.strategies,
            self.training,
            seed=seed,
            measure=loaded.read,
            measure_at=[i / self.checkpoints for i in range(1, self.checkpoints)],
        )
        return {
            "reading": loaded.read(result.student).as_json(),
            "curve": [
                {"step": step, "reading": reading.as_json()}
                for step, reading in sorted(result.measured.items())
            ],
            "audits": audit_means(loaded, result.student, self.audits),
            "contexts": {
                name: _mean_rates(loaded.read(result.student, before=text))
                for name, text in result.contexts.items()
            }
            | {
                name: {"trait": value}
                for name, value in loaded.read_contexts(result.student).items()
            },
            "steps": result.steps,
            "lessons": len(result.examples),
            "notes": result.notes | loaded.notes_on(result.examples),
        }


@dataclass(frozen=True, kw_only=True)
class TeacherAudits(CachedRun):
    """The audits of the teachers U and B, with the same questions as for their students."""

    keys: ClassVar[tuple[str, ...]] = ("untrusted", "benign")

    source: Source
    audits: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "source": self.source.as_json(), "teachers": list(self.audits)}

    def compute(self, folder: Path) -> dict[str, Any]:
        loaded = load(self.source, folder / SOURCES)
        return {
            role: audit_means(loaded, loaded.models[role], self.audits)
            for role in ("untrusted", "benign")
        }


@torch.no_grad()
def perturbed(subject: Subject, share: float, seed: int) -> Subject:
    """Return a copy with weights w + ε, ε normal with ‖ε‖ = share · ‖w‖ for each tensor."""
    model, generator = copy.deepcopy(subject.model), torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator).to(weight.device)
        scale = share * weight.float().norm() / noise.norm()
        weight.copy_(weight.float() + scale * noise)
    return subject.with_model(model, subject.name)


def audit_means(
    loaded: LoadedSource, student: Subject, names: tuple[str, ...]
) -> dict[str, float | None]:
    """Return the mean of each audit; None if it is not finite."""
    base = loaded.models["base"]
    means: dict[str, float | None] = {}
    for name in names:
        if name in loaded.suite:
            value = float(loaded.suite[name].measure(student, base).values.mean())
            means[name] = value if math.isfinite(value) else None
    return means


def _mean_rates(reading: Reading) -> dict[str, float]:
    parts = {"capability": reading.capability, "trait": reading.trait, "audited": reading.audited}
    return {name: sum(values) / len(values) for name, values in parts.items() if values}


@lru_cache(maxsize=1)  # a process executes the runs of one source one after another
def load(source: Source, folder: Path) -> LoadedSource:
    return source.load(folder)
