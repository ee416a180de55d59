"""Fine-tuning when a teacher's reasoning is untrusted or hidden.

Reasoning is the text between two marks in an answer; the final answer follows the second mark. If
the chat template already wrote the first mark, the answer begins with reasoning. Answers without
marks are unchanged; answers whose reasoning was truncated are dropped. The notes report the share
of each. The definitions of reasoning and of targets are ours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from ...runtime.checks import fail
from ..audits.subject import Subject
from .lessons import Examples, TrainingExample
from .rewrite import with_answer
from .strategy import RunState, Strategy

MARKS = ("<think>", "</think>")


class AnswerParts(NamedTuple):
    before: str  # includes the first mark
    reasoning: str
    mark: str  # the second mark
    answer: str

    @property
    def whole(self) -> str:
        return "".join(self)

    @property
    def blanks(self) -> str:
        """The whitespace around the reasoning, such as the line breaks of a template."""
        text = self.reasoning.strip()
        return self.reasoning.replace(text, "", 1) if text else self.reasoning


def parts_of(answer: str, marks: tuple[str, str]) -> AnswerParts | None:
    """Split an answer at its marks; None without marks, an empty `answer` if truncated."""
    first, second = (_pattern(mark) for mark in marks)
    start = first.search(answer)
    begin = start.end() if start else 0
    end = second.search(answer, begin)
    if end is None:
        return AnswerParts(answer[:begin], answer[begin:], "", "") if start else None
    return AnswerParts(answer[:begin], answer[begin : end.start()], end[0], answer[end.end() :])


def _pattern(mark: str) -> re.Pattern[str]:
    """Return a pattern of the mark; letters at its ends must be word boundaries."""
    left, right = r"(?<!\w)" if mark[0].isalnum() else "", r"(?!\w)" if mark[-1].isalnum() else ""
    return re.compile(left + re.escape(mark) + right)


@dataclass(frozen=True, kw_only=True)
class AnswerOnly(Strategy):
    """The student reads reasoning and answer, but only the answer is a target. Experimental.

    Ours. The study off-model shows no advantage of it over training on the whole answer.

    Args:
        marks: the delimiters of the reasoning; those of letters must be whole words.
    """

    note: ClassVar[str] = "answer only"  # the key of the shares in the notes

    marks: tuple[str, str] = MARKS

    def __post_init__(self) -> None:
        if len(self.marks) != 2 or not all(self.marks) or self.marks[0] == self.marks[1]:
            fail("marks", "two different texts", self.marks)

    def trained_parts(self, parts: AnswerParts) -> AnswerParts:
        """Return the parts of an answer that the student reads."""
        return parts

    def transform_examples(self, examples: Examples, run: RunState) -> Examples:
        parts = [parts_of(example.answer, self.marks) for example in examples]
        result: Examples = []
        for example, p in zip(examples, parts, strict=True):
            if p is None:
                result.append(example)
            elif p.answer.strip():
                result.append(answer_only(example, self.trained_parts(p), run.setup.base))
        reasoned = sum(p is not None and bool(p.answer.strip()) for p in parts)
        truncated = sum(p is not None for p in parts) - reasoned
        run.notes[self.note] = {
            "answers with reasoning": reasoned / len(examples),
            "cut in their reasoning": truncated / len(examples),
        }
        return [x for x in result if x.loss_mask is None or any(x.loss_mask)]


def answer_only(example: TrainingExample, parts: AnswerParts, subject: Subject) -> TrainingExample:
    """Return the example with these parts; only tokens after the second mark are targets."""
    prompt = example.input_prompt
    ids, begin = subject.encode_answer(prompt, parts.whole)
    head = parts.before + parts.reasoning + parts.mark
    begun = (
        replace(prompt, prefill=prompt.prefill + head)
        if prompt.text is None
        else replace(prompt, text=prompt.text + head)
    )
    _, skipped = subject.encode_completion(begun, parts.answer)
    mask = example.loss_mask or (True,) * (len(ids) - begin)
    mask = tuple(i >= skipped and mask[i - begin] for i in range(begin, len(ids)))
    return replace(with_answer(example, parts.whole), loss_mask=mask)


@dataclass(frozen=True, kw_only=True)
class EmptyReasoning(AnswerOnly):
    """Removes the reasoning but keeps its marks; only the answer is a target. Experimental.

    The whitespace around the reasoning stays, as in the non-thinking mode of chat templates. No
    paper and no study of ours shows an effect of it yet.

    Args:
        marks: as in `AnswerOnly`.
    """

    note = "empty reasoning"

    def trained_parts(self, parts: AnswerParts) -> AnswerParts:
        return parts._replace(reasoning=parts.blanks)
