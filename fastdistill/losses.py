"""Sparse distillation losses from hidden states and the LM head, without [N, V] logits.

    ℓ = (1 − ce_weight) · D(p, q) [· T² if t2_scale] + ce_weight · CE(label) + z_loss · LSE²

CE and LSE at T=1. The teacher p is known on K tokens per position and on its tail. D and the four
tails are in kernels/rows.py and kernels/divergences.py, the gradient paths in fused.py: gradients
in the forward pass, recomputation through the primitive, or K rows only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import checks
from .backend import resolve_impl
from .fused import LossTerms, by_reference, by_rows, empty_output, fused, recomputed
from .kernels.rows import LossOptions
from .operands import (
    Operands,
    TeacherRows,
    TokenWeights,
    check_mix,
    check_reduction,
    operands,
    to_teacher_rows,
    token_weights,
)
from .outputs import DistillOutput, TopK
from .parallel import check_same_on_all_ranks, distribute_head

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Divergence = str | Callable[[Tensor, Tensor], Tensor]


def topk_distill_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher: TopK,
    *,
    labels: Tensor | None = None,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    skew: float = 0.1,
    tail: str = "bucket",
    allow_biased: bool = False,
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
    valid_vocab: int | None = None,
    group: ProcessGroup | None = None,
    impl: str = "auto",
    backward: str = "auto",
    grad_filter_eps: float | None = None,
    check: bool = False,
) -> Tensor:
    """The loss of `topk_distill`, without its other statistics.

    Same arguments and errors. Returns a scalar, or [...] for reduction="none".
    """
    options = LossOptions(
        divergence, beta, skew, tail, temperature, t2_scale, ce_weight, z_loss, grad_filter_eps
    )
    return _distill(
        hidden,
        weight,
        teacher,
        labels,
        options,
        token_weight,
        ignore_index,
        reduction,
        num_items,
        (bias, logit_scale, softcap, temperature, valid_vocab),
        group,
        impl,
        backward,
        check,
        allow_biased,
        statistics=False,
    ).loss


def topk_distill(
    hidden: Tensor,
    weight: Tensor,
    teacher: TopK,
    *,
    labels: Tensor | None = None,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    skew: float = 0.1,
    tail: str = "bucket",
    allow_biased: bool = False,
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
    valid_vocab: int | None = None,
    group: ProcessGroup | None = None,
    impl: str = "auto",
    backward: str = "auto",
    grad_filter_eps: float | None = None,
    check: bool = False,
) -> DistillOutput:
    """Distill a teacher known on K tokens per position into hidden states and an LM head.

        ℓ = (1 − ce_weight)·D(p, q) [·T² if t2_scale] + ce_weight·CE(label) + z_loss·LSE²

    q = softmax(z), z = softcap·tanh(s / softcap) / T, s = logit_scale·(x Wᵀ + b); CE and LSE at
    T=1. Nothing is shifted: hidden, teacher and labels are aligned position by position.

    Args:
        hidden: [N, H] or [B, T, H], float16, bfloat16, float32 or float64.
        weight: [V, H], the same dtype; bias: [V] or None. Frozen ones cost no gradient.
        teacher: TopK over the same positions; it gets no gradient.
        labels: int32/int64 [...]; positions equal to ignore_index are ignored.
        divergence: "forward_kl" KL(p‖q) (Hinton et al., arXiv 1503.02531), "reverse_kl" KL(q‖p),
            "jsd" β·KL(p‖m) + (1−β)·KL(q‖m), m = βp + (1−β)q (GKD, arXiv 2306.13649; β = 0 and 1
            mean forward and reverse KL), "tvd" ½Σ|p−q|, "hellinger" 1 − Σ√(pq),
            "skew_forward_kl" KL(p ‖ skew·p + (1−skew)·q), "skew_reverse_kl"
            KL(q ‖ (1−skew)·p + skew·q) (DistiLLM, arXiv 2402.03898), or a callable
            (log_p [..., K(+1)], log_q [..., K(+1)]) -> [...]; empty slots hold the same tiny
            probability on both sides.
        tail: "bucket": one more outcome, the mass outside the K ids on each side. "truncate": the K
            ids alone, each term with its minimum at q = p; with forward_kl Σ p log(p/q).
            "renorm_teacher": the teacher is p/M on the ids, M their mass, and zero elsewhere.
            "renorm_both": both renormalized over the K ids, which needs no pass over the LM head.
            The minimum is at q = p with bucket, with truncate (except forward_kl) and, for the
            ratios among the K ids, with renorm_both. forward_kl with truncate and every divergence
            with renorm_teacher have it at p/M: they are biased and move all of the student's mass
            onto the K ids. They are an error without allow_biased. Pairs without a minimum are
            always an error: renorm_teacher with reverse_kl, with jsd at β = 1 and with
            skew_reverse_kl at skew 0.
        allow_biased: accept a loss whose minimum is at p/M, as in published top-k distillation.
        temperature: T > 0; the teacher's answers must use the same (except with renorm_both).
        token_weight: [...] multiplies ℓ. reduction: "mean" Σwℓ / (num_items or the number of
            non-ignored positions), "sum", or "none" -> [...].
        valid_vocab: rows of weight from this one on are padding.
        group: ranks that hold the head together: weight [V_r, H] and bias [V_r] are this rank's
            rows, in rank order; all else is the same on every rank, ids and valid_vocab count the
            whole vocabulary, and so do the loss and hidden's gradient. A DTensor weight sharded
            on dim 0 brings its own group. torch.compile leaves such a call to eager and refuses
            it with fullgraph=True.
        impl: "triton" (GPUs), "torch" (chunked), "reference" (materializes; the specification),
            or "auto": triton on a GPU that runs it, else torch. Nothing falls back silently.
        backward: "fused" computes gradients in the forward pass (6NVH FLOPs; scalar losses),
            "recompute" in the backward pass (8NVH, any upstream gradient); "auto" is fused for
            mean and sum.
        grad_filter_eps: in the fused pass of impl="triton", the gradient products skip 128 × 128
            tiles whose |∂loss/∂z| outside the K ids is below it times the largest token factor
            (after arXiv 2411.09009). None skips nothing.
        check: read and check values on a GPU too, which stalls its stream (on CPU always).

    Returns:
        DistillOutput; only `.loss` carries a gradient. An all-ignored batch gives 0 with zero
        gradients.

    Raises:
        ValueError or TypeError that names the argument, what was expected and what was passed.
    """
    options = LossOptions(
        divergence, beta, skew, tail, temperature, t2_scale, ce_weight, z_loss, grad_filter_eps
    )
    return _distill(
        hidden,
        weight,
        teacher,
        labels,
        options,
        token_weight,
        ignore_index,
        reduction,
        num_items,
        (bias, logit_scale, softcap, temperature, valid_vocab),
        group,
        impl,
        backward,
        check,
        allow_biased,
        statistics=True,
    )


def _distill(
    hidden: Tensor,
    weight: Tensor,
    teacher: TopK,
    labels: Tensor | None,
    options: LossOptions,
    token_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    num_items: int | float | Tensor | None,
    head: tuple[Tensor | None, float, float | None, float, int | None],
    group: ProcessGroup | None,
    impl: str,
    backward: str,
    check: bool,
    allow_biased: bool,
    *,
    statistics: bool,
) -> DistillOutput:
    weight, bias, placement = distribute_head(weight, head[0], group, impl)
    ops = operands(hidden, weight, bias, *head[1:], placement=placement)
    impl = resolve_impl(impl, hidden.device)
    check_mix(options, allow_biased)
    checks.choice("backward", backward, ("auto", "fused", "recompute"))
    check_reduction(reduction, num_items, token_weight, hidden)
    if labels is not None:
        checks.labels(labels, hidden, ops.vocab, ignore_index, check)
        check_same_on_all_ranks(ops.shard, "labels", labels, check)
    elif options.ce_weight:
        checks.fail("labels", "a tensor when ce_weight > 0", "None")
    if not isinstance(teacher, TopK):
        raise TypeError(f"teacher: expected a fastdistill.TopK, got {type(teacher).__name__}")
    checks.teacher(
        *teacher,
        hidden,
        None if labels is None else labels != ignore_index,
        vocab=ops.vocab,
        tail=options.tail,
        temperature=options.temperature,
        check=check,
    )
    check_same_on_all_ranks(ops.shard, "teacher.ids", teacher.ids, check)
    weights = token_weights(ops, labels, token_weight, ignore_index, reduction, num_items)
    label_N = None
    if labels is not None:
        label_N = labels.reshape(-1).long()
        label_N = torch.where(label_N == ignore_index, -1, label_N)
    teacher_rows = to_teacher_rows(
        teacher, options.tail, options.temperature, ops.head.dtype, weights.mask
    )
    x = ops.hidden
    if weights.rows is not None:
        x, label_N = x[weights.rows], None if label_N is None else label_N[weights.rows]
        teacher_rows = teacher_rows.take(weights.rows)
    elif weights.mask is not None:
        x = torch.where(
            weights.mask.unsqueeze(-1), x, 0
        )  # NaN at an ignored position must not spread
    if x.shape[0] == 0:
        return empty_output(ops, x, reduction, options, label_N)
    if options.filter_eps is not None:
        checks.grad_filter(options, impl, backward, reduction, ops.head.weight.dtype)
    compiled_callable = callable(options.divergence) and torch.compiler.is_compiling()
    if impl == "reference":
        out = by_reference(x, ops.head, teacher_rows, label_N, weights.coef, options)
    elif options.tail == "renorm_both" and not options.needs_base:
        out = by_rows(x, ops.head, teacher_rows, options, impl, ops.shard)
    elif backward == "recompute" or (
        backward == "auto" and (reduction == "none" or compiled_callable)
    ):
        out = recomputed(x, ops.head, teacher_rows, label_N, options, statistics, impl, ops.shard)
    elif reduction == "none":
        checks.fail(
            "backward",
            "'recompute' or 'auto' with reduction='none'",
            "'fused'",
            "gradients taken in the forward pass need a scalar loss",
        )
    else:
        out = fused(
            x, ops.head, teacher_rows, label_N, weights.coef, options, statistics, impl, ops.shard
        )
    return _assemble(ops, out, teacher_rows, weights, reduction)


def _assemble(
    ops: Operands, out: LossTerms, teacher_rows: TeacherRows, weights: TokenWeights, reduction: str
) -> DistillOutput:
    """Sum or weight the loss, restore dropped positions as zeros, detach the statistics."""

    def scatter_back(values_n: Tensor | None) -> Tensor | None:
        if values_n is None:
            return None
        if weights.rows is not None:
            blank = values_n.new_zeros(ops.hidden.shape[0])
            values_n = blank.index_copy(0, weights.rows, values_n)
        elif weights.mask is not None:
            values_n = torch.where(weights.mask, values_n, 0.0)
        return ops.unflatten(values_n)

    if reduction == "none":
        loss = scatter_back(weights.coef * out.per_token)
    else:
        loss = (weights.coef * out.per_token).sum() if out.loss is None else out.loss
    assert loss is not None
    fields = (out.per_token, out.divergence, teacher_rows.mass, *out[3:])
    per_token, D, mass, *rest = (None if f is None else scatter_back(f.detach()) for f in fields)
    assert per_token is not None
    assert D is not None
    assert mass is not None
    return DistillOutput(loss, per_token, D, mass, *rest)
