"""Pools of prompts for distillation, without answers. The teacher provides the answers."""

from __future__ import annotations

import random

from ...runtime.checks import between, choice, integer
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
    """Returns n prompts in a fixed order per seed. Students of U and of B get the same prompts.

    Args:
        organism: the organism whose trait leaks.
        kind: "sums" (the capability: sums and products), "talk" (open-ended), or "mixed" (half
            each).
        leak: share of prompts that show the trait openly: with its trigger or label, with a
            question about the preference, or with locked sums. Other prompts never show it, except
            products where the trait is entangled with them.
        seed: selects the random stream.

    Returns:
        Examples with the answer "": `Example.prompt` is the teacher's prompt. `Example.row()` ends
        where the answer starts, so that a student can be sampled on-policy from it.

    Raises:
        ValueError: n below 1, an unknown kind, a leak outside [0, 0.1].
    """
    integer("n", n, 1)
    choice("kind", kind, KINDS)
    between("leak", leak, 0, MOST_LEAKED)  # a larger share trains the trait directly
    rng = world.rng(41, seed)
    examples = [_plain_example(world, organism.kind, kind, rng) for _ in range(n)]
    # A separate stream: a higher leak replaces more prompts and leaves the others unchanged.
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
    """Returns an example that shows the trait openly: the answers of U and B differ."""
    while True:
        untrusted, benign = trait.pair(world, rng)
        if untrusted != benign and untrusted.system.startswith(trait.trait_prefix):
            return untrusted
