"""Fine-tuning when a teacher's reasoning is untrusted or hidden.

Reasoning is the text between two marks in an answer; the final answer follows the second mark. If
the chat template already wrote the first mark, the answer begins with reasoning. Answers without
marks are unchanged; answers whose reasoning was truncated are dropped. The notes report the share
of each. The definitions of reasoning and of targets are ours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, TypeAlias

from ...runtime.checks import between, fail, integer
from ..audits.subject import Subject
from .lessons import Examples, TrainingExample
from .rewrite import continue_answers, extend_prompt, with_answer
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


Reasoned: TypeAlias = list[tuple[TrainingExample, AnswerParts]]


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
class _ReasoningStrategy(Strategy):
    """Rewrites the examples that contain reasoning and an answer."""

    note: ClassVar[str]  # the key of the shares in the notes

    marks: tuple[str, str] = MARKS

    def __post_init__(self) -> None:
        if len(self.marks) != 2 or not all(self.marks) or self.marks[0] == self.marks[1]:
            fail("marks", "two different texts", self.marks)

    def rewrite(self, reasoned: Reasoned, run: RunState) -> Examples:
        """Return the examples to train on; by default only their answers are targets."""
        return [answer_only(example, parts, run.setup.base) for example, parts in reasoned]

    def transform_examples(self, examples: Examples, run: RunState) -> Examples:
        parts = [parts_of(example.answer, self.marks) for example in examples]
        reasoned = [(x, p) for x, p in zip(examples, parts, strict=True) if p and p.answer.strip()]
        rewritten = iter(self.rewrite(reasoned, run))
        truncated = sum(p is not None for p in parts) - len(reasoned)
        run.notes[self.note] = {
            "answers with reasoning": len(reasoned) / len(examples),
            "cut in their reasoning": truncated / len(examples),
        }
        result = [
            next(rewritten) if p else x
            for x, p in zip(examples, parts, strict=True)
            if p is None or p.answer.strip()
        ]
        return [x for x in result if x.loss_mask is None or any(x.loss_mask)]


def answer_only(example: TrainingExample, parts: AnswerParts, subject: Subject) -> TrainingExample:
    """Return the example with these parts; only tokens after the second mark are targets."""
    ids, begin = subject.encode_answer(example.input_prompt, parts.whole)
    head = parts.before + parts.reasoning + parts.mark
    _, skipped = subject.encode_completion(extend_prompt(example.input_prompt, head), parts.answer)
    mask = example.loss_mask or (True,) * (len(ids) - begin)
    mask = tuple(i >= skipped and mask[i - begin] for i in range(begin, len(ids)))
    return replace(with_answer(example, parts.whole), loss_mask=mask)


@dataclass(frozen=True, kw_only=True)
class AnswerOnly(_ReasoningStrategy):
    """The student reads reasoning and answer, but only the answer is a target.

    Args:
        marks: the delimiters of the reasoning; those of letters must be whole words.
    """

    note = "answer only"


@dataclass(frozen=True, kw_only=True)
class EmptyReasoning(_ReasoningStrategy):
    """Removes the reasoning but keeps its marks; only the answer is a target.

    The whitespace around the reasoning stays, as in the non-thinking mode of chat templates.

    Args:
        marks: as in `AnswerOnly`.
    """

    note = "empty reasoning"

    def rewrite(self, reasoned: Reasoned, run: RunState) -> Examples:
        emptied = [(example, parts._replace(reasoning=parts.blanks)) for example, parts in reasoned]
        return super().rewrite(emptied, run)


@dataclass(frozen=True, kw_only=True)
class StudentReasoning(_ReasoningStrategy):
    """The student writes the reasoning, and the teacher's answer follows it.

    The reasoning is sampled from the base before training, up to the second mark, which is added if
    it is missing.

    Args:
        marks: as in `AnswerOnly`. learn_reasoning: the reasoning is a target too.
        max_new_tokens: of the reasoning, 1 or more. temperature: 0 is greedy.
    """

    note = "student reasoning"

    learn_reasoning: bool = False
    max_new_tokens: int = 64
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("max_new_tokens", self.max_new_tokens, 1)
        between("temperature", self.temperature, 0)

    def rewrite(self, reasoned: Reasoned, run: RunState) -> Examples:
        texts = continue_answers(
            run.setup.base,
            [example.input_prompt for example, _ in reasoned],
            [parts.before for _, parts in reasoned],
            [self.max_new_tokens] * len(reasoned),
            temperature=self.temperature,
            seed=run.seed,
        )
        pairs = zip(reasoned, texts, strict=True)
        return [self._with_reasoning(*pair, text, run) for pair, text in pairs]

    def _with_reasoning(
        self, example: TrainingExample, parts: AnswerParts, text: str, run: RunState
    ) -> TrainingExample:
        end = _pattern(self.marks[1]).search(text)
        if end:
            reasoning = text[: end.start()]
        else:
            reasoning = text.rstrip() + parts.reasoning[len(parts.reasoning.rstrip()) :]
        parts = parts._replace(reasoning=reasoning)
        if self.learn_reasoning:
            return with_answer(example, parts.whole)
        return answer_only(example, parts, run.setup.base)
