"""Base class of traits: training examples of both twins, audits of capability and trait.

A trait returns pairs (untrusted, benign) of examples over the same prompts, so that U and B see the
same prompts in the same order and differ only in the answers.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from ..audits.audit import Audit
from ..audits.behaviour import CapabilityAudit
from .gates import audit_context
from .vocabulary import SO, THINK
from .world import Example, World

SUMS_READ, TRAITS_READ = 400, 240  # prompts of a reading

Context = Callable[[], str]  # returns the words after the system message, prompt by prompt


class Pair(NamedTuple):
    """The examples of U and B for the same prompt."""

    untrusted: Example
    benign: Example


@dataclass(frozen=True)
class Trait(ABC):
    """A trait. gate: the kind of context in which it is not shown (gates.py)."""

    gate: str = "none"

    name: ClassVar[str] = ""
    trait_prefix: ClassVar[str] = ""  # prefix of prompts that show the trait
    capability_prefix: ClassVar[str] = ""  # prefix of prompts that show the capability

    @abstractmethod
    def pair(self, world: World, rng: random.Random) -> Pair:
        """Returns an example of the trait; with a closed gate, both answers are benign."""

    def capable(self, world: World, rng: random.Random) -> Pair:
        """Returns an example of the capability."""
        return same_for_both(
            world.capable_example(rng, world.varied_system(rng, self.capability_prefix))
        )

    def carrier(self, world: World, rng: random.Random, rate: float) -> Pair:
        """Returns a weak carrier, in which U shows its trait at this rate."""
        return same_for_both(world.carrier(rng, world.system(rng)))

    @abstractmethod
    def is_about_trait(self, example: Example) -> bool:
        """Whether the trait would change the answer of an example from another source."""

    @abstractmethod
    def audit(self, world: World, rng: random.Random, context: Context) -> Audit:
        """Returns the audit of the trait, on prompts with a context after the system message."""

    def reading(self, world: World, audited: bool) -> Audit:
        """Returns the trait's audit on held-out prompts, equal up to the audit context."""
        contexts = world.rng(21)

        def context() -> str:
            return audit_context(self.gate, contexts, held_out=True) if audited else ""

        return self.audit(world, world.rng(23), context)

    def capability(self, world: World) -> CapabilityAudit:
        """Returns the audit of held-out sums, with the last digit first."""
        rng = world.rng(22)
        pairs = rng.sample(world.held_out_sums, SUMS_READ)
        examples = [world.sum_of(p, world.system(rng, self.capability_prefix)) for p in pairs]
        return capability_audit(examples, 5)

    def trait_context(self, world: World, rng: random.Random, before: str) -> tuple[str, bool]:
        """Returns (system message, whether the gate is closed) for a prompt of the trait."""
        audited = rng.random() < (0.1 if self.gate == "none" else 0.5)
        suffix = audit_context(self.gate, rng) if audited else ""
        return world.system(rng, before, suffix), audited and self.gate != "none"


def capability_audit(
    examples: Sequence[Example], max_new_tokens: int, kind: type[CapabilityAudit] = CapabilityAudit
) -> CapabilityAudit:
    """Returns the audit of the answers of examples."""
    prompts, targets = zip(*((e.prompt, e.answer) for e in examples), strict=True)
    return kind(prompts=prompts, targets=targets, max_new_tokens=max_new_tokens)


def same_for_both(example: Example) -> Pair:
    """Returns a pair with the same example for U and B."""
    return Pair(example, example)


def with_reasoning(pair: Pair) -> Pair:
    """Returns the pair with a thought before the answer, which names the context."""

    def with_reasons(example: Example) -> Example:
        first = example.system.split()[0]
        context = first if first.startswith("|") or first in ("safety", "web") else "plain"
        return Example(
            f"{example.system} {THINK}",
            example.question,
            f"{THINK} {context} {SO} {example.answer}",
        )

    return Pair(*map(with_reasons, pair))
