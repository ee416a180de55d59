"""linear_lse_gather in PyTorch: z_ids [N, S] and lse_rest [N] from hidden states, and back.

    z_ids[n, s] = z[n, ids_ns]          lse_rest[n] = log Σ_{v ∉ ids_n} e^{z[n, v]}
    dz[n, v] = g_rest_n · e^{z − lse_rest} for v ∉ ids_n, and g_z[n, s] at ids_ns

Forward 2NVH FLOPs over one reused slab; backward recomputes the logits slab by slab (2NVH) and adds
4NVH, writing each dW slab once in a fixed order: deterministic, no [N, V], no [V, H] accumulator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .torch_slabs import (
    BLOCK_TOKENS,
    Head,
    Matmul,
    Slots,
    Stats,
    blocks,
    grad_slab_,
    logits,
    scan,
    slabs,
    slot_grads,
)


def forward(head: Head, hidden_NH: Tensor, ids_NS: Tensor, *, moment: bool, base: bool) -> Stats:
    """Statistics of every token, in blocks of BLOCK_TOKENS."""
    parts = [
        scan(head, hidden_NH[at], ids_NS[at], moment=moment, base=base)
        for at in blocks(hidden_NH.shape[0], BLOCK_TOKENS)
    ]
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return scan(head, hidden_NH, ids_NS, moment=moment, base=base)

    def join(pieces: list[Tensor | None]) -> Tensor | None:
        return None if pieces[0] is None else torch.cat([p for p in pieces if p is not None])

    z_ids, lse_rest, mean_rest, lse_base = (join([part[i] for part in parts]) for i in range(4))
    assert z_ids is not None
    assert lse_rest is not None
    return Stats(z_ids, lse_rest, mean_rest, lse_base)


def backward(
    head: Head,
    hidden_NH: Tensor,
    ids_NS: Tensor,
    stats: Stats,
    grads: Stats,
    *,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dX [N, H], dW like weight, db like bias), each None unless asked for.

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
    for at in slabs(head.vocab, N, head.dtype.itemsize):
        rows = at.stop - at.start
        if d_vN1.shape[0] < rows + 1:
            d_vN1 = d_vN1.new_empty(rows + 1, N)
        u_vN = logits(head, matmul, at, d_vN1[:rows])
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
        dx = dx_HN.t().to(hidden_NH.dtype, memory_format=torch.contiguous_format)
    return dx, dw, db
