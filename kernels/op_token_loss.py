"""torch.library operators of the row mathematics alone, from logits that are computed elsewhere.

    fastdistill::token_loss           ℓ [N] of a named divergence, and its statistics
    fastdistill::token_loss_backward  d(Σ coef · ℓ) / d(z, lse_rest, lse_base)  (token_loss.py)

The backward pass of the first calls the second with coef = the upstream gradient of ℓ. The
statistics carry no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import get_backend
from .head import LMHead, Stats
from .op_common import LOSS, define_operator, library, or_empty, or_none
from .token_loss import LossOptions, RowLosses, TeacherTopK

_ROWS = (
    "Tensor z, Tensor lse_rest, Tensor mean_rest, Tensor lse_base, Tensor ids, "
    "Tensor teacher_ids, Tensor teacher_lp, Tensor teacher_log_tail, Tensor? labels"
)
_SCALARS = f"{LOSS}, float temperature, str impl"


def _rows(rows: tuple[Any, ...], coef: Tensor, scalars: dict[str, Any], *, grad: bool) -> RowLosses:
    """Return the losses of the rows, which are the tensors of _ROWS."""
    z, lse_rest, mean_rest, lse_base, ids, teacher_ids, lp, log_tail, labels = rows
    T = scalars["temperature"]
    as_z = LMHead(z, logit_scale=T, temperature=T)  # slots have gradients of z, not of W x
    result: RowLosses = get_backend(scalars["impl"]).token_loss(
        as_z,
        ids,
        Stats(z, lse_rest, or_none(mean_rest), or_none(lse_base)),
        TeacherTopK(teacher_ids, lp, log_tail),
        labels,
        coef,
        LossOptions.of(scalars),
        grad=grad,
    )
    return result


def _token_loss(*rows: Any, **scalars: Any) -> tuple[Tensor, ...]:
    lse_rest = rows[1]
    out = _rows(rows, lse_rest, scalars, grad=False)
    divergence = out.rows.divergence
    if divergence.data_ptr() == out.rows.per_token.data_ptr():
        divergence = divergence.clone()  # an operator's outputs may not share memory
    terms = (*out.rows._replace(divergence=divergence), out.entropy)
    return tuple(or_empty(t, lse_rest) for t in terms)


def _fake_token_loss(
    z: Tensor, lse_rest: Tensor, mean_rest: Tensor, lse_base: Tensor, *others: Any, **scalars: Any
) -> tuple[Tensor, ...]:
    has_lse = scalars["temperature"] == 1.0 or lse_base.shape[0] > 0
    has = (True, True, True, has_lse, has_lse and others[-1] is not None, mean_rest.shape[0] > 0)
    return tuple(torch.empty_like(lse_rest) if h else lse_rest.new_empty(0) for h in has)


token_loss = define_operator(
    f"token_loss({_ROWS}, *, {_SCALARS}) -> (Tensor per_token, Tensor divergence, "
    "Tensor student_mass, Tensor lse, Tensor nll, Tensor entropy)",
    _token_loss,
    _fake_token_loss,
)


def _token_loss_backward(*operands: Any, **scalars: Any) -> tuple[Tensor, ...]:
    *rows, coef = operands
    grads = _rows(tuple(rows), coef, scalars, grad=True).grads
    assert grads is not None
    on_base = torch.zeros_like(rows[3]) if grads.lse_base is None else grads.lse_base
    return grads.z_ids, grads.lse_rest, on_base


def _fake_token_loss_backward(
    z: Tensor, lse_rest: Tensor, mean_rest: Tensor, lse_base: Tensor, *others: Any, **scalars: Any
) -> tuple[Tensor, ...]:
    return torch.empty_like(z), torch.empty_like(lse_rest), torch.empty_like(lse_base)


token_loss_backward = define_operator(
    f"token_loss_backward({_ROWS}, Tensor coef, *, {_SCALARS}) -> "
    "(Tensor g_z, Tensor g_rest, Tensor g_base)",
    _token_loss_backward,
    _fake_token_loss_backward,
)


def _save(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)
    ctx.scalars = keyword_only_inputs


def _backward(ctx: Any, grad: Tensor | None, *others: Tensor) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    g_z, g_rest, g_base = token_loss_backward(*ctx.saved_tensors, grad.contiguous(), **ctx.scalars)
    return g_z, g_rest, None, g_base, *[None] * 5


torch.library.register_autograd(token_loss, _backward, setup_context=_save, lib=library)
