"""Sparse distillation losses from hidden states and the LM head, without [N, V] logits.

    ℓ = (1 − ce_weight) · D(p, q) [· T² if t2_scale] + ce_weight · CE(label) + z_loss · LSE²

CE and LSE at T=1. The teacher p is known on K tokens per position and on its tail. D and the four
tails are in kernels/token_loss.py and kernels/divergences.py. The gradient paths are in
gradient_paths.py: gradients in the forward pass, recomputation through the primitive, or K rows
only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from torch import Tensor

from ..kernels.head import LMHead
from ..kernels.op_losses import topk_loss
from ..kernels.token_loss import LossOptions
from ..runtime.backend import resolve_impl
from .arguments import (
    LossTerms,
    Reduction,
    check_options,
    check_reduction,
    only_argmax,
    operands,
    to_teacher_rows,
    token_weights,
)
from .checks import check_teacher
from .gradient_paths import TopKCall, empty_output, path_of, terms_of
from .types import DistillOutput, TopK
from .vocab_parallel import check_same_on_all_ranks, distribute_head

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Divergence = str | Callable[[Tensor, Tensor], Tensor]
P = ParamSpec("P")
R = TypeVar("R")


def topk_arguments(
    hidden: Tensor,
    weight: Tensor,
    teacher: TopK,
    *,
    labels: Tensor | None = None,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    skew: float = 0.1,
    eta: float = 3.0,
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
) -> dict[str, Any]:
    """The arguments of `distill_topk` from those of the public functions."""
    head = LMHead(weight, bias, logit_scale, softcap, valid_vocab)
    options = LossOptions(
        divergence,
        beta,
        skew,
        tail,
        temperature,
        t2_scale,
        ce_weight,
        z_loss,
        grad_filter_eps,
        allow_biased,
        impl,
        backward,
        eta,
    )
    reduction_of = Reduction(labels, token_weight, ignore_index, reduction, num_items)
    return {
        "hidden": hidden,
        "head": head,
        "teacher": teacher,
        "options": options,
        "reduction": reduction_of,
        "group": group,
        "check": check,
    }


def _takes(arguments: Callable[P, Any]) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Decorator that gives a function the signature of `arguments`, for inspect and help()."""

    def declare(function: Callable[..., R]) -> Callable[P, R]:
        returns = inspect.signature(function).return_annotation
        signature = inspect.signature(arguments).replace(return_annotation=returns)
        function.__signature__ = signature  # type: ignore[attr-defined]
        return function

    return declare


@_takes(topk_arguments)
def topk_distill_loss(*args: Any, **options: Any) -> Tensor:
    """Return the distillation loss on a teacher's K tokens per position, without [N, V] logits.

    Equation, arguments and errors are those of `topk_distill`. Returns a scalar, or [...] for
    reduction="none".

    Example:
        >>> hidden = torch.randn(5, 16, requires_grad=True)
        >>> weight, teacher_hidden = torch.randn(100, 16), torch.randn(5, 16)
        >>> teacher = linear_topk(teacher_hidden, weight, k=8)
        >>> topk_distill_loss(hidden, weight, teacher, divergence="jsd").backward()
    """
    return distill_topk(**topk_arguments(*args, **options), statistics=False).loss


@_takes(topk_arguments)
def topk_distill(*args: Any, **options: Any) -> DistillOutput:
    """Return the distillation loss on a teacher's K tokens per position, with its statistics.

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
            KL(q ‖ (1−skew)·p + skew·q) (DistiLLM, arXiv 2402.03898); for draft models "nla" −log α
            and "lk_hybrid" λ·KL(p‖q) + (1−λ)·½Σ|p−q|, with the acceptance rate α = Σ min(p, q) and
            λ = exp(−eta·α) without gradient (LK losses, arXiv 2602.23881), and "argmax_ce"
            −log q(argmax p), cross-entropy of the teacher's most probable token; or a callable
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
            skew_reverse_kl at skew 0; nla and lk_hybrid with other tails than bucket and
            renorm_both, argmax_ce with another than bucket.
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

    Example:
        >>> hidden, weight = torch.randn(2, 5, 16), torch.randn(100, 16)
        >>> teacher = linear_topk(torch.randn(2, 5, 16), weight, k=8)
        >>> out = topk_distill(hidden, weight, teacher, labels=torch.ones(2, 5, dtype=torch.long))
        >>> out.loss.shape, out.nll.shape
        (torch.Size([]), torch.Size([2, 5]))
    """
    return distill_topk(**topk_arguments(*args, **options))


def distill_topk(
    hidden: Tensor,
    head: LMHead,
    teacher: TopK,
    options: LossOptions,
    reduction: Reduction,
    *,
    group: ProcessGroup | None = None,
    check: bool = False,
    statistics: bool = True,
) -> DistillOutput:
    """Compute `topk_distill` from an LM head, options and a reduction."""
    call = _checked(hidden, head, teacher, options, reduction, group, check, statistics)
    if not call.hidden.shape[0]:
        return empty_output(call.ops, call.hidden, reduction, options)
    path = path_of(call, reduction)
    if path is None:
        terms = terms_of(topk_loss(*call.operands(), **call.scalars()))
    else:
        terms = path(call)
    return _output(call, terms, reduction)


def _checked(
    hidden: Tensor,
    head: LMHead,
    teacher: TopK,
    options: LossOptions,
    reduction: Reduction,
    group: ProcessGroup | None,
    check: bool,
    statistics: bool,
) -> TopKCall:
    head = head._replace(temperature=options.temperature)
    head, placement = distribute_head(head, group, options.impl)
    ops = operands(hidden, head, placement=placement)
    options = options._replace(impl=resolve_impl(options.impl, hidden.device))
    check_options(options)
    check_reduction(reduction, hidden, ops.vocab, options, check)
    if reduction.labels is not None:
        check_same_on_all_ranks(ops.shard, "labels", reduction.labels, check)
    check_teacher(teacher, hidden, reduction.counted, vocab=ops.vocab, options=options, check=check)
    check_same_on_all_ranks(ops.shard, "teacher.ids", teacher.ids, check)
    if options.divergence == "argmax_ce":
        teacher, options = only_argmax(teacher), options._replace(divergence="forward_kl")
    weights, label_N = token_weights(ops, reduction), reduction.label_N
    rows = to_teacher_rows(teacher, options, ops.head.dtype, weights.mask)
    return TopKCall(
        ops,
        weights.take_hidden(ops.hidden),
        rows if weights.rows is None else rows.take(weights.rows),
        None if label_N is None else weights.take(label_N),
        weights,
        options,
        statistics,
    )


def _output(call: TopKCall, terms: LossTerms, reduction: Reduction) -> DistillOutput:
    """Sum or weight the loss, restore dropped positions as zeros, detach the statistics."""
    ops, weights = call.ops, call.weights

    def restored(values_n: Tensor) -> Tensor:
        return ops.unflatten(weights.put_back(values_n, ops.hidden.shape[0]))

    if reduction.kind == "none":
        loss = restored(weights.coef * terms.per_token)
    else:
        loss = terms.loss if terms.loss is not None else (weights.coef * terms.per_token).sum()
    rows = (terms.per_token, terms.divergence, call.teacher_rows.mass, *terms[3:])
    statistics = (None if t is None else restored(t.detach()) for t in rows)
    return DistillOutput._make((loss, *statistics))
