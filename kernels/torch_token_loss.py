"""The row mathematics of the fused loss in PyTorch: closed forms, or autograd of a callable."""

from __future__ import annotations

import torch
from torch import Tensor

from .head import LMHead, Stats, slot_grads
from .token_loss import (
    ABSENT,
    NEG,
    Gathered,
    LossOptions,
    RowLosses,
    TeacherTopK,
    TokenLosses,
    entropy_of,
    lse_of,
    token_loss_backward,
    token_loss_forward,
)


def token_loss(
    head: LMHead,
    ids_nS: Tensor,
    stats: Stats,
    teacher: TeacherTopK,
    label_n: Tensor | None,
    coef_n: Tensor,
    options: LossOptions,
    *,
    grad: bool,
) -> RowLosses:
    """Loss, statistics and closed-form gradient of a named divergence.

    ids_nS are the distinct ids of the slots, −1 in those that get no gradient: a shard of the
    vocabulary has the statistics of all slots, and the gradient of its own.
    """
    gathered = Gathered(stats.z_ids, stats.lse_rest, stats.lse_base)
    rows = token_loss_forward(gathered, teacher, label_n, options)
    g = token_loss_backward(gathered, teacher, label_n, options, coef_n) if grad else None
    return _row_losses(head, ids_nS, stats, rows, g)


def callable_token_loss(
    head: LMHead,
    ids_nS: Tensor,
    stats: Stats,
    teacher: TeacherTopK,
    label_n: Tensor | None,
    coef_n: Tensor,
    options: LossOptions,
    *,
    grad: bool,
) -> RowLosses:
    """Loss and gradient of a user's divergence, by autograd on the [n, K] tensors."""
    gathered = Gathered(stats.z_ids, stats.lse_rest, stats.lse_base)
    if not grad:
        rows = token_loss_forward(gathered, teacher, label_n, options)
        return _row_losses(head, ids_nS, stats, rows, None)
    with torch.enable_grad():
        leaves = {
            name: t.detach().requires_grad_()
            for name, t in gathered._asdict().items()
            if t is not None
        }
        rows = token_loss_forward(gathered._replace(**leaves), teacher, label_n, options)
        total = (coef_n * rows.per_token).sum()
        grads = torch.autograd.grad(
            total, list(leaves.values()), allow_unused=True, materialize_grads=True
        )
    rows = TokenLosses._make(None if t is None else t.detach() for t in rows)
    g = gathered._replace(**dict(zip(leaves, grads, strict=True)))
    return _row_losses(head, ids_nS, stats, rows, g)


def _row_losses(
    head: LMHead, ids_nS: Tensor, stats: Stats, rows: TokenLosses, g: Gathered | None
) -> RowLosses:
    """The rows with their entropy, and d(W x) of the slots from d z."""
    entropy = grads = None
    if stats.mean_rest is not None:
        unique = stats.z_ids > ABSENT
        lse = lse_of(stats.z_ids, stats.lse_rest, unique)
        entropy = entropy_of(stats.z_ids, stats.lse_rest, stats.mean_rest, lse, unique)
    if g is not None:
        assert g.lse_rest is not None
        on_slots = slot_grads(head, stats.z_ids.masked_fill(ids_nS < 0, NEG), g.z)
        grads = Stats(on_slots, g.lse_rest, None, g.lse_base)
    return RowLosses(rows, entropy, grads)
