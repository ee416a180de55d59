"""Distillation from a dense teacher: two LM heads, every divergence, no [N, V].

    ℓ_n = (1 − ce) · Σ_v φ(log p_v, log q_v) [· T²] + ce · CE + z_loss · lse₁²
    dz = ψ − q Σψ,  ψ = ∂φ/∂log q

The logits of both heads are stored in fp32 for one chunk of tokens. A first sweep sums φ and
Ψ = Σψ; a second turns the student's logits into dz for both gradient GEMMs: 4NVH forward, 4NVH
backward. nla and lk_hybrid take two sweeps of sums. A callable divergence gets whole rows, and ψ
comes from autograd. With vocabulary-parallel heads, the ranks add up their parts of these sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import get_backend
from .divergences import Combined, combine, cost_of_missing
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


class DenseTeacher(NamedTuple):
    """A teacher's head and hidden states [N, G].

    missing_lse [N] is the log-sum-exp of its logits of the tokens that the student lacks; None
    leaves these tokens out.
    """

    head: LMHead
    hidden: Tensor
    missing_lse: Tensor | None = None


class Ranks(NamedTuple):
    """How the ranks of vocabulary-parallel heads share a pass; each holds the same rows of both.

    lse and total reduce tensors [n] over the ranks, as log-sum-exps and as sums. slots maps ids to
    the rows of this rank, −1 for those of others. chunk is the number of tokens that all ranks take
    at once.
    """

    lse: Callable[[list[Tensor]], list[Tensor]]
    total: Callable[[list[Tensor]], list[Tensor]]
    slots: Callable[[Tensor], Tensor]
    chunk: int


def dense(
    backend: Backend,
    head: LMHead,
    hidden_NH: Tensor,
    teacher: DenseTeacher,
    label_N: Tensor | None,
    coef_N: Tensor,
    options: LossOptions,
    *,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    device_type: str | None = None,
    ranks: Ranks | None = None,
) -> DenseLoss:
    """Return Σ coef · ℓ, ℓ [N] and the gradients; label_N is negative without a label.

    Chunks are chosen for `device_type`, "cpu" or "cuda": by default, that of the tensors. With
    `ranks`, dx is the part of this rank's rows, in fp32.
    """
    teacher_head = teacher.head
    N = hidden_NH.shape[0]
    grad = need_hidden or need_weight or need_bias
    chunk = dense_chunk_tokens(head, N, need_weight, device_type) if ranks is None else ranks.chunk
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
    carried = None  # the scale of dw and db: float16 sums carry one until they are complete
    for at in blocks(N, chunk):
        x_nH, none = hidden_NH[at], no_ids[at]
        scanned = backend.scan(head, x_nH, none, base=True, buffer=buffers[0])
        teacher_scanned = backend.scan(teacher_head, teacher.hidden[at], none, buffer=buffers[1])
        lse, teacher_lse = scanned.rest.lse(), teacher_scanned.rest.lse()
        lse_base = None if scanned.rest_base is None else scanned.rest_base.lse()
        if ranks is not None:
            lses = [lse, teacher_lse] + ([] if lse_base is None else [lse_base])
            lse, teacher_lse, *bases = ranks.lse(lses)
            lse_base = bases[0] if bases else None
        lse_base = lse if lse_base is None else lse_base
        missing = None
        if teacher.missing_lse is not None:
            teacher_lse = torch.logaddexp(teacher_lse, teacher.missing_lse[at])
            missing = (teacher.missing_lse[at] - teacher_lse).exp()
        label = held = None if label_N is None else label_N[at]
        if ranks is not None and label is not None:
            held = ranks.slots(label)
        of, u_label = _Pass(
            backend, head, teacher_head, buffers, lse, teacher_lse, missing, ranks, grad
        ).divergence(held, options)
        D, total = of.D, of.total
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
        on_D = coef * options.on_divergence
        if of.on_psi is not None:
            on_D = on_D * of.on_psi
        carried = backend.dense_grads(
            head,
            teacher_head,
            x_nH,
            buffers,
            DenseRows(
                lse,
                teacher_lse,
                lse_base,
                on_D,
                total * on_D,
                on_lse,
                on_ce,
                held,
                of.psi_size,
                of.w,
            ),
            options if callable(options.divergence) else options._replace(divergence=of.term),
            first=at.start == 0,
            dx=None if dx_NH is None else dx_NH[at],
            dw=dw,
            db=db,
            carried=carried,
        )
    del buffers
    if dw is not None:
        dw[head.vocab_size :] = 0
    # dW first: its fp32 sum is free before dX is rounded.
    dw, on_dw = round_scaled(dw, head.weight, carried)
    dx, on_dx = round_scaled(dx_NH, hidden_NH if ranks is None else coef_N)
    db, on_db = round_scaled(db, coef_N if head.bias is None else head.bias, carried)
    grad_scale = torch.stack([on_dx, on_dw, on_db])
    return DenseLoss((coef_N * per_token).sum(), per_token, dx, dw, db, grad_scale)


class _Pass(NamedTuple):
    """One chunk of tokens, whose logits of both heads are stored."""

    backend: Backend
    head: LMHead
    teacher_head: LMHead
    buffers: tuple[Tensor, Tensor]
    lse: Tensor
    teacher_lse: Tensor
    missing: Tensor | None  # [n], the teacher's mass on tokens that the student lacks
    ranks: Ranks | None
    grad: bool

    def divergence(
        self, label_n: Tensor | None, options: LossOptions
    ) -> tuple[Combined, Tensor | None]:
        """Return D with its Σψ, and the label's u [n]."""
        name = options.divergence
        if not options.is_combined:
            D, total, u_label = self._sums(label_n, options, None, grad=self.grad)
            return Combined(D, total, name if isinstance(name, str) else ""), u_label
        assert isinstance(name, str)
        u: list[Tensor | None] = []

        def sums(term: str, w_n: Tensor | None) -> tuple[Tensor, Tensor]:
            # ψ of the last term overwrites the teacher's logits.
            grad = self.grad and term != "tvd"
            of_term = options._replace(divergence=term)
            D, total, u_label = self._sums(None if u else label_n, of_term, w_n, grad=grad)
            u.append(u_label)
            return D, total

        return combine(name, options.eta, sums), u[0]

    def _sums(
        self, label_n: Tensor | None, options: LossOptions, w_n: Tensor | None, *, grad: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.head.vocab_size:
            D, total, u_label = self.backend.dense_sums(
                self.head,
                self.teacher_head,
                self.buffers,
                self.lse,
                self.teacher_lse,
                label_n,
                options,
                grad=grad,
                w_n=w_n,
            )
        else:  # a rank without real tokens
            D = total = torch.zeros_like(self.lse)
            u_label = None if label_n is None else D
        if self.ranks is not None:
            parts = [D, total]
            if label_n is not None and u_label is not None:
                parts.append(u_label.masked_fill(label_n < 0, 0.0))
            D, total, *u = self.ranks.total(parts)
            u_label = u[0] if u else None
        if self.missing is not None and isinstance(options.divergence, str):
            cost = cost_of_missing(options.divergence, options.beta, options.skew)
            assert cost is not None
            D = D + cost * self.missing
        return D, total, u_label


def dense_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coef: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    missing_lse: Tensor | None,
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
            DenseTeacher(teacher, teacher_hidden, missing_lse),
            labels,
            coef,
            LossOptions.of(scalars),
            **needed(scalars["need"]),
        )
    grads = (or_empty(t, coef) for t in (out.dx, out.dw, out.db))
    return out.loss, out.per_token, out.grad_scale, *grads
