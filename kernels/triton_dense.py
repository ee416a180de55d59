"""The loss with a dense teacher: two kernels for all separable divergences.

    D = Σ φ(log p, log q),  Ψ = Σψ                                          (sum_divergence)
    dz = on_D ψ − on_q q  [+ on_lse q₁ − on_ce at the label],  in place     (grad_divergence)

A program owns one row of both stored chunks and reads each once per sweep: 8 bytes per pair of
logits and sweep, 2 or 4 written. ψ is recomputed, not stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import log_q_of, round_to, shape_logits


@triton.jit
def sum_divergence(
    p_raw,
    p_t_raw,
    p_bias,
    p_t_bias,
    p_lse,
    p_t_lse,
    p_w,
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
    rest: tl.float64,
    log_w: tl.float64,
    log_rest: tl.float64,
    floor: tl.float64,
    PHI: tl.constexpr,
    BV: tl.constexpr,
):
    """D = Σ φ(log p, log q) and Ψ = Σψ of each row, over the whole vocabulary.

    Args:
        p_raw, p_t_raw: [n, v] raw products of the student and the teacher, row strides ld_raw and
            ld_t_raw.
        p_bias, p_t_bias: [v] or None. p_lse, p_t_lse: [n], the log-sum-exp of z of each model.
        p_w: [n] or None, w of each row instead of the scalar.
        p_D, p_psi_sum: [n], receive D and Ψ.
        scale, cap, inv_T, t_scale, t_cap: scalars of the two heads.
        w, rest, log_w, log_rest: of PHI. floor: the smallest log p.
        PHI: a function of triton_divergences.py.

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
    rest = tl.full([], rest, DT)
    log_w = tl.full([], log_w, DT)
    log_rest = tl.full([], log_rest, DT)
    floor = tl.full([], floor, DT)
    if p_w is not None:
        w = tl.load(p_w + i_row)
        rest = 1.0 - w
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
        b_lq = log_q_of(b_u, inv_T, b_lse, m_cols)
        b_lp = tl.where(m_cols, tl.maximum(b_t_u * inv_T - b_t_lse, floor), 0.0)
        b_phi, b_psi = PHI(b_lp, b_lq, w, rest, log_w, log_rest)
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
    p_w,
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
    rest: tl.float64,
    log_w: tl.float64,
    log_rest: tl.float64,
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
        p_w, w, rest, log_w, log_rest, floor, PHI: as in sum_divergence.

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
    rest = tl.full([], rest, DT)
    log_w = tl.full([], log_w, DT)
    log_rest = tl.full([], log_rest, DT)
    floor = tl.full([], floor, DT)
    if p_w is not None:
        w = tl.load(p_w + i_row)
        rest = 1.0 - w
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
            b_lq = log_q_of(b_u, inv_T, b_lse, m_cols)
            _phi, b_psi = PHI(b_lp, b_lq, w, rest, log_w, log_rest)
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
