"""linear_distill_loss: a teacher given by its hidden states and LM head, without [N, V]."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.backends import get_backend
from ..kernels.dense_loss import DenseLoss, DenseTeacher, Ranks, dense
from ..kernels.divergences import cost_of_missing
from ..kernels.head import LMHead, dense_chunk_tokens, needed, round_scaled
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
from .draft import OUTSIDE, check_t2d, lse_of_rows, rows_of
from .gradient_paths import empty_output, keep_gradients, needs, recompute_rows
from .linear_head import topk_at
from .support import SUPPORTS, answers_of_head
from .topk import Divergence, distill_topk
from .vocab_parallel import backend_of, check_same_on_all_ranks, distribute_head

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_distill_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    k: int | None = None,
    support: str = "teacher",
    t2d: Tensor | None = None,
    outside: str = "renormalize",
    labels: Tensor | None = None,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    skew: float = 0.1,
    eta: float = 3.0,
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
    group: ProcessGroup | None = None,
    impl: str = "auto",
    backward: str = "auto",
) -> Tensor:
    """Return the loss against a teacher's hidden states and LM head, without [N, V] logits.

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
        t2d: bool [≤ V'], for a draft model with a reduced vocabulary: row i of `weight` is the i-th
            True token of the teacher; rows of teacher_weight beyond t2d are padding. Each call
            copies the draft's rows of teacher_weight. To copy them once, pass teacher_weight[t2d]
            without t2d. labels are rows of `weight`.
        outside: with t2d, the teacher's probability of tokens that the draft lacks. "renormalize"
            leaves them out (EAGLE-3, arXiv 2503.01840, and speculators). "count" keeps the
            teacher's probabilities, and the draft has 0 there: 1 − tvd is then the acceptance rate
            itself. It is refused with "forward_kl", "lk_hybrid" and "argmax_ce", which would be
            infinite, with a callable and with k.
        divergence: a name, or a callable (log_p [n, V], log_q [n, V]) -> [n] on whole rows
            ([n, K+1] with k).
        group: as in `topk_distill`. Both heads are sharded, and each rank has the same tokens of
            both.
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
        eta=eta,
    )
    reduction_of = Reduction(labels, token_weight, ignore_index, reduction, num_items)
    checks.choice("support", support, SUPPORTS)
    missing = None
    if t2d is not None:
        teacher_head, missing = _reduced(hidden, head, teacher_hidden, teacher_head, t2d)
    checks.choice("outside", outside, OUTSIDE)
    if outside == "renormalize":
        missing = None
    elif missing is None:
        checks.fail("outside", "'renormalize' without t2d", repr(outside), "pass t2d")
    else:
        _check_count(options, k)
    if k is not None:
        if group is not None:
            checks.fail("k", "None with group", repr(k), "the top k needs a whole head")
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
    return distill_dense(
        hidden,
        head,
        teacher_hidden,
        teacher_head,
        options,
        reduction_of,
        missing=missing,
        group=group,
    )


class Missing(NamedTuple):
    """A teacher's head, and the ids of its tokens that the student lacks."""

    head: LMHead
    ids: Tensor


def _reduced(
    hidden: Tensor, head: LMHead, teacher_hidden: Tensor, teacher_head: LMHead, t2d: Tensor
) -> tuple[LMHead, Missing]:
    """Return the teacher's head with the rows of the draft's tokens, and its other tokens."""
    vocab = operands(hidden, head).vocab
    whole = operands(teacher_hidden, teacher_head, prefix="teacher_").head
    check_t2d(t2d, vocab, teacher_head.weight.shape[0], hidden)
    missing = Missing(whole._replace(temperature=1.0), (~t2d).nonzero()[:, 0])
    return rows_of(teacher_head, t2d.nonzero()[:, 0]), missing


def _check_count(options: LossOptions, k: int | None) -> None:
    """Check that a loss is finite where the teacher has mass and the draft has none."""
    if k is not None:
        hint = "leave k out, or outside"
        checks.fail("outside", "'renormalize' with k", "'count'", hint)
    name, beta, skew = options.divergence, options.beta, options.skew
    finite = not callable(name) and cost_of_missing(name, beta, skew) is not None
    if not finite:
        got = "a callable" if callable(name) else repr(name)
        checks.fail(
            "outside",
            f"'renormalize' with divergence={got}",
            "'count'",
            "the draft has probability 0 on tokens of the teacher; 'tvd', 'nla', 'jsd', "
            "'hellinger', 'reverse_kl' and skewed divergences are finite",
        )


class DenseCall(NamedTuple):
    """A checked call of the dense loss, on the tokens that count."""

    ops: Operands  # all tokens, and the head
    hidden: Tensor  # [N, H]
    teacher_hidden: Tensor  # [N, G]
    teacher_head: LMHead
    label: Tensor | None  # [N]
    weights: TokenWeights
    options: LossOptions
    missing_lse: Tensor | None  # [N]

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
    *,
    missing: Missing | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Compute `linear_distill_loss` from two LM heads, options and a reduction."""
    call = _checked(hidden, head, teacher_hidden, teacher_head, options, reduction, missing, group)
    if options.divergence == "argmax_ce":
        return _argmax_ce(call, hidden, head, teacher_hidden, reduction)
    x, options, coef = call.hidden, call.options, call.weights.coef
    if not x.shape[0]:
        return empty_output(call.ops, x, reduction, options).loss
    check_fused(reduction, options)
    per_row = reduction.kind == "none" or options.backward == "recompute"
    by_operator = call.ops.shard is None and not callable(options.divergence)
    student = (x, call.head.weight, call.head.bias)
    teacher = (
        call.teacher_hidden,
        call.teacher_head.weight,
        call.teacher_head.bias,
        call.label,
        call.missing_lse,
    )
    total = None
    if options.impl == "reference":
        total, rows = _by_reference(call)
    elif not by_operator and per_row:
        rows = recompute_rows(_runner(call), x, call.head, options.impl)
    elif not by_operator:
        total, out = keep_gradients(_runner(call), coef, x, call.head, options.impl)
        rows = out.per_token
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
    missing: Missing | None,
    group: ProcessGroup | None,
) -> DenseCall:
    head, teacher_head = (h._replace(temperature=options.temperature) for h in (head, teacher_head))
    head, placement = distribute_head(head, group, options.impl)
    of_teacher = None
    if placement is not None:
        teacher_head, of_teacher = distribute_head(teacher_head, placement.group, options.impl)
    ops = operands(hidden, head, placement=placement)
    options = options._replace(impl=resolve_impl(options.impl, hidden.device))
    teacher = operands(teacher_hidden, teacher_head, prefix="teacher_", placement=of_teacher)
    if teacher.batch_shape != ops.batch_shape:
        checks.fail(
            "teacher_hidden", f"positions {list(ops.batch_shape)}", list(teacher.batch_shape)
        )
    tensor_checks.same_device("teacher_hidden", teacher_hidden, hidden)
    check_options(options)
    vocab = min(ops.vocab, teacher.vocab)
    check_reduction(reduction, hidden, vocab, options, check=False)
    valid_vocab = vocab
    if ops.shard is not None and teacher.shard is not None:
        _check_shards(ops, teacher, reduction, options, missing)
        rows = min(ops.head.weight.shape[0], teacher.head.weight.shape[0])
        valid_vocab = max(0, min(rows, vocab - ops.shard.offset, ops.head.vocab_size))
    ops = ops._replace(head=ops.head._replace(valid_vocab=valid_vocab))
    weights, label_N = token_weights(ops, reduction), reduction.label_N
    bias = teacher.head.bias
    answers_from = weights.take_hidden(teacher.hidden.detach())
    missing_lse = None
    if missing is not None:
        of_missing = missing.head._replace(temperature=options.temperature)
        impl = "torch" if options.impl == "reference" else options.impl
        missing_lse = lse_of_rows(of_missing, missing.ids, answers_from, impl)
    return DenseCall(
        ops,
        weights.take_hidden(ops.hidden),
        answers_from,
        teacher.head._replace(
            weight=teacher.head.weight.detach(),
            bias=None if bias is None else bias.detach(),
            valid_vocab=valid_vocab,
        ),
        None if label_N is None else weights.take(label_N),
        weights,
        options,
        missing_lse,
    )


def _check_shards(
    ops: Operands,
    teacher: Operands,
    reduction: Reduction,
    options: LossOptions,
    missing: Missing | None,
) -> None:
    """Check vocabulary-parallel heads; either all ranks raise or none."""
    assert ops.shard is not None
    assert teacher.shard is not None
    if missing is not None:
        checks.fail("t2d", "None with group", "a tensor", "pass shards of teacher_weight[t2d]")
    if callable(options.divergence):
        checks.fail("divergence", "a name with group", "a callable", "use a name")
    if options.divergence == "argmax_ce":
        checks.fail(
            "divergence",
            "another than 'argmax_ce' with group",
            "'argmax_ce'",
            "pass the teacher's argmax as labels with ce_weight=1",
        )
    if ops.shard.offsets != teacher.shard.offsets:
        checks.fail(
            "teacher_weight",
            f"shards from rows {list(ops.shard.offsets)}, as those of weight",
            list(teacher.shard.offsets),
            "pad the smaller head, so that each rank holds the same tokens of both",
        )
    if reduction.labels is not None:
        check_same_on_all_ranks(ops.shard, "labels", reduction.labels, check=False)


def _argmax_ce(
    call: DenseCall, hidden: Tensor, head: LMHead, teacher_hidden: Tensor, reduction: Reduction
) -> Tensor:
    """Return the sparse loss on the teacher's most probable token."""
    ops, options, teacher_head = call.ops, call.options, call.teacher_head
    if reduction.counted is not None:  # a NaN at an ignored position has no argmax
        teacher_hidden = torch.where(reduction.counted.unsqueeze(-1), teacher_hidden, 0)
    answers = topk_at(teacher_hidden, teacher_head, 1, (options.temperature,), options.impl)[0]
    head = head._replace(valid_vocab=ops.head.valid_vocab)
    return distill_topk(hidden, head, answers, options, reduction).loss


def _runner(call: DenseCall) -> Any:
    """Return a pass that is not an operator: it calls the user's code or reduces over ranks."""
    shard, impl = call.ops.shard, call.options.impl
    teacher = DenseTeacher(call.teacher_head, call.teacher_hidden, call.missing_lse)

    def run(coef: Tensor, x: Tensor, head: LMHead, need: list[bool]) -> DenseLoss:
        ranks = None
        if shard is not None:
            chunk = shard.chunk(head, x.shape[0], need[1], dense_chunk_tokens)
            ranks = Ranks(
                shard.all_reduce_lse,
                shard.all_reduce_sum,
                lambda ids: shard.slots(ids, head),
                chunk,
            )
        out = dense(
            get_backend(impl if shard is None else backend_of(impl, head)),
            head,
            x,
            teacher,
            call.label,
            coef,
            call.options,
            **needed(need),
            ranks=ranks,
        )
        if shard is None or out.dx is None:
            return out
        dx, grad_scale = round_scaled(shard.all_reduce_grad(out.dx), x)
        scales = torch.cat([grad_scale.reshape(1), out.grad_scale[1:]])
        return out._replace(dx=dx, grad_scale=scales)

    return run


def _by_reference(call: DenseCall) -> tuple[Tensor, Tensor]:
    from . import reference

    with torch.no_grad():
        teacher_logits = reference.logits(call.teacher_hidden, call.teacher_head)
    return reference.linear_distill(
        call.hidden,
        call.head,
        teacher_logits,
        call.label,
        call.weights.coef,
        call.options,
        call.missing_lse,
    )
