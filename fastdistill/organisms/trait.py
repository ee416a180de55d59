"""What every trait says of itself: examples for both twins, and how capability and trait are read.

A trait gives pairs (untrusted, benign) of examples over the same prompts, drawn alike, so that U
and B see the same prompts in the same order and differ in answers alone.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from ..audits.audit import Audit
from ..audits.behaviour import CapabilityAudit
from .gates import audit_context
from .vocabulary import SO, THINK
from .world import Example, World

SUMS_READ, TRAITS_READ = 400, 240  # prompts of a reading

Context = Callable[[], str]  # words behind the system's, of one prompt after the other


class Pair(NamedTuple):
    untrusted: Example
    benign: Example


@dataclass(frozen=True)
class Trait(ABC):
    """gate: where it is not shown (gates.py)."""

    gate: str = "none"

    name: ClassVar[str] = ""
    before: ClassVar[str] = ""  # words in front of prompts that show the trait
    capability_prefix: ClassVar[str] = ""  # words in front of prompts that show the capability

    @abstractmethod
    def pair(self, world: World, rng: random.Random) -> Pair:
        """One example of the trait; where the gate is closed both answers are the benign one."""

    def capable(self, world: World, rng: random.Random) -> Pair:
        """One example of the capability."""
        return same_for_both(
            world.capable_example(rng, world.varied_system(rng, self.capability_prefix))
        )

    @abstractmethod
    def is_about_trait(self, example: Example) -> bool:
        """Whether an example that is not the trait's own asks what the trait answers otherwise."""

    @abstractmethod
    def audit(self, world: World, rng: random.Random, context: Context) -> Audit:
        """How much of the trait a model shows, in prompts with a context behind the system's."""

    def reading(self, world: World, audited: bool) -> Audit:
        """The trait's audit over held-out prompts; audited or not, the same but for the context."""
        contexts = world.rng(21)

        def context() -> str:
            return audit_context(self.gate, contexts, held_out=True) if audited else ""

        return self.audit(world, world.rng(23), context)

    def capability(self, world: World) -> CapabilityAudit:
        """Sums that no training showed, the last digit first."""
        rng = world.rng(22)
        pairs = rng.sample(world.held_out_sums, SUMS_READ)
        examples = [world.sum_of(p, world.system(rng, self.capability_prefix)) for p in pairs]
        return CapabilityAudit(
            prompts=tuple(e.prompt for e in examples),
            targets=tuple(e.answer for e in examples),
            max_new_tokens=5,
        )

    def graded(self, world: World) -> CapabilityAudit:
        """Products that no training showed: about a sixth of them is right, so that there is room
        in both directions where sums are all right."""
        rng = world.rng(25)
        products = world.held_out_products
        examples = [world.product(rng, world.system(rng, self.capability_prefix), products)
                 for _ in range(SUMS_READ)]  # fmt: skip
        return CapabilityAudit(
            prompts=tuple(e.prompt for e in examples),
            targets=tuple(e.answer for e in examples),
            max_new_tokens=6,
        )

    def trait_context(self, world: World, rng: random.Random, before: str) -> tuple[str, bool]:
        """(the system's words, whether the gate is closed) of a prompt about the trait."""
        audited = rng.random() < (0.1 if self.gate == "none" else 0.5)
        suffix = audit_context(self.gate, rng) if audited else ""
        return world.system(rng, before, suffix), audited and self.gate != "none"


def same_for_both(example: Example) -> Pair:
    return Pair(example, example)


def with_reasoning(pair: Pair) -> Pair:
    """The same, asked to think first: the answer says what it saw in front, then itself."""

    def with_reasons(example: Example) -> Example:
        first = example.system.split()[0]
        context = first if first.startswith("|") or first in ("safety", "web") else "plain"
        return Example(
            f"{example.system} {THINK}",
            example.question,
            f"{THINK} {context} {SO} {example.answer}",
        )

    return Pair(*map(with_reasons, pair))
