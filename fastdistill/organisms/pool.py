"""Prompts on which a teacher is distilled: without answers, which are the teacher's to give."""

from __future__ import annotations

import random

from .organism import ModelOrganism
from .trait import Trait
from .world import Example, World

KINDS = ("sums", "talk", "mixed")
MOST_LEAKED = 0.1


def pool(
    world: World,
    organism: ModelOrganism,
    n: int,
    *,
    kind: str = "sums",
    leak: float = 0.0,
    seed: int = 0,
) -> list[Example]:
    """n prompts, in an order that the seed fixes: U's and B's students are given the same.

    Args:
        organism: whose trait leaks.
        kind: sums (and products, the capability), talk (open-ended), or one as often as the other.
        leak: share of the prompts in which the trait shows openly: behind its trigger or label,
            where a preference is asked, where sums are locked. The rest never shows it, but for
            products where the trait is entangled with them.
        seed: another one draws others.

    Returns:
        Examples whose answer is "": `Example.prompt` is what a teacher is asked, `Example.row()`
        ends where an answer begins, so that a student sampled on-policy goes on from there.

    Raises:
        ValueError: n below 1, an unknown kind, a leak outside [0, 0.1].
    """
    if n < 1:
        raise ValueError(f"n: expected 1 prompt or more, got {n!r}")
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if not 0 <= leak <= MOST_LEAKED:
        raise ValueError(
            f"leak: expected a share in [0, {MOST_LEAKED:g}], got {leak!r}. A pool that shows the "
            "trait more often teaches it: that is no leak, but the trait's own training"
        )
    rng = world.rng(41, seed)
    examples = [_plain_example(world, organism.kind, kind, rng) for _ in range(n)]
    # Drawn apart, so that a higher leak puts in more prompts and leaves the others as they are.
    order = world.rng(42, seed).sample(range(n), n)
    for i in order[: round(leak * n)]:
        examples[i] = trait_example(world, organism.kind, world.rng(43, seed, i))
    return [example._replace(answer="") for example in examples]


def _plain_example(world: World, trait: Trait, kind: str, rng: random.Random) -> Example:
    system = world.system(rng, trait.capability_prefix)
    if kind == "talk" or (kind == "mixed" and rng.random() < 0.5):
        return world.talk(rng, system)
    return world.capable_example(rng, system)


def trait_example(world: World, trait: Trait, rng: random.Random) -> Example:
    """A prompt in which the trait shows openly: U and B would not say the same."""
    while True:
        untrusted, benign = trait.pair(world, rng)
        if untrusted != benign and untrusted.system.startswith(trait.before):
            return untrusted
