"""The gradient paths of the sparse losses: the same loss, computed in different ways.

topk_loss     gradients in the forward pass, scaled in backward: 6NVH FLOPs, scalar losses only
              (an operator; `fused` where none can be: a callable divergence, a sharded head)
recomputed    the head through the primitive, [N, K] by an operator (by autograd for a callable
              divergence): 8NVH, any upstream
by_rows       K gathered rows, no pass over the head: tail="renorm_both" only
by_reference  the specification on materialized logits
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.backends import get_backend
from ..kernels.head import LMHead, needed, round_scaled
from ..kernels.op_common import or_none
from ..kernels.op_losses import raise_no_second_derivative, scale_saved
from ..kernels.op_token_loss import token_loss
from ..kernels.token_loss import (
    Gathered,
    LossOptions,
    entropy_of,
    lse_of,
    slot_ids,
    token_loss_forward,
)
from ..kernels.topk_loss import FusedLoss
from ..kernels.topk_loss import fused as fused_loss
from ..runtime import checks
from .arguments import LossTerms, Operands, Reduction, TeacherRows, TokenWeights, check_fused
from .checks import check_grad_filter
from .types import DistillOutput
from .vocab_parallel import backend_of, gather_logits, lse_gather


class TopKCall(NamedTuple):
    """A checked call of the sparse loss, on the tokens that count."""

    ops: Operands  # all tokens, and the head
    hidden: Tensor  # [N, H]
    teacher_rows: TeacherRows
    label: Tensor | None  # [N]
    weights: TokenWeights
    options: LossOptions
    statistics: bool  # whether to compute what only DistillOutput needs

    @property
    def head(self) -> LMHead:
        return self.ops.head

    @property
    def needed_label(self) -> Tensor | None:
        """The label if it is needed: for statistics or cross-entropy."""
        return self.label if self.statistics or self.options.ce_weight else None

    @property
    def ids(self) -> Tensor:
        """The distinct ids of the slots, [N, K], or [N, K+1] if the label is needed."""
        return slot_ids(self.teacher_rows.teacher.ids, self.needed_label)

    @property
    def base(self) -> bool:
        """Whether a separate log-sum-exp at T=1 is needed."""
        return self.head.temperature != 1.0 and (self.statistics or self.options.needs_base)

    def operands(self) -> tuple[Tensor | None, ...]:
        """The tensors of fastdistill::topk_loss."""
        head, teacher = self.head, self.teacher_rows.teacher
        tensors = (self.hidden, head.weight, head.bias, self.weights.coef, self.ids)
        return *tensors, *teacher, self.needed_label

    def scalars(self) -> dict[str, Any]:
        """The scalars of fastdistill::topk_loss."""
        options = self.options
        return {
            **options.scalars(),
            **self.head.scalars(),
            "base": self.base,
            "entropy": self.statistics,
            "need": needs(self.hidden, self.head),
            "impl": options.impl,
            "filter_eps": options.filter_eps,
        }


def terms_of(outputs: tuple[Tensor, ...]) -> LossTerms:
    """The terms in the outputs of fastdistill::topk_loss, in the order of its schema."""
    return LossTerms._make((*outputs[:4], *(or_none(t) for t in outputs[4:7])))


def path_of(call: TopKCall, reduction: Reduction) -> Callable[[TopKCall], LossTerms] | None:
    """The function that computes this call; None for the operator."""
    options, named = call.options, isinstance(call.options.divergence, str)
    if options.filter_eps is not None:
        check_grad_filter(options, reduction.kind, call.head.weight.dtype)
    if options.impl == "reference":
        return by_reference
    if options.tail == "renorm_both" and not options.needs_base:
        return by_rows
    compiled_callable = not named and torch.compiler.is_compiling()
    automatic = options.backward == "auto" and (reduction.kind == "none" or compiled_callable)
    if options.backward == "recompute" or automatic:
        return recomputed
    check_fused(reduction, options)
    if compiled_callable:
        checks.fail(
            "backward",
            "'recompute' or 'auto' under torch.compile",
            "'fused'",
            "a callable divergence cannot enter an operator",
        )
    return None if named and call.ops.shard is None else fused


def recomputed(call: TopKCall) -> LossTerms:
    ids, label = call.ids, call.needed_label
    z, lse_rest, mean_rest, lse_base = lse_gather(
        call.hidden, call.head, ids, call.statistics, call.base, call.options.impl, call.ops.shard
    )
    teacher, options = call.teacher_rows.teacher, call.options
    if isinstance(options.divergence, str):
        stats, answers = (z, lse_rest, mean_rest, lse_base), (*teacher, label)
        scalars = options.scalars() | {"temperature": options.temperature, "impl": options.impl}
        grad = torch.is_grad_enabled() and z.requires_grad
        terms = token_loss(*stats, ids, *answers, grad=grad, **scalars)
        return LossTerms(None, *terms[:3], *(or_none(t) for t in terms[3:6]))
    gathered = Gathered(z, lse_rest, lse_base if call.base else None)
    rows = token_loss_forward(gathered, teacher, label, options)
    entropy = None
    if call.statistics:
        unique = ids >= 0
        entropy = entropy_of(z, lse_rest, mean_rest, lse_of(z, lse_rest, unique), unique)
    return LossTerms(None, *rows, entropy)


def by_rows(call: TopKCall) -> LossTerms:
    teacher, options = call.teacher_rows.teacher, call.options
    z = gather_logits(call.hidden, call.head, teacher.ids, options.impl, call.ops.shard)
    rows = token_loss_forward(Gathered(z, None, None), teacher, None, options)
    return LossTerms(None, *rows, None)


def fused(call: TopKCall) -> LossTerms:
    """Compute the fused loss of a callable divergence or a sharded head, without an operator."""
    options, shard, ids = call.options, call.ops.shard, call.ids

    def run(coef: Tensor, x: Tensor, head: LMHead, need: list[bool]) -> FusedLoss:
        out = fused_loss(
            get_backend(options.impl if shard is None else backend_of(options.impl, head)),
            head,
            x,
            ids if shard is None else shard.slots(ids, head),
            call.teacher_rows.teacher,
            call.needed_label,
            coef,
            options,
            base=call.base,
            entropy=call.statistics,
            **needed(need),
            combine=None if shard is None else shard.combine_stats,
            chunk=None if shard is None else shard.chunk(head, x.shape[0], need[1]),
        )
        if shard is None or out.dx is None:
            return out
        dx, grad_scale = round_scaled(shard.all_reduce_grad(out.dx), x)
        scales = torch.cat([grad_scale.reshape(1), out.grad_scale[1:]])
        return out._replace(dx=dx, grad_scale=scales)

    loss, out = keep_gradients(run, call.weights.coef, call.hidden, call.head, options.impl)
    return LossTerms._make((loss, *out.rows, out.entropy))


def needs(x: Tensor, head: LMHead) -> list[bool]:
    """Which of hidden, weight and bias need a gradient."""
    on = torch.is_grad_enabled()
    return [on and t is not None and t.requires_grad for t in (x, head.weight, head.bias)]


def keep_gradients(
    run: Callable[[Tensor, Tensor, LMHead, list[bool]], Any],
    coef_N: Tensor,
    x: Tensor,
    head: LMHead,
    impl: str,
) -> tuple[Tensor, Any]:
    """Run a computation of gradients in the forward pass that cannot be an operator.

    It calls the user's code or communicates with other ranks.
    """
    box: list[Any] = []
    loss: Tensor = _PrecomputedGradients.apply(  # type: ignore[no-untyped-call]
        run, box, head, needs(x, head), impl, coef_N, x, head.weight, head.bias
    )
    return loss, box[0]


class _PrecomputedGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[..., Any],
        box: list[Any],
        head: LMHead,
        need: list[bool],
        impl: str,
        coef: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        head = head._replace(weight=weight, bias=bias)
        with torch.autocast(x.device.type, enabled=False):
            out = run(coef, x, head, need)
        saved = [t if t is not None else x.new_empty(0) for t in (out.dx, out.dw, out.db)]
        per_token = out.per_token if hasattr(out, "per_token") else out.rows.per_token
        ctx.save_for_backward(per_token, out.grad_scale, *saved)
        ctx.impl = impl
        # Otherwise the box would hold dW after backward has freed it.
        box.append(out._replace(dx=None, dw=None, db=None))
        loss: Tensor = out.loss
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise_no_second_derivative()
        per_token, grad_scale, *saved = ctx.saved_tensors
        d_coef = grad * per_token if ctx.needs_input_grad[5] else None
        grads = scale_saved(saved, grad, grad_scale, ctx.needs_input_grad[6:], ctx.impl)
        return None, None, None, None, None, d_coef, *grads


def recompute_rows(
    run: Callable[[Tensor, Tensor, LMHead, list[bool]], Any], x: Tensor, head: LMHead, impl: str
) -> Tensor:
    """Return ℓ [N] of a computation that cannot be an operator; the backward pass repeats it."""
    rows: Tensor = _RecomputedRows.apply(  # type: ignore[no-untyped-call]
        run, head, needs(x, head), impl, x, head.weight, head.bias
    )
    return rows


class _RecomputedRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[..., Any],
        head: LMHead,
        need: list[bool],
        impl: str,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.run, ctx.need, ctx.impl = run, need, impl
        ctx.head = head._replace(weight=weight.new_empty(0), bias=None)
        head = head._replace(weight=weight, bias=bias)
        with torch.autocast(x.device.type, enabled=False):
            rows: Tensor = run(x.new_ones(len(x), dtype=head.dtype), x, head, [False] * 3).per_token
        return rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise_no_second_derivative()
        x, weight, bias = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            head = ctx.head._replace(weight=weight, bias=bias)
            out = ctx.run(grad.contiguous(), x, head, ctx.need)
        saved = [t if t is not None else x.new_empty(0) for t in (out.dx, out.dw, out.db)]
        one = out.grad_scale.new_ones(())
        return None, None, None, None, *scale_saved(saved, one, out.grad_scale, ctx.need, ctx.impl)


def by_reference(call: TopKCall) -> LossTerms:
    from . import reference

    teacher, coef = call.teacher_rows.teacher, call.weights.coef
    return reference.topk_distill(call.hidden, call.head, teacher, call.label, coef, call.options)


def empty_output(
    ops: Operands, x: Tensor, reduction: Reduction, options: LossOptions
) -> DistillOutput:
    """The result without any counted position: 0, with zero gradients."""
    zero = torch.zeros(ops.batch_shape, dtype=ops.head.dtype, device=x.device)
    parts = [x, ops.head.weight[:0], *([] if ops.head.bias is None else [ops.head.bias[:0]])]
    loss = sum((p.sum().to(zero.dtype) for p in parts), start=zero.sum())
    by_rows = options.tail == "renorm_both" and not options.needs_base
    of_head = None if by_rows else zero
    nll = None if reduction.labels is None else of_head
    loss = loss if reduction.kind != "none" else zero + loss
    return DistillOutput(loss, zero, zero, zero, of_head, of_head, nll, of_head)
