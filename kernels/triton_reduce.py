"""Reduce rows of raw logits to running statistics; move out the slots' logits.

    top = max u;  s_i = Σ e^{z − top / T} (z − top / T)^i,  z = u / T,  i = 0 .. 2

A program walks one row and reads it once: 4 bytes and 1.25 exp per logit. It keeps BV / LANE sets
of statistics, one per lane of LANE neighboring columns, so that a loop step has no barrier and no
exchange between threads; the sets are merged after the loop, in a fixed order. Slots are first
copied out and overwritten with NEG: the tail is summed without them, and a stored chunk marks where
they are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import ABSENT, NEG, shape_logits

LANE = tl.constexpr(4)  # columns: one 16-byte load of fp32
STEPS = tl.constexpr(64)  # of one lane that are read at once
LOWEST = tl.constexpr(-1e15)  # below any logit, far above NEG and NEG / T


@triton.jit
def move_sums(b_s0, b_s1, b_s2, b_from, b_to, MOMENTS: tl.constexpr):
    """Sums about the maximum `from` as sums about `to` ≥ from; zeros if `from` is NEG."""
    m_empty = b_from < ABSENT
    b_shift = tl.where(m_empty, 0.0, b_from - b_to)
    b_decay = tl.where(m_empty, 0.0, tl.exp(b_shift))
    if MOMENTS >= 2:
        b_s2 = b_decay * (b_s2 + 2 * b_shift * b_s1 + b_shift * b_shift * b_s0)
    if MOMENTS >= 1:
        b_s1 = b_decay * (b_s1 + b_shift * b_s0)
    return b_decay * b_s0, b_s1, b_s2


@triton.jit
def reduce_rows(
    p_raw,
    p_bias,
    p_ids,
    p_label_u,
    p_u_slots,
    p_top,
    p_sums,
    p_lse,
    p_base_sum,
    p_base_lse,
    p_best,
    p_best_id,
    p_n_above,
    ld_raw,
    v,
    v0,
    n,
    S,
    scale: tl.float64,
    cap: tl.float64,
    inv_T: tl.float64,
    CAP: tl.constexpr,
    MOMENTS: tl.constexpr,
    BASE: tl.constexpr,
    BEST: tl.constexpr,
    BV: tl.constexpr,
    SB: tl.constexpr,
):
    """Add v columns of logits to the running statistics of each row; move out the slots' logits.

        top' = max(top, max u);  s_i' = Σ e^{z − top' / T} (z − top' / T)^i,  i = 0 .. MOMENTS

    Args:
        p_raw: [n, v] raw products, row stride ld_raw; slots inside it become NEG. Rows have memory
            for a multiple of 16 columns.
        p_bias: [V] or None. p_ids: int64 [n, S], −1 in empty slots.
        p_label_u: [n] or None, the label's u; needed for p_n_above.
        p_u_slots: [n, S], receives u ≥ NEG of the slots in these columns, and first NEG elsewhere.
        p_top: [n], running maximum of u. p_sums: [MOMENTS + 1, n], running sums s_i.
        p_lse: [n], receives top / T + log s_0, NEG without a token.
        p_base_sum: [n], running Σ e^{u − top}; p_base_lse: [n], as p_lse at T = 1; if BASE.
        p_best: [n, 2], the two largest u; p_best_id: int64 [n], the id of the first; p_n_above:
            int64 [n], how many u exceed the label's; if BEST.
        v0: the first column. 0 starts the statistics: nothing is read then.
        n: row stride of p_sums.

    Program i owns row i and walks it in blocks of BV columns, its slots in blocks of SB.
    """
    i_row = tl.program_id(0)
    p_row = p_raw + i_row.to(tl.int64) * ld_raw
    DT: tl.constexpr = p_raw.dtype.element_ty
    LANES: tl.constexpr = BV // LANE
    scale = tl.full([], scale, DT)
    inv_T = tl.full([], inv_T, DT)
    p_row_ids = p_ids + i_row.to(tl.int64) * S
    p_row_slots = p_u_slots + i_row.to(tl.int64) * S
    if S > 0:
        for i_slot in range(0, S, SB):
            o_slots = i_slot + tl.arange(0, SB)
            b_ids = tl.load(p_row_ids + o_slots, mask=o_slots < S, other=-1)
            m_inside = (b_ids >= v0) & (b_ids < v0 + v)
            b_raw = tl.load(p_row + (b_ids - v0), mask=m_inside, other=0.0)
            b_u = shape_logits(b_raw, p_bias, b_ids, m_inside, scale, cap, CAP)
            b_u = tl.where(m_inside & ~(b_u < NEG), b_u, NEG)  # a NaN stays
            m_write = m_inside | ((v0 == 0) & (o_slots < S))
            tl.store(p_row_slots + o_slots, b_u, mask=m_write)
        tl.debug_barrier()  # an id may repeat: every slot has read before any is overwritten
        for i_slot in range(0, S, SB):
            o_slots = i_slot + tl.arange(0, SB)
            b_ids = tl.load(p_row_ids + o_slots, mask=o_slots < S, other=-1)
            m_inside = (b_ids >= v0) & (b_ids < v0 + v)
            tl.store(p_row + (b_ids - v0), tl.full([SB], NEG, DT), mask=m_inside)
        tl.debug_barrier()
    o_lane = tl.arange(0, LANES) * LANE
    o_block = o_lane[:, None] + tl.arange(0, LANE)[None, :]
    b_top = tl.full([LANES], NEG, DT)
    b_s0 = tl.zeros([LANES], DT)
    b_s1 = tl.zeros([LANES], DT)
    b_s2 = tl.zeros([LANES], DT)
    b_base = tl.zeros([LANES], DT)
    b_step = tl.zeros([LANES], tl.int32)
    b_n_above = tl.zeros([LANES], tl.int32)
    if BEST and p_label_u is not None:
        b_label_u = tl.load(p_label_u + i_row)
    n_aligned = (v + 15) // 16 * 16  # a mask at an odd v would split each load into four
    for i_col in range(0, v, BV):
        o_cols = i_col + o_block
        b_raw = tl.load(p_row + o_cols, mask=o_cols < n_aligned, other=NEG)
        m_cols = o_cols < v
        m_valid = m_cols & (b_raw > ABSENT)
        b_u = shape_logits(b_raw, p_bias, v0 + o_cols, m_cols, scale, cap, CAP)
        b_u = tl.where(m_valid, b_u, NEG)
        b_highest = tl.max(b_u, 1)
        b_new_top = tl.maximum(b_top, b_highest)
        b_d = b_u * inv_T - tl.maximum(b_new_top * inv_T, LOWEST)[:, None]
        b_d = tl.maximum(b_d, -1e4)  # NEG² would overflow, and e^-1e4 is zero
        b_exp = tl.exp(b_d)
        b_s0, b_s1, b_s2 = move_sums(b_s0, b_s1, b_s2, b_top * inv_T, b_new_top * inv_T, MOMENTS)
        b_s0 += tl.sum(b_exp, 1)
        if MOMENTS >= 1:
            b_s1 += tl.sum(b_exp * b_d, 1)
        if MOMENTS >= 2:
            b_s2 += tl.sum(b_exp * b_d * b_d, 1)
        if BASE:
            b_base, _, _ = move_sums(b_base, b_base, b_base, b_top, b_new_top, 0)
            b_base += tl.sum(tl.exp(b_u - tl.maximum(b_new_top, LOWEST)[:, None]), 1)
        if BEST:
            b_step = tl.where(b_highest > b_top, i_col, b_step)
            if p_label_u is not None:
                b_n_above += tl.sum((b_u > b_label_u).to(tl.int32), 1)
        b_top = b_new_top
    m_old = v0 > 0
    b_old_top = tl.load(p_top + i_row, mask=m_old, other=NEG)
    b_highest = tl.max(b_top, 0)
    b_new_top = tl.maximum(b_old_top, b_highest)
    tl.store(p_top + i_row, b_new_top)
    b_old_s0 = tl.load(p_sums + i_row, mask=m_old, other=0.0)
    b_old_s1 = b_old_s0
    b_old_s2 = b_old_s0
    if MOMENTS >= 1:
        b_old_s1 = tl.load(p_sums + n + i_row, mask=m_old, other=0.0)
    if MOMENTS >= 2:
        b_old_s2 = tl.load(p_sums + 2 * n + i_row, mask=m_old, other=0.0)
    b_s0, b_s1, b_s2 = move_sums(b_s0, b_s1, b_s2, b_top * inv_T, b_new_top * inv_T, MOMENTS)
    b_old_s0, b_old_s1, b_old_s2 = move_sums(
        b_old_s0, b_old_s1, b_old_s2, b_old_top * inv_T, b_new_top * inv_T, MOMENTS
    )
    b_s0_all = b_old_s0 + tl.sum(b_s0, 0)
    tl.store(p_sums + i_row, b_s0_all)
    m_none = b_new_top < ABSENT
    b_lse = b_new_top * inv_T + tl.log(tl.where(m_none, 1.0, b_s0_all))
    tl.store(p_lse + i_row, tl.where(m_none, NEG, b_lse))
    if MOMENTS >= 1:
        tl.store(p_sums + n + i_row, b_old_s1 + tl.sum(b_s1, 0))
    if MOMENTS >= 2:
        tl.store(p_sums + 2 * n + i_row, b_old_s2 + tl.sum(b_s2, 0))
    if BASE:
        b_old = tl.load(p_base_sum + i_row, mask=m_old, other=0.0)
        b_base, _, _ = move_sums(b_base, b_base, b_base, b_top, b_new_top, 0)
        b_old, _, _ = move_sums(b_old, b_old, b_old, b_old_top, b_new_top, 0)
        b_base_all = b_old + tl.sum(b_base, 0)
        tl.store(p_base_sum + i_row, b_base_all)
        b_lse = b_new_top + tl.log(tl.where(m_none, 1.0, b_base_all))
        tl.store(p_base_lse + i_row, tl.where(m_none, NEG, b_lse))
    if BEST:
        # Of equal logits the smallest id, in the first step of its lane that had it. The second is
        # the top of another lane, or in this one, which is read again.
        i_first = tl.min(tl.where(b_top == b_highest, b_step + o_lane, v), 0)
        i_lane = i_first % BV
        b_next = tl.max(tl.where(o_lane == i_lane, NEG, b_top), 0)
        i_best = i_first + LANE - 1
        for i_col in range(0, v, STEPS * BV):
            o_cols = (i_col + i_lane) + tl.arange(0, STEPS)[:, None] * BV
            o_cols += tl.arange(0, LANE)[None, :]
            b_raw = tl.load(p_row + o_cols, mask=o_cols < v, other=NEG)
            m_valid = b_raw > ABSENT
            b_u = shape_logits(b_raw, p_bias, v0 + o_cols, m_valid, scale, cap, CAP)
            b_u = tl.where(m_valid, b_u, NEG)
            i_best = tl.minimum(i_best, tl.min(tl.where(b_u == b_highest, o_cols, i_best)))
            b_next = tl.maximum(b_next, tl.max(tl.where(o_cols == i_best, NEG, b_u)))
        b_old_second = tl.load(p_best + 2 * i_row + 1, mask=m_old, other=NEG)
        b_old_id = tl.load(p_best_id + i_row, mask=m_old, other=0)
        m_better = b_highest > b_old_top
        tl.store(p_best + 2 * i_row, b_new_top)
        tl.store(
            p_best + 2 * i_row + 1,
            tl.where(m_better, tl.maximum(b_old_top, b_next), tl.maximum(b_old_second, b_highest)),
        )
        tl.store(p_best_id + i_row, tl.where(m_better, (v0 + i_best).to(tl.int64), b_old_id))
        if p_label_u is not None:
            b_old_n = tl.load(p_n_above + i_row, mask=m_old, other=0)
            tl.store(p_n_above + i_row, b_old_n + tl.sum(b_n_above, 0))
