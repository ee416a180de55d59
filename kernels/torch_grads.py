"""Gradients of the head in PyTorch, slab by slab, from stored or recomputed logits.

    dz[n, v] = g_rest_n · e^{z − lse_rest} for v ∉ ids_n, and g_z[n, s] at ids_ns
    dX = dz W,  dW = dzᵀ X

chunk_grads   stored logits of a chunk become dz in place (4NVH FLOPs beyond the forward pass). With
              a bfloat16 head, dX uses dz in 16 bits off the slots and in fp32 in them; float16,
              whose range ends at 65504, is summed in fp32 throughout. Where a CPU multiplies
              bfloat16 with fp32 results, dz is rounded for dW, too.
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
    carried: None = None,
) -> None:
    """Turn the stored logits of a chunk into dz, slab by slab, and add its gradients.

    grads.z_ids is d(W x) of the slots, 0 in empty ones.
    dx [n, H] is this chunk's part; dw and db belong to the whole head and start when `first`. They
    carry no scale here.
    """
    n, low = hidden_nH.shape[0], head.weight.dtype
    buffer_V1n = logits_view(head, buffer, n)
    packed = sums_in_16_bits(head.weight.dtype)
    g_nS = grads.z_ids
    g_Sn = g_nS.t().contiguous()
    matmul, slots = Matmul(head, hidden_nH), Slots(ids_nS)
    dx_nH = None
    if dx is not None and (matmul.product is not None or not packed):
        dx_nH = matmul.new_hidden_grad(n)
    dz_Vn = buffer_V1n.view(-1).view(low)[: head.vocab_size * n].view(head.vocab_size, n)
    for at in slabs(head, n):
        ds1, after = buffer_V1n[at.start : at.stop + 1], buffer_V1n[at.stop].clone()
        ds = grad_slab_(head, buffer_V1n[at], stats, grads.lse_rest, None, grads.lse_base)
        slots.clear(at, ds1)
        if dx_nH is not None and packed:
            matmul.add_hidden_grad(at, ds, dx_nH, rounded=True)
        off_slots = ds.to(low) if packed and dx is not None and dx_nH is None else None
        slots.put(at, ds1, g_Sn)
        buffer_V1n[at.stop] = after
        if db is not None:
            db[at] += ds.sum(1)
        if dw is not None:
            matmul.add_weight_grad(ds, dw[at], first)
        if off_slots is not None:
            # 16-bit dz moves to the front of the same memory, which was already read.
            dz_Vn[at] = off_slots
        elif dx_nH is not None and not packed:
            matmul.add_hidden_grad(at, ds, dx_nH)
    if dx is None:
        return
    if dx_nH is None:
        dx_nH = torch.mm(dz_Vn.t(), head.weight[: head.vocab_size])
    elif packed:
        matmul.add_lost(dx_nH)
    # dz of the slots is by far the largest. It stays in fp32, or its rounding would dominate.
    dx.copy_(hidden_grad(head, ids_nS, g_nS).add_(dx_nH) if packed else dx_nH)


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
    N = hidden_NH.shape[0]
    dw = torch.zeros_like(head.weight) if need_weight else None
    db = None
    if need_bias and head.bias is not None:
        db = torch.zeros_like(head.bias)
    g_NS = slot_grads(head, stats.z_ids, grads.z_ids)
    g_SN = g_NS.t().contiguous()
    matmul, slots = Matmul(head, hidden_NH), Slots(ids_NS)
    dx_NH = matmul.new_hidden_grad(N) if need_hidden else None
    rounded = matmul.product is not None
    d_vN1 = hidden_NH.new_empty(0, N, dtype=head.dtype)
    for at in slabs(head, N):
        rows = at.stop - at.start
        if d_vN1.shape[0] < rows + 1:
            d_vN1 = d_vN1.new_empty(rows + 1, N)
        u_vN = matmul.logits(at, d_vN1[:rows])
        ds_vN = grad_slab_(head, u_vN, stats, grads.lse_rest, grads.mean_rest, grads.lse_base)
        slots.clear(at, d_vN1[: rows + 1])
        if dx_NH is not None and rounded:
            matmul.add_hidden_grad(at, ds_vN, dx_NH, rounded=True)
        slots.put(at, d_vN1[: rows + 1], g_SN)
        if dx_NH is not None and not rounded:
            matmul.add_hidden_grad(at, ds_vN, dx_NH)
        if dw is not None:
            matmul.add_weight_grad(ds_vN, dw[at], first=True)
        if db is not None:
            db[at] = ds_vN.sum(1)
    dx = None
    if dx_NH is not None:
        if rounded:
            matmul.add_lost(dx_NH)
            dx_NH += hidden_grad(head, ids_NS, g_NS)
        dx = dx_NH.to(hidden_type, memory_format=torch.contiguous_format)
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
