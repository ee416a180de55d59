"""One slab of raw logits, reduced row by row into running statistics; the slots' logits taken out.

    top' = max(top, max z);  s_i' = Σ e^{z − top'} (z − top')^i over the slab and before, i = 0 .. 2

The slab [n, v] was just written by the library GEMM and is still in L2. A program reads its row
once: 4 bytes and an exp per logit. Slots are loaded, kept, and overwritten with NEG in the slab
first, so that the tail is summed without them and a kept chunk knows where they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .head import Head, RunningLSE, Scanned, Top2
from .rows import NEG as _NEG
from .triton_common import ABSENT, NEG, SLOT_TILE, launch, scalars, shaped

# A bound on registers keeps ptxas from spilling two of them to fit one more program.
REDUCE_TILE = {"num_warps": 16, "maxnreg": 64}


@triton.jit
def merged(old, new):
    """(how far the running sums move, by what they fade) when the top goes from old to new."""
    gone = old < ABSENT
    down = tl.where(gone, 0.0, old - new)
    return down, tl.where(gone, 0.0, tl.exp(down))


@triton.jit
def reduce_slab(
    slab, bias, ids, label_u,
    u_slots, top, sums, base_top, base_sum, best, best_id, above,
    ld, v, v0, n, S,
    scale: tl.float64, cap: tl.float64, inv_T: tl.float64, CAP: tl.constexpr,
    MOMENTS: tl.constexpr, BASE: tl.constexpr, BEST: tl.constexpr,
    BV: tl.constexpr, SB: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    row = slab + i.to(tl.int64) * ld
    DT: tl.constexpr = slab.dtype.element_ty
    scale = tl.full([], scale, DT)
    inv_T = tl.full([], inv_T, DT)
    my_ids = ids + i.to(tl.int64) * S
    my_slots = u_slots + i.to(tl.int64) * S
    if S > 0:
        for j in range(0, S, SB):
            slot = j + tl.arange(0, SB)
            at = tl.load(my_ids + slot, mask=slot < S, other=-1)
            here = (at >= v0) & (at < v0 + v)
            raw = tl.load(row + (at - v0), mask=here, other=0.0)
            tl.store(my_slots + slot, shaped(raw, bias, at, here, scale, cap, CAP), mask=here)
        tl.debug_barrier()  # an id may repeat: every slot has read before any is overwritten
        for j in range(0, S, SB):
            slot = j + tl.arange(0, SB)
            at = tl.load(my_ids + slot, mask=slot < S, other=-1)
            here = (at >= v0) & (at < v0 + v)
            tl.store(row + (at - v0), tl.full([SB], NEG, DT), mask=here)
        tl.debug_barrier()
    cols = tl.arange(0, BV)
    raw = tl.load(row + cols, mask=cols < v, other=NEG)
    there = raw > ABSENT
    u = tl.where(there, shaped(raw, bias, v0 + cols, there, scale, cap, CAP), NEG)
    z = tl.where(there, u * inv_T, NEG)
    first = v0 == 0
    old = tl.load(top + i, mask=not first, other=NEG)
    new = tl.maximum(old, tl.max(z, 0))
    d = tl.where(there, z - new, 0.0)
    e = tl.where(there, tl.exp(d), 0.0)
    down, fade = merged(old, new)
    s0 = tl.load(sums + i, mask=not first, other=0.0)
    tl.store(top + i, new)
    tl.store(sums + i, fade * s0 + tl.sum(e, 0))
    if MOMENTS >= 1:
        s1 = tl.load(sums + n + i, mask=not first, other=0.0)
        e *= d
        tl.store(sums + n + i, fade * (s1 + down * s0) + tl.sum(e, 0))
    if MOMENTS >= 2:
        s2 = tl.load(sums + 2 * n + i, mask=not first, other=0.0)
        e *= d
        moved = s2 + 2 * down * s1 + down * down * s0
        tl.store(sums + 2 * n + i, fade * moved + tl.sum(e, 0))
    if BASE:
        old = tl.load(base_top + i, mask=not first, other=NEG)
        new = tl.maximum(old, tl.max(u, 0))
        _, fade = merged(old, new)
        s0 = tl.load(base_sum + i, mask=not first, other=0.0)
        e = tl.where(there, tl.exp(tl.where(there, u - new, 0.0)), 0.0)
        tl.store(base_top + i, new)
        tl.store(base_sum + i, fade * s0 + tl.sum(e, 0))
    if BEST:
        one = tl.load(best + 2 * i, mask=not first, other=NEG)
        two = tl.load(best + 2 * i + 1, mask=not first, other=NEG)
        where = tl.load(best_id + i, mask=not first, other=0)
        here1 = tl.max(u, 0)
        index = tl.argmax(u, 0)
        here2 = tl.max(tl.where(cols == index, NEG, u), 0)
        better = here1 > one
        tl.store(best + 2 * i, tl.maximum(here1, one))
        tl.store(best + 2 * i + 1, tl.where(better, tl.maximum(one, here2), tl.maximum(two, here1)))
        tl.store(best_id + i, tl.where(better, (index + v0).to(tl.int64), where))
        if label_u is not None:
            count = tl.load(above + i, mask=not first, other=0)
            more = tl.sum((there & (u > tl.load(label_u + i))).to(tl.int32), 0)
            tl.store(above + i, count + more)


class Running:
    """Statistics of n tokens while their slabs go by: launches, and what they leave."""

    def __init__(
        self,
        head: Head,
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
        """A function (columns, raw products [n, v] of these tokens) that reduces one slab; slots in
        it become NEG. What does not change from slab to slab is put together once: at small H the
        host has little more than 50 µs per slab."""
        S = self.ids.shape[1]
        given = (
            self.head.bias,
            self.ids[rows],
            None if self.label_u is None else self.label_u[rows],
            self.u_slots[rows],
            self.top[rows],
            self.sums[:, rows],
            self.base_rows[0, rows] if self.base else None,
            self.base_rows[1, rows] if self.base else None,
            self.best_u[rows] if self.best else None,
            self.best_id[rows] if self.best else None,
            self.above[rows] if self.best else None,
        )
        options = {
            **scalars(self.head),
            "MOMENTS": self.moments,
            "BASE": self.base,
            "BEST": self.best,
            "SB": min(SLOT_TILE, triton.next_power_of_2(max(S, 1))),
            **REDUCE_TILE,
        }
        n = self.ids.shape[0]

        def reduce(at: slice, slab_nv: Tensor) -> None:
            v = at.stop - at.start
            launch(
                reduce_slab,
                (slab_nv.shape[0],),
                slab_nv,
                slab_nv,
                *given,
                slab_nv.stride(0),
                v,
                at.start,
                n,
                S,
                BV=triton.next_power_of_2(v),
                **options,
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
