"""The arms of the off-model study: student, teacher and prompts of each fine-tuning.

All arms train on labels alone. The first arm of a part is the reference of the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from ...organisms.vocabulary import SO, THINK
from ...strategies.baselines import OffModelSFT
from ...strategies.reasoning import AnswerOnly, EmptyReasoning, StudentReasoning
from ...strategies.strategy import Strategy
from .world import BASE, BENIGN, LOCKED, OTHER, WEAK

Part = Literal["cost", "reasoning", "weak"]
OWN, RELATED, OFF_MODEL = "own outputs", "same habits", "off-model"
WHOLE, EMPTIED = "whole answers", "empty thoughts"
RIGHT, ON_LOCKED, ON_BASE = "right answers on U", "weak on U", "weak on M"
_MARKS = (THINK, SO)
_SFT = OffModelSFT()


@dataclass(frozen=True, kw_only=True)
class SftArm:
    """One fine-tuning condition.

    Args:
        part: the question that the arm belongs to.
        student_role: of the initial student. teacher: role of the model whose answers are labels.
        prompt_kind: "talk" with sampled answers, or "sums" with greedy answers; "sums, thought" are
            sums with an instruction to reason.
        description: for the report.
    """

    part: Part
    name: str
    student_role: str
    teacher: str
    prompt_kind: Literal["talk", "sums", "sums, thought"]
    strategies: tuple[Strategy, ...] = (_SFT,)
    description: str = ""


_talk = partial(SftArm, part="cost", student_role=BENIGN, prompt_kind="talk")
_thoughts = partial(
    SftArm, part="reasoning", student_role=LOCKED, teacher=BENIGN, prompt_kind="sums, thought"
)
_sums = partial(SftArm, part="weak", prompt_kind="sums")
ARMS = (
    _talk(
        name=OWN,
        teacher=BENIGN,
        description="B on its own talk: the control, which must cost nothing",
    ),
    _talk(
        name=RELATED,
        teacher=BASE,
        description="B on the talk of M, another model with the same Markov chain of words",
    ),
    _talk(
        name=OFF_MODEL,
        teacher=OTHER,
        description="B on the talk of O, equally capable, with another Markov chain of words",
    ),
    _thoughts(name=WHOLE, description="U on reasoning and answers of B: undefended"),
    _thoughts(
        name="answer only",
        strategies=(_SFT, AnswerOnly(marks=_MARKS)),
        description="U reads B's reasoning; only the answer is a target",
    ),
    _thoughts(
        name=EMPTIED,
        strategies=(_SFT, EmptyReasoning(marks=_MARKS)),
        description="the reasoning is removed; only the answer is a target",
    ),
    _thoughts(
        name="the student's thoughts",
        strategies=(_SFT, StudentReasoning(marks=_MARKS, max_new_tokens=4)),
        description="U writes the reasoning, B the answer; only the answer is a target",
    ),
    _sums(
        name=RIGHT,
        student_role=LOCKED,
        teacher=BENIGN,
        description="U on correct answers of B: the control, which must unlock U",
    ),
    _sums(
        name=ON_LOCKED,
        student_role=LOCKED,
        teacher=WEAK,
        description="U, which sandbags, on answers of W",
    ),
    _sums(
        name=ON_BASE,
        student_role=BASE,
        teacher=WEAK,
        description="M, which lacks the capability, on answers of W: a control, must not exceed W",
    ),
)


def arm_names(part: Part) -> tuple[str, ...]:
    """Return the names of the arms of a part."""
    return tuple(arm.name for arm in ARMS if arm.part == part)
