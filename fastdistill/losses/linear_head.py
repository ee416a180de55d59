"""linear_lse_gather, the primitive of the sparse losses; linear_topk and linear_logprobs_at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels.backends import get_backend
from ..kernels.head import LMHead
from ..kernels.token_loss import ABSENT, entropy_of, first_slots, log_tail_of, lse_of
from ..kernels.topk import topk
from ..runtime import checks
from ..runtime.backend import resolve_impl
from .arguments import operands
from .checks import check_ids
from .types import SelectedLogits, TopK
from .vocab_parallel import check_same_on_all_ranks, distribute_head, lse_gather

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_lse_gather(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    valid_vocab: int | None = None,
    with_entropy: bool = False,
    group: ProcessGroup | None = None,
    impl: str = "auto",
    check: bool = False,
) -> SelectedLogits:
    """Return the logits at K ids and the log-sum-exp of all others, without [N, V] logits.

        z = softcap·tanh(s / softcap) / T,  s = logit_scale · (x Wᵀ + b)
        lse_rest = log Σ_{v ∉ ids} e^{z_v}

    Differentiable in hidden, weight and bias, by recomputation:
    2NVH FLOPs forward, 6NVH backward, O(N·K) memory beyond one slab of logits.

    Args:
        hidden: [N, H] or [B, T, H], float16, bfloat16, float32 or float64.
        weight: [V, H], the same dtype. bias: [V] or None.
        ids: int32/int64 [..., K]. They may repeat: each slot has its logit and gradient; lse_rest
            excludes the id once. −1 is an empty slot: −inf, without a gradient.
        logit_scale, softcap, temperature: see the equation.
        valid_vocab: rows of weight from this one on are padding.
        with_entropy: also return H(softmax(z)) in nats.
        group: ranks that hold the head together: weight [V_r, H] and bias [V_r] are this rank's
            rows, in rank order; all else is the same on every rank, ids and valid_vocab count the
            whole vocabulary, and so do the results and hidden's gradient. A DTensor weight sharded
            on dim 0 brings its own group. torch.compile leaves such a call to eager and refuses
            it with fullgraph=True.
        impl: "triton" (GPUs), "torch" (chunked), "reference" (materializes; the specification),
            or "auto": triton on a GPU that runs it, else torch. Nothing falls back silently.
        check: read and check values on a GPU too, which stalls its stream (on CPU always).

    Returns:
        SelectedLogits, fp32 (fp64 from fp64): logits [..., K], lse_rest [...], entropy [...] or
        None, lse [...].

    Raises:
        ValueError or TypeError that names the argument: ids outside the vocabulary, K > V, shapes,
        dtypes or devices that do not match, temperature ≤ 0.

    Example:
        >>> hidden, weight = torch.randn(5, 16), torch.randn(100, 16)
        >>> out = linear_lse_gather(hidden, weight, torch.tensor([[3], [1], [4], [1], [5]]))
        >>> nll = out.lse - out.logits[:, 0]
    """
    head = LMHead(weight, bias, logit_scale, softcap, valid_vocab, temperature)
    head, placement = distribute_head(head, group, impl)
    ops = operands(hidden, head, placement=placement)
    impl = resolve_impl(impl, hidden.device)
    check_ids("ids", ids, hidden, ops.vocab, check)
    check_same_on_all_ranks(ops.shard, "ids", ids, check)
    ids_NK = ids.reshape(-1, ids.shape[-1]).long()
    if impl == "reference":
        from . import reference

        selected = reference.linear_lse_gather(ops.hidden, ops.head, ids_NK, with_entropy)
        return SelectedLogits._make(None if t is None else ops.unflatten(t) for t in selected)
    z, lse_rest, mean_rest, _ = lse_gather(
        ops.hidden, ops.head, ids_NK, with_entropy, False, impl, ops.shard
    )
    unique = first_slots(ids_NK)
    lse = lse_of(z, lse_rest, unique)
    return SelectedLogits(
        ops.unflatten(z.masked_fill(ids_NK < 0, -torch.inf)),
        ops.unflatten(lse_rest.masked_fill(lse_rest < ABSENT, -torch.inf)),
        ops.unflatten(entropy_of(z, lse_rest, mean_rest, lse, unique)) if with_entropy else None,
        ops.unflatten(lse),
    )


@torch.no_grad()
def linear_topk(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    valid_vocab: int | None = None,
    impl: str = "auto",
) -> TopK:
    """Return the k most probable tokens of softmax(z), their logprobs and the exact log tail.

    z as in `linear_lse_gather`. No [N, V] tensor, no gradient.

    Args:
        hidden: [N, H] or [B, T, H]. weight: [V, H]. k: 1 ≤ k ≤ V (valid_vocab).

    Returns:
        TopK(ids int64 [..., k] by falling probability, logprobs fp32 [..., k], log_tail fp32 [...],
        temperature). log_tail is a sum over the other tokens, not 1 − Σ; −inf when k = V.

    Raises:
        ValueError or TypeError that names the argument.

    Example:
        >>> answers = linear_topk(torch.randn(5, 16), torch.randn(100, 16), k=8)
        >>> answers.ids.shape, answers.log_tail.shape
        (torch.Size([5, 8]), torch.Size([5]))
    """
    head = LMHead(weight, bias, logit_scale, softcap, valid_vocab, temperature)
    return topk_at(hidden, head, k, (temperature,), impl)[0]


@torch.no_grad()
def topk_at(
    hidden: Tensor, head: LMHead, k: int, temperatures: Sequence[float], impl: str
) -> list[TopK]:
    """Return `linear_topk` at several temperatures, with one product with the head."""
    for T in temperatures:
        checks.positive("temperature", T)
    ops = operands(hidden, head._replace(temperature=1.0))
    impl = resolve_impl(impl, hidden.device)
    if not isinstance(k, int) or not 1 <= k <= ops.vocab:
        checks.fail("k", f"an integer in 1..{ops.vocab} (V)", repr(k))
    if impl == "reference":
        from . import reference

        heads = [ops.head._replace(temperature=float(T)) for T in temperatures]
        answers = [reference.linear_topk(ops.hidden, each, k) for each in heads]
    else:
        with torch.autocast(hidden.device.type, enabled=False):
            rows = topk(get_backend(impl), ops.head, ops.hidden, k, temperatures)
        answers = [TopK(*best, float(T)) for best, T in zip(rows, temperatures, strict=True)]
    return [answer.map(ops.unflatten) for answer in answers]


@torch.no_grad()
def linear_logprobs_at(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    valid_vocab: int | None = None,
    impl: str = "auto",
    check: bool = False,
) -> TopK:
    """Return log softmax(z) at K given ids and the exact log tail, as the answers of a teacher.

        logprobs = z_ids − lse,  log_tail = log Σ_{v ∉ ids} e^{z_v} − lse

    z as in `linear_lse_gather`. No [N, V] tensor, no gradient.

    Args:
        hidden: [N, H] or [B, T, H]. weight: [V, H].
        ids: int32/int64 [..., K]; −1 is an empty slot. Repeats of an id become empty slots.
        check: read and check ids on a GPU too.

    Returns:
        TopK(ids int64 [..., K] in the given order, logprobs fp32 [..., K], −inf in empty slots,
        log_tail fp32 [...], temperature); fp64 from fp64.

    Raises:
        ValueError or TypeError that names the argument.

    Example:
        >>> hidden, weight = torch.randn(5, 16), torch.randn(100, 16)
        >>> student_ids = linear_topk(torch.randn(5, 16), torch.randn(100, 16), k=8).ids
        >>> answers = linear_logprobs_at(hidden, weight, student_ids)
    """
    selected = linear_lse_gather(
        hidden,
        weight,
        ids,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        valid_vocab=valid_vocab,
        impl=impl,
        check=check,
    )
    return answers_of(ids, selected, temperature)


def answers_of(ids: Tensor, selected: SelectedLogits, temperature: float) -> TopK:
    """Return the log-probabilities of ids from their logits; a repeated id is an empty slot."""
    first = first_slots(ids.long().flatten(0, -2)).view(ids.shape)
    logprobs = (selected.logits - selected.lse.unsqueeze(-1)).clamp(max=0.0)
    logprobs = logprobs.masked_fill(~first, -torch.inf)
    log_tail = log_tail_of(logprobs, (selected.lse_rest - selected.lse).clamp(max=0.0))
    return TopK(ids.long().masked_fill(~first, -1), logprobs, log_tail, float(temperature))
