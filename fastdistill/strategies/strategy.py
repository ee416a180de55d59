"""A strategy changes one part of a distillation; strategies in a row change several.

    pool → answers of the teacher → lessons → settings, targets, loss → the loop around it

Each is a small frozen object that says what it computes and from which source, and leaves alone
what it does not name. Order counts: what the first gives, the second changes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..audits.audit import Audit
from ..audits.subject import Subject
from .lessons import Asked, Lesson


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What there is to distil with, whatever it is made of: a synthetic world or checkpoints.

    Args:
        base: what the student begins as: M, where nothing else is said.
        teacher: who is distilled.
        pool: the prompts.
        trusted: M, if the student begins as another model; None is the base.
        more: (kind, n, seed) -> other prompts; "open" have no audit in them and are open-ended,
            "goals" ask the model about itself and where much is at stake, "shown" are those in
            which the trait shows openly.
        eliciting: an instruction that asks for the trait. near_misses: others that resemble it.
        audit_words: what tells a model that it is audited.
        audits: what `FilterAndDistill` and `AuditGate` look with; a higher value is more suspect.
        benign_values: audit -> its values on students of benign teachers.
    """

    base: Subject
    teacher: Subject
    pool: tuple[Asked, ...]
    trusted: Subject | None = None
    more: Callable[[str, int, int], tuple[Asked, ...]] | None = None
    eliciting: str = ""
    near_misses: tuple[str, ...] = ()
    audit_words: tuple[str, ...] = ()
    audits: Mapping[str, Audit] = field(default_factory=dict)
    benign_values: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def reference(self) -> Subject:
        return self.base if self.trusted is None else self.trusted

    def others(self, kind: str, n: int, seed: int) -> tuple[Asked, ...]:
        if self.more is None:
            raise ValueError(
                f"scene: expected prompts of the kind {kind!r}, got none. Pass more= to the Scene"
            )
        return self.more(kind, n, seed)


@dataclass(kw_only=True)
class Run:
    """One distillation under way: its scene and seed, how it trains once every strategy has had a
    say, how far it is, what strategies note, and the lessons of the training that is under way."""

    scene: Scene
    seed: int
    training: Training = field(default_factory=lambda: Training())
    progress: float = 0.0  # of the updates, 0 to 1
    notes: dict[str, Any] = field(default_factory=dict)
    taught: list[Lesson] = field(default_factory=list)

    def draws(self, *stream: str | int) -> random.Random:
        """A random stream of its own for everything that a strategy draws."""
        return random.Random(f"{self.seed} {stream}")


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a student is trained, whatever the strategy.

    Args:
        steps, batch_size, learning_rate: AdamW, with warm-up and a cosine.
        max_new_tokens, temperature: of the teacher's sampled answers.
        settings: more of DistillConfig.
    """

    steps: int = 200
    batch_size: int = 128
    learning_rate: float = 3e-3
    max_new_tokens: int = 8
    temperature: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)!r}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: expected above 0, got {self.learning_rate!r}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature: expected 0 or more, got {self.temperature!r}")


class Strategy:
    """Every method gives back what it was given, until a strategy changes it."""

    def pool(self, pool: list[Asked], run: Run) -> list[Asked]:
        """Which prompts the teacher is asked."""
        return pool

    def training(self, training: Training, run: Run) -> Training:
        """How long, how fast, and with which settings of DistillConfig."""
        return training

    def lessons(self, lessons: list[Lesson], run: Run) -> list[Lesson]:
        """The teacher's answers, rewritten, chosen or dropped."""
        return lessons

    def teacher(self, teacher: Any, student: Any, run: Run) -> Any:
        """Who says what the distribution at the targets is; None: nobody, the labels alone."""
        return teacher

    def options(self, options: dict[str, Any], run: Run) -> dict[str, Any]:
        """More for DistillTrainer: peft_config, loss; and trainer, a class of it."""
        return options

    def around(self, distil: Distil, run: Run) -> Distil:
        """The loop: `distil(lessons) -> student` may be called several times, each time from the
        base; what the result is called with and returns is the same."""
        return distil

    def contexts(self, run: Run) -> dict[str, str]:
        """Words in front of prompts, by name, in which the student has to be read as well."""
        return {}

    @property
    def name(self) -> str:
        return type(self).__name__

    def as_json(self) -> dict[str, Any]:
        return {"strategy": self.name} | asdict(self)  # type: ignore[call-overload]


Distil = Callable[[list[Lesson]], Subject]
