"""torch.library operator of the row mathematics alone, from logits that are computed elsewhere.

    fastdistill::token_loss   ℓ [N] of a named divergence, its statistics, and
                              dℓ / d(z, lse_rest, lse_base)                (token_loss.py)

The backward pass multiplies these derivatives by the upstream gradient of ℓ. The statistics carry
no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import get_backend
from .head import LMHead, Stats
from .op_common import LOSS, define_operator, library, or_empty, or_none
from .token_loss import LossOptions, TeacherTopK


def _token_loss(
    z: Tensor,
    lse_rest: Tensor,
    mean_rest: Tensor,
    lse_base: Tensor,
    ids: Tensor,
    teacher_ids: Tensor,
    teacher_lp: Tensor,
    teacher_log_tail: Tensor,
    labels: Tensor | None,
    **scalars: Any,
) -> tuple[Tensor, ...]:
    T = scalars["temperature"]
    out = get_backend(scalars["impl"]).token_loss(
        LMHead(z, logit_scale=T, temperature=T),  # slots have gradients of z, not of W x
        ids,
        Stats(z, lse_rest, or_none(mean_rest), or_none(lse_base)),
        TeacherTopK(teacher_ids, teacher_lp, teacher_log_tail),
        labels,
        torch.ones_like(lse_rest),
        LossOptions.of(scalars),
        grad=scalars["grad"],
    )
    rows, grads = out.rows, out.grads
    if rows.divergence.data_ptr() == rows.per_token.data_ptr():
        # An operator's outputs may not share memory.
        rows = rows._replace(divergence=rows.divergence.clone())
    on_inputs = (None,) * 3 if grads is None else (grads.z_ids, grads.lse_rest, grads.lse_base)
    return tuple(or_empty(t, lse_rest) for t in (*rows, out.entropy, *on_inputs))


def _fake_token_loss(
    z: Tensor, lse_rest: Tensor, mean_rest: Tensor, lse_base: Tensor, *others: Any, **scalars: Any
) -> tuple[Tensor, ...]:
    at_base, grad = lse_base.shape[0] > 0, scalars["grad"]
    has_lse = scalars["temperature"] == 1.0 or at_base
    on_base = grad and at_base and LossOptions.of(scalars).needs_base
    has = (True, True, True, has_lse, has_lse and others[-1] is not None, mean_rest.shape[0] > 0)
    rows = (
        torch.empty_like(lse_rest) if h else lse_rest.new_empty(0) for h in (*has, grad, on_base)
    )
    *terms, g_rest, g_base = rows
    return *terms, torch.empty_like(z) if grad else z.new_empty(0), g_rest, g_base


token_loss = define_operator(
    "token_loss(Tensor z, Tensor lse_rest, Tensor mean_rest, Tensor lse_base, Tensor ids, "
    "Tensor teacher_ids, Tensor teacher_lp, Tensor teacher_log_tail, Tensor? labels, *, "
    f"{LOSS}, float temperature, bool grad, str impl) -> (Tensor per_token, Tensor divergence, "
    "Tensor student_mass, Tensor lse, Tensor nll, Tensor entropy, Tensor g_z, Tensor g_rest, "
    "Tensor g_base)",
    _token_loss,
    _fake_token_loss,
)


def _save(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[-3:])


def _backward(ctx: Any, grad: Tensor | None, *others: Tensor) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    g_z, g_rest, g_base = ctx.saved_tensors
    on_base = grad * g_base if g_base.numel() else None
    return g_z * grad.unsqueeze(-1), grad * g_rest, None, on_base, *[None] * 5


torch.library.register_autograd(token_loss, _backward, setup_context=_save, lib=library)
