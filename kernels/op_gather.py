"""torch.library operators of the primitives: schema, shapes for tracing, autograd.

    fastdistill::lse_gather     z_ids, lse_rest, E_rest[z], lse_rest at T=1    (lse_gather.py)
    fastdistill::gather_logits  z_ids alone, no LM-head pass                   (*_gather.py)

An operator is opaque to torch.compile: one call is one node of the graph. hidden may have a wider
type than a 16-bit weight if its values fit in the narrower one; dX is then returned unrounded, as
part of a larger sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import lse_gather as primitive
from .backends import get_backend
from .head import Head, Stats
from .op_common import (
    accumulator,
    fake_grads,
    full_precision,
    needed,
    or_empty,
    or_none,
    select_needed,
)


@torch.library.custom_op("fastdistill::lse_gather", mutates_args=())
def lse_gather(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    vocab: int,
    moment: bool,
    base: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    head = Head(weight, bias, logit_scale, softcap, temperature, vocab)
    x = hidden.to(weight.dtype)
    with full_precision(hidden):
        stats = primitive.lse_gather(get_backend(impl), head, x, ids, moment=moment, base=base)
    z_ids = stats.z_ids.contiguous()
    return (
        z_ids,
        stats.lse_rest,
        or_empty(stats.mean_rest, z_ids),
        or_empty(stats.lse_base, z_ids),
    )


@lse_gather.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    vocab: int,
    moment: bool,
    base: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z_ids = hidden.new_empty(ids.shape, dtype=accumulator(weight))
    row = z_ids.new_empty(ids.shape[0])
    return (
        z_ids,
        row,
        torch.empty_like(row) if moment else z_ids.new_empty(0),
        torch.empty_like(row) if base and temperature != 1.0 else z_ids.new_empty(0),
    )


@torch.library.custom_op("fastdistill::lse_gather_backward", mutates_args=())
def lse_gather_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    stats: list[Tensor],
    grads: list[Tensor],
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    vocab: int,
    need: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    head = Head(weight, bias, logit_scale, softcap, temperature, vocab)
    z_ids, lse_rest, mean_rest, lse_base = stats
    with full_precision(hidden):
        computed = get_backend(impl).recompute(
            head,
            hidden.to(weight.dtype),
            ids,
            Stats(z_ids, lse_rest, or_none(mean_rest), or_none(lse_base)),
            Stats(grads[0], grads[1], or_none(grads[2]), or_none(grads[3])),
            need_hidden=need[0],
            need_weight=need[1],
            need_bias=need[2],
            hidden_type=hidden.dtype,
        )
    dx, dw, db = (or_empty(g, hidden) for g in computed)
    return dx, dw, db


@lse_gather_backward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    stats: list[Tensor],
    grads: list[Tensor],
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    vocab: int,
    need: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_grads(hidden, weight, bias, need)


def _lse_gather_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, ids, *ctx.scalars = inputs
    ctx.save_for_backward(hidden, weight, bias, ids, *output)


def _lse_gather_grad(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    hidden, weight, bias, ids, *stats = ctx.saved_tensors
    scale, softcap, temperature, vocab = ctx.scalars[:4]
    dx, dw, db = lse_gather_backward(
        hidden,
        weight,
        bias,
        ids,
        stats,
        [g.contiguous() for g in grads],
        scale,
        softcap,
        temperature,
        vocab,
        need := needed(ctx),
        ctx.scalars[-1],
    )
    return (*select_needed((dx, dw, db), need), *[None] * 8)


lse_gather.register_autograd(_lse_gather_grad, setup_context=_lse_gather_setup)


@torch.library.custom_op("fastdistill::gather_logits", mutates_args=())
def gather_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    impl: str,
) -> Tensor:
    head = Head(weight, bias, logit_scale, softcap, temperature, weight.shape[0])
    with full_precision(hidden):
        return get_backend(impl).gather(head, hidden, ids)


@gather_logits.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    impl: str,
) -> Tensor:
    return hidden.new_empty(ids.shape, dtype=accumulator(weight))


@torch.library.custom_op("fastdistill::gather_logits_backward", mutates_args=())
def gather_logits_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    z_ids: Tensor,
    grad: Tensor,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    need: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    head = Head(weight, bias, logit_scale, softcap, temperature, weight.shape[0])
    with full_precision(hidden):
        computed = get_backend(impl).gather_grads(
            head,
            hidden,
            ids,
            z_ids,
            grad,
            need_hidden=need[0],
            need_weight=need[1],
            need_bias=need[2],
        )
    dx, dw, db = (or_empty(g, hidden) for g in computed)
    return dx, dw, db


@gather_logits_backward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    z_ids: Tensor,
    grad: Tensor,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    need: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_grads(hidden, weight, bias, need)


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, weight, bias, ids, *ctx.scalars = inputs
    ctx.save_for_backward(hidden, weight, bias, ids, output)


def _gather_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    need = needed(ctx)
    *scalars, impl = ctx.scalars
    grads = gather_logits_backward(*ctx.saved_tensors, grad.contiguous(), *scalars, need, impl)
    return (*select_needed(grads, need), *[None] * 5)


gather_logits.register_autograd(_gather_grad, setup_context=_gather_setup)
