"""linear_distill_loss: a teacher given by its hidden states and LM head, without [N, V]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks
from .backend import resolve_impl
from .fused import empty_output, keep_gradients, needs
from .kernels.backends import get_backend
from .kernels.dense_loss import dense
from .kernels.head import Head
from .kernels.op_dense import dense_loss, dense_rows
from .kernels.rows import LossOptions
from .losses import Divergence
from .operands import check_mix, check_reduction, operands, token_weights


def linear_distill_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
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

    over the whole vocabulary. p is the softmax of the teacher's head at T. The logits of both
    models are computed in slabs. Options as in `topk_distill`; there is no tail.

    Args:
        hidden: [N, H] or [B, T, H] of the student; weight: [V, H], the same dtype.
        teacher_hidden: [..., G], the same positions; G may differ from H. It gets no gradient.
        teacher_weight: [V', G]. Both heads are cut at the smallest of V, V' and valid_vocab: rows
            beyond it are padding.
        divergence: a name, or a callable (log_p [n, V], log_q [n, V]) -> [n] on whole rows.
        backward: "fused" (gradients in the forward pass, scalar losses), "recompute" (any
            upstream gradient), "auto".

    Returns:
        A scalar, or [...] for reduction="none" (zero at ignored positions).

    Raises:
        ValueError or TypeError that names the argument, what was expected and what was passed.
    """
    ops = operands(hidden, weight, bias, logit_scale, softcap, temperature, valid_vocab)
    impl = resolve_impl(impl, hidden.device)
    teacher = operands(
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        teacher_logit_scale,
        teacher_softcap,
        temperature,
        None,
        prefix="teacher_",
    )
    if teacher.batch_shape != ops.batch_shape:
        checks.fail(
            "teacher_hidden", f"positions {list(ops.batch_shape)}", list(teacher.batch_shape)
        )
    checks.same_device("teacher_hidden", teacher_hidden, hidden)
    options = LossOptions(
        divergence, beta, skew, "bucket", temperature, t2_scale, ce_weight, z_loss
    )
    check_mix(options)
    checks.choice("backward", backward, ("auto", "fused", "recompute"))
    check_reduction(reduction, num_items, token_weight, hidden)
    vocab = min(ops.head.vocab, teacher.head.vocab)
    ops = ops._replace(head=ops.head._replace(vocab=vocab))
    if labels is not None:
        checks.labels(labels, hidden, vocab, ignore_index, check=False)
    elif ce_weight:
        checks.fail("labels", "a tensor when ce_weight > 0", "None")
    weights = token_weights(ops, labels, token_weight, ignore_index, reduction, num_items)
    x, t = ops.hidden, teacher.hidden.detach()
    label_N = None if labels is None else labels.reshape(-1).long()
    if label_N is not None:
        label_N = torch.where(label_N == ignore_index, -1, label_N)
    if weights.rows is not None:
        x, t = x[weights.rows], t[weights.rows]
        label_N = None if label_N is None else label_N[weights.rows]
    elif weights.mask is not None:
        x, t = (torch.where(weights.mask.unsqueeze(-1), h, 0) for h in (x, t))
    teacher_head = teacher.head._replace(
        weight=teacher.head.weight.detach(),
        bias=None if teacher.head.bias is None else teacher.head.bias.detach(),
        vocab=vocab,
    )
    if x.shape[0] == 0:
        return empty_output(ops, x, reduction, options, label_N).loss
    per_row = reduction == "none" or backward == "recompute"
    if reduction == "none" and backward == "fused":
        checks.fail(
            "backward",
            "'recompute' or 'auto' with reduction='none'",
            "'fused'",
            "gradients taken in the forward pass need a scalar loss",
        )
    total, rows = _run(x, ops.head, t, teacher_head, label_N, weights.coef, options, impl, per_row)
    if reduction != "none":
        return (weights.coef * rows).sum() if total is None else total
    rows = weights.coef * rows
    if weights.rows is not None:
        rows = rows.new_zeros(ops.hidden.shape[0]).index_copy(0, weights.rows, rows)
    return ops.unflatten(rows)


def _run(
    x: Tensor,
    head: Head,
    teacher_x: Tensor,
    teacher: Head,
    label_N: Tensor | None,
    coef_N: Tensor,
    options: LossOptions,
    impl: str,
    per_row: bool,
) -> tuple[Tensor | None, Tensor]:
    """(Σ coef · ℓ or None, ℓ [N]); the gradient is on the first, or on the second if per_row."""
    if impl == "reference":
        return _reference(x, head, teacher_x, teacher, label_N, coef_N, options)
    if callable(options.divergence):
        if per_row:
            checks.fail(
                "divergence",
                "a name with reduction='none' or backward='recompute'",
                "a callable",
                "with a dense teacher it needs the fused pass",
            )

        def run(coef: Tensor, x: Tensor, head: Head, need: list[bool]) -> Any:
            return dense(
                get_backend(impl),
                head,
                x,
                teacher,
                teacher_x,
                label_N,
                coef,
                options,
                need_hidden=need[0],
                need_weight=need[1],
                need_bias=need[2],
            )

        loss, out = keep_gradients(run, coef_N, x, head)
        return loss, out.per_token
    student_args = (x, head.weight, head.bias)
    teacher_args = (teacher_x, teacher.weight, teacher.bias, label_N)
    scalars = (
        options.divergence,
        options.beta,
        options.skew,
        options.t2_scale,
        options.ce_weight,
        options.z_loss,
        head.logit_scale,
        head.softcap,
        teacher.logit_scale,
        teacher.softcap,
        head.temperature,
        head.vocab,
    )
    if per_row:
        return None, dense_rows(*student_args, *teacher_args, *scalars, impl)
    loss, rows, *_ = dense_loss(
        *student_args, coef_N, *teacher_args, *scalars, needs(x, head), impl
    )
    return loss, rows


def _reference(
    x: Tensor,
    head: Head,
    teacher_x: Tensor,
    teacher: Head,
    label_N: Tensor | None,
    coef_N: Tensor,
    options: LossOptions,
) -> tuple[Tensor, Tensor]:
    from . import reference

    def scalars(h: Head) -> dict[str, Any]:
        return {
            "bias": h.bias,
            "logit_scale": h.logit_scale,
            "softcap": h.softcap,
            "valid_vocab": h.vocab,
        }

    with torch.no_grad():
        teacher_logits = reference.logits(teacher_x, teacher.weight, **scalars(teacher))
    return reference.linear_distill(
        x, head.weight, teacher_logits, label_N, coef_N, options, **scalars(head)
    )
