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
from .op_common import (
    HEAD,
    LOSS,
    define_operator,
    fake_grads,
    library,
    needed_by,
    select_needed,
)


def _fake_topk_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, coef: Tensor, *others: Any, **scalars: Any
) -> tuple[Tensor, ...]:
    has_lse = scalars["temperature"] == 1.0 or scalars["base"]
    has_label = others[-1] is not None

    def row(present: bool = True) -> Tensor:
        return torch.empty_like(coef) if present else coef.new_empty(0)

    return (
        coef.new_empty(()),
        *(row(), row(), row()),
        row(has_lse),
        row(has_lse and has_label),
        row(scalars["entropy"]),
        coef.new_empty(3),
        *fake_grads(hidden, weight, bias, scalars["need"]),
    )


topk_loss = define_operator(
    "topk_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor coef, Tensor ids, "
    "Tensor teacher_ids, Tensor teacher_lp, Tensor teacher_log_tail, Tensor? labels, *, "
    f"{LOSS}, {HEAD}, bool base, bool entropy, bool[] need, str impl, float? filter_eps) -> "
    "(Tensor loss, Tensor per_token, Tensor divergence, Tensor student_mass, Tensor lse, "
    "Tensor nll, Tensor entropy, Tensor grad_scale, Tensor dx, Tensor dw, Tensor db)",
    losses.topk_loss,
    _fake_topk_loss,
)


def scale_saved(
    saved: list[Tensor], grad: Tensor, grad_scale: Tensor, need: list[bool], impl: str
) -> list[Tensor | None]:
    """Saved gradients times the upstream scalar, divided by their grad_scale [3].

    They are scaled in place, without a second dW; a factor of 1, as in `loss.backward()`, leaves
    them unread. With retain_graph they must outlive the call, and a traced graph owns no memory:
    then the product is a new tensor.
    """
    factors = (grad / grad_scale).unbind()
    in_place = type(grad) is Tensor and not torch._C._autograd._get_current_graph_task_keep_graph()
    backend = get_backend(impl)

    def scaled(g: Tensor, factor: Tensor) -> Tensor:
        if not g.numel():
            return g
        if in_place:
            return backend.scale_(g, factor)
        return (g * factor.reshape(1)).to(g.dtype)  # [1]: a 0-dim factor is not promoted

    return select_needed(map(scaled, saved, factors), need)


def save_grads(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: Any, output: tuple[Tensor, ...]
) -> None:
    """Save per_token, grad_scale, dx, dw, db (the second output and the last four), and impl."""
    ctx.set_materialize_grads(False)  # or autograd would allocate zeros of the size of dW
    ctx.save_for_backward(output[1], *output[-4:])
    ctx.count, ctx.impl = len(inputs), keyword_only_inputs["impl"]


def raise_no_second_derivative() -> NoReturn:
    raise RuntimeError(
        "the fused losses have no second derivative: their gradient is computed in the forward "
        "pass. impl='reference' has one, and materializes the logits"
    )


def saved_grads(ctx: Any, grad: Tensor, *others: Tensor) -> tuple[Any, ...]:
    """Backward of an operator (hidden, weight, bias, coef, ...) -> (loss, ...) after `save_grads`.

    The statistics carry no gradient.
    """
    if grad is None:  # only a gradient of the gradient was requested
        raise_no_second_derivative()
    per_token, grad_scale, *saved = ctx.saved_tensors
    grads = scale_saved(saved, grad, grad_scale, needed_by(ctx), ctx.impl)
    d_coef = grad * per_token if ctx.needs_input_grad[3] else None
    return (*grads, d_coef, *[None] * (ctx.count - 4))


torch.library.register_autograd(topk_loss, saved_grads, setup_context=save_grads, lib=library)
