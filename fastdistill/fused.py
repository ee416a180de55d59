"""The gradient paths of the sparse losses: the same loss, computed in different ways.

fused         gradients in the forward pass, scaled in backward: 6NVH FLOPs, scalar losses only
recomputed    ordinary autograd on [N, K], the head through the primitive: 8NVH, any upstream
by_rows       K gathered rows, no pass over the head: tail="renorm_both" only
by_reference  the specification on materialized logits
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .kernels.backends import get_backend
from .kernels.head import Head, round_scaled
from .kernels.op_common import or_none
from .kernels.op_losses import raise_no_second_derivative, scale_saved, topk_loss
from .kernels.rows import Gathered, LossOptions, entropy_of, first_slots, token_loss_forward
from .kernels.topk_loss import FusedLoss, callable_token_loss, named_token_loss
from .kernels.topk_loss import fused as fused_loss
from .operands import Operands, TeacherRows
from .outputs import DistillOutput
from .parallel import Shard, backend_of, gather_logits, lse_gather


class LossTerms(NamedTuple):
    """Loss and statistics, [N] each.

    `loss` is Σ coef · ℓ if the path computes the sum itself; otherwise None, and per_token carries
    the gradient.
    """

    loss: Tensor | None
    per_token: Tensor
    divergence: Tensor
    student_mass: Tensor | None
    lse: Tensor | None
    nll: Tensor | None
    entropy: Tensor | None


def gathered_ids(teacher_rows: TeacherRows, label_N: Tensor | None) -> Tensor:
    """The teacher's ids, followed by the label if there is one: [N, K] or [N, K+1]."""
    ids = teacher_rows.teacher.ids
    return ids if label_N is None else torch.cat([ids, label_N.unsqueeze(-1)], -1)


def needed_label(label_N: Tensor | None, options: LossOptions, statistics: bool) -> Tensor | None:
    """The label if it is needed: for statistics or cross-entropy."""
    return label_N if statistics or options.ce_weight else None


def recomputed(
    x: Tensor,
    head: Head,
    teacher_rows: TeacherRows,
    label_N: Tensor | None,
    options: LossOptions,
    statistics: bool,
    impl: str,
    shard: Shard | None,
) -> LossTerms:
    label_N = needed_label(label_N, options, statistics)
    ids = gathered_ids(teacher_rows, label_N)
    base = head.temperature != 1.0 and (statistics or options.needs_base)
    z, lse_rest, mean_rest, lse_base = lse_gather(x, head, ids, statistics, base, impl, shard)
    gathered = Gathered(z, lse_rest, lse_base if base else None)
    rows = token_loss_forward(gathered, teacher_rows.teacher, label_N, options)
    entropy = entropy_of(gathered, mean_rest, first_slots(ids))[0] if statistics else None
    return LossTerms(None, *rows, entropy)


def by_rows(
    x: Tensor,
    head: Head,
    teacher_rows: TeacherRows,
    options: LossOptions,
    impl: str,
    shard: Shard | None,
) -> LossTerms:
    z = gather_logits(x, head, teacher_rows.teacher.ids, impl, shard)
    rows = token_loss_forward(Gathered(z, None, None), teacher_rows.teacher, None, options)
    return LossTerms(None, *rows, None)


def fused(
    x: Tensor,
    head: Head,
    teacher_rows: TeacherRows,
    label_N: Tensor | None,
    coef_N: Tensor,
    options: LossOptions,
    statistics: bool,
    impl: str,
    shard: Shard | None,
) -> LossTerms:
    label_N = needed_label(label_N, options, statistics)
    ids = gathered_ids(teacher_rows, label_N)
    base = head.temperature != 1.0 and (statistics or options.needs_base)
    named = isinstance(options.divergence, str)
    if not named or shard is not None:
        if not named and torch.compiler.is_compiling():
            checks.fail(
                "backward",
                "'recompute' or 'auto' under torch.compile",
                "'fused'",
                "a callable divergence cannot enter an operator",
            )

        def run(coef: Tensor, x: Tensor, head: Head, need: list[bool]) -> FusedLoss:
            out = fused_loss(
                get_backend(impl if shard is None else backend_of(impl, head)),
                head,
                x,
                ids if shard is None else shard.slots(ids, head),
                teacher_rows.teacher,
                label_N,
                coef,
                named_token_loss(options) if named else callable_token_loss(options),
                base=base,
                entropy=statistics,
                need_hidden=need[0],
                need_weight=need[1],
                need_bias=need[2],
                combine=None if shard is None else shard.combine_stats,
                chunk=None if shard is None else shard.chunk(head, x.shape[0], need[1]),
                filter_eps=options.filter_eps,
            )
            if shard is None or out.dx is None:
                return out
            dx, grad_scale = round_scaled(shard.all_reduce_grad(out.dx), x)
            return out._replace(
                dx=dx, grad_scale=torch.cat([grad_scale.reshape(1), out.grad_scale[1:]])
            )

        loss, out = keep_gradients(run, coef_N, x, head)
        return LossTerms._make((loss, *out.rows, out.entropy))
    loss, per_token, D, mass, lse, nll, entropy, *_ = topk_loss(
        x,
        head.weight,
        head.bias,
        coef_N,
        ids,
        *teacher_rows.teacher,
        label_N,
        options.divergence,
        options.beta,
        options.skew,
        options.tail,
        options.t2_scale,
        options.ce_weight,
        options.z_loss,
        head.logit_scale,
        head.softcap,
        head.temperature,
        head.vocab,
        base,
        statistics,
        needs(x, head),
        impl,
        options.filter_eps,
    )
    return LossTerms(loss, per_token, D, mass, or_none(lse), or_none(nll), or_none(entropy))


def needs(x: Tensor, head: Head) -> list[bool]:
    """Which of hidden, weight and bias need a gradient."""
    on = torch.is_grad_enabled()
    return [on and t is not None and t.requires_grad for t in (x, head.weight, head.bias)]


def keep_gradients(
    run: Callable[[Tensor, Tensor, Head, list[bool]], Any], coef_N: Tensor, x: Tensor, head: Head
) -> tuple[Tensor, Any]:
    """Run a computation of gradients in the forward pass that cannot be an operator.

    It calls the user's code or communicates with other ranks.
    """
    box: list[Any] = []
    loss = _PrecomputedGradients.apply(
        run, box, head, needs(x, head), coef_N, x, head.weight, head.bias
    )
    return loss, box[0]


class _PrecomputedGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, box, head, need, coef, x, weight, bias):
        head = head._replace(weight=weight, bias=bias)
        with torch.autocast(x.device.type, enabled=False):
            out = run(coef, x, head, need)
        saved = [t if t is not None else x.new_empty(0) for t in (out.dx, out.dw, out.db)]
        per_token = out.per_token if hasattr(out, "per_token") else out.rows.per_token
        ctx.save_for_backward(per_token, out.grad_scale, *saved)
        # Otherwise the box would hold dW after backward has freed it.
        box.append(out._replace(dx=None, dw=None, db=None))
        return out.loss

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # create_graph=True
            raise_no_second_derivative()
        per_token, grad_scale, *saved = ctx.saved_tensors
        d_coef = grad * per_token if ctx.needs_input_grad[4] else None
        grads = scale_saved(saved, grad, grad_scale, ctx.needs_input_grad[5:])
        return None, None, None, None, d_coef, *grads


def by_reference(
    x: Tensor,
    head: Head,
    teacher_rows: TeacherRows,
    label_N: Tensor | None,
    coef_N: Tensor,
    options: LossOptions,
) -> LossTerms:
    from . import reference

    out = reference.topk_distill(
        x,
        head.weight,
        *teacher_rows.teacher,
        label_N,
        coef_N,
        options,
        bias=head.bias,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        valid_vocab=head.vocab,
    )
    return LossTerms(*out)


def empty_output(
    ops: Operands, x: Tensor, reduction: str, options: LossOptions, label_N: Tensor | None
) -> DistillOutput:
    """The result without any counted position: 0, with zero gradients."""
    zero = torch.zeros(ops.batch_shape, dtype=ops.head.dtype, device=x.device)
    parts = [x, ops.head.weight[:0], *([] if ops.head.bias is None else [ops.head.bias[:0]])]
    loss = sum((p.sum().to(zero.dtype) for p in parts), start=zero.sum())
    by_rows = options.tail == "renorm_both" and not options.needs_base
    of_head = None if by_rows else zero
    nll = None if label_N is None else of_head
    loss = loss if reduction != "none" else zero + loss
    return DistillOutput(loss, zero, zero, zero, of_head, of_head, nll, of_head)
