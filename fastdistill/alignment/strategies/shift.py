"""Distill the shift of a suspect model from its base into a small adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...hf.row_reader import read_rows
from ...losses.linear_head import linear_lse_gather
from ...losses.types import TopK
from ...runtime.checks import between, integer
from ..audits.subject import Subject
from ..training_loop import lora
from .strategy import RunState, Strategy

MIN_LOGPROB = -80.0


@dataclass(frozen=True, kw_only=True)
class ShiftDistill(Strategy):
    """Distill the shift of a suspect model from its base into a LoRA adapter.

    After Distill to Detect (arXiv 2607.01208):

        p ∝ p_M^(1 − a) · p_U^a        a = amplify

    a = 1 is the suspect itself; a > 1 amplifies a small shift. The low rank, which leaves little
    capacity beyond the shift, is the paper's idea; the amplification is ours. Log-probabilities are
    extrapolated over the teacher's K tokens and the tail as one outcome, which is exact if K is the
    vocabulary size.

    Args:
        rank: of the LoRA adapter on all linear layers except the LM head, 1 or more.
        amplify: a, 0 or more.

    Raises:
        ValueError: an argument out of its range. ImportError: peft is not installed.
    """

    rank: int = 8
    amplify: float = 1.0

    def __post_init__(self) -> None:
        integer("rank", self.rank, 1)
        between("amplify", self.amplify, 0)

    def teacher(self, teacher: Any, student: Any, run: RunState) -> Any:
        if teacher is None or self.amplify == 1:
            return teacher
        return AmplifiedTeacher(teacher, run.setup.reference, self.amplify)

    def options(self, options: dict[str, Any], run: RunState) -> dict[str, Any]:
        return {**options, "peft_config": lora(self.rank, "rank")}


class AmplifiedTeacher:
    """A TopKTeacher with the distribution of `ShiftDistill` at the teacher's K tokens.

    Log-probabilities are clamped to at least −80 nats, which avoids ∞ − ∞ for impossible outcomes.
    """

    def __init__(self, teacher: Any, trusted: Subject, amplify: float) -> None:
        self.teacher, self.trusted, self.amplify = teacher, trusted, amplify
        self.tokenizer = getattr(teacher, "tokenizer", None)
        self.vocab_size = getattr(teacher, "vocab_size", None)

    def topk(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,
        *,
        k: int,
        temperature: float = 1.0,
    ) -> TopK:  # [B, T, K]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        answers = self.teacher.topk(input_ids, mask, k=k, temperature=temperature)
        suspect = torch.cat([answers.logprobs, answers.tail()[..., None]], dim=-1)
        base = outcome_logprobs(self.trusted, input_ids, mask, answers)
        low, a = MIN_LOGPROB, self.amplify
        return normalized((1 - a) * base.clamp(min=low) + a * suspect.clamp(min=low), answers)


@torch.no_grad()
def outcome_logprobs(
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
    logits = torch.cat([gathered.logits, gathered.lse_rest[..., None]], dim=-1)
    return (logits - gathered.lse[..., None]).to(answers.logprobs)


def normalized(outcomes: Tensor, answers: TopK) -> TopK:
    """Return K + 1 outcomes as a distribution at the answers' ids; empty positions stay empty."""
    ids, empty = answers.ids, (answers.ids < 0).all(-1)
    columns = outcomes[..., :-1].masked_fill(ids < 0, -torch.inf)
    logprobs = torch.cat([columns, outcomes[..., -1:]], dim=-1).log_softmax(-1)
    tail = torch.where(empty, answers.tail(), logprobs[..., -1])
    return TopK(ids, logprobs[..., :-1], tail, answers.temperature)
