"""The sparse losses for frameworks that pass the student's logits instead of hidden states.

Each pass reads the logits once, in chunks, in fp32. The only tensor [N, V] that it stores is their
gradient.

Letters: N tokens, V vocabulary, K teacher slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.token_loss import NEG, Gathered, LossOptions, token_loss_forward
from ..losses.arguments import to_teacher_rows
from ..losses.types import TopK

CHUNK_ELEMENTS = 2**24  # 64 MiB in fp32


class LossOfLogits(NamedTuple):
    """Loss per position, with its gradient, and the mass of both sides on the teacher's ids."""

    loss: Tensor
    student_mass: Tensor
    teacher_mass: Tensor


class _GatherFromLogits(torch.autograd.Function):
    """logits [N, V], ids [N, K] -> logits at the ids [N, K], log-sum-exp of the others [N]."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, ids_NK: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(logits_NV.dtype, torch.float32)
        z_NK = logits_NV.gather(-1, ids_NK).to(wide)
        rest_N = torch.empty_like(z_NK[:, 0])
        for at in _chunks(logits_NV):
            others = logits_NV[at].to(wide, copy=True).scatter_(-1, ids_NK[at], NEG)
            rest_N[at] = others.logsumexp(-1)
        ctx.save_for_backward(logits_NV, ids_NK, rest_N)
        return z_NK, rest_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad_z_NK, grad_rest_N = grads
        logits_NV, ids_NK, rest_N = ctx.saved_tensors
        grad_NV = torch.empty_like(logits_NV)
        for at in _chunks(logits_NV):
            others = logits_NV[at].to(rest_N.dtype, copy=True).scatter_(-1, ids_NK[at], NEG)
            dz = others.sub_(rest_N[at, None]).exp_().mul_(grad_rest_N[at, None])
            # Where the ids cover the vocabulary, exp(NEG − NEG) is 1: their entries start at 0.
            dz.scatter_(-1, ids_NK[at], 0.0).scatter_add_(-1, ids_NK[at], grad_z_NK[at])
            grad_NV[at] = dz
        return grad_NV, None


def _chunks(logits_NV: Tensor) -> Iterator[slice]:
    tokens = max(1, CHUNK_ELEMENTS // logits_NV.shape[1])
    return (slice(i, i + tokens) for i in range(0, logits_NV.shape[0], tokens))


def topk_loss_of_logits(logits: Tensor, teacher: TopK, divergence: str) -> LossOfLogits:
    """Return D(p, q) per position over K + 1 outcomes, from the logits of the student.

        p: the teacher's probabilities of its K ids, and of all other tokens as one outcome
        q = softmax(logits), on the same K + 1 outcomes

    Args:
        logits: [..., V], float16, bfloat16, float32 or float64.
        teacher: answers at the same positions, with one or more ids at each. A repeated id is one
            outcome with the summed probability.
        divergence: "forward_kl" KL(p‖q), "reverse_kl" KL(q‖p), or another of `topk_distill`.

    Returns:
        LossOfLogits, each [...] in fp32 (fp64 from fp64).

    Raises:
        ValueError or TypeError that names the argument.

    Example:
        >>> logits = torch.randn(1, 5, 100, requires_grad=True)
        >>> best = torch.randn(1, 5, 100).log_softmax(-1).topk(8)
        >>> teacher = TopK(best.indices, best.values)
        >>> topk_loss_of_logits(logits, teacher, "reverse_kl").loss.sum().backward()
    """
    options = LossOptions(divergence)
    rows = to_teacher_rows(teacher, options, torch.promote_types(logits.dtype, torch.float32))
    empty = rows.teacher.ids < 0
    # An empty slot gets an id that its row has, so that no other logit is left out of the rest.
    ids_NK = torch.where(empty, rows.teacher.ids.amax(-1, keepdim=True), rows.teacher.ids)
    z_NK, rest_N = _GatherFromLogits.apply(  # type: ignore[no-untyped-call]
        logits.flatten(0, -2), ids_NK
    )
    gathered = Gathered(z_NK.masked_fill(empty, NEG), rest_N, None)
    out = token_loss_forward(gathered, rows.teacher, None, options)
    assert out.student_mass is not None
    columns = (out.per_token, out.student_mass.detach(), rows.mass)
    return LossOfLogits(*(column.view(logits.shape[:-1]) for column in columns))
