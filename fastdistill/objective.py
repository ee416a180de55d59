"""What the trainer computes where the hidden states meet the output head.

    B sequences · T positions (already shifted) · H hidden size · V vocabulary · K teacher tokens

Every function returns sums over tokens, so that whoever knows the number of tokens in the whole
accumulated batch divides, once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .config import DistillConfig
from .data import IGNORE_INDEX
from .heads import LMHead
from .losses import topk_distill
from .outputs import TopK
from .primitive import linear_lse_gather
from .scores import token_scores

# Columns of the per-sequence sums that evaluation gathers, instead of logits.
EVAL_COLUMNS = ("tokens", "loss", "nll", "top1", "kl", "agreement", "teacher_mass", "student_mass")
_LOGGED = ("divergence", "teacher_mass", "student_mass", "nll", "entropy")


class Objective(NamedTuple):
    """The loss summed over tokens, and detached sums of what is logged beside it."""

    loss: Tensor  # scalar, carries the gradient
    per_token: Tensor  # (B, T), zero at ignored positions
    tokens: Tensor  # scalar, how many positions counted
    sums: dict[str, Tensor]


def objective(
    hidden: Tensor,  # (B, T, H)
    head: LMHead,
    labels: Tensor,  # (B, T)
    teacher: TopK | None,  # [B, T, K]
    config: DistillConfig,
) -> Objective:
    counted = labels != IGNORE_INDEX
    if teacher is None:
        return _labels_only(hidden, head, labels, counted, config)
    out = topk_distill(
        hidden,
        head.weight,
        teacher,
        labels=labels,
        divergence=config.divergence,
        beta=config.beta,
        skew=config.skew,
        tail=config.tail,
        temperature=config.temperature,
        t2_scale=config.t2_scale,
        ce_weight=config.ce_weight,
        z_loss=config.z_loss,
        ignore_index=IGNORE_INDEX,
        reduction="sum",
        impl=config.impl,
        **head.options(),
    )
    logged = {name: getattr(out, name) for name in _LOGGED}
    sums = {name: _sum(x, counted) for name, x in logged.items() if x is not None}
    return Objective(out.loss, out.per_token, counted.sum(), sums)


def _labels_only(
    hidden: Tensor, head: LMHead, labels: Tensor, counted: Tensor, config: DistillConfig
) -> Objective:
    """Cross-entropy of the labels, from the one logit per position that it needs."""
    ids = torch.where(counted, labels, -1).unsqueeze(-1)
    selected = linear_lse_gather(hidden, head.weight, ids, impl=config.impl, **head.options())
    label_logit = torch.where(counted, selected.logits[..., 0], 0.0)
    lse = torch.where(counted, selected.lse, 0.0)
    nll = lse - label_logit
    per_token = config.ce_weight * nll + config.z_loss * lse.square()
    sums = {"nll": _sum(nll.detach(), counted)}
    return Objective(per_token.sum(), per_token.detach(), counted.sum(), sums)


@torch.no_grad()
def measure(
    hidden: Tensor,  # (B, T, H)
    head: LMHead,
    labels: Tensor,  # (B, T)
    teacher: TopK | None,  # [B, T, K]
    config: DistillConfig,
) -> Tensor:  # (B, len(EVAL_COLUMNS)), NaN where there is no teacher to compare with
    """Per-sequence sums of the training loss and of what a student is judged by."""
    loss = objective(hidden, head, labels, teacher, config).per_token
    counted = labels != IGNORE_INDEX
    scores = token_scores(
        hidden,
        head.weight,
        labels=labels,
        teacher=teacher,
        temperature=config.temperature,
        ignore_index=IGNORE_INDEX,
        impl=config.impl,
        **head.options(),
    )
    columns: dict[str, Tensor | None] = {
        "tokens": torch.ones_like(loss),
        "loss": loss,
        "nll": scores.nll,
        "top1": scores.argmax == labels,
        "kl": scores.forward_kl,
        "agreement": None if teacher is None else scores.argmax == _first_choice(teacher),
        "teacher_mass": scores.teacher_mass,
        "student_mass": scores.student_mass,
    }
    missing = torch.full(labels.shape[:1], torch.nan, device=labels.device)
    sums = []
    for name in EVAL_COLUMNS:
        values = columns[name]
        counts = None if values is None else torch.where(counted, values.float(), 0.0)
        sums.append(missing if counts is None else counts.sum(-1))
    return torch.stack(sums, dim=-1)


def _first_choice(teacher: TopK) -> Tensor:
    best = teacher.logprobs.masked_fill(teacher.ids < 0, -torch.inf).argmax(-1, keepdim=True)
    return teacher.ids.gather(-1, best)[..., 0]


def _sum(values: Tensor, counted: Tensor) -> Tensor:
    return torch.where(counted, values.detach().float(), 0.0).sum()
