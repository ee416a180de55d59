"""A teacher that reads a different prompt than its student."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...losses.types import TopK
from ...runtime.checks import fail
from ..audits.subject import Subject, pad_rows
from .lessons import TrainingExample


class PromptSwapTeacher:
    """A TopKTeacher that reads each example's `prompt` where the student reads another.

    It maps student rows to teacher prompts by prefix: if a row begins with a student prompt, that
    prefix is replaced by the teacher's prompt. The rest of the row may be the example's answer, a
    part of it, or the student's own text. The teacher then answers from the answer's first token
    on. Other rows are passed on unchanged.
    """

    def __init__(self, teacher: Any, examples: list[TrainingExample], subject: Subject) -> None:
        self.teacher = teacher
        self.tokenizer = getattr(teacher, "tokenizer", None)
        self.vocab_size = getattr(teacher, "vocab_size", None)
        self._teacher_prompts: dict[tuple[int, ...], list[int]] = {}  # prompts, as token ids
        for example in examples:
            if example.student_prompt is not None:
                row = subject.encode_answer(example.student_prompt, example.answer)
                teacher_row = subject.encode_answer(example.prompt, example.answer)
                if row.targets != teacher_row.targets:
                    fail(
                        "student_prompt",
                        "an answer of the same tokens after both prompts",
                        f"different ones after {example.student_prompt.as_json()} and after "
                        f"{example.prompt.as_json()}",
                    )
                prompt = tuple(row.ids[: row.begin])
                self._teacher_prompts[prompt] = teacher_row.ids[: teacher_row.begin]
        self._lengths = sorted({len(prompt) for prompt in self._teacher_prompts}, reverse=True)

    def topk(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,
        *,
        k: int,
        temperature: float = 1.0,
    ) -> TopK:  # [B, T, K]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions = [row.nonzero()[:, 0] for row in mask]
        rows = [input_ids[i, at].tolist() for i, at in enumerate(positions)]
        swaps = [self._swap(row) for row in rows]
        teacher_rows = [prompt + row[n:] for row, (prompt, n) in zip(rows, swaps, strict=True)]
        ids = pad_rows(teacher_rows).to(input_ids)
        teacher_mask = pad_rows([[1] * len(row) for row in teacher_rows]).to(input_ids)
        answers = self.teacher.topk(ids, teacher_mask, k=k, temperature=temperature)
        aligned = TopK.empty(
            (*input_ids.shape, answers.ids.shape[-1]),
            temperature,
            dtype=answers.logprobs.dtype,
            device=input_ids.device,
            id_dtype=answers.ids.dtype,
        )
        answers = answers._replace(log_tail=answers.tail())
        for i, (prompt, n) in enumerate(swaps):
            # Position t predicts t + 1: the prompt's last position predicts the first answer token.
            target = i * input_ids.shape[1] + positions[i][max(n - 1, 0) :]
            source = slice(max(len(prompt) - 1, 0), len(teacher_rows[i]))
            aligned.put(target, answers.at((i, source)))
        return aligned

    def _swap(self, row: list[int]) -> tuple[list[int], int]:
        """Return the teacher's prompt and the number of the row's tokens that it replaces."""
        for n in self._lengths:
            prompt = self._teacher_prompts.get(tuple(row[:n]))
            if prompt is not None:
                return prompt, n
        return [], 0
