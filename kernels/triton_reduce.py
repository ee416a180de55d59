"""Reduce a slab of raw logits into running statistics per row; move out the slots' logits.

    top' = max(top, max z);  s_i' = Σ e^{z − top'} (z − top')^i over the slab and before, i = 0 .. 2

The slab [n, v] was just written by the library GEMM and is still in L2. A program reads its row
once: 4 bytes and an exp per logit. Slots are first copied out and overwritten with NEG in the slab:
the tail is summed without them, and a stored chunk marks where they are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import ABSENT, NEG, shape_logits


@triton.jit
def rescale(b_old_max, b_new_max):
    """(shift, decay) of running sums whose maximum goes from old to new."""
    m_empty = b_old_max < ABSENT
    b_shift = tl.where(m_empty, 0.0, b_old_max - b_new_max)
    return b_shift, tl.where(m_empty, 0.0, tl.exp(b_shift))


@triton.jit
def reduce_slab(
    p_slab,
    p_bias,
    p_ids,
    p_label_u,
    p_u_slots,
    p_max,
    p_sums,
    p_base_max,
    p_base_sum,
    p_best,
    p_best_id,
    p_n_above,
    ld_slab,
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
    """Add one slab of logits to the running statistics of each row; move out the slots' logits.

        top' = max(top, max z);  s_i' = Σ e^{z − top'} (z − top')^i,  i = 0 .. MOMENTS

    Args:
        p_slab: [n, v] raw products, row stride ld_slab; slots inside it become NEG.
        p_bias: [V] or None. p_ids: int64 [n, S], −1 in empty slots.
        p_label_u: [n] or None, the label's u; needed for p_n_above.
        p_u_slots: [n, S], receives u of the slots in this slab.
        p_max: [n], running maximum of z. p_sums: [MOMENTS + 1, n], running sums s_i.
        p_base_max, p_base_sum: [n] each, the same at T = 1, if BASE.
        p_best: [n, 2], the two largest u; p_best_id: int64 [n], the id of the first; p_n_above:
            int64 [n], how many u exceed the label's; if BEST.
        v0: the first column of the slab. 0 starts the statistics: nothing is read then.
        n: row stride of p_sums.

    Program i owns row i: BV ≥ v columns at once, slots in blocks of SB.
    """
    i_row = tl.program_id(0)
    p_row = p_slab + i_row.to(tl.int64) * ld_slab
    DT: tl.constexpr = p_slab.dtype.element_ty
    scale = tl.full([], scale, DT)
    inv_T = tl.full([], inv_T, DT)
    p_row_ids = p_ids + i_row.to(tl.int64) * S
    p_row_slots = p_u_slots + i_row.to(tl.int64) * S
    if S > 0:
        for i_slot in range(0, S, SB):
            o_slots = i_slot + tl.arange(0, SB)
            b_ids = tl.load(p_row_ids + o_slots, mask=o_slots < S, other=-1)
            m_in_slab = (b_ids >= v0) & (b_ids < v0 + v)
            b_raw = tl.load(p_row + (b_ids - v0), mask=m_in_slab, other=0.0)
            tl.store(
                p_row_slots + o_slots,
                shape_logits(b_raw, p_bias, b_ids, m_in_slab, scale, cap, CAP),
                mask=m_in_slab,
            )
        tl.debug_barrier()  # an id may repeat: every slot has read before any is overwritten
        for i_slot in range(0, S, SB):
            o_slots = i_slot + tl.arange(0, SB)
            b_ids = tl.load(p_row_ids + o_slots, mask=o_slots < S, other=-1)
            m_in_slab = (b_ids >= v0) & (b_ids < v0 + v)
            tl.store(p_row + (b_ids - v0), tl.full([SB], NEG, DT), mask=m_in_slab)
        tl.debug_barrier()
    o_cols = tl.arange(0, BV)
    b_raw = tl.load(p_row + o_cols, mask=o_cols < v, other=NEG)
    m_valid = b_raw > ABSENT
    b_u = tl.where(m_valid, shape_logits(b_raw, p_bias, v0 + o_cols, m_valid, scale, cap, CAP), NEG)
    b_z = tl.where(m_valid, b_u * inv_T, NEG)
    is_first = v0 == 0
    b_old_max = tl.load(p_max + i_row, mask=not is_first, other=NEG)
    b_new_max = tl.maximum(b_old_max, tl.max(b_z, 0))
    b_d = tl.where(m_valid, b_z - b_new_max, 0.0)
    b_exp = tl.where(m_valid, tl.exp(b_d), 0.0)
    b_shift, b_decay = rescale(b_old_max, b_new_max)
    b_s0 = tl.load(p_sums + i_row, mask=not is_first, other=0.0)
    tl.store(p_max + i_row, b_new_max)
    tl.store(p_sums + i_row, b_decay * b_s0 + tl.sum(b_exp, 0))
    if MOMENTS >= 1:
        b_s1 = tl.load(p_sums + n + i_row, mask=not is_first, other=0.0)
        b_exp *= b_d
        tl.store(p_sums + n + i_row, b_decay * (b_s1 + b_shift * b_s0) + tl.sum(b_exp, 0))
    if MOMENTS >= 2:
        b_s2 = tl.load(p_sums + 2 * n + i_row, mask=not is_first, other=0.0)
        b_exp *= b_d
        b_moved = b_s2 + 2 * b_shift * b_s1 + b_shift * b_shift * b_s0
        tl.store(p_sums + 2 * n + i_row, b_decay * b_moved + tl.sum(b_exp, 0))
    if BASE:
        b_old_max = tl.load(p_base_max + i_row, mask=not is_first, other=NEG)
        b_new_max = tl.maximum(b_old_max, tl.max(b_u, 0))
        _, b_decay = rescale(b_old_max, b_new_max)
        b_s0 = tl.load(p_base_sum + i_row, mask=not is_first, other=0.0)
        b_exp = tl.where(m_valid, tl.exp(tl.where(m_valid, b_u - b_new_max, 0.0)), 0.0)
        tl.store(p_base_max + i_row, b_new_max)
        tl.store(p_base_sum + i_row, b_decay * b_s0 + tl.sum(b_exp, 0))
    if BEST:
        b_best = tl.load(p_best + 2 * i_row, mask=not is_first, other=NEG)
        b_second = tl.load(p_best + 2 * i_row + 1, mask=not is_first, other=NEG)
        b_best_id = tl.load(p_best_id + i_row, mask=not is_first, other=0)
        b_slab_best = tl.max(b_u, 0)
        i_slab_best = tl.argmax(b_u, 0)
        b_slab_second = tl.max(tl.where(o_cols == i_slab_best, NEG, b_u), 0)
        m_better = b_slab_best > b_best
        tl.store(p_best + 2 * i_row, tl.maximum(b_slab_best, b_best))
        tl.store(
            p_best + 2 * i_row + 1,
            tl.where(
                m_better, tl.maximum(b_best, b_slab_second), tl.maximum(b_second, b_slab_best)
            ),
        )
        tl.store(p_best_id + i_row, tl.where(m_better, (i_slab_best + v0).to(tl.int64), b_best_id))
        if p_label_u is not None:
            b_n_above = tl.load(p_n_above + i_row, mask=not is_first, other=0)
            b_n_more = tl.sum((m_valid & (b_u > tl.load(p_label_u + i_row))).to(tl.int32), 0)
            tl.store(p_n_above + i_row, b_n_above + b_n_more)
