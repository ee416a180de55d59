"""Fine-tuning when a teacher's reasoning is untrusted or hidden.

Reasoning is the text between two marks in an answer; the final answer follows the second mark. If
the chat template already wrote the first mark, the answer begins with reasoning. Answers without
marks are unchanged; answers whose reasoning was truncated are dropped. The notes report the share
of each. The definitions of reasoning and of targets are ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..audits.subject import Subject
from .lessons import TrainingExample, encode_example
from .rewriting import continue_answers, extend_prompt, with_answer
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


def _check_marks(marks: tuple[str, str]) -> None:
    if len(marks) != 2 or not all(marks) or marks[0] == marks[1]:
        raise ValueError(f"marks: expected two different texts, got {marks!r}")


def _map_reasoned(
    examples: Sequence[TrainingExample],
    marks: tuple[str, str],
    run: RunState,
    name: str,
    transform: Callable[[list[tuple[TrainingExample, AnswerParts]]], list[TrainingExample]],
) -> list[TrainingExample]:
    """Apply `transform` to the examples that contain reasoning and an answer."""
    parts = [parts_of(example.answer, marks) for example in examples]
    whole = [(x, p) for x, p in zip(examples, parts, strict=True) if p and p.answer.strip()]
    transformed = iter(transform(whole))
    truncated = sum(p is not None for p in parts) - len(whole)
    run.notes[name] = {
        "answers with reasoning": len(whole) / len(examples),
        "cut in their reasoning": truncated / len(examples),
    }
    result = [
        next(transformed) if p else x
        for x, p in zip(examples, parts, strict=True)
        if p is None or p.answer.strip()
    ]
    return [example for example in result if example.loss_mask is None or any(example.loss_mask)]


def answer_only(example: TrainingExample, parts: AnswerParts, subject: Subject) -> TrainingExample:
    """Return the example with these parts; only tokens after the second mark are targets."""
    ids, begin = encode_example(example.input_prompt, parts.whole, subject)
    head = parts.before + parts.reasoning + parts.mark
    _, skipped = subject.encode_completion(extend_prompt(example.input_prompt, head), parts.answer)
    mask = example.loss_mask or (True,) * (len(ids) - begin)
    mask = tuple(i >= skipped and mask[i - begin] for i in range(begin, len(ids)))
    return replace(with_answer(example, parts.whole), loss_mask=mask)


@dataclass(frozen=True, kw_only=True)
class AnswerOnly(Strategy):
    """The student reads reasoning and answer, but only the answer is a target.

    Args:
        marks: the delimiters of the reasoning; those of letters must be whole words.
    """

    marks: tuple[str, str] = MARKS

    def __post_init__(self) -> None:
        _check_marks(self.marks)

    def transform_examples(
        self, examples: list[TrainingExample], run: RunState
    ) -> list[TrainingExample]:
        def transform(whole: list[tuple[TrainingExample, AnswerParts]]) -> list[TrainingExample]:
            return [answer_only(example, parts, run.setup.base) for example, parts in whole]

        return _map_reasoned(examples, self.marks, run, "answer only", transform)


@dataclass(frozen=True, kw_only=True)
class EmptyReasoning(Strategy):
    """Removes the reasoning but keeps its marks; only the answer is a target.

    The whitespace around the reasoning stays, as in the non-thinking mode of chat templates.

    Args:
        marks: as in `AnswerOnly`.
    """

    marks: tuple[str, str] = MARKS

    def __post_init__(self) -> None:
        _check_marks(self.marks)

    def transform_examples(
        self, examples: list[TrainingExample], run: RunState
    ) -> list[TrainingExample]:
        def transform(whole: list[tuple[TrainingExample, AnswerParts]]) -> list[TrainingExample]:
            emptied = [
                (example, parts._replace(reasoning=parts.blanks)) for example, parts in whole
            ]
            return [answer_only(example, parts, run.setup.base) for example, parts in emptied]

        return _map_reasoned(examples, self.marks, run, "empty reasoning", transform)


@dataclass(frozen=True, kw_only=True)
class StudentReasoning(Strategy):
    """The student writes the reasoning, and the teacher's answer follows it.

    The reasoning is sampled from the base before training, up to the second mark, which is added if
    it is missing.

    Args:
        marks: as in `AnswerOnly`. learn_reasoning: the reasoning is a target too.
        max_new_tokens: of the reasoning, 1 or more. temperature: 0 is greedy.
    """

    marks: tuple[str, str] = MARKS
    learn_reasoning: bool = False
    max_new_tokens: int = 64
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_marks(self.marks)
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected 1 or more, got {self.max_new_tokens!r}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature: expected 0 or more, got {self.temperature!r}")

    def transform_examples(
        self, examples: list[TrainingExample], run: RunState
    ) -> list[TrainingExample]:
        def transform(whole: list[tuple[TrainingExample, AnswerParts]]) -> list[TrainingExample]:
            texts = continue_answers(
                run.setup.base,
                [example.input_prompt for example, _ in whole],
                [parts.before for _, parts in whole],
                [self.max_new_tokens] * len(whole),
                temperature=self.temperature,
                seed=run.seed,
            )
            return [
                self._with_reasoning(*pair, text, run)
                for pair, text in zip(whole, texts, strict=True)
            ]

        return _map_reasoned(examples, self.marks, run, "student reasoning", transform)

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
