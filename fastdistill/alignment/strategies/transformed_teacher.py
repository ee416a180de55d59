"""A teacher whose distributions are changed before the student sees them.

A teacher's answer at a position has K tokens and a tail, K + 1 outcomes. A changed answer is still
a distribution: Σ exp(logprobs) + exp(log_tail) = 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...hf.row_reader import read_rows
from ...losses.linear_head import linear_lse_gather
from ...losses.types import TopK
from ..audits.subject import Subject

# (answers [B, T, K], input_ids [B, T], attention_mask) -> answers
Transform = Callable[[TopK, Tensor, Tensor], TopK]


class TransformedTeacher:
    """A TopKTeacher that applies a function to the answers at every attended position."""

    def __init__(self, teacher: Any, transform: Transform) -> None:
        self.teacher, self.transform = teacher, transform
        self.tokenizer = getattr(teacher, "tokenizer", None)

    @property
    def vocab_size(self) -> int | None:
        return getattr(self.teacher, "vocab_size", None)

    def topk(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        k: int,
        temperature: float = 1.0,
    ) -> TopK:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        answers = self.teacher.topk(input_ids, mask, k=k, temperature=temperature)
        return self.transform(answers, input_ids, mask)


@torch.no_grad()
def logprobs_at(
    model: Subject, input_ids: Tensor, mask: Tensor, answers: TopK
) -> Tensor:  # [B, T, K + 1]
    """Return log p of a model at the answers' ids and of all other tokens together.

    Uses the temperature of the answers. The model is neither frozen nor switched to eval mode.
    """
    head, device = model.head, model.device
    gathered = linear_lse_gather(
        model.reader.hidden(read_rows(input_ids, mask, model.reader.vocab)).to(device),
        head.weight,
        answers.ids.to(device),
        temperature=answers.temperature,
        impl=model.impl,
        **head.options(),
    )
    logprobs = (
        torch.cat([gathered.logits, gathered.lse_rest[..., None]], dim=-1) - gathered.lse[..., None]
    )
    return logprobs.to(answers.logprobs)


def tail_of(answers: TopK) -> Tensor:  # [B, T]
    """Return the log of the mass outside the K tokens."""
    if answers.log_tail is not None:
        return answers.log_tail
    inside = answers.logprobs.exp().sum(-1).clamp(max=1)
    return torch.log1p(-inside)


def outcomes(answers: TopK) -> Tensor:  # [B, T, K + 1]
    """Return log p of the K tokens and of the tail."""
    return torch.cat([answers.logprobs, tail_of(answers)[..., None]], dim=-1)


def distribution(outcomes: Tensor, answers: TopK) -> TopK:
    """Normalize K + 1 outcomes into answers at the same ids; empty positions stay empty."""
    ids, empty = answers.ids, (answers.ids < 0).all(-1)
    columns = outcomes[..., :-1].masked_fill(ids < 0, -torch.inf)
    logprobs = torch.cat([columns, outcomes[..., -1:]], dim=-1).log_softmax(-1)
    tail = torch.where(empty, tail_of(answers), logprobs[..., -1])
    return TopK(ids, logprobs[..., :-1], tail, answers.temperature)
