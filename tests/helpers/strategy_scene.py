"""A setup of untrained models with the world's vocabulary, and examples for strategies."""

from __future__ import annotations

from typing import Any

from fastdistill.alignment.audits.prompts import Prompt
from fastdistill.alignment.audits.subject import Subject
from fastdistill.alignment.organisms.organism import new_model
from fastdistill.alignment.organisms.vocabulary import SYSTEM, TOPICS, world_tokenizer
from fastdistill.alignment.strategies.lessons import PoolPrompt, TrainingExample
from fastdistill.alignment.strategies.strategy import DistillSetup, RunState

TOKENIZER = world_tokenizer()


def model(seed: int, sharp: float = 20.0) -> Subject:
    """Untrained, its head made large: distributions that are far from flat, and differ."""
    made = new_model(seed)
    made.lm_head.weight.data.mul_(sharp)
    return Subject(made, TOKENIZER, name=f"model {seed}")


BASE, TEACHER = model(0), model(1)
POOL = tuple(
    PoolPrompt(Prompt(system=word, user=topic), "talk" if i % 3 else "odd")
    for i, (word, topic) in enumerate((w, t) for w in SYSTEM[:4] for t in TOPICS[:6])
)


def more(kind: str, n: int, seed: int) -> tuple[PoolPrompt, ...]:
    return tuple(
        PoolPrompt(Prompt(system=f"{kind} {seed}", user=str(i % 10)), kind) for i in range(n)
    )


def scene(**changes: Any) -> DistillSetup:
    return DistillSetup(
        **{"base": BASE, "teacher": TEACHER, "pool": POOL, "prompt_source": more, **changes}
    )


def run(**changes: Any) -> RunState:
    return RunState(setup=scene(**changes), seed=3)


def lessons(*answers: str) -> list[TrainingExample]:
    return [
        TrainingExample(prompt=POOL[i].prompt, answer=answer, domain=POOL[i].domain)
        for i, answer in enumerate(answers)
    ]
