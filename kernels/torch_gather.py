"""Logits of K given ids without an LM-head pass: K gathered rows of W per token.

    z[n, s] = softcap·tanh(logit_scale · (W[ids_ns] · x_n + b) / softcap) / T

Forward and backward cost O(N·K·H). tail="renorm_both" needs nothing else, since the
log-sum-exp over the vocabulary cancels. dX_n = Σ_s g_ns W[ids_ns]; dW is summed per distinct id in
fp32, in a fixed order, and written once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .head import LMHead, blocks, slot_grads
from .token_loss import ABSENT, NEG

GATHER_BYTES = 16 << 20


def _rows(head: LMHead, ids_nS: Tensor) -> Tensor:
    rows = head.weight.index_select(0, ids_nS.clamp(min=0).flatten())
    return rows.view(*ids_nS.shape, -1).to(head.dtype)


def _blocks(head: LMHead, ids_NS: Tensor) -> list[slice]:
    per_token = max(1, ids_NS.shape[1] * head.weight.shape[1] * head.dtype.itemsize)
    return list(blocks(ids_NS.shape[0], max(1, GATHER_BYTES // per_token)))


def forward(head: LMHead, hidden_NH: Tensor, ids_NS: Tensor) -> Tensor:
    """z [N, S] at T, NEG in empty slots."""
    z_NS = hidden_NH.new_empty(ids_NS.shape, dtype=head.dtype)
    for at in _blocks(head, ids_NS):
        x_nH1 = hidden_NH[at].to(head.dtype).unsqueeze(-1)
        z_NS[at] = torch.bmm(_rows(head, ids_NS[at]), x_nH1).squeeze(-1)
    if head.bias is not None:
        z_NS += head.bias[ids_NS.clamp(min=0)].to(head.dtype)
    z_NS *= head.logit_scale
    if head.softcap is not None:
        z_NS = head.softcap * torch.tanh(z_NS / head.softcap)
    return (z_NS / head.temperature).masked_fill(ids_NS < 0, NEG)


def hidden_grad(head: LMHead, ids_NS: Tensor, g_NS: Tensor) -> Tensor:
    """Σ_s g_ns W[ids_ns], [N, H] in fp32; g is d(W x) and 0 in empty slots."""
    if head.weight.dtype == head.dtype:
        ids_NS = ids_NS.clamp(min=0)
        return F.embedding_bag(ids_NS, head.weight, mode="sum", per_sample_weights=g_NS)
    dx_NH = g_NS.new_empty(ids_NS.shape[0], head.weight.shape[1])
    for at in _blocks(head, ids_NS):
        dx_NH[at] = torch.bmm(g_NS[at].unsqueeze(1), _rows(head, ids_NS[at])).squeeze(1)
    return dx_NH


def backward(
    head: LMHead,
    hidden_NH: Tensor,
    ids_NS: Tensor,
    z_NS: Tensor,
    g_z_NS: Tensor,
    *,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dX, dW, db), each None unless needed; dW and db are dense."""
    g_NS = torch.where(z_NS < ABSENT, 0.0, slot_grads(head, z_NS, g_z_NS))
    dx = dw = db = None
    if need_hidden:
        dx = hidden_grad(head, ids_NS, g_NS).to(hidden_NH.dtype)
    if hidden_NH.device.type != "cpu":
        dw, db = without_host_reads(
            head, hidden_NH, ids_NS, g_NS, need_weight=need_weight, need_bias=need_bias
        )
        return dx, dw, db
    flat = ids_NS.flatten()
    order = torch.argsort(flat, stable=True)
    order = order[flat[order] >= 0]
    ids, counts = torch.unique_consecutive(flat[order], return_counts=True)
    ends = counts.cumsum(0)
    if need_weight:
        dw = torch.zeros_like(head.weight)
        x_NH, g = hidden_NH.to(head.dtype), g_NS.flatten()[order]
        tokens = order // max(1, ids_NS.shape[1])
        step = max(1, GATHER_BYTES // (head.weight.shape[1] * head.dtype.itemsize))
        for at in blocks(len(ids), step):
            start = int(ends[at.start] - counts[at.start])
            part = slice(start, int(ends[at.stop - 1]))
            sums = F.embedding_bag(
                tokens[part],
                x_NH,
                ends[at] - counts[at] - start,
                mode="sum",
                per_sample_weights=g[part],
            )
            dw[ids[at]] = sums.to(dw.dtype)
    if need_bias and head.bias is not None:
        db = torch.zeros_like(head.bias, dtype=head.dtype)
        db.index_add_(0, flat[order], g_NS.flatten()[order])
        db = db.to(head.bias.dtype)
    return dx, dw, db


def without_host_reads(
    head: LMHead,
    hidden_NH: Tensor,
    ids_NS: Tensor,
    g_NS: Tensor,
    *,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dW, db) for a GPU, where the number of distinct ids is not read; g is 0 in empty slots.

    On a GPU index_put_ sorts the ids and adds equal ones in order. dW is summed in fp32 at once.
    """
    ids_NS, dw, db = ids_NS.clamp(min=0), None, None
    if need_weight:
        dw = torch.zeros_like(head.weight, dtype=head.dtype)
        for at in _blocks(head, ids_NS):
            terms_nSH = g_NS[at].unsqueeze(-1) * hidden_NH[at].to(head.dtype).unsqueeze(1)
            dw.index_put_((ids_NS[at],), terms_nSH, accumulate=True)
        dw = dw.to(head.weight.dtype)
    if need_bias and head.bias is not None:
        db = torch.zeros_like(head.bias, dtype=head.dtype)
        db = db.index_put_((ids_NS,), g_NS, accumulate=True).to(head.bias.dtype)
    return dw, db
