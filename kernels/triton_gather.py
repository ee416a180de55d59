"""K rows of W per token: their logits, their share of dX, their dW. No pass over the head.

    z[n, s] = softcap·tanh(logit_scale · (W[ids_ns] · x_n + b) / softcap) / T
    dX_n = Σ_s g_ns W[ids_ns]              dW_v = Σ_{(n, s): ids_ns = v} g_ns x_n

All three are bound by reading N·S rows of H values (of W for the first two, of x for dW). For dW
the N·S entries are sorted by id; a program sums the runs that start among its entries, in order,
and writes each row once: no atomics, no partial sums, deterministic, no length read on the host.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import NEG, round_to, shape_logits


@triton.jit
def gather_rows(
    p_x,
    p_w,
    p_bias,
    p_ids,
    p_z,
    S,
    H,
    ld_x,
    ld_w,
    scale: tl.float64,
    cap: tl.float64,
    inv_T: tl.float64,
    CAP: tl.constexpr,
    SB: tl.constexpr,
    BH: tl.constexpr,
):
    """z[n, s] = softcap·tanh(logit_scale · (W[ids_ns] · x_n + b) / softcap) / T, NEG if empty.

    Args:
        p_x: [n, H] hidden states, row stride ld_x. p_w: [V, H], row stride ld_w.
        p_bias: [V] or None.
        p_ids: int64 [n, S], −1 in empty slots. p_z: [n, S], the result.

    Program (i, j) owns SB slots of row i and walks H in blocks of BH.
    """
    i_row = tl.program_id(0).to(tl.int64)
    o_slots = tl.program_id(1) * SB + tl.arange(0, SB)
    DT: tl.constexpr = p_z.dtype.element_ty
    b_ids = tl.load(p_ids + i_row * S + o_slots, mask=o_slots < S, other=-1).to(tl.int64)
    m_ids = b_ids >= 0
    b_acc = tl.zeros([SB], DT)
    for i_h in range(0, H, BH):
        o_h = i_h + tl.arange(0, BH)
        b_x = tl.load(p_x + i_row * ld_x + o_h, mask=o_h < H, other=0.0).to(DT)
        b_w = tl.load(
            p_w + b_ids[:, None] * ld_w + o_h[None, :],
            mask=m_ids[:, None] & (o_h < H)[None, :],
            other=0.0,
        )
        b_acc += tl.sum(b_w.to(DT) * b_x[None, :], 1)
    b_z = shape_logits(b_acc, p_bias, b_ids, m_ids, tl.full([], scale, DT), cap, CAP)
    b_z = tl.where(m_ids, b_z * tl.full([], inv_T, DT), NEG)
    tl.store(p_z + i_row * S + o_slots, b_z, mask=o_slots < S)


@triton.jit
def scatter_hidden(
    p_w,
    p_ids,
    p_g,
    p_base,
    p_dx,
    S,
    H,
    ld_w,
    ld_base,
    ld_dx,
    SB: tl.constexpr,
    BH: tl.constexpr,
):
    """dX_n = base_n + Σ_s g_ns W[ids_ns], summed in the type of g and rounded once.

    Args:
        p_w: [V, H], row stride ld_w. p_ids: int64 [n, S], −1 in empty slots. p_g: [n, S], d(W x).
        p_base: [n, H] or None, row stride ld_base. p_dx: [n, H], the result, row stride ld_dx.

    Program (i, j) owns BH columns of row i of dX and walks its slots in blocks of SB.
    """
    i_row = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    DT: tl.constexpr = p_g.dtype.element_ty
    b_acc = tl.zeros([BH], DT)
    if p_base is not None:
        b_acc += tl.load(p_base + i_row * ld_base + o_h, mask=o_h < H, other=0.0)
    for i_slot in range(0, S, SB):
        o_slots = i_slot + tl.arange(0, SB)
        b_ids = tl.load(p_ids + i_row * S + o_slots, mask=o_slots < S, other=-1).to(tl.int64)
        m_ids = b_ids >= 0
        b_g = tl.load(p_g + i_row * S + o_slots, mask=m_ids, other=0.0)
        b_w = tl.load(
            p_w + b_ids[:, None] * ld_w + o_h[None, :],
            mask=m_ids[:, None] & (o_h < H)[None, :],
            other=0.0,
        )
        b_acc += tl.sum(b_w.to(DT) * b_g[:, None], 0)
    tl.store(p_dx + i_row * ld_dx + o_h, round_to(b_acc, p_dx.dtype.element_ty), mask=o_h < H)


@triton.jit
def sum_runs(
    p_x,
    p_ids,
    p_entries,
    p_g,
    p_starts,
    p_dw,
    p_db,
    E,
    S,
    H,
    ld_x,
    ld_dw,
    ADD: tl.constexpr,
    BE: tl.constexpr,
    BH: tl.constexpr,
):
    """dW_v = Σ g_e x_e and db_v = Σ g_e over the entries e with id v, written once per id.

    Args:
        p_x: [N, H] hidden states, row stride ld_x. p_g: [N, S], d(W x).
        p_ids: int64 [E], the ids of all N·S entries, sorted; −1 in empty slots.
        p_entries: int64 [E], the entry n·S + s of each sorted id.
        p_starts: int64 [⌈E / BE⌉ + 1]: where the first run of an id starts at or after each block
            of BE entries; E if none does.
        p_dw: [V, H] or None, row stride ld_dw. p_db: [V] or None.
        ADD: add to p_dw and p_db instead of writing.

    Program (b, j) owns the runs that start in block b of BE entries, and BH columns of dW.
    """
    i_block = tl.program_id(0)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    DT: tl.constexpr = p_g.dtype.element_ty
    i_first = tl.load(p_starts + i_block)  # the first run that starts in this block …
    i_end = tl.load(p_starts + i_block + 1)  # … up to the first that starts after it
    b_dw = tl.zeros([BH], DT)
    b_db = tl.zeros([], DT)
    for i_sorted in range(i_first, i_end):
        i_id = tl.load(p_ids + i_sorted)
        i_entry = tl.load(p_entries + i_sorted)
        b_g = tl.load(p_g + i_entry)
        b_x = tl.load(p_x + (i_entry // S) * ld_x + o_h, mask=o_h < H, other=0.0)
        b_dw += b_g * b_x.to(DT)
        b_db += b_g
        m_last = (i_sorted + 1 == E) | (
            tl.load(p_ids + i_sorted + 1, mask=i_sorted + 1 < E, other=-1) != i_id
        )
        if p_dw is not None:
            m_write = m_last & (o_h < H)
            b_row = b_dw
            if ADD:
                b_row += tl.load(p_dw + i_id * ld_dw + o_h, mask=m_write, other=0.0).to(DT)
            tl.store(
                p_dw + i_id * ld_dw + o_h, round_to(b_row, p_dw.dtype.element_ty), mask=m_write
            )
        if p_db is not None:
            m_once = m_last & (tl.program_id(1) == 0)
            b_bias = b_db
            if ADD:
                b_bias += tl.load(p_db + i_id, mask=m_once, other=0.0).to(DT)
            tl.store(p_db + i_id, round_to(b_bias, p_db.dtype.element_ty), mask=m_once)
        b_dw = tl.where(m_last, 0.0, b_dw)
        b_db = tl.where(m_last, 0.0, b_db)
