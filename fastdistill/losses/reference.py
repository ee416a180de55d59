"""The specification: every public operation on materialized [N, V] logits, by definition.

Only tests, benchmarks and an explicit impl="reference" may import it. Arguments are those of the
public functions with leading dimensions flattened to N. Computed in fp32 (fp64 for fp64 inputs) and
differentiable by plain autograd. Written from the formulas, not from kernels/: a divergence is a
sum over all V tokens of a dense p and q.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels.head import LMHead
from ..kernels.token_loss import LossOptions, TeacherTopK
from .arguments import LossTerms
from .types import SelectedLogits, TokenScores, TopK


def logits(hidden: Tensor, head: LMHead) -> Tensor:
    """[N, V] at T=1: softcap · tanh(logit_scale · (x Wᵀ + b) / softcap)."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    V = head.vocab_size
    s = hidden.to(wide) @ head.weight[:V].to(wide).t()
    if head.bias is not None:
        s = s + head.bias[:V].to(wide)
    s = s * head.logit_scale
    return s if head.softcap is None else head.softcap * torch.tanh(s / head.softcap)


def linear_lse_gather(
    hidden: Tensor, head: LMHead, ids: Tensor, with_entropy: bool
) -> SelectedLogits:
    z = logits(hidden, head) / head.temperature
    empty = ids < 0
    selected = z.gather(-1, ids.clamp(min=0)).masked_fill(empty, -math.inf)
    rest = z.masked_fill(_support(ids, z.shape[-1]), -math.inf)
    lse = z.logsumexp(-1)
    entropy = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1) if with_entropy else None
    return SelectedLogits(selected, rest.logsumexp(-1), entropy, lse)


def _support(ids: Tensor, V: int) -> Tensor:
    """bool [N, V]: the ids of each row."""
    hits = torch.zeros(ids.shape[0], V + 1, dtype=torch.bool, device=ids.device)
    return hits.scatter(-1, torch.where(ids < 0, V, ids), True)[:, :V]


def _xlogx_over(p: Tensor, log_ratio: Tensor) -> Tensor:
    """p · log_ratio with 0 · anything = 0, in value and gradient."""
    return p * torch.where(p > 0, log_ratio, torch.zeros_like(log_ratio))


def _terms(name: str, p: Tensor, q: Tensor, beta: float, skew: float) -> Tensor:
    """The summands of D over tokens; p may be zero."""
    tiny = torch.finfo(q.dtype).tiny

    def log(x: Tensor) -> Tensor:
        return x.clamp(min=tiny).log()

    if name == "forward_kl":
        return _xlogx_over(p, log(p) - log(q))
    if name == "reverse_kl":
        return q * (log(q) - log(p))
    if name == "jsd":
        m = beta * p + (1 - beta) * q
        return beta * _xlogx_over(p, log(p) - log(m)) + (1 - beta) * q * (log(q) - log(m))
    if name == "tvd":
        return 0.5 * (p - q).abs()
    if name == "skew_forward_kl":
        return _xlogx_over(p, log(p) - log(skew * p + (1 - skew) * q))
    if name == "skew_reverse_kl":
        return q * (log(q) - log((1 - skew) * p + skew * q))
    raise ValueError(name)


def _named(name: str, beta: float, skew: float) -> str:
    if name == "jsd" and beta in (0.0, 1.0):
        return "reverse_kl" if beta else "forward_kl"
    return {"skew_reverse_kl": "reverse_kl", "skew_forward_kl": "forward_kl"}.get(
        name if skew == 0.0 else "", name
    )


def divergence_on_ids(
    name: str, p: Tensor, q: Tensor, beta: float, skew: float, ids: Tensor
) -> Tensor:
    """Σ_ids d(p, q) [N] of masses that need not sum to 1.

    d = q f(p/q) − f′(1) (p − q), whose minimum 0 is at q = p; for forward KL p log(p/q), as
    published. `ids` is bool [N, V].
    """
    name = _named(name, beta, skew)
    if name == "hellinger":
        # √ has an infinite slope at 0.
        terms = 0.5 * (p + q) - torch.where(ids, torch.where(ids, p * q, 1.0).sqrt(), 0.0)
        return terms.masked_fill(~ids, 0.0).sum(-1)
    slope = {"reverse_kl": -1.0, "skew_forward_kl": 1 - skew, "skew_reverse_kl": skew - 1}
    terms = _terms(name, p, q, beta, skew) - slope.get(name, 0.0) * (p - q)
    return terms.masked_fill(~ids, 0.0).sum(-1)


def divergence(
    name: str, p: Tensor, q: Tensor, beta: float, skew: float, eta: float = 3.0
) -> Tensor:
    """D(p, q) [N] over the last dimension."""
    name = _named(name, beta, skew)
    if name == "argmax_ce":
        return -q.gather(-1, p.argmax(-1, keepdim=True))[..., 0].log()
    if name in ("nla", "lk_hybrid"):
        overlap = torch.minimum(p, q).sum(-1)
        if name == "nla":
            return -overlap.log()
        share = (-eta * overlap.detach()).exp()
        kl, tv = _terms("forward_kl", p, q, beta, skew), _terms("tvd", p, q, beta, skew)
        return share * kl.sum(-1) + (1 - share) * tv.sum(-1)
    if name == "hellinger":
        # √ has an infinite slope at 0: for p = 0 the product is 0 for any q.
        return 1 - torch.where(p > 0, torch.where(p > 0, p * q, 1.0).sqrt(), 0.0).sum(-1)
    return _terms(name, p, q, beta, skew).sum(-1)


def topk_distill(
    hidden: Tensor,
    head: LMHead,
    teacher: TeacherTopK,
    labels: Tensor | None,
    coef: Tensor,
    options: LossOptions,
) -> LossTerms:
    """The terms of the loss; no id of the teacher is repeated, labels are −1 if absent."""
    ids = teacher.ids
    u = logits(hidden, head)
    z = u / options.temperature
    q_NV = z.softmax(-1)
    V = u.shape[-1]
    S = _support(ids, V)
    p_slots = teacher.lp.to(u.dtype).exp().masked_fill(ids < 0, 0.0)
    p_NV = torch.zeros_like(u).scatter_add(-1, ids.clamp(min=0), p_slots)
    if options.tail in ("renorm_teacher", "renorm_both"):
        p_NV = p_NV / p_NV.sum(-1, keepdim=True).clamp(min=torch.finfo(u.dtype).tiny)
    if options.tail == "bucket":
        # If the ids are the whole vocabulary, there is no outcome outside them.
        rest = teacher.log_tail.to(u.dtype).exp().masked_fill(S.all(-1), 0.0)
        p = torch.cat([p_NV, rest.unsqueeze(-1)], -1)
        q = torch.cat([q_NV * S, (q_NV * ~S).sum(-1, keepdim=True)], -1)
    elif options.tail == "renorm_both":
        p, q = p_NV, z.masked_fill(~S, -1e30).softmax(-1) * S
    else:
        p, q = p_NV, q_NV
    if isinstance(options.divergence, str):
        name, beta, skew = options.divergence, options.beta, options.skew
        if options.tail == "truncate":
            D = divergence_on_ids(name, p, q, beta, skew, S)
        else:
            D = divergence(name, p, q, beta, skew, options.eta)
        if options.tail == "renorm_both":
            D = D.masked_fill(~S.any(-1), 0.0)
    else:
        tiny = torch.finfo(u.dtype).tiny

        def columns(x: Tensor) -> Tensor:
            picked = x.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, tiny)
            return torch.cat([picked, x[:, V:]], -1).clamp(min=tiny).log()

        D = options.divergence(columns(p), columns(q))
    lse = u.logsumexp(-1)
    per_token = options.on_divergence * D + options.z_loss * lse.square()
    nll = None
    if labels is not None:
        label_u = u.gather(-1, labels.clamp(min=0).unsqueeze(-1))[:, 0]
        nll = (lse - label_u).masked_fill(labels < 0, 0.0)
        per_token = per_token + options.ce_weight * nll
    entropy = -(q_NV * z.log_softmax(-1)).sum(-1)
    mass = (q_NV * S).sum(-1)
    return LossTerms((coef * per_token).sum(), per_token, D, mass, lse, nll, entropy)


def linear_distill(
    hidden: Tensor,
    head: LMHead,
    teacher_logits: Tensor,
    labels: Tensor | None,
    coef: Tensor,
    options: LossOptions,
    missing_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (Σ coef · ℓ, ℓ [N]) for a dense teacher's [N, V] logits at T=1.

    missing_lse [N] is the log-sum-exp, at T, of its logits of the tokens that the student lacks.
    """
    u, T = logits(hidden, head), options.temperature
    lq, z_teacher = (u / T).log_softmax(-1), teacher_logits / T
    if missing_lse is not None:
        z_teacher = torch.cat([z_teacher, missing_lse.unsqueeze(-1)], -1)
    lp = z_teacher.log_softmax(-1)
    if isinstance(options.divergence, str):
        q = lq.exp()
        q = torch.cat([q, q.new_zeros(len(q), lp.shape[-1] - q.shape[-1])], -1)
        of = options
        D = divergence(options.divergence, lp.exp(), q, of.beta, of.skew, of.eta)
    else:
        D = options.divergence(lp, lq)
    lse = u.logsumexp(-1)
    per_token = options.on_divergence * D + options.z_loss * lse.square()
    if labels is not None:
        nll = lse - u.gather(-1, labels.clamp(min=0).unsqueeze(-1))[:, 0]
        per_token = per_token + options.ce_weight * nll.masked_fill(labels < 0, 0.0)
    return (coef * per_token).sum(), per_token


def linear_topk(hidden: Tensor, head: LMHead, k: int) -> TopK:
    z = logits(hidden, head) / head.temperature
    lp = z.log_softmax(-1)
    best = lp.topk(k, -1)
    rest = z.scatter(-1, best.indices, -math.inf).logsumexp(-1) - z.logsumexp(-1)
    return TopK(best.indices, best.values, rest, head.temperature)


def token_scores(hidden: Tensor, head: LMHead, labels: Tensor | None) -> TokenScores:
    """The scores that do not need a teacher."""
    u = logits(hidden, head)
    z = u / head.temperature
    lq = z.log_softmax(-1)
    q = lq.exp()
    entropy = -(q * lq).sum(-1)
    top2 = lq.topk(2, -1)
    nll = rank = None
    if labels is not None:
        label_u = u.gather(-1, labels.clamp(min=0).unsqueeze(-1))
        nll = (u.logsumexp(-1) - label_u[:, 0]).masked_fill(labels < 0, 0.0)
        rank = (u > label_u).sum(-1).masked_fill(labels < 0, 0)
    return TokenScores(
        z.logsumexp(-1),
        entropy,
        (q * (lq + entropy.unsqueeze(-1)).square()).sum(-1),
        top2.values[:, 0],
        top2.indices[:, 0],
        top2.values[:, 0] - top2.values[:, 1],
        nll,
        rank,
    )
