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
from .head import LMHead, Stats, needed
from .op_common import (
    HEAD,
    accumulator,
    define_operator,
    fake_grads,
    full_precision,
    library,
    needed_by,
    or_empty,
    or_none,
    select_needed,
)

_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor ids"
_GRADS = "(Tensor dx, Tensor dw, Tensor db)"


def _lse_gather(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, **scalars: Any
) -> tuple[Tensor, ...]:
    backend, head = get_backend(scalars["impl"]), LMHead.of(weight, bias, scalars)
    moment, base = scalars["moment"], scalars["base"]
    x = hidden.to(weight.dtype)
    with full_precision(hidden):
        stats = primitive.lse_gather(backend, head, x, ids, moment=moment, base=base)
    z_ids = stats.z_ids.contiguous()
    optional = (or_empty(t, z_ids) for t in (stats.mean_rest, stats.lse_base))
    return z_ids, stats.lse_rest, *optional


def _fake_lse_gather(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, **scalars: Any
) -> tuple[Tensor, ...]:
    z_ids = hidden.new_empty(ids.shape, dtype=accumulator(weight))
    at_base = scalars["base"] and scalars["temperature"] != 1.0
    optional = (z_ids.new_empty(len(ids) if n else 0) for n in (scalars["moment"], at_base))
    return z_ids, z_ids.new_empty(len(ids)), *optional


lse_gather = define_operator(
    f"lse_gather({_INPUTS}, *, {HEAD}, bool moment, bool base, str impl) -> "
    "(Tensor z_ids, Tensor lse_rest, Tensor mean_rest, Tensor lse_base)",
    _lse_gather,
    _fake_lse_gather,
)


def _lse_gather_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    stats: list[Tensor],
    grads: list[Tensor],
    **scalars: Any,
) -> tuple[Tensor, ...]:
    with full_precision(hidden):
        computed = get_backend(scalars["impl"]).recompute(
            LMHead.of(weight, bias, scalars),
            hidden.to(weight.dtype),
            ids,
            _stats(stats),
            _stats(grads),
            **needed(scalars["need"]),
            hidden_type=hidden.dtype,
        )
    return tuple(or_empty(g, hidden) for g in computed)


def _stats(tensors: list[Tensor]) -> Stats:
    z_ids, lse_rest, *optional = tensors
    return Stats(z_ids, lse_rest, *map(or_none, optional))


def _fake_lse_gather_backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any, **scalars: Any
) -> tuple[Tensor, ...]:
    return fake_grads(hidden, weight, bias, scalars["need"])


lse_gather_backward = define_operator(
    f"lse_gather_backward({_INPUTS}, Tensor[] stats, Tensor[] grads, *, {HEAD}, "
    f"bool[] need, str impl) -> {_GRADS}",
    _lse_gather_backward,
    _fake_lse_gather_backward,
)


def _save(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
) -> None:
    outputs = [output] if isinstance(output, Tensor) else output
    ctx.save_for_backward(*inputs, *outputs)
    ctx.scalars = {n: v for n, v in keyword_only_inputs.items() if n not in ("moment", "base")}


def _lse_gather_grad(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    hidden, weight, bias, ids, *stats = ctx.saved_tensors
    need, upstream = needed_by(ctx), [g.contiguous() for g in grads]
    computed = lse_gather_backward(
        hidden, weight, bias, ids, stats, upstream, need=need, **ctx.scalars
    )
    return (*select_needed(computed, need), None)


torch.library.register_autograd(lse_gather, _lse_gather_grad, setup_context=_save, lib=library)


def _gather_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, **scalars: Any
) -> Tensor:
    with full_precision(hidden):
        return get_backend(scalars["impl"]).gather(LMHead.of(weight, bias, scalars), hidden, ids)


def _fake_gather_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, **scalars: Any
) -> Tensor:
    return hidden.new_empty(ids.shape, dtype=accumulator(weight))


gather_logits = define_operator(
    f"gather_logits({_INPUTS}, *, {HEAD}, str impl) -> Tensor",
    _gather_logits,
    _fake_gather_logits,
)


def _gather_logits_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    z_ids: Tensor,
    grad: Tensor,
    **scalars: Any,
) -> tuple[Tensor, ...]:
    with full_precision(hidden):
        computed = get_backend(scalars["impl"]).gather_grads(
            LMHead.of(weight, bias, scalars),
            hidden,
            ids,
            z_ids,
            grad,
            **needed(scalars["need"]),
        )
    return tuple(or_empty(g, hidden) for g in computed)


def _fake_gather_logits_backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any, **scalars: Any
) -> tuple[Tensor, ...]:
    return fake_grads(hidden, weight, bias, scalars["need"])


gather_logits_backward = define_operator(
    f"gather_logits_backward({_INPUTS}, Tensor z_ids, Tensor grad, *, {HEAD}, "
    f"bool[] need, str impl) -> {_GRADS}",
    _gather_logits_backward,
    _fake_gather_logits_backward,
)


def _gather_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    need = needed_by(ctx)
    grads = gather_logits_backward(*ctx.saved_tensors, grad.contiguous(), need=need, **ctx.scalars)
    return (*select_needed(grads, need), None)


torch.library.register_autograd(gather_logits, _gather_grad, setup_context=_save, lib=library)
