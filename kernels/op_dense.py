"""torch.library operators of the dense-teacher loss: schema, shapes for tracing, autograd.

fastdistill::dense_loss  Σ coef · ℓ and its gradients                    (dense_loss.py)
fastdistill::dense_rows  ℓ [N]; its backward is dense_loss with coef = the upstream gradient
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import dense_loss as losses
from .op_common import HEAD, LOSS, accumulator, define_operator, fake_grads, library, needed_by
from .op_losses import save_grads, saved_grads, scale_saved

_TEACHER = (
    "Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias, Tensor? labels, "
    "Tensor? missing_lse"
)
_SCALARS = f"{LOSS}, {HEAD}, float teacher_logit_scale, float? teacher_softcap"


def _fake_dense_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, coef: Tensor, *teacher: Any, **scalars: Any
) -> tuple[Tensor, ...]:
    grads = fake_grads(hidden, weight, bias, scalars["need"])
    return coef.new_empty(()), torch.empty_like(coef), coef.new_empty(3), *grads


dense_loss = define_operator(
    f"dense_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor coef, {_TEACHER}, *, "
    f"{_SCALARS}, bool[] need, str impl) -> "
    "(Tensor loss, Tensor per_token, Tensor grad_scale, Tensor dx, Tensor dw, Tensor db)",
    losses.dense_loss,
    _fake_dense_loss,
)
torch.library.register_autograd(dense_loss, saved_grads, setup_context=save_grads, lib=library)


def _dense_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *teacher: Any, **scalars: Any
) -> Tensor:
    coef = hidden.new_ones(hidden.shape[0], dtype=accumulator(weight))
    return losses.dense_loss(hidden, weight, bias, coef, *teacher, need=[False] * 3, **scalars)[1]


def _fake_dense_rows(hidden: Tensor, weight: Tensor, *others: Any, **scalars: Any) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=accumulator(weight))


dense_rows = define_operator(
    f"dense_rows(Tensor hidden, Tensor weight, Tensor? bias, {_TEACHER}, *, {_SCALARS}, "
    "str impl) -> Tensor",
    _dense_rows,
    _fake_dense_rows,
)


def _save_inputs(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    ctx.save_for_backward(*inputs)
    ctx.scalars = keyword_only_inputs


def _rows_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    hidden, weight, bias, *teacher = ctx.saved_tensors
    need = needed_by(ctx)
    _, _, grad_scale, *scaled_up = dense_loss(
        hidden, weight, bias, grad.contiguous(), *teacher, need=need, **ctx.scalars
    )
    one = grad_scale.new_ones(())
    grads = scale_saved(scaled_up, one, grad_scale, need, ctx.scalars["impl"])
    return (*grads, *[None] * len(teacher))


torch.library.register_autograd(dense_rows, _rows_grad, setup_context=_save_inputs, lib=library)
