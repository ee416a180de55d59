"""Scores of a token from the logits of its slots and the statistics of all other tokens.

`scores` in row_scores.py has the equations. A program owns BN rows and walks their K slots twice:
for the log-sum-exps, the two largest and the label's rank; for the moments and the divergences. The
label has a slot of its own, behind the teacher's, which counts if the teacher lacks its id.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import ABSENT, NEG
from .triton_divergences import forward_kl, hellinger, tvd
from .triton_reduce import move_sums
from .triton_token_loss import add_exp, add_tile, log1p, log_probs


@triton.jit
def add_moments(b_s0, b_s1, b_s2, b_z, b_top):
    """Sums of e^d, e^d d and e^d d² of each row with one more tile, d = z − top."""
    b_d = tl.maximum(b_z - b_top[:, None], -1e4, propagate_nan=tl.PropagateNan.ALL)
    b_exp = tl.exp(b_d)
    b_s1 += tl.sum(b_exp * b_d, 1)
    return b_s0 + tl.sum(b_exp, 1), b_s1, b_s2 + tl.sum(b_exp * b_d * b_d, 1)


@triton.jit
def token_scores(
    p_u,
    p_teacher_ids,
    p_lp,
    p_log_tail,
    p_label,
    p_top,
    p_s0,
    p_s1,
    p_s2,
    p_lse_rest,
    p_lse_base,
    p_best,
    p_best_id,
    p_n_above,
    p_scores,
    p_argmax,
    p_rank,
    n,
    ld,
    K,
    S,
    T: tl.float64,
    floor: tl.float64,
    BN: tl.constexpr,
    SB: tl.constexpr,
):
    """The fields of RowScores (row_scores.py) of each row.

    Args:
        p_u: [n, S], u of the slots, NEG if absent. S = K, or K + 1 with a slot of the label.
        p_teacher_ids: int64 [n, K], distinct, −1 in empty slots. p_lp: [n, K]. p_log_tail: [n]. All
            None without a teacher: K = 0.
        p_label: int64 [n] or None, negative without a label.
        p_top: [n], max z outside the slots. p_s0, p_s1, p_s2: [n], Σ e^d d^i there, d = z − top.
        p_lse_rest, p_lse_base: [n], their log-sum-exp at T and at T = 1.
        p_best: [n, 2], the two largest u there; p_best_id, p_n_above: int64 [n], the id of the
            first, and how many exceed the label's.
        p_scores: [10, n], row stride ld, receives lse, entropy, varentropy, max_logprob, margin,
            nll, forward_kl, student_mass, hellinger, acceptance_rate; the last four with a teacher,
            nll with a label.
        p_argmax: int64 [n]. p_rank: int64 [n] or None.
        floor: the smallest log p.

    Program i owns rows [i·BN, (i + 1)·BN) and walks the slots in tiles of SB.
    """
    DT: tl.constexpr = p_u.dtype.element_ty
    T = tl.full([], T, DT)
    inv_T = 1.0 / T
    floor = tl.full([], floor, DT)
    none = tl.full([], NEG, DT)
    o_rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m_rows = o_rows < n
    b_rest = tl.load(p_lse_rest + o_rows, mask=m_rows, other=0.0)
    b_base = tl.load(p_lse_base + o_rows, mask=m_rows, other=0.0)
    b_best = tl.load(p_best + 2 * o_rows, mask=m_rows, other=0.0)
    b_second = tl.load(p_best + 2 * o_rows + 1, mask=m_rows, other=0.0)
    b_best_id = tl.load(p_best_id + o_rows, mask=m_rows, other=0)
    b_label = tl.full([BN], -1, tl.int64)
    b_u_label = tl.full([BN], NEG, DT)
    b_rank = tl.zeros([BN], tl.int64)
    if p_label is not None:
        b_label = tl.load(p_label + o_rows, mask=m_rows, other=-1)
        b_u_label = tl.load(p_u + o_rows * S + K, mask=m_rows, other=none)
        b_rank = tl.load(p_n_above + o_rows, mask=m_rows, other=0)

    b_n_label = tl.zeros([BN], tl.int32)
    b_max = tl.full([BN], NEG, DT)
    b_sum = tl.zeros([BN], DT)
    b_base_max = b_max
    b_base_sum = b_sum
    if p_lp is not None:
        for i_slot in range(0, K, SB):
            o_slots = i_slot + tl.arange(0, SB)
            m_in = m_rows[:, None] & (o_slots < K)[None, :]
            b_u = tl.load(p_u + o_rows[:, None] * S + o_slots[None, :], mask=m_in, other=none)
            b_ids = tl.load(
                p_teacher_ids + o_rows[:, None] * K + o_slots[None, :], mask=m_in, other=-1
            )
            b_max, b_sum = add_tile(b_max, b_sum, tl.where(b_u < ABSENT, none, b_u * inv_T))
            b_base_max, b_base_sum = add_tile(b_base_max, b_base_sum, b_u)
            b_n_label += tl.sum(((b_ids >= 0) & (b_ids == b_label[:, None])).to(tl.int32), 1)
            b_rank += tl.sum((b_u > b_u_label[:, None]).to(tl.int64), 1)
            b_first = tl.max(b_u, 1)
            i_first = tl.min(tl.where(b_u == b_first[:, None], o_slots[None, :], i_slot + SB), 1)
            m_first = o_slots[None, :] == i_first[:, None]
            b_next = tl.max(tl.where(m_first, none, b_u), 1)
            b_second = tl.maximum(tl.minimum(b_best, b_first), tl.maximum(b_second, b_next))
            b_first_id = tl.sum(tl.where(m_first, b_ids, 0), 1)
            b_best_id = tl.where(b_first > b_best, b_first_id, b_best_id)
            b_best = tl.maximum(b_best, b_first)
    m_new = (b_label >= 0) & (b_n_label == 0)
    b_u_new = tl.where(m_new, b_u_label, none)
    b_second = tl.maximum(tl.minimum(b_best, b_u_new), b_second)
    b_best_id = tl.where(b_u_new > b_best, b_label, b_best_id)
    b_best = tl.maximum(b_best, b_u_new)
    b_z_new = tl.where(b_u_new < ABSENT, none, b_u_new * inv_T)
    b_lse_slots = b_max + tl.log(tl.where(b_max < ABSENT, 1.0, b_sum))
    b_lse_tail = add_exp(b_rest, b_z_new)
    b_lse = add_exp(b_lse_tail, b_lse_slots)

    b_top = b_best * inv_T
    b_rest_top = tl.load(p_top + o_rows, mask=m_rows, other=0.0)
    b_s0 = tl.load(p_s0 + o_rows, mask=m_rows, other=1.0)
    b_s1 = tl.load(p_s1 + o_rows, mask=m_rows, other=0.0)
    b_s2 = tl.load(p_s2 + o_rows, mask=m_rows, other=0.0)
    b_s0, b_s1, b_s2 = move_sums(b_s0, b_s1, b_s2, b_rest_top, b_top, 2)
    b_s0, b_s1, b_s2 = add_moments(b_s0, b_s1, b_s2, b_z_new[:, None], b_top)
    b_kl = tl.zeros([BN], DT)
    b_hellinger = b_kl
    b_tv = b_kl
    b_inside = b_kl
    b_p_sum = tl.zeros([BN], tl.float64)
    if p_lp is not None:
        for i_slot in range(0, K, SB):
            o_slots = i_slot + tl.arange(0, SB)
            m_in = m_rows[:, None] & (o_slots < K)[None, :]
            o_tile = o_rows[:, None] * K + o_slots[None, :]
            b_u = tl.load(p_u + o_rows[:, None] * S + o_slots[None, :], mask=m_in, other=none)
            b_z = tl.where(b_u < ABSENT, none, b_u * inv_T)
            b_s0, b_s1, b_s2 = add_moments(b_s0, b_s1, b_s2, b_z, b_top)
            m_ids = tl.load(p_teacher_ids + o_tile, mask=m_in, other=-1) >= 0
            b_lp = tl.load(p_lp + o_tile, mask=m_in, other=0.0).to(DT)
            b_lp, b_lq = log_probs(b_z, b_lp, m_ids, b_lse, b_lse, floor, False)
            b_inside += tl.sum(tl.where(m_in, tl.exp(b_lq), 0.0), 1)
            b_phi, _psi = forward_kl(b_lp, b_lq, 0.0, 0.0, 0.0, 0.0)
            b_kl += tl.sum(tl.where(m_in, b_phi, 0.0), 1)
            b_phi, _psi = hellinger(b_lp, b_lq, 0.0, 0.0, 0.0, 0.0)
            b_hellinger += tl.sum(tl.where(m_in, b_phi, 0.0), 1)
            b_phi, _psi = tvd(b_lp, b_lq, 0.0, 0.0, 0.0, 0.0)
            b_tv += tl.sum(tl.where(m_in, b_phi, 0.0), 1)
            b_p_sum += tl.sum(tl.where(m_in, tl.exp(b_lp.to(tl.float64)), 0.0), 1)

    b_mean = b_s1 / b_s0
    b_variance = b_s2 / b_s0 - b_mean * b_mean
    tl.store(p_scores + o_rows, b_lse, mask=m_rows)
    tl.store(p_scores + ld + o_rows, tl.log(b_s0) - b_mean, mask=m_rows)
    b_variance = tl.where(b_variance < 0.0, 0.0, b_variance)  # a NaN stays
    tl.store(p_scores + 2 * ld + o_rows, b_variance, mask=m_rows)
    tl.store(p_scores + 3 * ld + o_rows, b_top - b_lse, mask=m_rows)
    tl.store(p_scores + 4 * ld + o_rows, (b_best - b_second) * inv_T, mask=m_rows)
    tl.store(p_argmax + o_rows, b_best_id, mask=m_rows)
    if p_label is not None:
        b_lse1 = b_base_max + tl.log(tl.where(b_base_max < ABSENT, 1.0, b_base_sum))
        b_lse1 = add_exp(add_exp(b_base, b_u_new), b_lse1)
        b_nll = tl.where(b_label >= 0, b_lse1 - b_u_label, 0.0)
        tl.store(p_scores + 5 * ld + o_rows, b_nll, mask=m_rows)
        # The label's logit comes from another product; if it is the argmax, its rank is 0.
        m_top = (b_label < 0) | (b_best_id == b_label)
        tl.store(p_rank + o_rows, tl.where(m_top, 0, b_rank), mask=m_rows)
    if p_lp is not None:
        # As the bucket tail of token_loss.
        m_none = b_lse_tail < ABSENT
        b_lq = tl.where(b_inside < 0.5, log1p(-tl.minimum(b_inside, 0.5)), b_lse_tail - b_lse)
        b_lq = tl.where(m_none, floor, b_lq)
        b_lp = tl.load(p_log_tail + o_rows, mask=m_rows, other=0.0).to(DT)
        b_lp = tl.where(m_none, floor, b_lp)
        b_p_sum += tl.exp(b_lp.to(tl.float64))
        b_phi, _psi = forward_kl(b_lp, b_lq, 0.0, 0.0, 0.0, 0.0)
        tl.store(p_scores + 6 * ld + o_rows, b_kl + b_phi, mask=m_rows)
        tl.store(p_scores + 7 * ld + o_rows, tl.exp(b_lse_slots - b_lse), mask=m_rows)
        b_phi, _psi = hellinger(b_lp, b_lq, 0.0, 0.0, 0.0, 0.0)
        b_hellinger += b_phi + (0.5 * (1.0 - b_p_sum)).to(DT)
        b_hellinger = tl.where(b_hellinger < 0.0, 0.0, b_hellinger)
        tl.store(p_scores + 8 * ld + o_rows, tl.sqrt(b_hellinger), mask=m_rows)
        b_phi, _psi = tvd(b_lp, b_lq, 0.0, 0.0, 0.0, 0.0)
        b_alpha = 1.0 - (b_tv + b_phi)
        b_alpha = tl.where(b_alpha < 0.0, 0.0, tl.where(b_alpha > 1.0, 1.0, b_alpha))
        tl.store(p_scores + 9 * ld + o_rows, b_alpha, mask=m_rows)
