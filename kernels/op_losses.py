"""torch.library operator of the fused sparse loss: schema, shapes for tracing, autograd.

    fastdistill::topk_loss   Σ coef · ℓ and its gradients, sparse teacher     (topk_loss.py)

The backward pass scales the gradients of the forward pass; coef [N] has its own gradient.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from . import topk_loss as losses
from .backends import get_backend
from .head import Head
from .op_common import fake_grads, full_precision, needed, or_empty, select_needed
from .rows import LossOptions, TeacherTopK


@torch.library.custom_op("fastdistill::topk_loss", mutates_args=())
def topk_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coef: Tensor,
    ids: Tensor,
    teacher_ids: Tensor,
    teacher_lp: Tensor,
    teacher_log_tail: Tensor,
    labels: Tensor | None,
    divergence: str,
    beta: float,
    skew: float,
    tail: str,
    t2_scale: bool,
    ce_weight: float,
    z_loss: float,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    vocab: int,
    base: bool,
    entropy: bool,
    need: list[bool],
    impl: str,
    filter_eps: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, per_token, divergence, student_mass, lse, nll, entropy, grad_scale, dx, dw, db)."""
    options = LossOptions(divergence, beta, skew, tail, temperature, t2_scale, ce_weight, z_loss)
    with full_precision(hidden):
        out = losses.fused(
            get_backend(impl),
            Head(weight, bias, logit_scale, softcap, temperature, vocab),
            hidden,
            ids,
            TeacherTopK(teacher_ids, teacher_lp, teacher_log_tail),
            labels,
            coef,
            losses.named_token_loss(options),
            base=base,
            entropy=entropy,
            need_hidden=need[0],
            need_weight=need[1],
            need_bias=need[2],
            filter_eps=filter_eps,
        )
    outputs = (*out.rows, out.entropy, out.dx, out.dw, out.db)
    per_token, D, mass, lse, nll, H, dx, dw, db = (or_empty(t, coef) for t in outputs)
    if D.data_ptr() == per_token.data_ptr():
        D = D.clone()  # an operator's outputs may not share memory
    return out.loss, per_token, D, mass, lse, nll, H, out.grad_scale, dx, dw, db


@topk_loss.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coef: Tensor,
    ids: Tensor,
    teacher_ids: Tensor,
    teacher_lp: Tensor,
    teacher_log_tail: Tensor,
    labels: Tensor | None,
    divergence: str,
    beta: float,
    skew: float,
    tail: str,
    t2_scale: bool,
    ce_weight: float,
    z_loss: float,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    vocab: int,
    base: bool,
    entropy: bool,
    need: list[bool],
    impl: str,
    filter_eps: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    row, none = torch.empty_like(coef), coef.new_empty(0)
    has_base = temperature == 1.0 or base
    return (
        coef.new_empty(()),
        row,
        torch.empty_like(row),
        torch.empty_like(row),
        torch.empty_like(row) if has_base else none,
        torch.empty_like(row) if has_base and labels is not None else coef.new_empty(0),
        torch.empty_like(row) if entropy else coef.new_empty(0),
        coef.new_empty(3),
        *fake_grads(hidden, weight, bias, need),
    )


def scale_saved(
    saved: list[Tensor], grad: Tensor, grad_scale: Tensor, need: list[bool]
) -> list[Tensor | None]:
    """Saved gradients times the upstream scalar, divided by their grad_scale [3].

    They are scaled in place, without a second dW. `loss.backward()` on CPU has upstream 1 and
    returns them unchanged; on a GPU, reading the scalar would stall the stream. With retain_graph
    they must outlive the call, and a traced graph owns no memory: then the product is a new tensor.
    """
    factors = (grad / grad_scale).unbind()
    in_place = type(grad) is Tensor and not torch._C._autograd._get_current_graph_task_keep_graph()
    pairs = zip(saved, factors, strict=True)
    return select_needed((scale_grad(g, f, in_place) if g.numel() else g for g, f in pairs), need)


def scale_grad(grad: Tensor, factor: Tensor, in_place: bool) -> Tensor:
    """grad · factor (0-dim, fp32 or fp64), multiplied in the wider type and rounded once.

    A GPU rounds a 0-dim factor to the type of `grad` first, and 2^17 is infinite in float16; a
    factor of shape [1] is promoted instead. A CPU does not round the 0-dim factor.
    """
    if not in_place:
        return (grad * factor.reshape(1)).to(grad.dtype)
    if grad.device.type == "cpu":
        return grad if factor.item() == 1.0 else grad.mul_(factor)
    return grad.mul_(factor.reshape(1))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # or autograd would allocate zeros of the size of dW
    ctx.save_for_backward(output[1], *output[7:])
    ctx.count = len(inputs)


def raise_no_second_derivative() -> NoReturn:
    raise RuntimeError(
        "the fused losses have no second derivative: their gradient is computed in the forward "
        "pass. impl='reference' has one, and materializes the logits"
    )


def saved_grads(ctx: Any, grad: Tensor, *others: Tensor) -> tuple[Any, ...]:
    """Backward of an operator (hidden, weight, bias, coef, ...) -> (loss, ...).

    It saved per_token, grad_scale, dx, dw, db. The statistics carry no gradient.
    """
    if grad is None:  # only a gradient of the gradient was requested
        raise_no_second_derivative()
    per_token, grad_scale, *saved = ctx.saved_tensors
    grads = scale_saved(saved, grad, grad_scale, needed(ctx))
    d_coef = grad * per_token if ctx.needs_input_grad[3] else None
    return (*grads, d_coef, *[None] * (ctx.count - 4))


topk_loss.register_autograd(saved_grads, setup_context=_setup)
