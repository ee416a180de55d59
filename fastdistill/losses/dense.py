"""linear_distill_loss: a teacher given by its hidden states and LM head, without [N, V]."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.backends import get_backend
from ..kernels.dense_loss import DenseLoss, dense
from ..kernels.head import LMHead, needed
from ..kernels.op_dense import dense_loss, dense_rows
from ..kernels.token_loss import LossOptions
from ..runtime import checks, tensor_checks
from ..runtime.backend import resolve_impl
from .arguments import (
    Operands,
    Reduction,
    TokenWeights,
    check_fused,
    check_options,
    check_reduction,
    operands,
    token_weights,
)
from .gradient_paths import empty_output, keep_gradients, needs
from .support import SUPPORTS, answers_of_head
from .topk import Divergence, distill_topk


def linear_distill_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    k: int | None = None,
    support: str = "teacher",
    labels: Tensor | None = None,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    skew: float = 0.1,
    temperature: float = 1.0,
    t2_scale: bool = False,
    ce_weight: float = 0.0,
    z_loss: float = 0.0,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | float | Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    valid_vocab: int | None = None,
    impl: str = "auto",
    backward: str = "auto",
) -> Tensor:
    """Distill a dense teacher, given by its hidden states and LM head, without [N, V] logits.

        ℓ = (1 − ce_weight)·D(p, q) [·T² if t2_scale] + ce_weight·CE(label) + z_loss·LSE²

    over the whole vocabulary, or over k tokens and the rest as one outcome. p is the softmax of the
    teacher's head at T. The logits of both models are computed in slabs. Options as in
    `topk_distill`.

    Args:
        hidden: [N, H] or [B, T, H] of the student; weight: [V, H], the same dtype.
        teacher_hidden: [..., G], the same positions; G may differ from H. It gets no gradient.
        teacher_weight: [V', G]. Both heads are cut at the smallest of V, V' and valid_vocab: rows
            beyond it are padding.
        k: None compares the whole vocabulary. An integer compares the k tokens of `support` and
            the rest as one outcome (tail="bucket"); it is a lower bound of the whole divergence.
        support: with k, whose k likeliest tokens: "teacher", "student", or "union", the 2k of both.
            The reverse KL and JSD have their large terms where the student is.
        divergence: a name, or a callable (log_p [n, V], log_q [n, V]) -> [n] on whole rows
            ([n, K+1] with k).
        backward: "fused" (gradients in the forward pass, scalar losses), "recompute" (any
            upstream gradient), "auto".

    Returns:
        A scalar, or [...] for reduction="none" (zero at ignored positions).

    Raises:
        ValueError or TypeError that names the argument, what was expected and what was passed.

    Example:
        >>> hidden, weight = torch.randn(5, 16), torch.randn(100, 16, requires_grad=True)
        >>> teacher_hidden, teacher_weight = torch.randn(5, 32), torch.randn(100, 32)
        >>> linear_distill_loss(hidden, weight, teacher_hidden, teacher_weight).backward()
    """
    head = LMHead(weight, bias, logit_scale, softcap, valid_vocab)
    teacher_head = LMHead(teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap)
    options = LossOptions(
        divergence,
        beta,
        skew,
        temperature=temperature,
        t2_scale=t2_scale,
        ce_weight=ce_weight,
        z_loss=z_loss,
        impl=impl,
        backward=backward,
    )
    reduction_of = Reduction(labels, token_weight, ignore_index, reduction, num_items)
    checks.choice("support", support, SUPPORTS)
    if k is not None:
        vocab = operands(hidden, head).vocab
        vocab = min(vocab, operands(teacher_hidden, teacher_head, prefix="teacher_").vocab)
        head, teacher_head = (h._replace(valid_vocab=vocab) for h in (head, teacher_head))
        answers = answers_of_head(
            support,
            k,
            hidden,
            head,
            teacher_hidden,
            teacher_head,
            temperature=temperature,
            impl=impl,
        )
        return distill_topk(hidden, head, answers, options, reduction_of).loss
    if support != "teacher":
        hint = "k=None compares the whole vocabulary"
        checks.fail("support", "'teacher' with k=None", repr(support), hint)
    return distill_dense(hidden, head, teacher_hidden, teacher_head, options, reduction_of)


class DenseCall(NamedTuple):
    """A checked call of the dense loss, on the tokens that count."""

    ops: Operands  # all tokens, and the head
    hidden: Tensor  # [N, H]
    teacher_hidden: Tensor  # [N, G]
    teacher_head: LMHead
    label: Tensor | None  # [N]
    weights: TokenWeights
    options: LossOptions

    @property
    def head(self) -> LMHead:
        return self.ops.head

    def scalars(self) -> dict[str, Any]:
        """The scalars of fastdistill::dense_loss and dense_rows."""
        return {
            **self.options.scalars(),
            **self.head.scalars(),
            "teacher_logit_scale": self.teacher_head.logit_scale,
            "teacher_softcap": self.teacher_head.softcap,
            "impl": self.options.impl,
        }


def distill_dense(
    hidden: Tensor,
    head: LMHead,
    teacher_hidden: Tensor,
    teacher_head: LMHead,
    options: LossOptions,
    reduction: Reduction,
) -> Tensor:
    """Compute `linear_distill_loss` from two LM heads, options and a reduction."""
    call = _checked(hidden, head, teacher_hidden, teacher_head, options, reduction)
    x, options, coef = call.hidden, call.options, call.weights.coef
    if not x.shape[0]:
        return empty_output(call.ops, x, reduction, options).loss
    check_fused(reduction, options)
    per_row = reduction.kind == "none" or options.backward == "recompute"
    student = (x, call.head.weight, call.head.bias)
    teacher = (call.teacher_hidden, call.teacher_head.weight, call.teacher_head.bias, call.label)
    total = None
    if options.impl == "reference":
        total, rows = _by_reference(call)
    elif callable(options.divergence):
        total, rows = _with_callable(call, per_row)
    elif per_row:
        rows = dense_rows(*student, *teacher, **call.scalars())
    else:
        need = needs(x, call.head)
        total, rows = dense_loss(*student, coef, *teacher, need=need, **call.scalars())[:2]
    if reduction.kind == "none":
        N = call.ops.hidden.shape[0]
        return call.ops.unflatten(call.weights.put_back(coef * rows, N))
    return (coef * rows).sum() if total is None else total


def _checked(
    hidden: Tensor,
    head: LMHead,
    teacher_hidden: Tensor,
    teacher_head: LMHead,
    options: LossOptions,
    reduction: Reduction,
) -> DenseCall:
    head, teacher_head = (h._replace(temperature=options.temperature) for h in (head, teacher_head))
    ops = operands(hidden, head)
    options = options._replace(impl=resolve_impl(options.impl, hidden.device))
    teacher = operands(teacher_hidden, teacher_head, prefix="teacher_")
    if teacher.batch_shape != ops.batch_shape:
        checks.fail(
            "teacher_hidden", f"positions {list(ops.batch_shape)}", list(teacher.batch_shape)
        )
    tensor_checks.same_device("teacher_hidden", teacher_hidden, hidden)
    check_options(options)
    vocab = min(ops.vocab, teacher.vocab)
    check_reduction(reduction, hidden, vocab, options, check=False)
    ops = ops._replace(head=ops.head._replace(valid_vocab=vocab))
    weights, label_N = token_weights(ops, reduction), reduction.label_N
    bias = teacher.head.bias
    return DenseCall(
        ops,
        weights.take_hidden(ops.hidden),
        weights.take_hidden(teacher.hidden.detach()),
        teacher.head._replace(
            weight=teacher.head.weight.detach(),
            bias=None if bias is None else bias.detach(),
            valid_vocab=vocab,
        ),
        None if label_N is None else weights.take(label_N),
        weights,
        options,
    )


def _with_callable(call: DenseCall, per_row: bool) -> tuple[Tensor, Tensor]:
    """(Σ coef · ℓ with its gradient, ℓ [N]) of a divergence that cannot enter an operator."""
    if per_row:
        checks.fail(
            "divergence",
            "a name with reduction='none' or backward='recompute'",
            "a callable",
            "with a dense teacher it needs the fused pass",
        )

    def run(coef: Tensor, x: Tensor, head: LMHead, need: list[bool]) -> DenseLoss:
        return dense(
            get_backend(call.options.impl),
            head,
            x,
            call.teacher_head,
            call.teacher_hidden,
            call.label,
            coef,
            call.options,
            **needed(need),
        )

    loss, out = keep_gradients(run, call.weights.coef, call.hidden, call.head, call.options.impl)
    return loss, out.per_token


def _by_reference(call: DenseCall) -> tuple[Tensor, Tensor]:
    from . import reference

    with torch.no_grad():
        teacher_logits = reference.logits(call.teacher_hidden, call.teacher_head)
    return reference.linear_distill(
        call.hidden, call.head, teacher_logits, call.label, call.weights.coef, call.options
    )
