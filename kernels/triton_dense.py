"""The dense teacher between the GEMMs: one pair of kernels for every separable divergence.

    D = Σ φ(log p, log q),  Ψ = Σψ                                          (sum_divergence)
    dz = on_D ψ − on_q q  [+ on_lse q₁ − on_ce at the label],  in place     (grad_divergence)

A program owns a row of both kept chunks and reads each once per sweep: 8 bytes per token pair and
sweep, 2 or 4 written. ψ is computed again rather than stored. A callable divergence is PyTorch on a
few rows at a time; its ψ takes the place of the teacher's logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .divergences import floor_of, of_callable
from .head import DenseRows, Head, blocks, lift_of
from .rows import RowOptions
from .triton_common import (
    add_product,
    launch,
    narrowed,
    product,
    scalars,
    shaped,
    sums_at_lift,
)
from .triton_divergences import functor
from .triton_slabs import logits_view

DENSE_TILE = {"BV": 2048, "num_warps": 8}
CALLABLE_BYTES = 64 << 20


@triton.jit
def sum_divergence(
    raws, t_raws, bias, t_bias, lse, t_lse, D, total, ld, t_ld, v,
    scale: tl.float64, cap: tl.float64, inv_T: tl.float64, CAP: tl.constexpr,
    t_scale: tl.float64, t_cap: tl.float64, T_CAP: tl.constexpr,
    w: tl.float64, floor: tl.float64,
    PHI: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    raws += i.to(tl.int64) * ld
    t_raws += i.to(tl.int64) * t_ld
    DT: tl.constexpr = raws.dtype.element_ty
    scale = tl.full([], scale, DT)
    t_scale = tl.full([], t_scale, DT)
    inv_T = tl.full([], inv_T, DT)
    w = tl.full([], w, DT)
    floor = tl.full([], floor, DT)
    my_lse = tl.load(lse + i)
    my_t_lse = tl.load(t_lse + i).to(DT)
    sum_phi = tl.zeros([BV], DT)
    sum_psi = tl.zeros([BV], DT)
    for c in range(0, v, BV):
        cols = c + tl.arange(0, BV)
        there = cols < v
        u = shaped(tl.load(raws + cols, mask=there, other=0.0), bias, cols, there, scale, cap, CAP)
        raw = tl.load(t_raws + cols, mask=there, other=0.0).to(DT)
        t = shaped(raw, t_bias, cols, there, t_scale, t_cap, T_CAP)
        lq = tl.where(there, u * inv_T - my_lse, 0.0)
        lp = tl.where(there, tl.maximum(t * inv_T - my_t_lse, floor), 0.0)
        phi, psi = PHI(lp, lq, w)
        sum_phi += tl.where(there, phi, 0.0)
        sum_psi += tl.where(there, psi, 0.0)
    tl.store(D + i, tl.sum(sum_phi, 0))
    tl.store(total + i, tl.sum(sum_psi, 0))


@triton.jit
def grad_divergence(
    raws, t_raws, out, bias, t_bias, lse, t_lse, lse_base, on_D, on_q, on_lse, on_ce, label,
    ld, t_ld, out_ld, v,
    scale: tl.float64, cap: tl.float64, inv_T: tl.float64, CAP: tl.constexpr,
    t_scale: tl.float64, t_cap: tl.float64, T_CAP: tl.constexpr,
    w: tl.float64, floor: tl.float64,
    PHI: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    raws += i.to(tl.int64) * ld
    t_raws += i.to(tl.int64) * t_ld
    out += i.to(tl.int64) * out_ld
    DT: tl.constexpr = raws.dtype.element_ty
    scale = tl.full([], scale, DT)
    t_scale = tl.full([], t_scale, DT)
    inv_T = tl.full([], inv_T, DT)
    w = tl.full([], w, DT)
    floor = tl.full([], floor, DT)
    my_lse = tl.load(lse + i)
    my_t_lse = tl.load(t_lse + i).to(DT)
    a = tl.load(on_D + i)
    b = tl.load(on_q + i)
    for c in range(0, v, BV):
        cols = c + tl.arange(0, BV)
        there = cols < v
        u = shaped(tl.load(raws + cols, mask=there, other=0.0), bias, cols, there, scale, cap, CAP)
        raw = tl.load(t_raws + cols, mask=there, other=0.0).to(DT)
        if PHI is None:
            psi = raw
        else:
            t = shaped(raw, t_bias, cols, there, t_scale, t_cap, T_CAP)
            lp = tl.where(there, tl.maximum(t * inv_T - my_t_lse, floor), 0.0)
            lq = tl.where(there, u * inv_T - my_lse, 0.0)
            _phi, psi = PHI(lp, lq, w)
        q = tl.exp(tl.where(there, u * inv_T - my_lse, 0.0))
        d = (a * psi - b * q) * inv_T
        if on_lse is not None:
            at_one = tl.exp(tl.where(there, u - tl.load(lse_base + i), 0.0))
            d += tl.load(on_lse + i) * at_one
        if on_ce is not None:
            d -= tl.where(cols == tl.load(label + i), tl.load(on_ce + i), 0.0)
        if CAP:
            y = u / tl.full([], cap, DT)
            d *= 1.0 - y * y
        d *= scale
        tl.debug_barrier()  # a 16-bit row lands over the front of its own fp32 row
        tl.store(out + cols, narrowed(d, out.dtype.element_ty), mask=there)


def _numbers(head: Head, teacher: Head, w: float) -> dict[str, float | bool]:
    theirs = scalars(teacher)
    teacher_scalars = {"t_scale": theirs["scale"], "t_cap": theirs["cap"], "T_CAP": theirs["CAP"]}
    return scalars(head) | teacher_scalars | {"w": float(w), "floor": floor_of(head.dtype)}


def _shaped_rows(head: Head, raw_nV: Tensor) -> Tensor:
    """u of raw products, in PyTorch."""
    u = raw_nV
    if head.bias is not None:
        u = u + head.bias[: head.vocab].to(u.dtype)
    u = u * head.logit_scale
    return u if head.softcap is None else head.softcap * torch.tanh(u / head.softcap)


def dense_sums(
    head: Head,
    teacher_head: Head,
    buffers: tuple[Tensor, Tensor],
    lse_n: Tensor,
    teacher_lse_n: Tensor,
    label_n: Tensor | None,
    options: RowOptions,
    *,
    grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(D [n], Σψ [n], the label's u [n])."""
    n = len(lse_n)
    raw, theirs = logits_view(head, buffers[0], n), logits_view(teacher_head, buffers[1], n)
    D, total = torch.zeros_like(lse_n), torch.zeros_like(lse_n)
    if isinstance(options.divergence, str):
        phi, w = functor(options.divergence, options.beta, options.skew)
        launch(
            sum_divergence,
            (n,),
            raw,
            raw,
            theirs,
            head.bias,
            teacher_head.bias,
            lse_n,
            teacher_lse_n,
            D,
            total,
            raw.stride(0),
            theirs.stride(0),
            head.vocab,
            **_numbers(head, teacher_head, w),
            PHI=phi,
            BV=min(DENSE_TILE["BV"], triton.next_power_of_2(head.vocab)),
            num_warps=DENSE_TILE["num_warps"],
        )
    else:
        T, floor = options.temperature, floor_of(head.dtype)
        for at in blocks(n, max(1, CALLABLE_BYTES // (head.vocab * raw.element_size()))):
            lq = _shaped_rows(head, raw[at]) / T - lse_n[at].unsqueeze(-1)
            lp = _shaped_rows(teacher_head, theirs[at]) / T - teacher_lse_n[at].unsqueeze(-1)
            with torch.enable_grad():
                leaf = lq.detach().requires_grad_(grad)
                value = of_callable(options.divergence, lp.clamp(min=floor), leaf)
                if grad:
                    psi = torch.autograd.grad(value.sum(), leaf)[0]
                    theirs[at] = psi
                    total[at] = psi.sum(-1)
            D[at] = value.detach()
    u_label = None
    if label_n is not None:
        index = label_n.clamp(min=0)
        chosen = raw.gather(1, index.unsqueeze(-1))[:, 0]
        if head.bias is not None:
            chosen = chosen + head.bias[index].to(chosen.dtype)
        u_label = _shaped_rows(head._replace(bias=None), chosen)
    return D, total, u_label


def dense_grads(
    head: Head,
    teacher_head: Head,
    hidden_nH: Tensor,
    buffers: tuple[Tensor, Tensor],
    rows: DenseRows,
    options: RowOptions,
    *,
    first: bool,
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
) -> None:
    """The chunk's share of the gradients."""
    n, low = len(hidden_nH), head.weight.dtype
    raw, theirs = logits_view(head, buffers[0], n), logits_view(teacher_head, buffers[1], n)
    dz = raw if low == raw.dtype else raw.view(low)[:, : head.vocab]
    phi, w = None, 0.0
    if isinstance(options.divergence, str):
        phi, w = functor(options.divergence, options.beta, options.skew)
    rows, lift = _lifted(head, rows, theirs if phi is None else None)
    launch(
        grad_divergence,
        (n,),
        raw,
        raw,
        theirs,
        dz,
        head.bias,
        teacher_head.bias,
        *rows,
        raw.stride(0),
        theirs.stride(0),
        dz.stride(0),
        head.vocab,
        **_numbers(head, teacher_head, w),
        PHI=phi,
        BV=min(DENSE_TILE["BV"], triton.next_power_of_2(head.vocab)),
        num_warps=DENSE_TILE["num_warps"],
    )
    db = None if db is None else db[: head.vocab]
    dw = None if dw is None else dw[: head.vocab]
    with sums_at_lift(lift, first, dx, dw, db):
        if db is not None:
            db += dz.sum(0, dtype=db.dtype)
        if dw is not None:
            add_product(dz.t(), hidden_nH, dw, first)
        if dx is not None:
            product(dz, head.weight[: head.vocab], dx)


def _lifted(head: Head, rows: DenseRows, psi_nV: Tensor | None) -> tuple[DenseRows, Tensor | None]:
    """(rows whose factors carry the lift, lift) such that dz stays inside float16; (rows, None) for
    other types. |ψ| of a named divergence is at most 90, since log p ≥ −88: the lift leaves room
    for that; ψ of a callable is measured."""
    if head.weight.dtype != torch.float16:
        return rows, None
    on_u, on_z = head.logit_scale, head.logit_scale / head.temperature
    on_psi = rows.on_D
    if psi_nV is not None:
        on_psi = on_psi * torch.linalg.vector_norm(psi_nV, torch.inf, dim=1)
    factors = ((on_psi, on_z), (rows.on_q, on_z), (rows.on_lse, on_u), (rows.on_ce, on_u))
    lift = lift_of(*(None if t is None else t * f for t, f in factors))
    lifted = rows._replace(
        on_D=rows.on_D * lift,
        on_q=rows.on_q * lift,
        on_lse=None if rows.on_lse is None else rows.on_lse * lift,
        on_ce=None if rows.on_ce is None else rows.on_ce * lift,
    )
    return lifted, lift
