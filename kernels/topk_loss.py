"""Fused sparse distillation loss: loss, statistics and gradients in one sweep of token chunks.

    loss = Σ_n coef_n · ℓ_n(z_ids, lse_rest, lse_base)        (ℓ: kernels/rows.py)

For each chunk of tokens the logits are computed once and kept (fp32, a chunk at a time); once ℓ is
known they become dz in place, the K entries are overwritten in fp32, and both gradient GEMMs
follow: 6NVH FLOPs (4NVH with a frozen head), as if the logits had been materialised, at the memory
of one chunk. dW is summed over a chunk in fp32, and over chunks in fp32, or in bfloat16 if that is
the head's type and they are but a few (CARRIED_CHUNKS).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .engines import Backend
from .head import Head, Stats, blocks, chunk_tokens, keep_rounded, sums_in_16_bits
from .rows import (
    Gathered,
    RowOptions,
    Teacher,
    TokenLosses,
    entropy_of,
    first_slots,
    token_loss_backward,
)
from .rows import token_loss_forward as _token_loss_forward

# A bfloat16 dW is rounded once more with every chunk; beyond these many it is summed in fp32.
CARRIED_CHUNKS = {"cpu": 2, "cuda": 4}

TokenLossFunction = Callable[
    [Gathered, Teacher, Tensor | None, Tensor, bool], tuple[TokenLosses, Gathered | None]
]


class Fused(NamedTuple):
    """The sum, per-token statistics [N], and the gradients of the sum (None unless asked for), each
    times its own entry of `lift` [3]."""

    loss: Tensor
    rows: TokenLosses
    entropy: Tensor | None
    dx: Tensor | None
    dw: Tensor | None
    db: Tensor | None
    lift: Tensor


def named_token_loss(options: RowOptions) -> TokenLossFunction:
    """Loss and closed-form gradient of a named divergence."""

    def run(
        gathered: Gathered, teacher: Teacher, label_N: Tensor | None, coef_N: Tensor, grad: bool
    ) -> tuple[TokenLosses, Gathered | None]:
        rows = _token_loss_forward(gathered, teacher, label_N, options)
        return rows, token_loss_backward(
            gathered, teacher, label_N, options, coef_N
        ) if grad else None

    return run


def callable_token_loss(options: RowOptions) -> TokenLossFunction:
    """Loss and gradient of a user's divergence, by autograd on the [n, K] tensors."""

    def run(
        gathered: Gathered, teacher: Teacher, label_N: Tensor | None, coef_N: Tensor, grad: bool
    ) -> tuple[TokenLosses, Gathered | None]:
        if not grad:
            return _token_loss_forward(gathered, teacher, label_N, options), None
        with torch.enable_grad():
            leaves = {
                name: t.detach().requires_grad_()
                for name, t in gathered._asdict().items()
                if t is not None
            }
            rows = _token_loss_forward(gathered._replace(**leaves), teacher, label_N, options)
            total = (coef_N * rows.per_token).sum()
            grads = torch.autograd.grad(
                total, list(leaves.values()), allow_unused=True, materialize_grads=True
            )
        rows = TokenLosses._make(None if t is None else t.detach() for t in rows)
        return rows, gathered._replace(**dict(zip(leaves, grads, strict=True)))

    return run


def fused(
    backend: Backend,
    head: Head,
    hidden_NH: Tensor,
    ids_NS: Tensor,
    teacher: Teacher,
    label_N: Tensor | None,
    coef_N: Tensor,
    token_loss: TokenLossFunction,
    *,
    base: bool,
    entropy: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    combine: Callable[[Stats], Stats] | None = None,
    chunk: int | None = None,
    filter_eps: float | None = None,
) -> Fused:
    """ids_NS are the teacher's ids with the label's appended when label_N is given; coef_N [N] is
    each token's factor in the sum (0 drops it). `combine` turns the statistics of a shard of the
    vocabulary into those of the whole; ids_NS are then the shard's own, −1 where another one has
    the id, and `chunk` is how many tokens every shard takes at a time."""
    N, _H = hidden_NH.shape
    grad = need_hidden or need_weight or need_bias
    chunk = chunk or chunk_tokens(head, N, need_weight)
    few = CARRIED_CHUNKS.get(hidden_NH.device.type, 4)
    carried = head.weight.dtype == head.dtype or (sums_in_16_bits(head) and chunk * few >= N)
    # Parts of dX that shards of the vocabulary hold are added before they are rounded.
    rounds = combine is None and sums_in_16_bits(head)
    dx = None
    if need_hidden:
        dx = torch.empty_like(hidden_NH, dtype=None if rounds else head.dtype)
    dw = db = None
    if need_weight:
        dw = torch.empty_like(head.weight, dtype=None if carried else head.dtype)
    if need_bias and head.bias is not None:
        db = torch.zeros_like(head.bias, dtype=head.dtype)
    skip: dict[str, Tensor] = {}
    if filter_eps is not None:
        skip["filter_threshold"] = coef_N.abs().amax() * filter_eps
    buffer = backend.new_logits_buffer(head, min(chunk, N)) if grad else None
    row_parts, entropy_parts = [], []
    loss = torch.zeros((), dtype=head.dtype, device=hidden_NH.device)
    for i, at in enumerate(blocks(N, chunk)):
        ids, coef = ids_NS[at], coef_N[at]
        label = None if label_N is None else label_N[at]
        scanned = backend.scan(
            head, hidden_NH[at], ids, moments=int(entropy), base=base, buffer=buffer
        )
        mine = scanned.stats()
        stats = mine if combine is None else combine(mine)
        gathered = Gathered(stats.z_ids, stats.lse_rest, stats.lse_base)
        part = Teacher(*(t[at] for t in teacher))
        rows, g = token_loss(gathered, part, label, coef, grad)
        loss += (coef * rows.per_token).sum()
        row_parts.append(rows)
        if entropy and stats.mean_rest is not None:
            support_ids = (
                part.ids if label is None else torch.cat([part.ids, label.unsqueeze(-1)], -1)
            )
            entropy_parts.append(entropy_of(gathered, stats.mean_rest, first_slots(support_ids))[0])
        if g is not None:
            part_dx = None if dx is None else dx[at]
            stats = stats._replace(z_ids=mine.z_ids)  # slots of other shards take no gradient here
            backend.chunk_grads(
                head,
                hidden_NH[at],
                ids,
                stats,
                g,
                buffer,
                first=i == 0,
                dx=part_dx,
                dw=dw,
                db=db,
                **skip,
            )
    del buffer  # before dW is rounded: the peak is a chunk or a rounded copy, not both
    if dw is not None:
        dw[head.vocab :] = 0
    dw, on_dw = keep_rounded(dw, head.weight)  # first: the wide dW is gone before dX is rounded
    dx, on_dx = keep_rounded(dx, hidden_NH if combine is None else coef_N)
    db, on_db = keep_rounded(db, coef_N if head.bias is None else head.bias)
    rows = TokenLosses._make(
        None if pieces[0] is None else torch.cat(pieces) for pieces in zip(*row_parts, strict=True)
    )
    return Fused(
        loss,
        rows,
        torch.cat(entropy_parts) if entropy else None,
        dx,
        dw,
        db,
        torch.stack([on_dx, on_dw, on_db]),
    )
