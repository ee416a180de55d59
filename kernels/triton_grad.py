"""Raw logits of a row become dz in place: a closed form off the slots, given values in them.

    r = e^{z − lse_rest};  d = r (g_rest + g_mean (1 + z − mean)) + g_base e^{u − lse₁}
    dz = d · (1 − (u / c)²)        (the factors logit_scale and 1/T are in the g already)

4 bytes read and 2 or 4 written per logit. A 16-bit row overwrites the front of its own fp32 row, so
a chunk needs no second buffer: tile t overwrites columns that were already read, with a barrier
between the reads and the writes of a tile.

scale_in_place multiplies a gradient by the upstream scalar, which is 1 in `loss.backward()`: the
host does not read it, and the kernel does not read the gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_common import ABSENT, round_to, shape_logits


@triton.jit
def grad_rows(
    p_raw,
    p_dz,
    p_bias,
    p_ids,
    p_g_slots,
    p_lse_rest,
    p_g_rest,
    p_mean_rest,
    p_g_mean,
    p_lse_base,
    p_g_base,
    ld_raw,
    ld_dz,
    v,
    v0,
    S,
    scale: tl.float64,
    cap: tl.float64,
    inv_T: tl.float64,
    CAP: tl.constexpr,
    BV: tl.constexpr,
    SB: tl.constexpr,
):
    """Raw products become dz: a closed form off the slots, the given gradient in them.

        d = e^{z − lse_rest} (g_rest + g_mean (1 + z − mean_rest)) + g_base e^{u − lse_base}
        dz = d · (1 − (u / c)²)

    Args:
        p_raw: [n, v] raw products, row stride ld_raw; NEG where a slot was moved out.
        p_dz: [n, v] in the type of the head, row stride ld_dz; may be the memory of p_raw.
        p_bias: [V] or None. p_ids: int64 [n, S], distinct, −1 in empty slots.
        p_g_slots: [n, S], d(W x) of the slots.
        p_lse_rest, p_g_rest: [n]. p_mean_rest, p_g_mean: [n] or None. p_lse_base, p_g_base: [n] or
            None. The gradients contain logit_scale and 1/T.
        v0: the first column of the slab.

    Program i owns row i and walks it in blocks of BV columns, then its slots in blocks of SB.
    """
    i_row = tl.program_id(0)
    p_raw += i_row.to(tl.int64) * ld_raw
    p_dz += i_row.to(tl.int64) * ld_dz
    DT: tl.constexpr = p_raw.dtype.element_ty
    scale = tl.full([], scale, DT)
    inv_T = tl.full([], inv_T, DT)
    b_lse = tl.load(p_lse_rest + i_row)
    b_g_rest = tl.load(p_g_rest + i_row)
    for i_col in range(0, v, BV):
        o_cols = i_col + tl.arange(0, BV)
        b_raw = tl.load(p_raw + o_cols, mask=o_cols < v, other=0.0)
        m_valid = (b_raw > ABSENT) & (o_cols < v)
        b_u = shape_logits(b_raw, p_bias, v0 + o_cols, m_valid, scale, cap, CAP)
        b_z = b_u * inv_T
        b_dz = tl.exp(tl.minimum(b_z - b_lse, 0.0))  # above 0 only at slots, overwritten below
        if p_g_mean is not None:
            b_dz *= b_g_rest + tl.load(p_g_mean + i_row) * (
                1.0 + b_z - tl.load(p_mean_rest + i_row)
            )
        else:
            b_dz *= b_g_rest
        if p_g_base is not None:
            b_q1 = tl.exp(tl.minimum(b_u - tl.load(p_lse_base + i_row), 0.0))
            b_dz += tl.load(p_g_base + i_row) * b_q1
        if CAP:
            b_y = b_u / tl.full([], cap, DT)
            b_dz *= 1.0 - b_y * b_y
        tl.debug_barrier()
        tl.store(
            p_dz + o_cols,
            round_to(tl.where(m_valid, b_dz, 0.0), p_dz.dtype.element_ty),
            mask=o_cols < v,
        )
    p_row_ids = p_ids + i_row.to(tl.int64) * S
    p_row_g = p_g_slots + i_row.to(tl.int64) * S
    if S > 0:
        tl.debug_barrier()
        for i_slot in range(0, S, SB):
            o_slots = i_slot + tl.arange(0, SB)
            b_ids = tl.load(p_row_ids + o_slots, mask=o_slots < S, other=-1)
            m_in_slab = (b_ids >= v0) & (b_ids < v0 + v)
            b_g = tl.load(p_row_g + o_slots, mask=m_in_slab, other=0.0)
            tl.store(p_dz + (b_ids - v0), round_to(b_g, p_dz.dtype.element_ty), mask=m_in_slab)


@triton.jit
def scale_in_place(p_x, p_factor, n, BE: tl.constexpr):
    """x *= factor, in the type of the factor and rounded once; returns at once if it is 1.

    Args:
        p_x: n elements. p_factor: one element, fp32 or fp64.

    Program i owns every num_programs-th block of BE elements, from block i on.
    """
    b_factor = tl.load(p_factor)
    if b_factor != 1.0:
        i_first = tl.program_id(0).to(tl.int64) * BE
        for i_block in range(i_first, n, tl.num_programs(0) * BE):
            o_x = i_block + tl.arange(0, BE)
            b_x = tl.load(p_x + o_x, mask=o_x < n, other=0.0).to(b_factor.dtype) * b_factor
            tl.store(p_x + o_x, round_to(b_x, p_x.dtype.element_ty), mask=o_x < n)
