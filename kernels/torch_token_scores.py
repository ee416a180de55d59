"""Scores of a block from its statistics and the logits of its slots, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .head import LMHead, Scanned, Stats
from .row_scores import RowScores
from .token_loss import ABSENT, NEG, LossOptions, TeacherTopK, TokenLosses, first_slots
from .torch_token_loss import token_loss


def token_scores(
    head: LMHead,
    ids_nS: Tensor,
    scanned: Scanned,
    teacher: TeacherTopK | None,
    label_n: Tensor | None,
) -> RowScores:
    """Scores of one block; the label, if given, is the last slot and may repeat another."""
    T, u_nS, running = head.temperature, scanned.u_nS, scanned.rest
    assert scanned.best is not None
    best, best_id, above = scanned.best
    unique = first_slots(ids_nS)
    unique_u = torch.where(unique, u_nS, NEG)
    if label_n is not None:
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
    nll = rank = kl = mass = hellinger = acceptance = None
    if teacher is not None:
        stats = Stats(torch.where(u_nS < ABSENT, NEG, u_nS / T), lse_rest, None, base)

        def rows(name: str) -> TokenLosses:
            options, one = LossOptions(name, temperature=T), torch.ones_like(lse)
            return token_loss(head, ids_nS, stats, teacher, label_n, one, options, grad=False).rows

        _, kl, mass, _, nll = rows("forward_kl")
        hellinger = rows("hellinger").divergence.clamp(min=0).sqrt()
        acceptance = (1 - rows("tvd").divergence).clamp(min=0, max=1)
    elif label_n is not None:
        u_label = u_nS[:, -1]
        nll = (torch.logaddexp(base, u_label) - u_label).masked_fill(label_n < 0, 0.0)
    if label_n is not None:
        # The label's logit comes from another product; if it is the argmax, its rank is 0.
        rank = torch.where((best_id == label_n) | (label_n < 0), 0, above)
    return RowScores(
        lse,
        s0.log() - mean,
        (s2 / s0 - mean.square()).clamp(min=0),
        best[:, 0] / T - lse,
        best_id,
        (best[:, 0] - best[:, 1]) / T,
        nll,
        rank,
        kl,
        mass,
        hellinger,
        acceptance,
    )
