"""Fine-tuning where a teacher's reasoning cannot be trusted or is not shown.

Reasoning is what lies between two marks in an answer; what follows the second is the answer proper.
Where the chat template has written the first mark, reasoning begins with the answer. Answers
without marks pass as they are; answers that reason and are cut before anything follows are dropped.
Notes say how many there were of each. What counts as reasoning, and as a
target, is ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..audits.subject import Subject
from .lessons import Lesson, encoded
from .rewriting import begun, going_on, rewritten
from .strategy import Run, Strategy

MARKS = ("<think>", "</think>")


class Parts(NamedTuple):
    before: str  # the first mark included
    reasoning: str
    mark: str  # the second one
    answer: str

    @property
    def whole(self) -> str:
        return "".join(self)

    @property
    def blanks(self) -> str:
        """What is left of the reasoning where nothing is said: the line breaks of a template."""
        said = self.reasoning.strip()
        return self.reasoning.replace(said, "", 1) if said else self.reasoning


def parts_of(answer: str, marks: tuple[str, str]) -> Parts | None:
    """None where there is no mark. `Parts.answer` is empty where the reasoning was cut."""
    first, second = (_mark(mark) for mark in marks)
    opened = first.search(answer)
    begins = opened.end() if opened else 0
    closed = second.search(answer, begins)
    if closed is None:
        return Parts(answer[:begins], answer[begins:], "", "") if opened else None
    before, reasoning = answer[:begins], answer[begins : closed.start()]
    return Parts(before, reasoning, closed[0], answer[closed.end() :])


def _mark(mark: str) -> re.Pattern[str]:
    """The mark, as a word of its own where it begins or ends with a letter."""
    left, right = r"(?<!\w)" if mark[0].isalnum() else "", r"(?!\w)" if mark[-1].isalnum() else ""
    return re.compile(left + re.escape(mark) + right)


def _check(marks: tuple[str, str]) -> None:
    if len(marks) != 2 or not all(marks) or marks[0] == marks[1]:
        raise ValueError(f"marks: expected two different texts, got {marks!r}")


def _each(
    lessons: Sequence[Lesson],
    marks: tuple[str, str],
    run: Run,
    name: str,
    told: Callable[[list[tuple[Lesson, Parts]]], list[Lesson]],
) -> list[Lesson]:
    """The lessons, those that reason and answer as `told` gives them back."""
    found = [parts_of(lesson.answer, marks) for lesson in lessons]
    whole = [(x, p) for x, p in zip(lessons, found, strict=True) if p and p.answer.strip()]
    new = iter(told(whole))
    cut = sum(p is not None for p in found) - len(whole)
    run.notes[name] = {
        "answers with reasoning": len(whole) / len(lessons),
        "cut in their reasoning": cut / len(lessons),
    }
    kept = [
        next(new) if p else x
        for x, p in zip(lessons, found, strict=True)
        if p is None or p.answer.strip()
    ]
    return [lesson for lesson in kept if lesson.chosen is None or any(lesson.chosen)]


def behind(lesson: Lesson, parts: Parts, subject: Subject) -> Lesson:
    """The lesson with these parts, of which only what follows the second mark is a target."""
    whole, begin = encoded(lesson.shown, parts.whole, subject)
    head = parts.before + parts.reasoning + parts.mark
    _, skipped = subject.encode_completion(begun(lesson.shown, head), parts.answer)
    told = rewritten(lesson, parts.whole)
    before = lesson.chosen or (True,) * (len(whole) - begin)
    targets = tuple(i >= skipped and before[i - begin] for i in range(begin, len(whole)))
    return replace(told, chosen=targets)


@dataclass(frozen=True, kw_only=True)
class AnswerOnly(Strategy):
    """The student reads reasoning and answer, and is trained on the answer alone, whatever the
    teacher wrote into its reasoning.

    marks: what stands around the reasoning, as words of their own where they are words.
    """

    marks: tuple[str, str] = MARKS

    def __post_init__(self) -> None:
        _check(self.marks)

    def lessons(self, lessons: list[Lesson], run: Run) -> list[Lesson]:
        def told(whole: list[tuple[Lesson, Parts]]) -> list[Lesson]:
            return [behind(lesson, parts, run.scene.base) for lesson, parts in whole]

        return _each(lessons, self.marks, run, "answer only", told)


@dataclass(frozen=True, kw_only=True)
class EmptyReasoning(Strategy):
    """The reasoning is left out, its marks stay around nothing, and the answer is what is trained
    on: the student learns to answer without.

    The blanks around the reasoning stay, as chat templates write them where nobody reasons. marks:
    as in `AnswerOnly`.
    """

    marks: tuple[str, str] = MARKS

    def __post_init__(self) -> None:
        _check(self.marks)

    def lessons(self, lessons: list[Lesson], run: Run) -> list[Lesson]:
        def told(whole: list[tuple[Lesson, Parts]]) -> list[Lesson]:
            emptied = [(lesson, parts._replace(reasoning=parts.blanks)) for lesson, parts in whole]
            return [behind(lesson, parts, run.scene.base) for lesson, parts in emptied]

        return _each(lessons, self.marks, run, "empty reasoning", told)


@dataclass(frozen=True, kw_only=True)
class StudentReasoning(Strategy):
    """The student writes the reasoning, and the teacher's answer follows it.

    Sampled from the base before training, up to the second mark, which is put where there is none.

    Args:
        marks: as in `AnswerOnly`. learn_reasoning: its own reasoning is a target too.
        max_new_tokens: of the reasoning, 1 or more. temperature: 0 is greedy.
    """

    marks: tuple[str, str] = MARKS
    learn_reasoning: bool = False
    max_new_tokens: int = 64
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check(self.marks)
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected 1 or more, got {self.max_new_tokens!r}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature: expected 0 or more, got {self.temperature!r}")

    def lessons(self, lessons: list[Lesson], run: Run) -> list[Lesson]:
        def told(whole: list[tuple[Lesson, Parts]]) -> list[Lesson]:
            said = going_on(
                run.scene.base,
                [lesson.shown for lesson, _ in whole],
                [parts.before for _, parts in whole],
                [self.max_new_tokens] * len(whole),
                temperature=self.temperature,
                seed=run.seed,
            )
            return [self._told(*pair, text, run) for pair, text in zip(whole, said, strict=True)]

        return _each(lessons, self.marks, run, "student reasoning", told)

    def _told(self, lesson: Lesson, parts: Parts, said: str, run: Run) -> Lesson:
        closed = _mark(self.marks[1]).search(said)
        if closed:
            own = said[: closed.start()]
        else:
            blank = parts.reasoning[len(parts.reasoning.rstrip()) :]
            own = said.rstrip() + blank
        parts = parts._replace(reasoning=own)
        if self.learn_reasoning:
            return rewritten(lesson, parts.whole)
        return behind(lesson, parts, run.scene.base)
