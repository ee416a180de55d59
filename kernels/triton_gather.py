"""K rows of W per token: their logits, their share of dX, their dW. No pass over the head.

    z[n, s] = softcap·tanh(logit_scale · (W[ids_ns] · x_n + b) / softcap) / T
    dX_n = Σ_s g_ns W[ids_ns]              dW_v = Σ_{(n, s): ids_ns = v} g_ns x_n

All three are bound by reading N·S rows of H values (of W for the first two, of x for dW). For dW
the N·S entries are sorted by id; a program sums the runs that start among its entries, in order,
and writes each row once. Runs are cut at every multiple of BC entries, or a frequent token would be
the work of one program; the parts are added in order: no atomics, deterministic, no length read on
the host.
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
    LOST: tl.constexpr,
    SB: tl.constexpr,
    BH: tl.constexpr,
):
    """dX_n = base_n + Σ_s g_ns W[ids_ns], summed in the type of g and rounded once.

    Args:
        p_w: [V, H], row stride ld_w. p_ids: int64 [n, S], −1 in empty slots. p_g: [n, S], d(W x).
        p_base: [n, H] or None, row stride ld_base. p_dx: [n, H], the result, row stride ld_dx.
        LOST: take what g loses when it is rounded to the type of p_w, in place of g.

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
        if LOST:
            b_g -= round_to(b_g, p_w.dtype.element_ty).to(DT)
        b_w = tl.load(
            p_w + b_ids[:, None] * ld_w + o_h[None, :],
            mask=m_ids[:, None] & (o_h < H)[None, :],
            other=0.0,
        )
        b_acc += tl.sum(b_w.to(DT) * b_g[:, None], 0)
    tl.store(p_dx + i_row * ld_dx + o_h, round_to(b_acc, p_dx.dtype.element_ty), mask=o_h < H)


@triton.jit
def _add_entry(
    b_dw,
    b_db,
    p_x,
    p_tokens,
    p_g,
    i_sorted,
    o_h,
    H,
    ld_x,
):
    """The sums with the entry at i_sorted added."""
    i_token = tl.load(p_tokens + i_sorted).to(tl.int64)
    b_g = tl.load(p_g + i_sorted)
    b_x = tl.load(p_x + i_token * ld_x + o_h, mask=o_h < H, other=0.0)
    return b_dw + b_g * b_x.to(b_g.dtype), b_db + b_g


@triton.jit
def _write_row(
    b_dw, b_db, p_dw, p_db, i_id, m_row, i_column_block, o_h, H, ld_dw, ADD: tl.constexpr
):
    """Write the sums of one id, or add them, if m_row."""
    if p_dw is not None:
        m_write = m_row & (o_h < H)
        p_row = p_dw + i_id.to(tl.int64) * ld_dw + o_h
        if ADD:
            b_dw += tl.load(p_row, mask=m_write, other=0.0).to(b_dw.dtype)
        tl.store(p_row, round_to(b_dw, p_dw.dtype.element_ty), mask=m_write)
    if p_db is not None:
        m_once = m_row & (i_column_block == 0)
        if ADD:
            b_db += tl.load(p_db + i_id, mask=m_once, other=0.0).to(b_db.dtype)
        tl.store(p_db + i_id, round_to(b_db, p_db.dtype.element_ty), mask=m_once)


@triton.jit
def sum_parts(
    p_x,
    p_ids,
    p_tokens,
    p_g,
    p_parts,
    p_db_parts,
    E,
    H,
    ld_x,
    BC: tl.constexpr,
    BH: tl.constexpr,
):
    """Part b of a run that began before entry b·BC: Σ g_e x_e and Σ g_e over its entries there.

    Args:
        p_x, p_ids, p_tokens, p_g: as in sum_runs.
        p_parts: [⌈E / BC⌉, H] or None. p_db_parts: [⌈E / BC⌉]. Other parts are not written.

    Program (b, j) owns one block of BC entries and BH columns.
    """
    i_block = tl.program_id(0) + 1  # no run began before block 0
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    i_first = i_block * BC
    i_id = tl.load(p_ids + i_first)
    if (i_id >= 0) & (tl.load(p_ids + i_first - 1) == i_id):
        o_entries = i_first + tl.arange(0, BC)
        b_ids = tl.load(p_ids + o_entries, mask=o_entries < E, other=-1)
        n_run = tl.sum((b_ids == i_id).to(tl.int32), 0)  # sorted: they come first
        DT: tl.constexpr = p_g.dtype.element_ty
        b_dw = tl.zeros([BH], DT)
        b_db = tl.zeros([], DT)
        for i_sorted in range(i_first, i_first + n_run):
            b_dw, b_db = _add_entry(b_dw, b_db, p_x, p_tokens, p_g, i_sorted, o_h, H, ld_x)
        if p_parts is not None:
            tl.store(p_parts + i_block.to(tl.int64) * H + o_h, b_dw, mask=o_h < H)
        tl.store(p_db_parts + i_block, b_db, mask=tl.program_id(1) == 0)


@triton.jit
def sum_runs(
    p_x,
    p_ids,
    p_tokens,
    p_g,
    p_starts,
    p_parts,
    p_db_parts,
    p_dw,
    p_db,
    E,
    H,
    ld_x,
    ld_dw,
    ADD: tl.constexpr,
    BE: tl.constexpr,
    BC: tl.constexpr,
    BH: tl.constexpr,
):
    """dW_v = Σ g_e x_e and db_v = Σ g_e over the entries e with id v, written once per id.

    Args:
        p_x: [N, H] hidden states, row stride ld_x.
        p_ids: int32 [E], the ids of all N·S entries, sorted; −1 in empty slots.
        p_tokens: int32 [E], the token of each sorted entry. p_g: [E], its d(W x).
        p_starts: int32 [⌈E / BE⌉ + 1]: where the first run of an id starts at or after each block
            of BE entries; E if none does.
        p_parts, p_db_parts: what sum_parts wrote: the runs beyond a multiple of BC.
        p_dw: [V, H] or None, row stride ld_dw. p_db: [V] or None.
        ADD: add to p_dw and p_db instead of writing.

    Program (b, j) owns the runs that start in block b of BE entries, and BH columns of dW. BC is a
    multiple of BE: only the last of its runs has parts.
    """
    i_block = tl.program_id(0)
    i_column_block = tl.program_id(1)
    o_h = i_column_block * BH + tl.arange(0, BH)
    DT: tl.constexpr = p_g.dtype.element_ty
    i_first = tl.load(p_starts + i_block)  # the first run that starts in this block …
    i_end = tl.load(p_starts + i_block + 1)  # … up to the first that starts after it
    i_part = (i_block * BE) // BC + 1
    i_cut = tl.minimum(i_end, i_part * BC)
    b_dw = tl.zeros([BH], DT)
    b_db = tl.zeros([], DT)
    for i_sorted in range(i_first, i_cut):
        i_id = tl.load(p_ids + i_sorted)
        b_dw, b_db = _add_entry(b_dw, b_db, p_x, p_tokens, p_g, i_sorted, o_h, H, ld_x)
        m_last = (i_sorted + 1 == E) | (
            tl.load(p_ids + i_sorted + 1, mask=i_sorted + 1 < E, other=-1) != i_id
        )
        _write_row(b_dw, b_db, p_dw, p_db, i_id, m_last, i_column_block, o_h, H, ld_dw, ADD)
        b_dw = tl.where(m_last, 0.0, b_dw)
        b_db = tl.where(m_last, 0.0, b_db)
    m_cut = (i_first < i_cut) & (i_cut < i_end)
    if m_cut:
        for i_next in range(i_part, tl.cdiv(i_end, BC)):
            if p_parts is not None:
                i_row = tl.full([], i_next, tl.int64)
                b_dw += tl.load(p_parts + i_row * H + o_h, mask=o_h < H, other=0.0)
            b_db += tl.load(p_db_parts + i_next)
        i_id = tl.load(p_ids + i_cut)
        _write_row(b_dw, b_db, p_dw, p_db, i_id, m_cut, i_column_block, o_h, H, ld_dw, ADD)
