"""Reduced vocabularies and D-PACE weights for the losses of draft models."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.backends import get_backend
from ..kernels.head import LMHead
from ..kernels.lse_gather import lse_gather
from ..runtime import checks, tensor_checks

OUTSIDE = ("renormalize", "count")
COPIED_ROWS = 16384  # of the teacher's head, at once


def check_t2d(t2d: Tensor, vocab: int, teacher_rows: int, device: Tensor) -> None:
    """Check a bool [≤ teacher_rows] with one True for each of the draft's `vocab` tokens."""
    tensor_checks.tensor("t2d", t2d, (torch.bool,))
    if t2d.dim() != 1 or len(t2d) > teacher_rows:
        hint = "one entry per token of the teacher"
        checks.fail("t2d", f"shape [V'] with V' ≤ {teacher_rows}", list(t2d.shape), hint)
    tensor_checks.same_device("t2d", t2d, device)
    if (count := int(t2d.sum())) != vocab:
        hint = "pass the t2d of this draft"
        checks.fail("t2d", f"{vocab} True entries, the rows of weight", count, hint)


def rows_of(head: LMHead, ids: Tensor) -> LMHead:
    """Return a copy of the rows `ids` of a head, in this order."""
    bias = None if head.bias is None else head.bias[ids]
    return head._replace(weight=head.weight[ids], bias=bias, valid_vocab=None)


@torch.no_grad()
def lse_of_rows(head: LMHead, ids: Tensor, hidden_NG: Tensor, impl: str) -> Tensor:
    """Return log Σ e^z [N] over the rows `ids` of a head."""
    none = hidden_NG.new_empty(hidden_NG.shape[0], 0, dtype=torch.int64)
    lse = torch.full(none.shape[:1], -torch.inf, dtype=head.dtype, device=none.device)
    with torch.autocast(hidden_NG.device.type, enabled=False):
        for part in ids.split(COPIED_ROWS):
            stats = lse_gather(
                get_backend(impl), rows_of(head, part), hidden_NG, none, moment=False, base=False
            )
            lse = torch.logaddexp(lse, stats.lse_rest)
    return lse


@torch.no_grad()
def dpace_weights(
    nll: Tensor, block_size: int, *, alpha: float = 0.5, mask: Tensor | None = None
) -> Tensor:
    """Return D-PACE's weight of each position of drafted blocks, for `token_weight`.

        w_j = Σ_{m ≥ j} Π_{i ≤ m} c_i,  c_i = (1 − alpha) · e^{−nll_i} + alpha

    over the positions of one block (arXiv 2605.18810, equations 7 and 8). It is how much position j
    adds to the expected number of accepted tokens. It has no gradient.

    Args:
        nll: [..., T], cross-entropy of each position (`linear_distill_loss` with
            divergence="argmax_ce" and reduction="none", or `token_scores` with labels). T is a
            multiple of block_size; blocks are adjacent.
        alpha: in (0, 1], smooths the draft's confidence.
        mask: bool [..., T] or None. A position outside it has weight 0 and c = 1.

    Returns:
        [..., T], in the type of nll.

    Raises:
        ValueError or TypeError that names the argument.

    Example:
        >>> nll = torch.tensor([0.0, 0.0, 100.0, 0.0])
        >>> dpace_weights(nll, 2)
        tensor([2.0000, 1.0000, 1.0000, 0.5000])
    """
    tensor_checks.tensor("nll", nll, tensor_checks.FLOATS)
    checks.integer("block_size", block_size, 1)
    checks.between("alpha", alpha, 0, 1)
    checks.positive("alpha", alpha)
    if not nll.dim() or nll.shape[-1] % block_size:
        expected = f"a last dimension that is a multiple of block_size = {block_size}"
        checks.fail("nll", expected, list(nll.shape), "pass whole blocks, padded with a mask")
    counts = torch.ones_like(nll, dtype=torch.bool)
    if mask is not None:
        tensor_checks.tensor("mask", mask, (torch.bool,))
        if mask.shape != nll.shape:
            hint = "one entry per position"
            checks.fail("mask", f"shape {list(nll.shape)} as nll", list(mask.shape), hint)
        counts = mask
    confidence = torch.where(counts, (1 - alpha) * (-nll).exp() + alpha, 1.0)
    prefix = confidence.unflatten(-1, (-1, block_size)).cumprod(-1)
    parts = torch.where(counts.view(prefix.shape), prefix, 0.0)
    weights = parts.flip(-1).cumsum(-1).flip(-1).view(nll.shape)
    return torch.where(counts, weights, 0.0).to(nll.dtype)


@torch.no_grad()
def acceptance_length(acceptance_rate: Tensor, ratio: Tensor | None = None) -> Tensor:
    """Return the expected number of tokens per verification of a drafted chain.

        1 + Σ_i α_i · Π_{j < i} r_j

    for the speculative sampling rule (Leviathan et al., arXiv 2211.17192): a drafted token x is
    kept with probability min(1, p(x) / q(x)), and the verifier adds one token of its own.

    Without `ratio`, r = α, as if the steps were independent; a constant α then gives their
    (1 − α^{T + 1}) / (1 − α). With `ratio` the mean over texts that the verifier sampled is exact:
    Σ_x min(p, q) over the chains x of i tokens equals the mean over x ~ p of Π_j min(1, q / p),
    and α_i is its last factor, summed over the vocabulary.

    Args:
        acceptance_rate: [..., T], α_i = Σ_v min(p, q) at step i of a chain, which has read the
            first i − 1 tokens of the text (`token_scores`, or 1 minus "tvd").
        ratio: [..., T], min(1, q(x) / p(x)) of the text's token at step i. The last one of a chain
            has no effect.

    Returns:
        [...], in the type of acceptance_rate, from 1 to T + 1. It has no gradient.

    Raises:
        ValueError or TypeError that names the argument.

    Example:
        >>> acceptance_length(torch.tensor([0.5, 0.5, 0.5]))
        tensor(1.8750)
    """
    tensor_checks.tensor("acceptance_rate", acceptance_rate, tensor_checks.FLOATS)
    if not acceptance_rate.dim() or not acceptance_rate.shape[-1]:
        checks.fail("acceptance_rate", "shape [..., T] with T ≥ 1", list(acceptance_rate.shape))
    factors = acceptance_rate
    if ratio is not None:
        tensor_checks.tensor("ratio", ratio, tensor_checks.FLOATS)
        if ratio.shape != acceptance_rate.shape:
            expected = f"shape {list(acceptance_rate.shape)} as acceptance_rate"
            checks.fail("ratio", expected, list(ratio.shape), "one entry per step")
        factors = ratio.to(acceptance_rate.dtype)
    for name, values in (("acceptance_rate", acceptance_rate), ("ratio", factors)):
        if not bool(((values >= 0) & (values <= 1 + 1e-4)).all()):
            least, most = values.aminmax()
            checks.fail(name, "probabilities in [0, 1]", f"{least.item():.4g} to {most.item():.4g}")
    before = torch.cat([torch.ones_like(factors[..., :1]), factors[..., :-1].cumprod(-1)], -1)
    return 1 + (before * acceptance_rate).sum(-1)
