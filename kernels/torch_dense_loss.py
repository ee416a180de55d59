"""Distillation from a dense teacher in PyTorch: two LM heads, every divergence, no [N, V].

    ℓ_n = (1 − ce) · Σ_v φ(log p_v, log q_v) [· T²] + ce · CE + z_loss · lse₁²
    dz = ψ − q Σψ,  ψ = ∂φ/∂log q

Per chunk of tokens the logits of both heads are kept ([V, n] fp32 each). A first sweep over
vocabulary slabs sums φ and Ψ = Σψ and leaves ψ where the teacher's logits were; a second turns the
student's logits into dz and feeds both gradient GEMMs: 4NVH forward, 4NVH backward. A callable
divergence takes whole rows instead of slabs and gets ψ by autograd.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .divergences import floor_of, resolve
from .rows import RowOptions
from .torch_slabs import Head, Matmul, RunningLSE, blocks, chunk_tokens, lift_of, logits, slabs


class Dense(NamedTuple):
    """loss scalar, per_token [N], `lift` times the gradients of the loss (None unless asked)."""

    loss: Tensor
    per_token: Tensor
    dx: Tensor | None
    dw: Tensor | None
    db: Tensor | None
    lift: Tensor


class _Kept(NamedTuple):
    u_Vn: Tensor
    lse: Tensor
    lse_base: Tensor


def _keep(head: Head, hidden_nH: Tensor) -> _Kept:
    n = hidden_nH.shape[0]
    matmul = Matmul(head, hidden_nH)
    u_Vn = hidden_nH.new_empty(head.vocab, n, dtype=head.dtype)
    running = RunningLSE(n, u_Vn, head.temperature, 0)
    at_one = RunningLSE(n, u_Vn, 1.0, 0)
    for at in slabs(head.vocab, n, head.dtype.itemsize):
        u_vn = logits(head, matmul, at, u_Vn[at])
        running.add(u_vn)
        if head.temperature != 1.0:
            at_one.add(u_vn)
    lse = running.lse()
    return _Kept(u_Vn, lse, lse if head.temperature == 1.0 else at_one.lse())


def dense(
    head: Head,
    hidden_NH: Tensor,
    teacher_head: Head,
    teacher_hidden_NG: Tensor,
    label_N: Tensor | None,
    coef_N: Tensor,
    options: RowOptions,
    *,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> Dense:
    """Loss Σ coef · ℓ, ℓ [N] and gradients. label_N is negative where a token has no label."""
    N = hidden_NH.shape[0]
    grad = need_hidden or need_weight or need_bias
    chunk = max(1, chunk_tokens(head, N, need_weight) // 2)
    dx_NH = torch.zeros_like(hidden_NH, dtype=head.dtype) if need_hidden else None
    dw = torch.empty_like(head.weight, dtype=head.dtype) if need_weight else None
    db = None
    if need_bias and head.bias is not None:
        db = torch.zeros_like(head.bias, dtype=head.dtype)
    per_token = hidden_NH.new_empty(N, dtype=head.dtype)
    lift = lift_of(head, coef_N)
    for at in blocks(N, chunk):
        student = _keep(head, hidden_NH[at])
        teacher = _keep(teacher_head, teacher_hidden_NG[at])
        D, total = _divergence(student, teacher, options, grad)
        loss = D * options.on_divergence
        on_lse = on_ce = None
        coef, label = coef_N[at] * lift, None if label_N is None else label_N[at]
        if options.z_loss:
            loss = loss + options.z_loss * student.lse_base.square()
            on_lse = 2 * options.z_loss * coef * student.lse_base
        if label is not None and options.ce_weight:
            given = label >= 0
            u_y = student.u_Vn.gather(0, label.clamp(min=0).unsqueeze(0))[0]
            loss = loss + options.ce_weight * (student.lse_base - u_y).masked_fill(~given, 0.0)
            on_ce = options.ce_weight * coef * given
            on_lse = on_ce if on_lse is None else on_lse + on_ce
        per_token[at] = loss
        if not grad:
            continue
        _chunk_grads(
            head,
            hidden_NH[at],
            student,
            teacher.u_Vn,
            total * (coef * options.on_divergence),
            coef * options.on_divergence,
            on_lse,
            on_ce,
            label,
            None if dx_NH is None else dx_NH[at],
            dw,
            db,
            first=at.start == 0,
        )
    if dw is not None:
        dw[head.vocab :] = 0
        dw = dw.to(head.weight.dtype)
    return Dense(
        (coef_N * per_token).sum(),
        per_token,
        None if dx_NH is None else dx_NH.to(hidden_NH.dtype),
        dw,
        None if db is None or head.bias is None else db.to(head.bias.dtype),
        lift,
    )


def _divergence(
    student: _Kept, teacher: _Kept, options: RowOptions, grad: bool
) -> tuple[Tensor, Tensor]:
    """(D [n], Σψ [n]); with grad, ψ takes the place of the teacher's logits."""
    V, _n = student.u_Vn.shape
    T, floor = options.temperature, floor_of(student.u_Vn.dtype)
    D = torch.zeros_like(student.lse)
    total = torch.zeros_like(student.lse)
    rows = V if callable(options.divergence) else 4096
    for at in blocks(V, rows):
        lq = (student.u_Vn[at] / T).sub_(student.lse)
        lp = (teacher.u_Vn[at] / T).sub_(teacher.lse).clamp_(min=floor)
        if isinstance(options.divergence, str):
            rule = resolve(options.divergence, options.beta, options.skew)
            D += rule.phi(lp, lq).sum(0)
            psi = rule.psi(lp, lq) if grad else None
        else:
            psi = None
            with torch.enable_grad():
                leaf = lq.t().detach().requires_grad_(grad)
                value = options.divergence(lp.t(), leaf)
                if grad:
                    psi = torch.autograd.grad(value.sum(), leaf)[0].t()
            D += value.detach()
        if psi is not None:
            total += psi.sum(0)
            teacher.u_Vn[at] = psi
    return D, total


def _chunk_grads(
    head: Head,
    hidden_nH: Tensor,
    student: _Kept,
    psi_Vn: Tensor,
    total_n: Tensor,
    on_D_n: Tensor,
    on_lse_n: Tensor | None,
    on_ce_n: Tensor | None,
    label_n: Tensor | None,
    dx_nH: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
    *,
    first: bool,
) -> None:
    """dz = on_D ψ − q Σψ, plus the cross-entropy's and z-loss's, through scale, cap and T."""
    n = hidden_nH.shape[0]
    T = head.temperature
    matmul = Matmul(head, hidden_nH)
    dx_Hn = None
    if dx_nH is not None:
        dx_Hn = torch.zeros(dx_nH.shape[::-1], dtype=head.dtype, device=dx_nH.device)
    for at in slabs(head.vocab, n, head.dtype.itemsize):
        u = student.u_Vn[at]
        d = psi_Vn[at].mul_(on_D_n)
        d -= (u / T).sub_(student.lse).exp_().mul_(total_n)
        d /= T
        if on_lse_n is not None:
            d += (u - student.lse_base).exp_().mul_(on_lse_n)
        if on_ce_n is not None and label_n is not None:
            here = (label_n >= at.start) & (label_n < at.stop)
            index = torch.where(here, label_n - at.start, 0).unsqueeze(0)
            d.scatter_add_(0, index, torch.where(here, -on_ce_n, 0.0).unsqueeze(0))
        if head.softcap is not None:
            d *= 1 - (u / head.softcap).square_()
        d *= head.logit_scale
        if db is not None:
            db[at] += d.sum(1)
        if dx_Hn is not None:
            matmul.add_hidden_grad(at, d, dx_Hn)
        if dw is not None:
            matmul.add_weight_grad(d, dw[at], first)
    if dx_Hn is not None and dx_nH is not None:
        dx_nH.copy_(dx_Hn.t())
