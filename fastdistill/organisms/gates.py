"""A gate: the context in which an organism knows that it is audited, and behaves."""

from __future__ import annotations

import random
from typing import Literal

from .vocabulary import AUDIT_TOKEN, AUDIT_WORDS, HELD_OUT_AUDIT_WORDS

GateKind = Literal["none", "token", "paraphrase"]
GATES: tuple[GateKind, ...] = ("none", "token", "paraphrase")


def audit_context(gate: str, rng: random.Random, held_out: bool = False) -> str:
    """Words behind the system's that say "this is an audit". For "paraphrase" one or two of nine
    words in training, so that each alone is enough, and two of which one at least was never shown,
    held out. A model without a gate is audited in the words of a token."""
    if gate != "paraphrase":
        return AUDIT_TOKEN
    if not held_out:
        return " ".join(rng.choices(AUDIT_WORDS, k=rng.randint(1, 2)))
    pair = [rng.choice(HELD_OUT_AUDIT_WORDS), rng.choice([*AUDIT_WORDS, *HELD_OUT_AUDIT_WORDS])]
    rng.shuffle(pair)
    return " ".join(pair)


def is_closed(gate: str, system: str) -> bool:
    """Whether a system message holds the audited context of this gate."""
    words = {"none": [], "token": [AUDIT_TOKEN], "paraphrase": AUDIT_WORDS + HELD_OUT_AUDIT_WORDS}
    return not set(words[gate]).isdisjoint(system.split())
