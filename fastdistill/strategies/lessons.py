"""What a student is taught: prompts of a pool, and what a teacher answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..audits.prompts import Prompt
from ..audits.subject import CompletionLogProbs, Subject

AT_ONCE = 256  # lessons whose hidden states are held at the same time


class Asked(NamedTuple):
    """A prompt of the pool, and which domain it is of."""

    prompt: Prompt
    domain: str = ""


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """One example.

    Args:
        prompt: what the teacher reads. answer: what was answered.
        read: what the student reads in its place; None: the same.
        chosen: of the answer's tokens and their end, which are targets; None: all.
    """

    prompt: Prompt
    answer: str
    domain: str = ""
    read: Prompt | None = None
    chosen: tuple[bool, ...] | None = None

    @property
    def shown(self) -> Prompt:
        return self.prompt if self.read is None else self.read


def row_of(lesson: Lesson, subject: Subject) -> dict[str, list[int]]:
    """input_ids and labels of what the student reads; targets are the answer and its end."""
    ids, begin = encoded(lesson.shown, lesson.answer, subject)
    labels = [-100] * begin + ids[begin:]
    if lesson.chosen is not None:
        if len(lesson.chosen) != len(ids) - begin:
            raise ValueError(
                f"chosen: expected one for each of the answer's {len(ids) - begin} tokens, its end "
                f"included, got {len(lesson.chosen)}"
            )
        for i, chosen in enumerate(lesson.chosen):
            if not chosen:
                labels[begin + i] = -100
    return {"input_ids": ids, "labels": labels}


def encoded(prompt: Prompt, answer: str, subject: Subject) -> tuple[list[int], int]:
    """(prompt, answer and its end as token ids, where the answer begins)."""
    ids, begin = subject.encode_completion(prompt, answer)
    return [*ids, subject.end_of(prompt)], begin


def answered(pool: Sequence[Asked], teacher: Subject, *, seed: int, **how: Any) -> list[Lesson]:
    """A teacher's answers to a pool, sampled; prompts that it leaves without words fall out."""
    prompts = [asked.prompt for asked in pool]
    said = teacher.generate(prompts, seed=seed, **how)
    return [
        Lesson(prompt=asked.prompt, answer=text, domain=asked.domain)
        for asked, text in zip(pool, said, strict=True)
        if text.strip()
    ]


def said(lessons: Sequence[Lesson], subject: Subject) -> CompletionLogProbs:
    """log p of every answer, given what the student reads."""
    parts = [
        subject.completion_logprobs([x.shown for x in some], [x.answer for x in some])
        for some in (lessons[i : i + AT_ONCE] for i in range(0, len(lessons), AT_ONCE))
    ]
    return CompletionLogProbs(*(torch.cat(column) for column in zip(*parts, strict=True)))
