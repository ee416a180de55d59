"""Fused sparse distillation loss: loss, statistics and gradients in one pass over chunks.

    loss = Σ_n coef_n · ℓ_n(z_ids, lse_rest, lse_base)        (ℓ: kernels/token_loss.py)

The logits of each chunk of tokens are computed once and stored in fp32. Once ℓ is known they become
dz in place, the K entries are overwritten in fp32, and both gradient GEMMs
follow: 6NVH FLOPs (4NVH with a frozen head), as many as with materialized logits, with the memory
of one chunk. dW is summed in fp32 within a chunk. Over chunks it is summed in fp32, or in bfloat16
if that is the type of the head and there are at most CARRIED_CHUNKS of them (head.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import get_backend
from .engines import Backend
from .head import (
    LMHead,
    Stats,
    blocks,
    chunk_tokens,
    dw_type,
    needed,
    round_scaled,
    sums_in_16_bits,
)
from .op_common import full_precision, or_empty
from .token_loss import LossOptions, TeacherTopK, TokenLosses
from .torch_token_loss import callable_token_loss


class FusedLoss(NamedTuple):
    """The summed loss, per-token statistics [N], and the gradients of the sum.

    Each gradient (None unless needed) is multiplied by its entry of `grad_scale` [3].
    """

    loss: Tensor
    rows: TokenLosses
    entropy: Tensor | None
    dx: Tensor | None
    dw: Tensor | None
    db: Tensor | None
    grad_scale: Tensor


def fused(
    backend: Backend,
    head: LMHead,
    hidden_NH: Tensor,
    ids_NS: Tensor,
    teacher: TeacherTopK,
    label_N: Tensor | None,
    coef_N: Tensor,
    options: LossOptions,
    *,
    base: bool,
    entropy: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    combine: Callable[[Stats], Stats] | None = None,
    chunk: int | None = None,
    device_type: str | None = None,
) -> FusedLoss:
    """Loss, statistics and gradients in one pass over chunks of tokens.

    Args:
        ids_NS: `slot_ids` of the teacher's ids and the labels. For a shard of the vocabulary: ids
            in this shard, −1 for ids of other shards.
        coef_N: factor of each token in the sum; 0 drops it.
        combine: maps the statistics of this shard to those of the whole vocabulary.
        chunk: tokens per chunk; the same for all shards.
        device_type: "cpu" or "cuda": the device for which chunks are chosen, that of the tensors by
            default.
    """
    N, _H = hidden_NH.shape
    grad = need_hidden or need_weight or need_bias
    device_type = device_type or hidden_NH.device.type
    chunk = chunk or chunk_tokens(head, N, need_weight, device_type)
    # Shards of the vocabulary add their parts of dX before it is rounded.
    dx_rounded = combine is None and sums_in_16_bits(head.weight.dtype)
    dx = None
    if need_hidden:
        dx = torch.empty_like(hidden_NH, dtype=None if dx_rounded else head.dtype)
    dw = db = None
    if need_weight:
        dw = torch.empty_like(head.weight, dtype=dw_type(head, N, chunk, device_type))
    if need_bias and head.bias is not None:
        db = torch.zeros_like(head.bias, dtype=head.dtype)
    skip: dict[str, Tensor] = {}
    if options.filter_eps is not None:
        skip["filter_threshold"] = coef_N.abs().amax() * options.filter_eps
    named = isinstance(options.divergence, str)
    token_loss = backend.token_loss if named else callable_token_loss
    buffer = backend.new_logits_buffer(head, min(chunk, N)) if grad else None
    row_parts, entropy_parts = [], []
    carried = None  # the scale of dw and db: float16 sums carry one until they are complete
    for i, at in enumerate(blocks(N, chunk)):
        ids, coef = ids_NS[at], coef_N[at]
        label = None if label_N is None else label_N[at]
        scanned = backend.scan(
            head, hidden_NH[at], ids, moments=int(entropy), base=base, buffer=buffer
        )
        stats = scanned.stats()
        if combine is not None:
            stats = combine(stats)
        part = token_loss(
            head,
            ids,
            stats,
            TeacherTopK(*(t[at] for t in teacher)),
            label,
            coef,
            options,
            grad=grad,
        )
        row_parts.append(part.rows)
        if part.entropy is not None:
            entropy_parts.append(part.entropy)
        if part.grads is not None:
            part_dx = None if dx is None else dx[at]
            carried = backend.chunk_grads(
                head,
                hidden_NH[at],
                ids,
                stats,
                part.grads,
                buffer,
                first=i == 0,
                dx=part_dx,
                dw=dw,
                db=db,
                carried=carried,
                **skip,
            )
    del buffer  # before dW is rounded: its copy can reuse the memory
    if dw is not None:
        dw[head.vocab_size :] = 0
    # dW first: its fp32 sum is free before dX is rounded.
    dw, on_dw = round_scaled(dw, head.weight, carried)
    dx, on_dx = round_scaled(dx, hidden_NH if combine is None else coef_N)
    db, on_db = round_scaled(db, coef_N if head.bias is None else head.bias, carried)
    rows = TokenLosses._make(
        None if pieces[0] is None else torch.cat(pieces) for pieces in zip(*row_parts, strict=True)
    )
    return FusedLoss(
        (coef_N * rows.per_token).sum(),
        rows,
        torch.cat(entropy_parts) if entropy else None,
        dx,
        dw,
        db,
        torch.stack([on_dx, on_dw, on_db]),
    )


def topk_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coef: Tensor,
    ids: Tensor,
    teacher_ids: Tensor,
    teacher_lp: Tensor,
    teacher_log_tail: Tensor,
    labels: Tensor | None,
    **scalars: Any,
) -> tuple[Tensor, ...]:
    """fastdistill::topk_loss: `fused` of a named divergence; its schema is in op_losses.py."""
    head, options = LMHead.of(weight, bias, scalars), LossOptions.of(scalars)
    with full_precision(hidden):
        out = fused(
            get_backend(scalars["impl"]),
            head,
            hidden,
            ids,
            TeacherTopK(teacher_ids, teacher_lp, teacher_log_tail),
            labels,
            coef,
            options,
            base=scalars["base"],
            entropy=scalars["entropy"],
            **needed(scalars["need"]),
        )
    divergence = out.rows.divergence
    if divergence.data_ptr() == out.rows.per_token.data_ptr():
        divergence = divergence.clone()  # an operator's outputs may not share memory
    rows = out.rows._replace(divergence=divergence)
    grads = (out.dx, out.dw, out.db)
    return (
        out.loss,
        *(or_empty(t, coef) for t in (*rows, out.entropy)),
        out.grad_scale,
        *(or_empty(t, coef) for t in grads),
    )
