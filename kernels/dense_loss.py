"""Distillation from a dense teacher: two LM heads, every divergence, no [N, V].

    ℓ_n = (1 − ce) · Σ_v φ(log p_v, log q_v) [· T²] + ce · CE + z_loss · lse₁²
    dz = ψ − q Σψ,  ψ = ∂φ/∂log q

The logits of both heads are stored in fp32 for one chunk of tokens. A first sweep sums φ and
Ψ = Σψ; a second turns the student's logits into dz for both gradient GEMMs: 4NVH forward, 4NVH
backward. A callable divergence gets whole rows, and ψ comes from autograd.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import get_backend
from .engines import Backend
from .head import DenseRows, LMHead, blocks, dense_chunk_tokens, dw_type, needed, round_scaled
from .op_common import full_precision, or_empty
from .token_loss import LossOptions


class DenseLoss(NamedTuple):
    """The scalar loss, per_token [N], and the gradients of the loss.

    Each gradient (None unless needed) is multiplied by its entry of `grad_scale` [3].
    """

    loss: Tensor
    per_token: Tensor
    dx: Tensor | None
    dw: Tensor | None
    db: Tensor | None
    grad_scale: Tensor


def dense(
    backend: Backend,
    head: LMHead,
    hidden_NH: Tensor,
    teacher_head: LMHead,
    teacher_hidden_NG: Tensor,
    label_N: Tensor | None,
    coef_N: Tensor,
    options: LossOptions,
    *,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    device_type: str | None = None,
) -> DenseLoss:
    """Return Σ coef · ℓ, ℓ [N] and the gradients; label_N is negative without a label.

    Chunks are chosen for `device_type`, "cpu" or "cuda": by default, that of the tensors.
    """
    N = hidden_NH.shape[0]
    grad = need_hidden or need_weight or need_bias
    chunk = dense_chunk_tokens(head, N, need_weight, device_type)
    dx_NH = torch.zeros_like(hidden_NH, dtype=head.dtype) if need_hidden else None
    dw = None
    if need_weight:
        dw = torch.empty_like(head.weight, dtype=dw_type(head, N, chunk, device_type))
    db = None
    if need_bias and head.bias is not None:
        db = torch.zeros_like(head.bias, dtype=head.dtype)
    per_token = hidden_NH.new_empty(N, dtype=head.dtype)
    size = min(chunk, N)
    buffers = backend.new_logits_buffer(head, size), backend.new_logits_buffer(teacher_head, size)
    no_ids = hidden_NH.new_empty(N, 0, dtype=torch.int64)
    for at in blocks(N, chunk):
        x_nH, none = hidden_NH[at], no_ids[at]
        scanned = backend.scan(head, x_nH, none, base=True, buffer=buffers[0])
        teacher_scanned = backend.scan(teacher_head, teacher_hidden_NG[at], none, buffer=buffers[1])
        lse, teacher_lse = scanned.rest.lse(), teacher_scanned.rest.lse()
        lse_base = lse if scanned.rest_base is None else scanned.rest_base.lse()
        label = None if label_N is None else label_N[at]
        D, total, u_label = backend.dense_sums(
            head, teacher_head, buffers, lse, teacher_lse, label, options, grad=grad
        )
        loss = D * options.on_divergence
        on_lse = on_ce = None
        coef = coef_N[at]
        if options.z_loss:
            loss = loss + options.z_loss * lse_base.square()
            on_lse = 2 * options.z_loss * coef * lse_base
        if label is not None and options.ce_weight:
            assert u_label is not None
            has_label = label >= 0
            loss = loss + options.ce_weight * (lse_base - u_label).masked_fill(~has_label, 0.0)
            on_ce = options.ce_weight * coef * has_label
            on_lse = on_ce if on_lse is None else on_lse + on_ce
        per_token[at] = loss
        if not grad:
            continue
        backend.dense_grads(
            head,
            teacher_head,
            x_nH,
            buffers,
            DenseRows(
                lse,
                teacher_lse,
                lse_base,
                coef * options.on_divergence,
                total * (coef * options.on_divergence),
                on_lse,
                on_ce,
                label,
            ),
            options,
            first=at.start == 0,
            dx=None if dx_NH is None else dx_NH[at],
            dw=dw,
            db=db,
        )
    del buffers
    if dw is not None:
        dw[head.vocab_size :] = 0
    dw, on_dw = round_scaled(dw, head.weight)  # first: frees the fp32 dW before dX is rounded
    dx, on_dx = round_scaled(dx_NH, hidden_NH)
    db, on_db = round_scaled(db, coef_N if head.bias is None else head.bias)
    grad_scale = torch.stack([on_dx, on_dw, on_db])
    return DenseLoss((coef_N * per_token).sum(), per_token, dx, dw, db, grad_scale)


def dense_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coef: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    **scalars: Any,
) -> tuple[Tensor, ...]:
    """fastdistill::dense_loss: `dense` of a named divergence; its schema is in op_dense.py."""
    head = LMHead.of(weight, bias, scalars)
    teacher = head._replace(
        weight=teacher_weight,
        bias=teacher_bias,
        logit_scale=scalars["teacher_logit_scale"],
        softcap=scalars["teacher_softcap"],
    )
    with full_precision(hidden):
        out = dense(
            get_backend(scalars["impl"]),
            head,
            hidden,
            teacher,
            teacher_hidden,
            labels,
            coef,
            LossOptions.of(scalars),
            **needed(scalars["need"]),
        )
    grads = (or_empty(t, coef) for t in (out.dx, out.dw, out.db))
    return out.loss, out.per_token, out.grad_scale, *grads
