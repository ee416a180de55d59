"""torch.library operators of the dense-teacher loss: schema, shapes for tracing, autograd.

fastdistill::dense_loss  Σ coef · ℓ and its gradients                    (dense_loss.py)
fastdistill::dense_rows  ℓ [N]; its backward is dense_loss with coef = the upstream gradient
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import dense_loss as losses
from .backends import get_backend
from .head import Head
from .op_common import accumulator, fake_grads, full_precision, needed, or_empty
from .op_losses import saved_grads, scale_saved
from .rows import LossOptions


@torch.library.custom_op("fastdistill::dense_loss", mutates_args=())
def dense_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coef: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    divergence: str,
    beta: float,
    skew: float,
    t2_scale: bool,
    ce_weight: float,
    z_loss: float,
    logit_scale: float,
    softcap: float | None,
    teacher_logit_scale: float,
    teacher_softcap: float | None,
    temperature: float,
    vocab: int,
    need: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, per_token, grad_scale, dx, dw, db)."""
    options = LossOptions(
        divergence, beta, skew, "bucket", temperature, t2_scale, ce_weight, z_loss
    )
    with full_precision(hidden):
        out = losses.dense(
            get_backend(impl),
            Head(weight, bias, logit_scale, softcap, temperature, vocab),
            hidden,
            Head(
                teacher_weight,
                teacher_bias,
                teacher_logit_scale,
                teacher_softcap,
                temperature,
                vocab,
            ),
            teacher_hidden,
            labels,
            coef,
            options,
            need_hidden=need[0],
            need_weight=need[1],
            need_bias=need[2],
        )
    dx, dw, db = (or_empty(t, coef) for t in (out.dx, out.dw, out.db))
    return out.loss, out.per_token, out.grad_scale, dx, dw, db


@dense_loss.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coef: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    divergence: str,
    beta: float,
    skew: float,
    t2_scale: bool,
    ce_weight: float,
    z_loss: float,
    logit_scale: float,
    softcap: float | None,
    teacher_logit_scale: float,
    teacher_softcap: float | None,
    temperature: float,
    vocab: int,
    need: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        coef.new_empty(()),
        torch.empty_like(coef),
        coef.new_empty(3),
        *fake_grads(hidden, weight, bias, need),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # or autograd would allocate zeros of the size of dW
    ctx.save_for_backward(output[1], *output[2:])
    ctx.count = len(inputs)


dense_loss.register_autograd(saved_grads, setup_context=_setup)


@torch.library.custom_op("fastdistill::dense_rows", mutates_args=())
def dense_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    divergence: str,
    beta: float,
    skew: float,
    t2_scale: bool,
    ce_weight: float,
    z_loss: float,
    logit_scale: float,
    softcap: float | None,
    teacher_logit_scale: float,
    teacher_softcap: float | None,
    temperature: float,
    vocab: int,
    impl: str,
) -> Tensor:
    coef = hidden.new_ones(hidden.shape[0], dtype=accumulator(weight))
    return dense_loss(
        hidden,
        weight,
        bias,
        coef,
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        labels,
        divergence,
        beta,
        skew,
        t2_scale,
        ce_weight,
        z_loss,
        logit_scale,
        softcap,
        teacher_logit_scale,
        teacher_softcap,
        temperature,
        vocab,
        [False] * 3,
        impl,
    )[1]


@dense_rows.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    divergence: str,
    beta: float,
    skew: float,
    t2_scale: bool,
    ce_weight: float,
    z_loss: float,
    logit_scale: float,
    softcap: float | None,
    teacher_logit_scale: float,
    teacher_softcap: float | None,
    temperature: float,
    vocab: int,
    impl: str,
) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=accumulator(weight))


def _rows_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.scalars = inputs[7:]


def _rows_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    hidden, weight, bias, *teacher = ctx.saved_tensors
    need = needed(ctx)
    *scalars, impl = ctx.scalars
    _, _, grad_scale, *scaled_up = dense_loss(
        hidden, weight, bias, grad.contiguous(), *teacher, *scalars, need, impl
    )
    grads = scale_saved(scaled_up, grad_scale.new_ones(()), grad_scale, need)
    return (*grads, *[None] * (4 + len(ctx.scalars)))


dense_rows.register_autograd(_rows_grad, setup_context=_rows_setup)
