"""Reduce a slab of raw logits into running statistics per row; move out the slots' logits.

    top' = max(top, max z);  s_i' = Σ e^{z − top'} (z − top')^i over the slab and before, i = 0 .. 2

The slab [n, v] was just written by the library GEMM and is still in L2. A program reads its row
once: 4 bytes and an exp per logit. Slots are first copied out and overwritten with NEG in the slab:
the tail is summed without them, and a stored chunk marks where they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .head import LMHead, RunningLSE, Scanned, Top2
from .token_loss import NEG as _NEG
from .triton_common import ABSENT, NEG, SLOT_TILE, launch, scalars, shape_logits

# Without this bound ptxas spills two registers to fit one more program.
REDUCE_TILE = {"num_warps": 16, "maxnreg": 64}


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


class Running:
    """Running statistics of n tokens, updated slab by slab."""

    def __init__(
        self,
        head: LMHead,
        ids_nS: Tensor,
        moments: int,
        base: bool,
        best: bool,
        label_u_n: Tensor | None,
    ) -> None:
        self.head, self.moments, self.label_u = head, moments, label_u_n
        self.ids = ids_nS.contiguous()
        n, S = ids_nS.shape
        new = head.weight.new_empty
        self.u_slots = torch.full((n, S), _NEG, dtype=head.dtype, device=head.weight.device)
        self.top = new(n, dtype=head.dtype)
        self.sums = new(moments + 1, n, dtype=head.dtype)
        self.base = base and head.temperature != 1.0
        self.base_rows = new(2 if self.base else 0, n, dtype=head.dtype)
        self.best = best
        self.best_u = new(n if best else 0, 2, dtype=head.dtype)
        self.best_id = new(n if best else 0, dtype=torch.int64)
        self.above = torch.zeros_like(self.best_id)

    def block(self, rows: slice) -> Callable[[slice, Tensor], None]:
        """A function (columns, raw products [n, v] of these tokens) that reduces one slab.

        Slots in the slab become NEG. Arguments that do not change from slab to slab are built once:
        at small H the host has little more than 50 µs per slab.
        """
        S = self.ids.shape[1]
        constant = {
            "p_bias": self.head.bias,
            "p_ids": self.ids[rows],
            "p_label_u": None if self.label_u is None else self.label_u[rows],
            "p_u_slots": self.u_slots[rows],
            "p_max": self.top[rows],
            "p_sums": self.sums[:, rows],
            "p_base_max": self.base_rows[0, rows] if self.base else None,
            "p_base_sum": self.base_rows[1, rows] if self.base else None,
            "p_best": self.best_u[rows] if self.best else None,
            "p_best_id": self.best_id[rows] if self.best else None,
            "p_n_above": self.above[rows] if self.best else None,
            "n": self.ids.shape[0],
            "S": S,
            **scalars(self.head),
            "MOMENTS": self.moments,
            "BASE": self.base,
            "BEST": self.best,
            "SB": min(SLOT_TILE, triton.next_power_of_2(max(S, 1))),
            **REDUCE_TILE,
        }

        def reduce(at: slice, slab_nv: Tensor) -> None:
            v = at.stop - at.start
            launch(
                reduce_slab,
                (slab_nv.shape[0],),
                slab_nv,
                p_slab=slab_nv,
                ld_slab=slab_nv.stride(0),
                v=v,
                v0=at.start,
                BV=triton.next_power_of_2(v),
                **constant,
            )

        return reduce

    def scanned(self) -> Scanned:
        T = self.head.temperature
        base = None
        if self.base:
            base = RunningLSE(self.base_rows[0], [self.base_rows[1]], 1.0)
        return Scanned(
            self.u_slots,
            RunningLSE(self.top, list(self.sums), T),
            base,
            Top2(self.best_u, self.best_id, self.above) if self.best else None,
        )
