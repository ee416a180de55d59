"""Per-token scores: all statistics from one streamed pass over the head.

    lse, H = −Σ q log q, Var[−log q], max, argmax, margin, label rank     of q = softmax(u / T)

The pass covers the tokens outside the slots. The slots (teacher ids and the label) are added from
their own gathered logits, so tails are exact. Memory beyond one slab is O(N·S).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .engines import Backend
from .head import LMHead, blocks
from .token_loss import ABSENT, NEG, first_slots


class HeadScores(NamedTuple):
    """[N] each at T; lse_rest_base at T=1; z_ids [N, S] at T."""

    z_ids: Tensor
    lse_rest: Tensor
    lse_rest_base: Tensor
    lse: Tensor
    entropy: Tensor
    varentropy: Tensor
    max_logprob: Tensor
    argmax: Tensor
    margin: Tensor
    above_label: Tensor  # int64: how many tokens have a larger logit than the last slot


def scores(
    backend: Backend, head: LMHead, hidden_NH: Tensor, ids_NS: Tensor, label_u_N: Tensor | None
) -> HeadScores:
    """Return the scores; label_u_N is the label's logit at T=1, from a product with its row."""
    parts = [
        _block(
            backend,
            head,
            hidden_NH[at],
            ids_NS[at],
            None if label_u_N is None else label_u_N[at],
        )
        for at in blocks(max(1, hidden_NH.shape[0]), backend.block_tokens)
    ]
    if len(parts) == 1:
        return parts[0]
    return HeadScores._make(torch.cat(pieces) for pieces in zip(*parts, strict=True))


def _block(
    backend: Backend, head: LMHead, hidden_nH: Tensor, ids_nS: Tensor, label_u_n: Tensor | None
) -> HeadScores:
    T = head.temperature
    scanned = backend.scan(
        head, hidden_nH, ids_nS, moments=2, base=True, best=True, label_u_n=label_u_n
    )
    u_nS, running = scanned.u_nS, scanned.rest
    assert scanned.best is not None
    best, best_id, above = scanned.best
    unique = first_slots(ids_nS)
    unique_u = torch.where(unique, u_nS, NEG)
    if label_u_n is not None:
        above = above + (unique_u > u_nS[:, -1:]).sum(-1)
    lse_rest = running.lse()
    base = lse_rest if scanned.rest_base is None else scanned.rest_base.lse()
    if ids_nS.shape[1]:
        running.add(unique_u.t())
        slot_u, slot = unique_u.max(-1)
        slot_id = ids_nS.gather(-1, slot.unsqueeze(-1))[:, 0]
        best_id = torch.where(slot_u > best[:, 0], slot_id, best_id)
        best = torch.cat([best, unique_u], -1).topk(2, -1).values
    s0, s1, s2 = running.sums
    mean = s1 / s0
    lse = running.lse()
    return HeadScores(
        torch.where(u_nS < ABSENT, NEG, u_nS / T),
        lse_rest,
        base,
        lse,
        s0.log() - mean,
        (s2 / s0 - mean.square()).clamp(min=0),
        best[:, 0] / T - lse,
        best_id,
        (best[:, 0] - best[:, 1]) / T,
        above,
    )
