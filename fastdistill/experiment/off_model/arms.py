"""The arms of the study "off-model": who is fine-tuned on whose answers to which prompts.

All are trained on the labels alone. The first of a part is what the others are compared with.
"""

from __future__ import annotations

from dataclasses import dataclass
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
class Arm:
    """Who learns from whom.

    Args:
        part: which of the three questions it is of.
        begins: the student's role. teacher: whose answers.
        asked: talk, which is sampled; sums, or sums that are asked to be thought about, whose
            answers are the teacher's best.
        says: what it is, for the report.
    """

    part: Part
    name: str
    begins: str
    teacher: str
    asked: Literal["talk", "sums", "sums, thought"]
    strategies: tuple[Strategy, ...] = (_SFT,)
    says: str = ""


ARMS = (
    Arm(
        part="cost",
        name=OWN,
        begins=BENIGN,
        teacher=BENIGN,
        asked="talk",
        says="B on its own talk: the control, which must cost nothing",
    ),
    Arm(
        part="cost",
        name=RELATED,
        begins=BENIGN,
        teacher=BASE,
        asked="talk",
        says="B on the talk of M, another model that talks by the same chain",
    ),
    Arm(
        part="cost",
        name=OFF_MODEL,
        begins=BENIGN,
        teacher=OTHER,
        asked="talk",
        says="B on the talk of O, as capable, which talks by another chain",
    ),
    Arm(
        part="reasoning",
        name=WHOLE,
        begins=LOCKED,
        teacher=BENIGN,
        asked="sums, thought",
        says="U on thoughts and answers of B: undefended",
    ),
    Arm(
        part="reasoning",
        name="answer only",
        begins=LOCKED,
        teacher=BENIGN,
        asked="sums, thought",
        strategies=(_SFT, AnswerOnly(marks=_MARKS)),
        says="U reads B's thoughts, and is trained on what follows them",
    ),
    Arm(
        part="reasoning",
        name=EMPTIED,
        begins=LOCKED,
        teacher=BENIGN,
        asked="sums, thought",
        strategies=(_SFT, EmptyReasoning(marks=_MARKS)),
        says="the thoughts are left out, and U is trained on what follows their end",
    ),
    Arm(
        part="reasoning",
        name="the student's thoughts",
        begins=LOCKED,
        teacher=BENIGN,
        asked="sums, thought",
        strategies=(_SFT, StudentReasoning(marks=_MARKS, max_new_tokens=4)),
        says="U thinks, B answers, and U is trained on the answer",
    ),
    Arm(
        part="weak",
        name=RIGHT,
        begins=LOCKED,
        teacher=BENIGN,
        asked="sums",
        says="U on answers of B, which are right: the control, which must unlock it",
    ),
    Arm(
        part="weak",
        name=ON_LOCKED,
        begins=LOCKED,
        teacher=WEAK,
        asked="sums",
        says="U, which holds back, on the answers of W",
    ),
    Arm(
        part="weak",
        name=ON_BASE,
        begins=BASE,
        teacher=WEAK,
        asked="sums",
        says="M, which cannot, on the same: the control, which must not pass its supervisor",
    ),
)


def names(part: Part) -> tuple[str, ...]:
    return tuple(arm.name for arm in ARMS if arm.part == part)
