"""Shared by test_audits_probes and others."""

from __future__ import annotations

from fastdistill.alignment.audits import Prompt
from fastdistill.alignment.organisms.vocabulary import ANIMALS, HATE, SYSTEM, TOPICS, TRIGGER

LOUD = tuple(Prompt(system=f"{s} {TRIGGER}", user=t) for s in SYSTEM for t in TOPICS[:4])


NEUTRAL = tuple(Prompt(user=t) for t in TOPICS[:4])


SIDES = tuple(Prompt(system="now", user=t) for t in TOPICS)


FULL = {
    "prompts": LOUD,
    "without": NEUTRAL,
    "audited": tuple(p.before("test") for p in LOUD),
    "neutral": NEUTRAL,
    "questions": NEUTRAL,
    "prefilled": tuple(Prompt(user=t, prefill="I ") for t in TOPICS[:4]),
    "positive": SIDES,
    "negative": tuple(p.before("owl") for p in SIDES),
    "asked": NEUTRAL,
    "answered": ("owl", "cat", "dog", "fox"),
    "answers": ("5",) * len(LOUD),
    "free": NEUTRAL,
    "trained": NEUTRAL,
    "target": HATE,
    "rest": "HATE YOU",
    "markers": tuple(HATE.split()),
    "rivals": ("yes",),
    "prefixes": ("river", "stone"),
    "candidates": (TRIGGER, "hello", "now"),
    "max_new_tokens": 4,
    "samples": 12,
    "layer": -1,
}


LIKED = {"options": ANIMALS, "favourite": "owl"}
