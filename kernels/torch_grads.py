"""Gradients of the head in PyTorch, slab by slab, from stored or recomputed logits.

    dz[n, v] = g_rest_n · e^{z − lse_rest} for v ∉ ids_n, and g_z[n, s] at ids_ns
    dX = dz W,  dW = dzᵀ X

chunk_grads   stored logits of a chunk become dz in place (4NVH FLOPs beyond the forward pass). With
              a bfloat16 head, dX uses dz in 16 bits off the slots and in fp32 in them; float16,
              whose range ends at 65504, is summed in fp32 throughout.
recompute     computes the logits again (2NVH), vocabulary slabs outermost; each dW slab is written
              once in a fixed order: deterministic, no [N, V], no [V, H] accumulator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .head import LMHead, Stats, slot_grads, sums_in_16_bits
from .torch_gather import hidden_grad
from .torch_slabs import Matmul, Slots, grad_slab_, logits_view, slabs


def chunk_grads(
    head: LMHead,
    hidden_nH: Tensor,
    ids_nS: Tensor,
    stats: Stats,
    grads: Stats,
    buffer: Tensor,
    first: bool,
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
) -> None:
    """Turn the stored logits of a chunk into dz, slab by slab, and add its gradients.

    grads.z_ids is d(W x) of the slots, 0 in empty ones.
    dx [n, H] is this chunk's part; dw and db belong to the whole head and start when `first`.
    """
    n, low = hidden_nH.shape[0], head.weight.dtype
    buffer_V1n = logits_view(head, buffer, n)
    packed = sums_in_16_bits(head.weight.dtype)
    g_nS = grads.z_ids
    g_Sn = g_nS.t().contiguous()
    matmul, slots = Matmul(head, hidden_nH), Slots(ids_nS)
    dx_Hn = None
    if dx is not None and not packed:
        dx_Hn = torch.zeros(hidden_nH.shape[::-1], dtype=head.dtype, device=dx.device)
    dz_Vn = buffer_V1n.view(-1).view(low)[: head.vocab_size * n].view(head.vocab_size, n)
    for at in slabs(head, n):
        ds1, after = buffer_V1n[at.start : at.stop + 1], buffer_V1n[at.stop].clone()
        ds = grad_slab_(head, buffer_V1n[at], stats, grads.lse_rest, None, grads.lse_base)
        slots.clear(at, ds1)
        off_slots = ds.to(low) if packed and dx is not None else None
        slots.put(at, ds1, g_Sn)
        buffer_V1n[at.stop] = after
        if db is not None:
            db[at] += ds.sum(1)
        if dw is not None:
            matmul.add_weight_grad(ds, dw[at], first)
        if off_slots is not None:
            # 16-bit dz moves to the front of the same memory, which was already read.
            dz_Vn[at] = off_slots
        elif dx_Hn is not None:
            matmul.add_hidden_grad(at, ds, dx_Hn)
    if dx is None:
        return
    if dx_Hn is not None:
        dx.copy_(dx_Hn.t())
    else:
        # dz of the slots, by far the largest, stays in fp32: its rounding would dominate the error.
        off_slots = torch.mm(dz_Vn.t(), head.weight[: head.vocab_size])
        dx.copy_(hidden_grad(head, ids_nS, g_nS).add_(off_slots))


def recompute(
    head: LMHead,
    hidden_NH: Tensor,
    ids_NS: Tensor,
    stats: Stats,
    grads: Stats,
    *,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    hidden_type: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dX [N, H] in hidden_type, dW like weight, db like bias), each None unless needed.

    Vocabulary slabs outermost, all tokens inside: each dW slab is one product over all N,
    summed in fp32 and rounded once; dX is summed in fp32.
    """
    N, H = hidden_NH.shape
    dx_HN = hidden_NH.new_zeros(H, N, dtype=head.dtype) if need_hidden else None
    dw = torch.zeros_like(head.weight) if need_weight else None
    db = None
    if need_bias and head.bias is not None:
        db = torch.zeros_like(head.bias)
    g_SN = slot_grads(head, stats.z_ids, grads.z_ids).t().contiguous()
    matmul, slots = Matmul(head, hidden_NH), Slots(ids_NS)
    d_vN1 = hidden_NH.new_empty(0, N, dtype=head.dtype)
    for at in slabs(head, N):
        rows = at.stop - at.start
        if d_vN1.shape[0] < rows + 1:
            d_vN1 = d_vN1.new_empty(rows + 1, N)
        u_vN = matmul.logits(at, d_vN1[:rows])
        ds_vN = grad_slab_(head, u_vN, stats, grads.lse_rest, grads.mean_rest, grads.lse_base)
        slots.clear(at, d_vN1[: rows + 1])
        slots.put(at, d_vN1[: rows + 1], g_SN)
        if dx_HN is not None:
            matmul.add_hidden_grad(at, ds_vN, dx_HN)
        if dw is not None:
            matmul.add_weight_grad(ds_vN, dw[at], first=True)
        if db is not None:
            db[at] = ds_vN.sum(1)
    dx = None
    if dx_HN is not None:
        dx = dx_HN.t().to(hidden_type, memory_format=torch.contiguous_format)
    return dx, dw, db


def scale_(grad: Tensor, factor: Tensor) -> Tensor:
    """grad *= factor (0-dim, fp32 or fp64), multiplied in the wider type and rounded once.

    A CPU reads the factor, and returns at once if it is 1. A GPU does not: that would stall the
    stream. It rounds a 0-dim factor to the type of `grad` first, and 2^17 is infinite in float16; a
    factor of shape [1] is promoted instead.
    """
    if grad.device.type == "cpu":
        return grad if factor.item() == 1.0 else grad.mul_(factor)
    return grad.mul_(factor.reshape(1))
