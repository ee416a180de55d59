"""Per-token scores in PyTorch: one streamed pass over the head emits every statistic.

    lse, H = −Σ q log q, Var[−log q], max, argmax, margin, label rank     of q = softmax(u / T)

The pass sees the tokens outside the asked slots; the slots (teacher ids and the label) join from
their own gathered logits, so tails stay exact. Memory beyond one slab is O(N·S).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .rows import ABSENT, NEG, first_slots
from .torch_slabs import BLOCK_TOKENS, Head, Matmul, RunningLSE, Slots, blocks, logits, slabs


class Scores(NamedTuple):
    """[N] each, at T unless said otherwise; z_ids [N, S] at T."""

    z_ids: Tensor
    lse_rest: Tensor
    lse_rest_base: Tensor
    lse: Tensor
    entropy: Tensor
    varentropy: Tensor
    max_logprob: Tensor
    argmax: Tensor
    margin: Tensor
    above_label: Tensor  # int64: how many tokens outrank the last slot


def scores(head: Head, hidden_NH: Tensor, ids_NS: Tensor, label_u_N: Tensor | None) -> Scores:
    """label_u_N [N]: the label's logit at T=1, from a direct product with its row."""
    parts = [
        _block(head, hidden_NH[at], ids_NS[at], None if label_u_N is None else label_u_N[at])
        for at in blocks(hidden_NH.shape[0], BLOCK_TOKENS)
    ]
    return Scores._make(torch.cat(pieces) for pieces in zip(*parts, strict=True))


def _block(head: Head, hidden_nH: Tensor, ids_nS: Tensor, label_u_n: Tensor | None) -> Scores:
    n, T = hidden_nH.shape[0], head.temperature
    matmul, slots = Matmul(head, hidden_nH), Slots(ids_nS)
    first = hidden_nH.new_zeros(n, dtype=head.dtype)
    running = RunningLSE(n, first, T, 2)
    at_one = RunningLSE(n, first, 1.0, 0)
    best = torch.full((n, 2), NEG, dtype=head.dtype, device=first.device)
    best_id = torch.zeros(n, 2, dtype=torch.int64, device=first.device)
    above = torch.zeros(n, dtype=torch.int64, device=first.device)
    buffer = first.new_empty(0, n)
    for at in slabs(head.vocab, n, head.dtype.itemsize):
        rows = at.stop - at.start
        if buffer.shape[0] < rows + 1:
            buffer = buffer.new_empty(rows + 1, n)
        u_vn = logits(head, matmul, at, buffer[:rows])
        slots.take(at, buffer[: rows + 1])
        running.add(u_vn)
        if T != 1.0:
            at_one.add(u_vn)
        if label_u_n is not None:
            above += (u_vn > label_u_n).sum(0)
        for _ in range(min(2, rows)):
            value, index = u_vn.max(0)
            best, order = torch.cat([best, value.unsqueeze(-1)], -1).topk(2, -1)
            found = torch.cat([best_id, (index + at.start).unsqueeze(-1)], -1)
            best_id = found.gather(-1, order)
            u_vn.scatter_(0, index.unsqueeze(0), NEG)
    u_nS = first.new_full((n, ids_nS.shape[1]), NEG)
    if slots.gathered is not None:
        u_nS = slots.gathered.t().contiguous()
    unique = first_slots(ids_nS)
    counted = torch.where(unique, u_nS, NEG)
    if label_u_n is not None:
        above += (counted > u_nS[:, -1:]).sum(-1)
    lse_rest = running.lse()
    base = lse_rest if T == 1.0 else at_one.lse()
    if ids_nS.shape[1]:
        running.add(counted.t())
        best, order = torch.cat([best, counted], -1).topk(2, -1)
        best_id = torch.cat([best_id, ids_nS], -1).gather(-1, order)
    s0, s1, s2 = running.sums
    mean = s1 / s0
    lse = running.lse()
    return Scores(
        torch.where(u_nS < ABSENT, NEG, u_nS / T),
        lse_rest,
        base,
        lse,
        s0.log() - mean,
        (s2 / s0 - mean.square()).clamp(min=0),
        best[:, 0] / T - lse,
        best_id[:, 0],
        (best[:, 0] - best[:, 1]) / T,
        above,
    )
