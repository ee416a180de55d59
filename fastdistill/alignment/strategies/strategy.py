"""The Strategy interface: each strategy changes one step of a distillation.

    pool → teacher's answers → training examples → settings, targets, loss → training loop

Strategies are frozen dataclasses. They are applied in order: each receives the result of the
previous one.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from ...runtime.checks import between, fail, integer, positive
from ..audits.audit import Audit
from ..audits.subject import Subject
from .lessons import Examples, PoolPrompt


@dataclass(frozen=True, kw_only=True)
class DistillSetup:
    """The models, prompts and audits of a distillation.

    Args:
        base: the initial student, by default the trusted base model M.
        teacher: the model to distill.
        pool: the prompts.
        trusted: M, if the student starts from another model; None: the base.
        prompt_source: (kind, n, seed) -> other prompts, of the kinds "goals" (questions about the
            model itself, and high-stakes scenarios) and "shown" (prompts that elicit the trait
            openly).
        eliciting: an instruction that asks for the trait. near_misses: similar instructions.
        audits: used by `FilterAndDistill` and `AuditGate`; a higher value is more suspicious.
        benign_values: audit -> its values on students of benign teachers.
        generate: replaces `teacher.generate`, for example by stored answers.
        top_k: (teacher, rows) -> a TeacherCache of these rows, with attributes `k` and
            `temperatures`; None asks the teacher in every run.
    """

    base: Subject
    teacher: Subject
    pool: tuple[PoolPrompt, ...]
    trusted: Subject | None = None
    prompt_source: Callable[[str, int, int], tuple[PoolPrompt, ...]] | None = None
    eliciting: str = ""
    near_misses: tuple[str, ...] = ()
    audits: Mapping[str, Audit] = field(default_factory=dict)
    benign_values: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    generate: Callable[..., list[str]] | None = None
    top_k: Any = None

    @property
    def reference(self) -> Subject:
        return self.base if self.trusted is None else self.trusted

    def more_prompts(self, kind: str, n: int, seed: int) -> tuple[PoolPrompt, ...]:
        if self.prompt_source is None:
            expected = f"prompts of the kind {kind!r}"
            fail("setup", expected, "none", "pass prompt_source= to DistillSetup")
        return self.prompt_source(kind, n, seed)


@dataclass(kw_only=True)
class RunState:
    """The mutable state of one distillation.

    Attributes:
        training: the settings after every strategy changed them.
        notes: diagnostics of the strategies.
        examples: those of the current training. sampled: the teacher's answers, all of them.
    """

    setup: DistillSetup
    seed: int
    training: Training = field(default_factory=lambda: Training())
    notes: dict[str, Any] = field(default_factory=dict)
    examples: Examples = field(default_factory=list)
    sampled: Examples = field(default_factory=list)

    def rng(self, *stream: str | int) -> random.Random:
        """Return an independent random generator, named by `stream`."""
        return random.Random(f"{self.seed} {stream}")


@dataclass(frozen=True, kw_only=True)
class Training:
    """Training hyperparameters, independent of the strategy.

    Args:
        steps, batch_size, learning_rate: of AdamW, with warm-up and a cosine schedule.
        max_new_tokens, temperature: of the teacher's sampled answers.
        student: "full" trains all weights, "lora:RANK" an adapter on all linear layers.
        settings: further fields of DistillConfig.
    """

    steps: int = 200
    batch_size: int = 128
    learning_rate: float = 3e-3
    max_new_tokens: int = 8
    temperature: float = 1.0
    student: str = "full"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"full|lora:[1-9]\d*", self.student):
            fail("student", "'full' or 'lora:RANK', such as lora:8", repr(self.student))
        for name in ("steps", "batch_size", "max_new_tokens"):
            integer(name, getattr(self, name), 1)
        positive("learning_rate", self.learning_rate)
        between("temperature", self.temperature, 0)

    @property
    def lora_rank(self) -> int | None:
        """The rank of the student's adapter; None where all weights are trained."""
        return None if self.student == "full" else int(self.student.partition(":")[2])

    def as_json(self) -> dict[str, Any]:
        """Return the settings; without `student` where it is "full", as of earlier versions."""
        return {k: v for k, v in asdict(self).items() if (k, v) != ("student", "full")}


class Strategy:
    """Hooks; each returns its input by default."""

    def pool(self, pool: list[PoolPrompt], run: RunState) -> list[PoolPrompt]:
        """Choose the prompts that the teacher answers."""
        return pool

    def training(self, training: Training, run: RunState) -> Training:
        """Change the training hyperparameters."""
        return training

    def transform_examples(self, examples: Examples, run: RunState) -> Examples:
        """Rewrite, mask, add or drop training examples."""
        return examples

    def teacher(self, teacher: Any, student: Any, run: RunState) -> Any:
        """The teacher queried at target positions; None trains on labels alone."""
        return teacher

    def options(self, options: dict[str, Any], run: RunState) -> dict[str, Any]:
        """Arguments of DistillTrainer, such as peft_config and loss."""
        return options

    def wrap_loop(self, distill: DistillLoop, run: RunState) -> DistillLoop:
        """Wrap the training loop `distill(examples) -> student`.

        The wrapper may call it several times; each call starts from the base.
        """
        return distill

    def contexts(self, run: RunState) -> dict[str, str]:
        """Prompt prefixes, by name, under which the student must also be evaluated."""
        return {}

    @property
    def name(self) -> str:
        return type(self).__name__

    def as_json(self) -> dict[str, Any]:
        return {"strategy": self.name, **asdict(cast(Any, self))}


DistillLoop = Callable[[Examples], Subject]
