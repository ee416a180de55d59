"""Fused sparse distillation loss in PyTorch: loss, statistics and gradients in one sweep of chunks.

    loss = Σ_n coef_n · ℓ_n(z_ids, lse_rest, lse_base)        (ℓ: kernels/rows.py)

For each chunk of tokens the logits are computed once and kept ([V, n] fp32, a chunk at a time);
once ℓ is known they become dz in place, the K entries are overwritten in fp32, and both gradient
GEMMs follow: 6NVH FLOPs (4NVH with a frozen head), as if the logits had been materialised, at the
memory of one chunk. With a 16-bit head dX takes dz in 16 bits off the slots and in fp32 at them;
dW is summed over a chunk in fp32, and over chunks in fp32, or in its own type if there are but two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .rows import Gathered, RowOptions, Rows, Teacher, entropy_of, first_slots, rows_backward
from .rows import rows_forward as _rows_forward
from .torch_gather import hidden_grad
from .torch_slabs import (
    Head,
    Matmul,
    Slots,
    Stats,
    blocks,
    chunk_tokens,
    grad_slab_,
    lift_of,
    scan,
    slabs,
    slot_grads,
)

RowFunction = Callable[
    [Gathered, Teacher, Tensor | None, Tensor, bool], tuple[Rows, Gathered | None]
]


class Fused(NamedTuple):
    """The sum, per-token statistics [N], and `lift` times the gradients of the sum (None unless
    asked for)."""

    loss: Tensor
    rows: Rows
    entropy: Tensor | None
    dx: Tensor | None
    dw: Tensor | None
    db: Tensor | None
    lift: Tensor


def named_rows(options: RowOptions) -> RowFunction:
    """Loss and closed-form gradient of a named divergence."""

    def run(
        seen: Gathered, teacher: Teacher, label_N: Tensor | None, coef_N: Tensor, grad: bool
    ) -> tuple[Rows, Gathered | None]:
        rows = _rows_forward(seen, teacher, label_N, options)
        return rows, rows_backward(seen, teacher, label_N, options, coef_N) if grad else None

    return run


def callable_rows(options: RowOptions) -> RowFunction:
    """Loss and gradient of a user's divergence, by autograd on the [n, K] tensors."""

    def run(
        seen: Gathered, teacher: Teacher, label_N: Tensor | None, coef_N: Tensor, grad: bool
    ) -> tuple[Rows, Gathered | None]:
        if not grad:
            return _rows_forward(seen, teacher, label_N, options), None
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in seen if t is not None]
            found = iter(leaves)
            seen = Gathered._make(None if t is None else next(found) for t in seen)
            rows = _rows_forward(seen, teacher, label_N, options)
            grads = torch.autograd.grad((coef_N * rows.per_token).sum(), leaves, allow_unused=True)
        given = iter(
            torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)
        )
        rows = Rows._make(None if t is None else t.detach() for t in rows)
        return rows, Gathered._make(None if t is None else next(given) for t in seen)

    return run


def fused(
    head: Head,
    hidden_NH: Tensor,
    ids_NS: Tensor,
    teacher: Teacher,
    label_N: Tensor | None,
    coef_N: Tensor,
    row_function: RowFunction,
    *,
    base: bool,
    entropy: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> Fused:
    """ids_NS are the teacher's ids with the label's appended when label_N is given; coef_N [N] is
    each token's factor in the sum (0 drops it)."""
    N, _H = hidden_NH.shape
    grad = need_hidden or need_weight or need_bias
    chunk = chunk_tokens(head, N, need_weight)
    carried = head.weight.dtype == head.dtype or chunk * 2 >= N
    dx = torch.empty_like(hidden_NH) if need_hidden else None
    dw = db = None
    if need_weight:
        dw = torch.empty_like(head.weight, dtype=None if carried else head.dtype)
    if need_bias and head.bias is not None:
        db = torch.zeros_like(head.bias, dtype=head.dtype)
    lift = lift_of(head, coef_N)
    keep_V1n = hidden_NH.new_empty((head.vocab + 1) * min(chunk, N), dtype=head.dtype)
    seen_rows, seen_entropy = [], []
    loss = torch.zeros((), dtype=head.dtype, device=hidden_NH.device)
    for i, at in enumerate(blocks(N, chunk)):
        keep = keep_V1n[: (head.vocab + 1) * (at.stop - at.start)].view(head.vocab + 1, -1)
        ids, coef = ids_NS[at], coef_N[at]
        label = None if label_N is None else label_N[at]
        stats = scan(
            head, hidden_NH[at], ids, moment=entropy, base=base, keep_V1n=keep if grad else None
        )
        gathered = Gathered(stats.z_ids, stats.lse_rest, stats.lse_base)
        part = Teacher(*(t[at] for t in teacher))
        rows, g = row_function(gathered, part, label, coef * lift, grad)
        loss += (coef * rows.per_token).sum()
        seen_rows.append(rows)
        if entropy and stats.mean_rest is not None:
            seen_entropy.append(entropy_of(gathered, stats.mean_rest, first_slots(ids))[0])
        if g is not None:
            _chunk_grads(head, hidden_NH[at], ids, stats, g, keep, i == 0, at, dx, dw, db)
    del keep_V1n, keep  # before dW is rounded: the peak is a chunk or a rounded copy, not both
    if dw is not None:
        dw[head.vocab :] = 0
        dw = dw.to(head.weight.dtype)
    rows = Rows._make(
        None if pieces[0] is None else torch.cat(pieces) for pieces in zip(*seen_rows, strict=True)
    )
    return Fused(
        loss,
        rows,
        torch.cat(seen_entropy) if entropy else None,
        dx,
        dw,
        None if db is None or head.bias is None else db.to(head.bias.dtype),
        lift,
    )


def _chunk_grads(
    head: Head,
    hidden_nH: Tensor,
    ids_nS: Tensor,
    stats: Stats,
    g: Gathered,
    keep_V1n: Tensor,
    first: bool,
    at_tokens: slice,
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
) -> None:
    """Turn a chunk's kept logits into dz, slab by slab, and add its share of the gradients."""
    assert g.lse_rest is not None
    n, low = hidden_nH.shape[0], head.weight.dtype
    packed = low != head.dtype
    g_nS = slot_grads(head, stats.z_ids, g.z)
    g_Sn = g_nS.t().contiguous()
    matmul, slots = Matmul(head, hidden_nH), Slots(ids_nS)
    dx_Hn = None
    if dx is not None and not packed:
        dx_Hn = torch.zeros(hidden_nH.shape[::-1], dtype=head.dtype, device=dx.device)
    dz_Vn = keep_V1n.view(-1).view(low)[: head.vocab * n].view(head.vocab, n)
    for at in slabs(head.vocab, n, head.dtype.itemsize):
        ds1, after = keep_V1n[at.start : at.stop + 1], keep_V1n[at.stop].clone()
        ds = grad_slab_(head, keep_V1n[at], stats, g.lse_rest, None, g.lse_base)
        slots.clear(at, ds1)
        off_slots = ds.to(low) if packed and dx is not None else None
        slots.put(at, ds1, g_Sn)
        keep_V1n[at.stop] = after
        if db is not None:
            db[at] += ds.sum(1)
        if dw is not None:
            matmul.add_weight_grad(ds, dw[at], first)
        if off_slots is not None:
            # 16-bit dz moves to the front of the chunk's own memory, behind the slabs still unread.
            dz_Vn[at] = off_slots
        elif dx_Hn is not None:
            matmul.add_hidden_grad(at, ds, dx_Hn)
    if dx is None:
        return
    if dx_Hn is not None:
        dx[at_tokens] = dx_Hn.t()
    else:
        # The slots' dz is the largest by far and stays in fp32: rounded, it would be the error.
        off_slots = torch.mm(dz_Vn.t(), head.weight[: head.vocab])
        dx[at_tokens] = hidden_grad(head, ids_nS, g_nS).add_(off_slots)
