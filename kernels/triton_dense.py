"""The loss with a dense teacher: two kernels for all separable divergences.

    D = Σ φ(log p, log q),  Ψ = Σψ                                          (sum_divergence)
    dz = on_D ψ − on_q q  [+ on_lse q₁ − on_ce at the label],  in place     (grad_divergence)

A program owns one row of both stored chunks and reads each once per sweep: 8 bytes per pair of
logits and sweep, 2 or 4 written. ψ is recomputed, not stored. A callable divergence runs in PyTorch
on a few rows at a time; its ψ overwrites the teacher's logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .divergences import call_divergence, floor_of
from .head import DenseRows, LMHead, blocks, grad_scale_of
from .token_loss import LossOptions
from .triton_common import (
    add_product,
    launch,
    product,
    round_to,
    scalars,
    shape_logits,
    sums_at_scale,
)
from .triton_divergences import divergence_function
from .triton_slabs import logits_view

DENSE_TILE = {"BV": 2048, "num_warps": 8}
CALLABLE_BYTES = 64 << 20


@triton.jit
def sum_divergence(
    p_raw,
    p_t_raw,
    p_bias,
    p_t_bias,
    p_lse,
    p_t_lse,
    p_D,
    p_psi_sum,
    ld_raw,
    ld_t_raw,
    v,
    scale: tl.float64,
    cap: tl.float64,
    inv_T: tl.float64,
    CAP: tl.constexpr,
    t_scale: tl.float64,
    t_cap: tl.float64,
    T_CAP: tl.constexpr,
    w: tl.float64,
    floor: tl.float64,
    PHI: tl.constexpr,
    BV: tl.constexpr,
):
    """D = Σ φ(log p, log q) and Ψ = Σψ of each row, over the whole vocabulary.

    Args:
        p_raw, p_t_raw: [n, v] raw products of the student and the teacher, row strides ld_raw and
            ld_t_raw.
        p_bias, p_t_bias: [v] or None. p_lse, p_t_lse: [n], the log-sum-exp of z of each model.
        p_D, p_psi_sum: [n], receive D and Ψ.
        scale, cap, inv_T, t_scale, t_cap: scalars of the two heads.
        w: β or the skew of PHI. floor: the smallest log p.
        PHI: (log p, log q, w) -> (φ, ψ), from triton_divergences.py.

    Program i owns row i and walks it in blocks of BV columns.
    """
    i_row = tl.program_id(0)
    p_raw += i_row.to(tl.int64) * ld_raw
    p_t_raw += i_row.to(tl.int64) * ld_t_raw
    DT: tl.constexpr = p_raw.dtype.element_ty
    scale = tl.full([], scale, DT)
    t_scale = tl.full([], t_scale, DT)
    inv_T = tl.full([], inv_T, DT)
    w = tl.full([], w, DT)
    floor = tl.full([], floor, DT)
    b_lse = tl.load(p_lse + i_row)
    b_t_lse = tl.load(p_t_lse + i_row).to(DT)
    b_phi_sum = tl.zeros([BV], DT)
    b_psi_sum = tl.zeros([BV], DT)
    for i_col in range(0, v, BV):
        o_cols = i_col + tl.arange(0, BV)
        m_cols = o_cols < v
        b_u = shape_logits(
            tl.load(p_raw + o_cols, mask=m_cols, other=0.0), p_bias, o_cols, m_cols, scale, cap, CAP
        )
        b_t_raw = tl.load(p_t_raw + o_cols, mask=m_cols, other=0.0).to(DT)
        b_t_u = shape_logits(b_t_raw, p_t_bias, o_cols, m_cols, t_scale, t_cap, T_CAP)
        b_lq = tl.where(m_cols, b_u * inv_T - b_lse, 0.0)
        b_lp = tl.where(m_cols, tl.maximum(b_t_u * inv_T - b_t_lse, floor), 0.0)
        b_phi, b_psi = PHI(b_lp, b_lq, w)
        b_phi_sum += tl.where(m_cols, b_phi, 0.0)
        b_psi_sum += tl.where(m_cols, b_psi, 0.0)
    tl.store(p_D + i_row, tl.sum(b_phi_sum, 0))
    tl.store(p_psi_sum + i_row, tl.sum(b_psi_sum, 0))


@triton.jit
def grad_divergence(
    p_raw,
    p_t_raw,
    p_dz,
    p_bias,
    p_t_bias,
    p_lse,
    p_t_lse,
    p_lse_base,
    p_on_D,
    p_on_q,
    p_on_lse,
    p_on_ce,
    p_label,
    ld_raw,
    ld_t_raw,
    ld_dz,
    v,
    scale: tl.float64,
    cap: tl.float64,
    inv_T: tl.float64,
    CAP: tl.constexpr,
    t_scale: tl.float64,
    t_cap: tl.float64,
    T_CAP: tl.constexpr,
    w: tl.float64,
    floor: tl.float64,
    PHI: tl.constexpr,
    BV: tl.constexpr,
):
    """dz = on_D ψ − on_q q  [+ on_lse q₁ − on_ce at the label], written over the raw products.

    q = softmax(u / T), q₁ = softmax(u). The factors 1/T, logit_scale and 1 − (u / c)² are applied.

    Args:
        p_raw: [n, v] raw products of the student, row stride ld_raw.
        p_t_raw: [n, v] raw products of the teacher, or ψ itself if PHI is None; row stride
            ld_t_raw.
        p_dz: [n, v] in the type of the head, row stride ld_dz; may be the memory of p_raw.
        p_bias, p_t_bias: [v] or None. p_lse, p_t_lse, p_lse_base: [n], log-sum-exp of z of each
            model and of the student's u.
        p_on_D, p_on_q: [n]. p_on_lse, p_on_ce: [n] or None. p_label: int64 [n], needed for p_on_ce.
        w, floor, PHI: as in sum_divergence.

    Program i owns row i and walks it in blocks of BV columns.
    """
    i_row = tl.program_id(0)
    p_raw += i_row.to(tl.int64) * ld_raw
    p_t_raw += i_row.to(tl.int64) * ld_t_raw
    p_dz += i_row.to(tl.int64) * ld_dz
    DT: tl.constexpr = p_raw.dtype.element_ty
    scale = tl.full([], scale, DT)
    t_scale = tl.full([], t_scale, DT)
    inv_T = tl.full([], inv_T, DT)
    w = tl.full([], w, DT)
    floor = tl.full([], floor, DT)
    b_lse = tl.load(p_lse + i_row)
    b_t_lse = tl.load(p_t_lse + i_row).to(DT)
    b_on_D = tl.load(p_on_D + i_row)
    b_on_q = tl.load(p_on_q + i_row)
    for i_col in range(0, v, BV):
        o_cols = i_col + tl.arange(0, BV)
        m_cols = o_cols < v
        b_u = shape_logits(
            tl.load(p_raw + o_cols, mask=m_cols, other=0.0), p_bias, o_cols, m_cols, scale, cap, CAP
        )
        b_t_raw = tl.load(p_t_raw + o_cols, mask=m_cols, other=0.0).to(DT)
        if PHI is None:
            b_psi = b_t_raw
        else:
            b_t_u = shape_logits(b_t_raw, p_t_bias, o_cols, m_cols, t_scale, t_cap, T_CAP)
            b_lp = tl.where(m_cols, tl.maximum(b_t_u * inv_T - b_t_lse, floor), 0.0)
            b_lq = tl.where(m_cols, b_u * inv_T - b_lse, 0.0)
            _phi, b_psi = PHI(b_lp, b_lq, w)
        b_q = tl.exp(tl.where(m_cols, b_u * inv_T - b_lse, 0.0))
        b_dz = (b_on_D * b_psi - b_on_q * b_q) * inv_T
        if p_on_lse is not None:
            b_q1 = tl.exp(tl.where(m_cols, b_u - tl.load(p_lse_base + i_row), 0.0))
            b_dz += tl.load(p_on_lse + i_row) * b_q1
        if p_on_ce is not None:
            b_dz -= tl.where(o_cols == tl.load(p_label + i_row), tl.load(p_on_ce + i_row), 0.0)
        if CAP:
            b_y = b_u / tl.full([], cap, DT)
            b_dz *= 1.0 - b_y * b_y
        b_dz *= scale
        tl.debug_barrier()  # a 16-bit row overwrites the front of its own fp32 row
        tl.store(p_dz + o_cols, round_to(b_dz, p_dz.dtype.element_ty), mask=m_cols)


def _kernel_scalars(head: LMHead, teacher: LMHead, w: float) -> dict[str, float | bool]:
    teacher_head_scalars = scalars(teacher)
    teacher_scalars = {
        "t_scale": teacher_head_scalars["scale"],
        "t_cap": teacher_head_scalars["cap"],
        "T_CAP": teacher_head_scalars["CAP"],
    }
    return scalars(head) | teacher_scalars | {"w": float(w), "floor": floor_of(head.dtype)}


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
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(D [n], Σψ [n], the label's u [n])."""
    n = len(lse_n)
    raw, teacher_raw = logits_view(head, buffers[0], n), logits_view(teacher_head, buffers[1], n)
    D, total = torch.zeros_like(lse_n), torch.zeros_like(lse_n)
    if isinstance(options.divergence, str):
        phi, w = divergence_function(options.divergence, options.beta, options.skew)
        launch(
            sum_divergence,
            (n,),
            raw,
            p_raw=raw,
            p_t_raw=teacher_raw,
            p_bias=head.bias,
            p_t_bias=teacher_head.bias,
            p_lse=lse_n,
            p_t_lse=teacher_lse_n,
            p_D=D,
            p_psi_sum=total,
            ld_raw=raw.stride(0),
            ld_t_raw=teacher_raw.stride(0),
            v=head.vocab_size,
            **_kernel_scalars(head, teacher_head, w),
            PHI=phi,
            BV=min(DENSE_TILE["BV"], triton.next_power_of_2(head.vocab_size)),
            num_warps=DENSE_TILE["num_warps"],
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
) -> None:
    """Add the gradients of one chunk."""
    n, low = len(hidden_nH), head.weight.dtype
    raw, teacher_raw = logits_view(head, buffers[0], n), logits_view(teacher_head, buffers[1], n)
    dz = raw if low == raw.dtype else raw.view(low)[:, : head.vocab_size]
    phi, w = None, 0.0
    if isinstance(options.divergence, str):
        phi, w = divergence_function(options.divergence, options.beta, options.skew)
    rows, grad_scale = _scaled_rows(head, rows, teacher_raw if phi is None else None)
    launch(
        grad_divergence,
        (n,),
        raw,
        p_raw=raw,
        p_t_raw=teacher_raw,
        p_dz=dz,
        p_bias=head.bias,
        p_t_bias=teacher_head.bias,
        p_lse=rows.lse,
        p_t_lse=rows.teacher_lse,
        p_lse_base=rows.lse_base,
        p_on_D=rows.on_D,
        p_on_q=rows.on_q,
        p_on_lse=rows.on_lse,
        p_on_ce=rows.on_ce,
        p_label=rows.label,
        ld_raw=raw.stride(0),
        ld_t_raw=teacher_raw.stride(0),
        ld_dz=dz.stride(0),
        v=head.vocab_size,
        **_kernel_scalars(head, teacher_head, w),
        PHI=phi,
        BV=min(DENSE_TILE["BV"], triton.next_power_of_2(head.vocab_size)),
        num_warps=DENSE_TILE["num_warps"],
    )
    db = None if db is None else db[: head.vocab_size]
    dw = None if dw is None else dw[: head.vocab_size]
    with sums_at_scale(grad_scale, first, dx, dw, db):
        if db is not None:
            db += dz.sum(0, dtype=db.dtype)
        if dw is not None:
            add_product(dz.t(), hidden_nH, dw, first)
        if dx is not None:
            product(dz, head.weight[: head.vocab_size], dx)


def _scaled_rows(
    head: LMHead, rows: DenseRows, psi_nV: Tensor | None
) -> tuple[DenseRows, Tensor | None]:
    """(rows · scale, scale) such that dz fits float16; (rows, None) for other types.

    |ψ| of a named divergence is at most 90, since log p ≥ −88: the scale leaves room for that. ψ of
    a callable is measured.
    """
    if head.weight.dtype != torch.float16:
        return rows, None
    on_u, on_z = head.logit_scale, head.logit_scale / head.temperature
    on_psi = rows.on_D
    if psi_nV is not None:
        on_psi = on_psi * torch.linalg.vector_norm(psi_nV, torch.inf, dim=1)
    factors = ((on_psi, on_z), (rows.on_q, on_z), (rows.on_lse, on_u), (rows.on_ce, on_u))
    grad_scale = grad_scale_of(*(None if t is None else t * f for t, f in factors))
    scaled_up = rows._replace(
        on_D=rows.on_D * grad_scale,
        on_q=rows.on_q * grad_scale,
        on_lse=None if rows.on_lse is None else rows.on_lse * grad_scale,
        on_ce=None if rows.on_ce is None else rows.on_ce * grad_scale,
    )
    return scaled_up, grad_scale
