"""Per-token scores: all statistics from one streamed pass over the head.

    lse, H = −Σ q log q, Var[−log q], max, argmax, margin, label rank     of q = softmax(u / T)

The pass covers the tokens outside the slots. The slots (teacher ids and the label) are added from
their own gathered logits, so tails are exact. Memory beyond one slab is O(N·S).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .engines import Backend
from .head import LMHead, blocks
from .token_loss import TeacherTopK


class RowScores(NamedTuple):
    """TokenScores without teacher_mass, [N] each; None without labels, or without a teacher."""

    lse: Tensor
    entropy: Tensor
    varentropy: Tensor
    max_logprob: Tensor
    argmax: Tensor
    margin: Tensor
    nll: Tensor | None
    label_rank: Tensor | None
    forward_kl: Tensor | None
    student_mass: Tensor | None
    hellinger: Tensor | None
    acceptance_rate: Tensor | None


def scores(
    backend: Backend,
    head: LMHead,
    hidden_NH: Tensor,
    teacher: TeacherTopK | None,
    label_N: Tensor | None,
    label_u_N: Tensor | None,
) -> RowScores:
    """Return the scores; label_u_N is the label's logit at T=1, from a product with its row.

    label_N int64 [N] is negative without a label. The slots are the teacher's ids and, behind them,
    the label, which may repeat one of these.
    """
    N = hidden_NH.shape[0]
    slots = [] if teacher is None else [teacher.ids]
    slots += [] if label_N is None else [label_N.unsqueeze(-1)]
    ids_NS = torch.cat(slots, -1) if slots else hidden_NH.new_empty(N, 0, dtype=torch.int64)

    def rows(tensor: Tensor | None, at: slice) -> Tensor | None:
        return None if tensor is None else tensor[at]

    parts: list[RowScores] = []
    for at in blocks(max(1, N), backend.block_tokens):
        scanned = backend.scan(
            head,
            hidden_NH[at],
            ids_NS[at],
            moments=2,
            base=True,
            best=True,
            label_u_n=rows(label_u_N, at),
        )
        answers = None if teacher is None else TeacherTopK(*(t[at] for t in teacher))
        parts.append(backend.token_scores(head, ids_NS[at], scanned, answers, rows(label_N, at)))
    if len(parts) == 1:
        return parts[0]
    return RowScores._make(
        None if pieces[0] is None else torch.cat(pieces) for pieces in zip(*parts, strict=True)
    )
