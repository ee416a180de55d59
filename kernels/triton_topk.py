"""The exact top k of gpu_topk.py: maxima and sums of groups of columns, then the answers.

    key_g = max_{v in g} s_v;  lse_Tg = log Σ_{v in g} e^{u_v / T};  s = logit_scale · (raw + b)

reduce_groups reads every logit once, 4 bytes, whatever the number of temperatures. finish_topk
reads the members of the chosen groups and the log-sum-exps of all others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import ABSENT, NEG, shape_logits
from .triton_token_loss import add_exp, log1p


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
        p_key: [n, n_groups], receives max s, whose order softcap and T keep; +inf for a group with
            a NaN, so that it is among the largest.
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


@triton.jit
def add_exps(b_max, b_sum, b_z):
    """The running maximum and sum of exponentials of each lane, with one more value."""
    b_new = tl.maximum(b_max, b_z)
    return b_new, b_sum * tl.exp(b_max - b_new) + tl.exp(b_z - b_new)


@triton.jit
def finish_topk(
    p_members,
    p_best,
    p_values,
    p_groups,
    p_lse,
    p_ids,
    p_logprobs,
    p_log_tail,
    ld_members,
    n_members,
    K,
    n_groups,
    inv_T: tl.float64,
    cap: tl.float64,
    CAP: tl.constexpr,
    GROUP: tl.constexpr,
    BV: tl.constexpr,
    SB: tl.constexpr,
):
    """Log-probabilities of the winners of a row, and the exact log-probability of all others.

    Args:
        p_members: [n, n_members], s of the members, row stride ld_members; winners become −inf.
        p_best: int64 [n, K], the winners among the members, by falling value; p_values: [n, K],
            their s.
        p_groups: int64 [n, K], the groups of the members; or None, if members are all tokens.
        p_lse: [n, n_groups] or None, log-sum-exps of groups; those of p_groups become NEG.
        p_ids: int64 [n, K], p_logprobs: [n, K], p_log_tail: [n], the results; log_tail is −inf
            without another token.

    Program i owns row i.
    """
    i_row = tl.program_id(0).to(tl.int64)
    DT: tl.constexpr = p_members.dtype.element_ty
    inv_T = tl.full([], inv_T, DT)
    p_members += i_row * ld_members
    p_lse_row = p_lse
    if p_groups is not None:
        p_lse_row += i_row * n_groups
    for i_slot in range(0, K, SB):
        o_slots = i_slot + tl.arange(0, SB)
        m_slots = o_slots < K
        b_ids = tl.load(p_best + i_row * K + o_slots, mask=m_slots, other=0)
        tl.store(p_members + b_ids, -float("inf"), mask=m_slots)
        if p_groups is not None:
            b_group = tl.load(p_groups + i_row * K + o_slots, mask=m_slots, other=0)
            tl.store(p_lse_row + b_group, NEG, mask=m_slots)
            b_group = tl.load(p_groups + i_row * K + b_ids // GROUP, mask=m_slots, other=0)
            b_ids = b_group * GROUP + b_ids % GROUP
        tl.store(p_ids + i_row * K + o_slots, b_ids, mask=m_slots)
    tl.debug_barrier()
    b_max = tl.full([BV], NEG, DT)
    b_sum = tl.zeros([BV], DT)
    for i_col in range(0, n_members, BV):
        o_cols = i_col + tl.arange(0, BV)
        b_s = tl.load(p_members + o_cols, mask=o_cols < n_members, other=-float("inf"))
        b_u = shape_logits(b_s, None, o_cols, o_cols < n_members, 1.0, cap, CAP)
        b_max, b_sum = add_exps(b_max, b_sum, tl.where(b_s == -float("inf"), b_s, b_u * inv_T))
    if p_groups is not None:
        for i_group in range(0, n_groups, BV):
            o_groups = i_group + tl.arange(0, BV)
            b_z = tl.load(p_lse_row + o_groups, mask=o_groups < n_groups, other=-float("inf"))
            b_max, b_sum = add_exps(b_max, b_sum, b_z)
    b_top = tl.max(b_max, 0)
    m_none = b_top < ABSENT
    b_rest = tl.sum(b_sum * tl.exp(b_max - b_top), 0)
    b_rest = tl.where(m_none, NEG, b_top + tl.log(tl.where(m_none, 1.0, b_rest)))
    b_max = tl.full([SB], NEG, DT)
    b_sum = tl.zeros([SB], DT)
    for i_slot in range(0, K, SB):
        o_slots = i_slot + tl.arange(0, SB)
        b_s = tl.load(p_values + i_row * K + o_slots, mask=o_slots < K, other=-float("inf"))
        b_u = shape_logits(b_s, None, o_slots, o_slots < K, 1.0, cap, CAP)
        b_max, b_sum = add_exps(b_max, b_sum, tl.where(b_s == -float("inf"), b_s, b_u * inv_T))
    b_top = tl.max(b_max, 0)
    b_lse = tl.sum(b_sum * tl.exp(b_max - b_top), 0)
    b_lse = b_top + tl.log(tl.where(b_top < ABSENT, 1.0, b_lse))
    b_lse = add_exp(b_rest, b_lse)
    b_inside = tl.zeros([SB], DT)
    for i_slot in range(0, K, SB):
        o_slots = i_slot + tl.arange(0, SB)
        b_s = tl.load(p_values + i_row * K + o_slots, mask=o_slots < K, other=-float("inf"))
        b_u = shape_logits(b_s, None, o_slots, o_slots < K, 1.0, cap, CAP)
        b_lp = tl.where(b_s == -float("inf"), b_s, b_u * inv_T) - b_lse
        b_inside += tl.exp(b_lp)
        tl.store(p_logprobs + i_row * K + o_slots, b_lp, mask=o_slots < K)
    b_mass = tl.sum(b_inside, 0)
    # From whichever form is exact: see log_tail_of in token_loss.py.
    b_tail = tl.where(b_mass < 0.5, log1p(-tl.minimum(b_mass, 0.5)), b_rest - b_lse)
    tl.store(p_log_tail + i_row, tl.where(m_none, -float("inf"), b_tail))
