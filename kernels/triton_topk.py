"""The maximum and the log-sum-exp of every group of columns, for the exact top k of gpu_topk.py.

    key_g = max_{v in g} s_v;  lse_Tg = log Σ_{v in g} e^{u_v / T};  s = logit_scale · (raw + b)

Every logit is read once, 4 bytes, whatever the number of temperatures.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import ABSENT, NEG, shape_logits


@triton.jit
def reduce_groups(
    p_raw,
    p_bias,
    p_inv_T,
    p_key,
    p_lse,
    ld_raw,
    n,
    n_groups,
    n_T,
    scale: tl.float64,
    cap: tl.float64,
    CAP: tl.constexpr,
    GROUP: tl.constexpr,
    BG: tl.constexpr,
):
    """The largest s of each group of columns and its log-sum-exp at each temperature.

    Args:
        p_raw: [n, n_groups · GROUP] raw products, row stride ld_raw; where s is −inf, no token.
        p_bias: [n_groups · GROUP] or None. p_inv_T: [n_T], 1 / T, in the type of p_raw.
        p_key: [n, n_groups] or None, receives max s, whose order softcap and T keep; +inf for a
            group with a NaN, so that it is among the largest.
        p_lse: [n_T, n, n_groups], receives log Σ e^{u / T}; NEG without a token.

    Program (i, j) owns BG groups of row i.
    """
    i_row = tl.program_id(0).to(tl.int64)
    DT: tl.constexpr = p_raw.dtype.element_ty
    o_groups = tl.program_id(1) * BG + tl.arange(0, BG)
    m_groups = o_groups < n_groups
    o_cols = o_groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    m_cols = m_groups[:, None]
    b_raw = tl.load(p_raw + i_row * ld_raw + o_cols, mask=m_cols, other=0.0)
    b_s = shape_logits(b_raw, p_bias, o_cols, m_cols, tl.full([], scale, DT), 0.0, False)
    b_key = tl.max(tl.where(b_s == b_s, b_s, float("inf")), 1)
    if p_key is not None:
        tl.store(p_key + i_row * n_groups + o_groups, b_key, mask=m_groups)
    b_u, b_top = b_s, b_key
    if CAP:
        b_u = shape_logits(b_s, None, o_cols, m_cols, 1.0, cap, CAP)
        b_u = tl.where(b_s == -float("inf"), b_s, b_u)
        b_top = shape_logits(b_key, None, o_groups, m_groups, 1.0, cap, CAP)
    b_top = tl.where(b_key == -float("inf"), NEG, b_top)
    for i_T in range(n_T):
        b_inv_T = tl.load(p_inv_T + i_T)
        b_sum = tl.sum(tl.exp(b_u * b_inv_T - (b_top * b_inv_T)[:, None]), 1)
        m_empty = b_top < ABSENT
        b_lse = tl.where(m_empty, NEG, b_top * b_inv_T + tl.log(tl.where(m_empty, 1.0, b_sum)))
        tl.store(p_lse + (i_T * n + i_row) * n_groups + o_groups, b_lse, mask=m_groups)
