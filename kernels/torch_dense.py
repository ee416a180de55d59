"""Sums and gradients with a dense teacher in PyTorch, on vocabulary-major chunks of logits.

    D = Σ φ(log p, log q),  Ψ = Σψ,  dz = on_D ψ − q Ψ [+ on_lse q₁ − on_ce at the label]

ψ overwrites the teacher's logits between the two sweeps. A callable divergence gets whole rows, and
ψ comes from autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .divergences import call_divergence, floor_of, resolve
from .head import DenseRows, LMHead, vocabulary_slabs
from .token_loss import LEAST_LOG_Q, LossOptions
from .torch_slabs import Matmul, logits_view, slabs


def dense_sums(
    head: LMHead,
    teacher_head: LMHead,
    buffers: tuple[Tensor, Tensor],
    lse_n: Tensor,
    teacher_lse_n: Tensor,
    label_n: Tensor | None,
    options: LossOptions,
    *,
    grad: bool,
    w_n: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(D [n], Σψ [n], the label's u [n]); with grad, ψ overwrites the teacher's logits."""
    n, V = len(lse_n), head.vocab_size
    u_Vn, psi_Vn = (
        logits_view(head, buffers[0], n)[:-1],
        logits_view(teacher_head, buffers[1], n)[:-1],
    )
    T, floor = options.temperature, floor_of(u_Vn.dtype)
    D = torch.zeros_like(lse_n)
    total = torch.zeros_like(lse_n)
    rows = V if callable(options.divergence) else 4096
    for at in vocabulary_slabs(head, rows):
        u, teacher_u = (u_Vn[at], psi_Vn[at]) if T == 1.0 else (u_Vn[at] / T, psi_Vn[at] / T)
        lq = (u - lse_n).clamp_(min=LEAST_LOG_Q)  # a bias may be −∞
        lp = (teacher_u - teacher_lse_n).clamp_(min=floor)
        if isinstance(options.divergence, str):
            rule = resolve(options.divergence, options.beta, options.skew, w_n)
            psi: Tensor | None = None
            if grad and rule.both is not None:
                phi, psi = rule.both(lp, lq)
            else:
                phi = rule.phi(lp, lq)
                psi = rule.psi(lp, lq) if grad else None
            D += phi.sum(0)
        else:
            psi = None
            with torch.enable_grad():
                leaf = lq.t().detach().requires_grad_(grad)
                value = call_divergence(options.divergence, lp.t(), leaf)
                if grad:
                    psi = torch.autograd.grad(value.sum(), leaf)[0].t()
            D += value.detach()
        if psi is not None:
            total += psi.sum(0)
            psi_Vn[at] = psi
    u_label = None
    if label_n is not None:
        u_label = u_Vn.gather(0, label_n.clamp(min=0).unsqueeze(0))[0]
    return D, total, u_label


def dense_grads(
    head: LMHead,
    teacher_head: LMHead,
    hidden_nH: Tensor,
    buffers: tuple[Tensor, Tensor],
    rows: DenseRows,
    options: LossOptions,
    *,
    first: bool,
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
    carried: None = None,
) -> None:
    """Add the gradients of one chunk; dw and db carry no scale here."""
    n = hidden_nH.shape[0]
    T = head.temperature
    matmul = Matmul(head, hidden_nH)
    u_Vn, psi_Vn = (
        logits_view(head, buffers[0], n)[:-1],
        logits_view(teacher_head, buffers[1], n)[:-1],
    )
    dx_nH = matmul.new_hidden_grad(n) if dx is not None else None
    for at in slabs(head, n):
        u = u_Vn[at]
        d = psi_Vn[at].mul_(rows.on_D)
        d -= (u / T).sub_(rows.lse).exp_().mul_(rows.on_q)
        if T != 1.0:
            d /= T
        if rows.on_lse is not None:
            d += (u - rows.lse_base).exp_().mul_(rows.on_lse)
        if rows.on_ce is not None and rows.label is not None:
            in_slab = (rows.label >= at.start) & (rows.label < at.stop)
            index = torch.where(in_slab, rows.label - at.start, 0).unsqueeze(0)
            d.scatter_add_(0, index, torch.where(in_slab, -rows.on_ce, 0.0).unsqueeze(0))
        if head.softcap is not None:
            d *= 1 - (u / head.softcap).square_()
        if head.logit_scale != 1.0:
            d *= head.logit_scale
        if db is not None:
            db[at] += d.sum(1)
        if dx_nH is not None:
            matmul.add_hidden_grad(at, d, dx_nH)
        if dw is not None:
            matmul.add_weight_grad(d, dw[at], first)
    if dx_nH is not None and dx is not None:
        dx.copy_(dx_nH)
