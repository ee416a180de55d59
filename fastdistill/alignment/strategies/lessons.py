"""Training examples of a student: prompts of a pool and a teacher's answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch

from ...runtime.checks import fail
from ..audits.prompts import Prompt
from ..audits.subject import CompletionLogProbs, Subject, TokenRow

BATCH_SIZE = 256  # examples whose hidden states are in memory at the same time
_Item = TypeVar("_Item")


class PoolPrompt(NamedTuple):
    """A prompt of the pool and its domain."""

    prompt: Prompt
    domain: str = ""


@dataclass(frozen=True, kw_only=True)
class TrainingExample:
    """A prompt and the answer to train on.

    Args:
        prompt: read by the teacher. answer: the completion.
        student_prompt: read by the student instead of `prompt`; None: the same prompt.
        loss_mask: True for the answer's tokens, its end included, that are targets; None: all.
    """

    prompt: Prompt
    answer: str
    domain: str = ""
    student_prompt: Prompt | None = None
    loss_mask: tuple[bool, ...] | None = None

    @property
    def input_prompt(self) -> Prompt:
        """The prompt that the student reads."""
        return self.prompt if self.student_prompt is None else self.student_prompt


Examples: TypeAlias = list[TrainingExample]


def to_row(example: TrainingExample, subject: Subject) -> dict[str, list[int]]:
    """Return the student's input_ids and labels; targets are the answer and its end."""
    ids, begin = subject.encode_answer(example.input_prompt, example.answer)
    answer, mask = ids[begin:], example.loss_mask
    if mask is not None and len(mask) != len(answer):
        expected = f"one value for each of the answer's {len(answer)} tokens, its end included"
        fail("loss_mask", expected, len(mask))
    if mask is not None:
        answer = [i if is_target else -100 for i, is_target in zip(answer, mask, strict=True)]
    return {"input_ids": ids, "labels": [-100] * begin + answer}


def sample_answers(
    pool: Sequence[PoolPrompt], generate: Callable[..., list[str]], *, seed: int, **generation: Any
) -> Examples:
    """Sample answers to a pool by `Subject.generate`; prompts with an empty answer are dropped."""
    texts = generate([entry.prompt for entry in pool], seed=seed, **generation)
    return [
        TrainingExample(prompt=entry.prompt, answer=text, domain=entry.domain)
        for entry, text in zip(pool, texts, strict=True)
        if text.strip()
    ]


def batches(items: Sequence[_Item]) -> Iterator[Sequence[_Item]]:
    """Yield BATCH_SIZE items at a time."""
    for start in range(0, len(items), BATCH_SIZE):
        yield items[start : start + BATCH_SIZE]


def encoded_batches(
    examples: Sequence[TrainingExample], subject: Subject
) -> Iterator[list[TokenRow]]:
    """Yield the rows of BATCH_SIZE examples at a time."""
    for batch in batches(examples):
        yield [subject.encode_answer(x.input_prompt, x.answer) for x in batch]


def answer_logprobs(examples: Sequence[TrainingExample], subject: Subject) -> CompletionLogProbs:
    """Return log p of every answer, given the student's prompt."""
    parts = [
        subject.completion_logprobs([x.input_prompt for x in batch], [x.answer for x in batch])
        for batch in batches(examples)
    ]
    return CompletionLogProbs(*(torch.cat(column) for column in zip(*parts, strict=True)))
