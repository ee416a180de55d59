"""A teacher that reads another prompt than its student, and answers at the student's tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..audits.subject import Subject
from ..outputs import TopK
from .lessons import Lesson, encoded


class Rereading:
    """A TopKTeacher that reads each lesson's own prompt where the student reads another.

    A row that begins as one of the prompts that students read goes on as it does, behind the prompt
    that the teacher reads; whether as the lesson does, cut, or in the student's own words. There
    the teacher answers, from the answer's first token on, and nowhere else. Other rows are read as
    they are.
    """

    def __init__(self, teacher: Any, lessons: list[Lesson], subject: Subject) -> None:
        self.teacher = teacher
        self.tokenizer = getattr(teacher, "tokenizer", None)
        self._theirs: dict[tuple[int, ...], list[int]] = {}  # prompts, as token ids
        for lesson in lessons:
            if lesson.read is not None:
                ours, at = encoded(lesson.read, lesson.answer, subject)
                theirs, begin = encoded(lesson.prompt, lesson.answer, subject)
                if ours[at:] != theirs[begin:]:
                    raise ValueError(
                        "read: expected an answer of the same tokens behind both prompts, got "
                        f"others behind {lesson.read.as_json()} than behind "
                        f"{lesson.prompt.as_json()}"
                    )
                self._theirs[tuple(ours[:at])] = theirs[:begin]
        self._lengths = sorted({len(prompt) for prompt in self._theirs}, reverse=True)

    @property
    def vocab_size(self) -> int | None:
        return getattr(self.teacher, "vocab_size", None)

    def topk(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,
        *,
        k: int,
        temperature: float = 1.0,
    ) -> TopK:  # [B, T, K]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        places = [row.nonzero()[:, 0] for row in mask]
        rows = [input_ids[i, at].tolist() for i, at in enumerate(places)]
        prompts = [self._prompts(row) for row in rows]
        asked = [theirs + row[n:] for row, (theirs, n) in zip(rows, prompts, strict=True)]
        ids = torch.zeros((len(rows), max(map(len, asked))), dtype=input_ids.dtype)
        read = torch.zeros_like(ids)
        for i, row in enumerate(asked):
            ids[i, : len(row)] = torch.tensor(row)
            read[i, : len(row)] = 1
        device = input_ids.device
        said = self.teacher.topk(ids.to(device), read.to(device), k=k, temperature=temperature)
        found = TopK.empty(
            (*input_ids.shape, said.ids.shape[-1]),
            temperature,
            dtype=said.logprobs.dtype,
            device=device,
            id_dtype=said.ids.dtype,
        )
        for i, (theirs, n) in enumerate(prompts):
            # Position t predicts t + 1: a prompt's last one is the first that answers.
            ours = places[i][max(n - 1, 0) :]
            other = slice(max(len(theirs) - 1, 0), len(asked[i]))
            found.ids[i, ours] = said.ids[i, other]
            found.logprobs[i, ours] = said.logprobs[i, other]
            if said.log_tail is not None:
                assert found.log_tail is not None
                found.log_tail[i, ours] = said.log_tail[i, other]
        return found if said.log_tail is not None else found._replace(log_tail=None)

    def _prompts(self, row: list[int]) -> tuple[list[int], int]:
        """(the prompt that the teacher reads, how many of the row's tokens it stands for)."""
        for n in self._lengths:
            theirs = self._theirs.get(tuple(row[:n]))
            if theirs is not None:
                return theirs, n
        return [], 0
