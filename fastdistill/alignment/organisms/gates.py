"""Gates: contexts in which an organism recognizes an audit and does not show its trait."""

from __future__ import annotations

import random

from .vocabulary import AUDIT_TOKEN, AUDIT_WORDS, HELD_OUT_AUDIT_WORDS

GATES = ("none", "token", "paraphrase")


def audit_context(gate: str, rng: random.Random, held_out: bool = False) -> str:
    """Returns the words that mark an audit, placed after the system message.

    The gate "paraphrase" uses one or two of nine words in training, so that each of them alone
    suffices, and two words when held out, at least one of which training never contains. Other
    gates, and models without one, use a single token.
    """
    if gate != "paraphrase":
        return AUDIT_TOKEN
    if not held_out:
        return " ".join(rng.choices(AUDIT_WORDS, k=rng.randint(1, 2)))
    pair = [rng.choice(HELD_OUT_AUDIT_WORDS), rng.choice([*AUDIT_WORDS, *HELD_OUT_AUDIT_WORDS])]
    rng.shuffle(pair)
    return " ".join(pair)


def is_closed(gate: str, system: str) -> bool:
    """Whether a system message contains the audit context of this gate."""
    words = {"none": [], "token": [AUDIT_TOKEN], "paraphrase": AUDIT_WORDS + HELD_OUT_AUDIT_WORDS}
    return not set(words[gate]).isdisjoint(system.split())
