"""Sums and gradients with a dense teacher: two kernels for all separable divergences.

    D = Σ φ(log p, log q),  Ψ = Σψ                                          (sum_divergence)
    dz = on_D ψ − on_q q  [+ on_lse q₁ − on_ce at the label],  in place     (grad_divergence)

A callable divergence runs in PyTorch on a few rows at a time; its ψ overwrites the teacher's
logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .divergences import call_divergence, floor_of, plain_name
from .gpu_launch import (
    add_product,
    jitted,
    launch,
    mixture,
    next_power_of_2,
    product,
    scalars,
)
from .gpu_rows import move_to_scale
from .gpu_slabs import logits_view
from .head import DenseRows, LMHead, blocks, grad_scale_of
from .token_loss import LossOptions

DENSE_TILE = {"BV": 2048, "num_warps": 8}
CALLABLE_BYTES = 64 << 20


def _launch(
    kernel: str,
    head: LMHead,
    teacher_head: LMHead,
    raw_nV: Tensor,
    teacher_raw_nV: Tensor,
    options: LossOptions,
    **arguments: Any,
) -> None:
    """Launch a kernel of triton_dense.py, with the divergence as a function of Triton's language.

    A callable divergence has none. At the ends of β and skew a divergence is a KL.
    """
    if raw_nV.is_meta:
        return
    phi = None
    if isinstance(options.divergence, str):
        name = plain_name(options.divergence, options.beta, options.skew)
        phi = jitted(f"triton_divergences:{name}")
    of_teacher = scalars(teacher_head)
    launch(
        kernel,
        (len(raw_nV),),
        raw_nV,
        p_raw=raw_nV,
        p_t_raw=teacher_raw_nV,
        p_bias=head.bias,
        p_t_bias=teacher_head.bias,
        ld_raw=raw_nV.stride(0),
        ld_t_raw=teacher_raw_nV.stride(0),
        v=head.vocab_size,
        **scalars(head),
        t_scale=of_teacher["scale"],
        t_cap=of_teacher["cap"],
        T_CAP=of_teacher["CAP"],
        **mixture(options),
        floor=floor_of(head.dtype),
        PHI=phi,
        BV=min(DENSE_TILE["BV"], next_power_of_2(head.vocab_size)),
        num_warps=DENSE_TILE["num_warps"],
        **arguments,
    )


def _shaped_rows(head: LMHead, raw_nV: Tensor) -> Tensor:
    """u of raw products, in PyTorch."""
    u = raw_nV
    if head.bias is not None:
        u = u + head.bias[: head.vocab_size].to(u.dtype)
    u = u * head.logit_scale
    return u if head.softcap is None else head.softcap * torch.tanh(u / head.softcap)


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
    """(D [n], Σψ [n], the label's u [n])."""
    n = len(lse_n)
    raw, teacher_raw = logits_view(head, buffers[0], n), logits_view(teacher_head, buffers[1], n)
    D, total = torch.zeros_like(lse_n), torch.zeros_like(lse_n)
    if isinstance(options.divergence, str):
        _launch(
            "triton_dense:sum_divergence",
            head,
            teacher_head,
            raw,
            teacher_raw,
            options,
            p_lse=lse_n,
            p_t_lse=teacher_lse_n,
            p_w=w_n,
            p_D=D,
            p_psi_sum=total,
        )
    else:
        T, floor = options.temperature, floor_of(head.dtype)
        for at in blocks(n, max(1, CALLABLE_BYTES // (head.vocab_size * raw.element_size()))):
            lq = _shaped_rows(head, raw[at]) / T - lse_n[at].unsqueeze(-1)
            lp = _shaped_rows(teacher_head, teacher_raw[at]) / T - teacher_lse_n[at].unsqueeze(-1)
            with torch.enable_grad():
                leaf = lq.detach().requires_grad_(grad)
                value = call_divergence(options.divergence, lp.clamp(min=floor), leaf)
                if grad:
                    psi = torch.autograd.grad(value.sum(), leaf)[0]
                    teacher_raw[at] = psi
                    total[at] = psi.sum(-1)
            D[at] = value.detach()
    u_label = None
    if label_n is not None:
        index = label_n.clamp(min=0)
        label_logits = raw.gather(1, index.unsqueeze(-1))[:, 0]
        if head.bias is not None:
            label_logits = label_logits + head.bias[index].to(label_logits.dtype)
        u_label = _shaped_rows(head._replace(bias=None), label_logits)
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
    carried: Tensor | None = None,
) -> Tensor | None:
    """Add the gradients of one chunk; return the scale of dw and db, as gpu_slabs.chunk_grads."""
    n, low = len(hidden_nH), head.weight.dtype
    raw, teacher_raw = logits_view(head, buffers[0], n), logits_view(teacher_head, buffers[1], n)
    dz = raw if low == raw.dtype else raw.view(low)[:, : head.vocab_size]
    is_named = isinstance(options.divergence, str)
    rows, grad_scale = _scaled_rows(head, rows, None if is_named else teacher_raw, carried)
    _launch(
        "triton_dense:grad_divergence",
        head,
        teacher_head,
        raw,
        teacher_raw,
        options,
        p_dz=dz,
        p_lse=rows.lse,
        p_t_lse=rows.teacher_lse,
        p_lse_base=rows.lse_base,
        p_on_D=rows.on_D,
        p_on_q=rows.on_q,
        p_on_lse=rows.on_lse,
        p_on_ce=rows.on_ce,
        p_label=rows.label,
        p_w=rows.w,
        ld_dz=dz.stride(0),
    )
    db = None if db is None else db[: head.vocab_size]
    dw = None if dw is None else dw[: head.vocab_size]
    move_to_scale(grad_scale, carried, dw, db)
    if db is not None:
        db += dz.sum(0, dtype=db.dtype)
    if dw is not None:
        add_product(dz.t(), hidden_nH, dw, first)
    if dx is not None:
        product(dz, head.weight[: head.vocab_size], dx)
        if grad_scale is not None:
            dx.div_(grad_scale)
    return grad_scale


def _scaled_rows(
    head: LMHead, rows: DenseRows, psi_nV: Tensor | None, carried: Tensor | None
) -> tuple[DenseRows, Tensor | None]:
    """(rows · scale, scale) such that dz fits float16; (rows, None) for other types.

    |ψ| of a named divergence is at most 90, since log p ≥ −88: a scale to at most 2⁹ leaves room
    for that. ψ of a callable is measured, and that of "overlap" is at most α.
    """
    if head.weight.dtype != torch.float16:
        return rows, None
    on_u, on_z = head.logit_scale, head.logit_scale / head.temperature
    on_psi = rows.on_D if rows.psi_size is None else rows.on_D * rows.psi_size
    if psi_nV is not None:
        on_psi = on_psi * torch.linalg.vector_norm(psi_nV, torch.inf, dim=1)
    factors = ((on_psi, on_z), (rows.on_q, on_z), (rows.on_lse, on_u), (rows.on_ce, on_u))
    sizes = (None if t is None else t * f for t, f in factors)
    grad_scale = grad_scale_of(*sizes, carried=carried)
    scaled_up = rows._replace(
        on_D=rows.on_D * grad_scale,
        on_q=rows.on_q * grad_scale,
        on_lse=None if rows.on_lse is None else rows.on_lse * grad_scale,
        on_ce=None if rows.on_ce is None else rows.on_ce * grad_scale,
    )
    return scaled_up, grad_scale
