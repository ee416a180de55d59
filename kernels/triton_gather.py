"""K rows of W per token: their logits, their share of dX, their dW. No pass over the head.

    z[n, s] = softcap·tanh(logit_scale · (W[ids_ns] · x_n + b) / softcap) / T
    dX_n = Σ_s g_ns W[ids_ns]              dW_v = Σ_{(n, s): ids_ns = v} g_ns x_n

All three are bound by reading N·S rows of H values (W's for the first two, x's for dW). For dW the
N·S entries are sorted by id; a program sums the runs that start among its entries, in order, and
writes each row once: no atomics, no partial sums, deterministic, and no length is read on the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .head import Head, slot_grads
from .rows import ABSENT
from .triton_common import NEG, launch, narrowed, scalars, shaped

GATHER_TILE = {"SB": 16, "BH": 256, "num_warps": 4, "maxnreg": 128}
RUN_TILE = {"BE": 32, "BH": 512, "num_warps": 4}


@triton.jit
def gather_rows(
    hidden, weight, bias, ids, z, S, H, ldx, ldw,
    scale: tl.float64, cap: tl.float64, inv_T: tl.float64, CAP: tl.constexpr,
    SB: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * SB + tl.arange(0, SB)
    DT: tl.constexpr = z.dtype.element_ty
    at = tl.load(ids + i * S + slot, mask=slot < S, other=-1).to(tl.int64)
    there = at >= 0
    acc = tl.zeros([SB], DT)
    for h0 in range(0, H, BH):
        h = h0 + tl.arange(0, BH)
        x = tl.load(hidden + i * ldx + h, mask=h < H, other=0.0).to(DT)
        w = tl.load(
            weight + at[:, None] * ldw + h[None, :],
            mask=there[:, None] & (h < H)[None, :],
            other=0.0,
        )
        acc += tl.sum(w.to(DT) * x[None, :], 1)
    u = shaped(acc, bias, at, there, tl.full([], scale, DT), cap, CAP)
    u = tl.where(there, u * tl.full([], inv_T, DT), NEG)
    tl.store(z + i * S + slot, u, mask=slot < S)


@triton.jit
def scatter_hidden(
    weight, ids, g, base, dx, S, H, ldw, ld_base, ld_dx,
    SB: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    DT: tl.constexpr = g.dtype.element_ty
    acc = tl.zeros([BH], DT)
    if base is not None:
        acc += tl.load(base + i * ld_base + h, mask=h < H, other=0.0)
    for j in range(0, S, SB):
        slot = j + tl.arange(0, SB)
        at = tl.load(ids + i * S + slot, mask=slot < S, other=-1).to(tl.int64)
        there = at >= 0
        factor = tl.load(g + i * S + slot, mask=there, other=0.0)
        w = tl.load(
            weight + at[:, None] * ldw + h[None, :],
            mask=there[:, None] & (h < H)[None, :],
            other=0.0,
        )
        acc += tl.sum(w.to(DT) * factor[:, None], 0)
    tl.store(dx + i * ld_dx + h, narrowed(acc, dx.dtype.element_ty), mask=h < H)


@triton.jit
def sum_runs(
    hidden, ids, entries, g, starts, dw, db, E, S, H, ldx, ldw,
    ADD: tl.constexpr, BE: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    DT: tl.constexpr = g.dtype.element_ty
    low = tl.load(starts + b)  # the first run that starts among these entries …
    high = tl.load(starts + b + 1)  # … up to the first that starts behind them
    acc = tl.zeros([BH], DT)
    total = tl.zeros([], DT)
    for e in range(low, high):
        at = tl.load(ids + e)
        entry = tl.load(entries + e)
        factor = tl.load(g + entry)
        x = tl.load(hidden + (entry // S) * ldx + h, mask=h < H, other=0.0)
        acc += factor * x.to(DT)
        total += factor
        last = (e + 1 == E) | (tl.load(ids + e + 1, mask=e + 1 < E, other=-1) != at)
        if dw is not None:
            m_write = last & (h < H)
            row = acc
            if ADD:
                row += tl.load(dw + at * ldw + h, mask=m_write, other=0.0).to(DT)
            tl.store(dw + at * ldw + h, narrowed(row, dw.dtype.element_ty), mask=m_write)
        if db is not None:
            once = last & (tl.program_id(1) == 0)
            one = total
            if ADD:
                one += tl.load(db + at, mask=once, other=0.0).to(DT)
            tl.store(db + at, narrowed(one, db.dtype.element_ty), mask=once)
        acc = tl.where(last, 0.0, acc)
        total = tl.where(last, 0.0, total)


def forward(head: Head, hidden_NH: Tensor, ids_NS: Tensor) -> Tensor:
    """z [N, S] at T, NEG in empty slots."""
    (N, H), S = hidden_NH.shape, ids_NS.shape[1]
    z_NS = hidden_NH.new_empty(N, S, dtype=head.dtype)
    SB = min(GATHER_TILE["SB"], triton.next_power_of_2(max(S, 1)))
    launch(
        gather_rows,
        (N, triton.cdiv(S, SB)),
        z_NS,
        hidden_NH,
        head.weight,
        head.bias,
        ids_NS.contiguous(),
        z_NS,
        S,
        H,
        hidden_NH.stride(0),
        head.weight.stride(0),
        **scalars(head),
        SB=SB,
        BH=min(GATHER_TILE["BH"], triton.next_power_of_2(H)),
        num_warps=GATHER_TILE["num_warps"],
        maxnreg=GATHER_TILE["maxnreg"],
    )
    return z_NS


def hidden_grad(
    head: Head, ids_NS: Tensor, g_NS: Tensor, out: Tensor, base: Tensor | None = None
) -> None:
    """out [N, H] = base + Σ_s g_ns W[ids_ns], summed in fp32; g is d(W x)."""
    N, S = ids_NS.shape
    H = head.weight.shape[1]
    BH = min(GATHER_TILE["BH"], triton.next_power_of_2(H))
    launch(
        scatter_hidden,
        (N, triton.cdiv(H, BH)),
        out,
        head.weight,
        ids_NS.contiguous(),
        g_NS.contiguous(),
        base,
        out,
        S,
        H,
        head.weight.stride(0),
        0 if base is None else base.stride(0),
        out.stride(0),
        SB=min(GATHER_TILE["SB"], triton.next_power_of_2(max(S, 1))),
        BH=BH,
        num_warps=GATHER_TILE["num_warps"],
        maxnreg=GATHER_TILE["maxnreg"],
    )


def weight_grad(
    hidden_NH: Tensor,
    ids_NS: Tensor,
    g_NS: Tensor,
    dw: Tensor | None,
    db: Tensor | None,
    *,
    add: bool = False,
) -> None:
    """Write (or add) Σ g x into dw's rows, and Σ g into db, whose ids occur; the rest stays."""
    (N, H), S = hidden_NH.shape, ids_NS.shape[1]
    E = N * S
    ids, entries = torch.sort(ids_NS.reshape(-1), stable=True)
    index = torch.arange(E, device=ids.device)
    new = torch.ones_like(ids, dtype=torch.bool)
    new[1:] = ids[1:] != ids[:-1]
    # The first entry, at or behind each, where a run of a real id starts; E where none does.
    begin = torch.where(new & (ids >= 0), index, E).flip(0).cummin(0).values.flip(0)
    BE = RUN_TILE["BE"]
    ends = begin.new_full((1,), E)
    starts = torch.cat([begin[::BE], ends])
    BH = min(RUN_TILE["BH"], triton.next_power_of_2(H))
    launch(
        sum_runs,
        (triton.cdiv(E, BE), 1 if dw is None else triton.cdiv(H, BH)),
        hidden_NH,
        hidden_NH,
        ids,
        entries,
        g_NS.contiguous(),
        starts,
        dw,
        db,
        E,
        S,
        H,
        hidden_NH.stride(0),
        0 if dw is None else dw.stride(0),
        ADD=add,
        BE=BE,
        BH=BH,
        num_warps=RUN_TILE["num_warps"],
    )


def backward(
    head: Head,
    hidden_NH: Tensor,
    ids_NS: Tensor,
    z_NS: Tensor,
    g_z_NS: Tensor,
    *,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dX, dW, db), each None unless asked for; dW and db are dense."""
    g_NS = torch.where(z_NS < ABSENT, 0.0, slot_grads(head, z_NS, g_z_NS))
    dx = torch.empty_like(hidden_NH) if need_hidden else None
    dw = torch.zeros_like(head.weight) if need_weight else None
    db = None
    if need_bias and head.bias is not None:
        db = torch.zeros_like(head.bias)
    if dx is not None:
        hidden_grad(head, ids_NS, g_NS, dx)
    if dw is not None or db is not None:
        weight_grad(hidden_NH, ids_NS, g_NS, dw, db)
    return dx, dw, db
