"""Raw logits of a row become dz in place: off the slots a closed form, at the slots what is given.

    r = e^{z − lse_rest};  d = r (g_rest + g_mean (1 + z − mean)) + g_base e^{u − lse₁}
    dz = d · (1 − (u / c)²)        (the factors logit_scale and 1/T are in the g already)

4 bytes read and 2 or 4 written per logit. A 16-bit row lands at the front of its own fp32 row, so a
chunk needs no second buffer: tile t is written over columns already read, and a barrier stands
between the reads and the writes of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .head import Head, Stats
from .triton_common import ABSENT, ROW_TILE, SLOT_TILE, launch, narrowed, scalars, shaped


@triton.jit
def grad_rows(
    raws, out, bias, ids, g_slots, lse_rest, g_rest, mean_rest, g_mean, lse_base, g_base,
    ld, out_ld, v, v0, S,
    scale: tl.float64, cap: tl.float64, inv_T: tl.float64, CAP: tl.constexpr,
    BV: tl.constexpr, SB: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    raws += i.to(tl.int64) * ld
    out += i.to(tl.int64) * out_ld
    DT: tl.constexpr = raws.dtype.element_ty
    scale = tl.full([], scale, DT)
    inv_T = tl.full([], inv_T, DT)
    lse = tl.load(lse_rest + i)
    a = tl.load(g_rest + i)
    for c in range(0, v, BV):
        cols = c + tl.arange(0, BV)
        raw = tl.load(raws + cols, mask=cols < v, other=0.0)
        there = (raw > ABSENT) & (cols < v)
        u = shaped(raw, bias, v0 + cols, there, scale, cap, CAP)
        z = u * inv_T
        d = tl.exp(tl.minimum(z - lse, 0.0))  # above 0 only at slots, overwritten below
        if g_mean is not None:
            d *= a + tl.load(g_mean + i) * (1.0 + z - tl.load(mean_rest + i))
        else:
            d *= a
        if g_base is not None:
            at_one = tl.exp(tl.minimum(u - tl.load(lse_base + i), 0.0))
            d += tl.load(g_base + i) * at_one
        if CAP:
            y = u / tl.full([], cap, DT)
            d *= 1.0 - y * y
        tl.debug_barrier()
        tl.store(out + cols, narrowed(tl.where(there, d, 0.0), out.dtype.element_ty), mask=cols < v)
    my_ids = ids + i.to(tl.int64) * S
    my_g = g_slots + i.to(tl.int64) * S
    if S > 0:
        tl.debug_barrier()
        for j in range(0, S, SB):
            slot = j + tl.arange(0, SB)
            at = tl.load(my_ids + slot, mask=slot < S, other=-1)
            here = (at >= v0) & (at < v0 + v)
            g = tl.load(my_g + slot, mask=here, other=0.0)
            tl.store(out + (at - v0), narrowed(g, out.dtype.element_ty), mask=here)


def grad_rows_(
    head: Head,
    raw_nv: Tensor,
    v0: int,
    ids_nS: Tensor,
    g_nS: Tensor,
    stats: Stats,
    grads: Stats,
) -> Tensor:
    """dz [n, v] in the head's own type, in raw's memory (rows as far apart as raw's were).

    grads hold d lse_rest, d mean_rest and d lse_base per token; g_nS is d(W x) at distinct ids.
    """
    n, v = raw_nv.shape
    S, T, scale = ids_nS.shape[1], head.temperature, head.logit_scale
    wide, low = raw_nv.element_size(), head.weight.element_size()
    out = raw_nv if wide == low else raw_nv.view(head.weight.dtype)[:, :v]
    mean = grads.mean_rest is not None and stats.mean_rest is not None
    base = grads.lse_base is not None and stats.lse_base is not None
    g_mean, g_base = grads.mean_rest, grads.lse_base
    launch(
        grad_rows,
        (n,),
        raw_nv,
        raw_nv,
        out,
        head.bias,
        ids_nS,
        g_nS,
        stats.lse_rest,
        grads.lse_rest * (scale / T),
        stats.mean_rest if mean else None,
        g_mean * (scale / T) if mean and g_mean is not None else None,
        stats.lse_base if base else None,
        g_base * scale if base and g_base is not None else None,
        raw_nv.stride(0),
        out.stride(0),
        v,
        v0,
        S,
        **scalars(head),
        BV=min(ROW_TILE["BV"], triton.next_power_of_2(v)),
        SB=min(SLOT_TILE, triton.next_power_of_2(max(S, 1))),
        num_warps=ROW_TILE["num_warps"],
    )
    return out
