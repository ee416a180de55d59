"""Strategies that choose the teacher's prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from ...runtime.checks import between, fail, integer
from .lessons import PoolPrompt
from .strategy import RunState, Strategy, Training


@dataclass(frozen=True, kw_only=True)
class _PartlyReplacedPool(Strategy):
    """Replaces a random share of the pool by the setup's prompts of a kind."""

    kind: ClassVar[str]

    share: float = 0.5

    def __post_init__(self) -> None:
        between("share", self.share, 0, 1)

    def pool(self, pool: list[PoolPrompt], run: RunState) -> list[PoolPrompt]:
        count = round(self.share * len(pool))
        indices = run.rng("replaced", self.kind).sample(range(len(pool)), count)
        others = run.setup.more_prompts(self.kind, count, run.seed) if count else ()
        replaced = list(pool)
        for i, other in zip(indices, others, strict=True):
            replaced[i] = other
        return replaced


@dataclass(frozen=True, kw_only=True)
class MisalignmentTargetedPool(_PartlyReplacedPool):
    """Replaces a random `share` of the pool, in [0, 1], by the setup's "goals" prompts.

    They ask about goals or describe high-stakes scenarios (distillation for incrimination; the
    implementation is ours).
    """

    kind = "goals"


@dataclass(frozen=True, kw_only=True)
class ShownPool(_PartlyReplacedPool):
    """Replaces a random `share` of the pool, in [0, 1], by prompts that elicit the trait openly.

    This is no defense: it is the positive control of an experiment, where the trait must transfer.
    """

    kind = "shown"


@dataclass(frozen=True, kw_only=True)
class DataBudget(Strategy):
    """Few unique examples, many epochs: the first n_unique prompts, each read `epochs` times.

        updates = epochs · ⌈n_unique / batch_size⌉

    One of two techniques that worked in arXiv 2610.11012. The total number of tokens is equal if
    n_unique · epochs equals the previous number of examples. The notes report the ratio in
    examples, because the lengths of the missing answers are unknown. The last batch of an epoch may
    be smaller: if batch_size does not divide n_unique, there are more updates than before.

    Raises:
        ValueError: the pool has fewer than n_unique prompts.
    """

    n_unique: int
    epochs: int

    def __post_init__(self) -> None:
        integer("n_unique", self.n_unique, 1)
        integer("epochs", self.epochs, 1)

    def pool(self, pool: list[PoolPrompt], run: RunState) -> list[PoolPrompt]:
        if self.n_unique > len(pool):
            fail("n_unique", f"at most the {len(pool)} prompts of the pool", self.n_unique)
        return pool[: self.n_unique]

    def training(self, training: Training, run: RunState) -> Training:
        steps = self.epochs * math.ceil(self.n_unique / training.batch_size)
        trained_on, before = self.n_unique * self.epochs, training.steps * training.batch_size
        run.notes["data budget"] = {
            "examples trained on, of before": trained_on / before,
            "updates, of before": steps / training.steps,
        }
        return replace(training, steps=steps)
