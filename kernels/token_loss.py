"""The loss per token, and its gradient, from K logits and the log-sum-exp of the rest.

    log q_k = z_k − lse,   log q_tail = lse_tail − lse,   lse = log(e^lse_tail + Σ_S e^z)
    ℓ = (1 − ce) · D(p, q) [· T²] + ce · (lse₁ − u_y) + z_loss · lse₁²

D sums φ over S, plus φ of the tail (bucket), f(0) · q_tail (renorm_teacher) or `on_ids` · (p − q)
of each id (truncate), or runs over a softmax on S alone (renorm_both). With ψ = ∂φ/∂log q and
Ψ = Σψ the softmax gives dD/dz_k = ψ_k − q_k Ψ and dD/dlse_tail = ψ_tail − q_tail Ψ. This is
ordinary PyTorch: `token_loss_forward` is differentiable by autograd, `token_loss_backward` is the
same derivative in closed form for the fused loss. triton_token_loss.py has both in one kernel, for
named divergences.

Letters: N tokens, K teacher slots, S = K or K+1 slots (the label is last), T temperature,
z = u / T logits at T, u logits at T=1. Empty slots hold z = NEG, log p = floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .divergences import (
    COMBINED,
    Combined,
    Divergence,
    call_divergence,
    combine,
    floor_of,
    resolve,
)

if TYPE_CHECKING:
    from .head import Stats

NEG = -1e30  # "no such token": finite, so that 0 · NEG is 0 and differences stay finite
ABSENT = -1e20  # values below it are NEG, possibly divided by a temperature
LEAST_LOG_Q = -1e15  # of log q: its products with gradients up to 1e23 stay finite in fp32
TAILS = ("bucket", "truncate", "renorm_teacher", "renorm_both")


class LossOptions(NamedTuple):
    """The loss of one position, and how it and its gradient are computed."""

    divergence: str | Callable[[Tensor, Tensor], Tensor] = "forward_kl"
    beta: float = 0.5
    skew: float = 0.1
    tail: str = "bucket"
    temperature: float = 1.0
    t2_scale: bool = False
    ce_weight: float = 0.0
    z_loss: float = 0.0
    filter_eps: float | None = None  # skip gradient tiles below this times the largest factor
    allow_biased: bool = False
    impl: str = "auto"
    backward: str = "auto"
    eta: float = 3.0

    def scalars(self) -> dict[str, Any]:
        """The terms of the loss as an operator takes them; it gets the temperature of its head."""
        return {
            "divergence": self.divergence,
            "beta": self.beta,
            "skew": self.skew,
            "eta": self.eta,
            "tail": self.tail,
            "t2_scale": self.t2_scale,
            "ce_weight": self.ce_weight,
            "z_loss": self.z_loss,
        }

    @classmethod
    def of(cls, scalars: dict[str, Any]) -> LossOptions:
        """The options among the scalars of an operator."""
        return cls(**{name: scalars[name] for name in cls._fields if name in scalars})

    @property
    def is_combined(self) -> bool:
        """Return whether the divergence is a function of several sums over the outcomes."""
        return self.divergence in COMBINED

    @property
    def on_divergence(self) -> float:
        """The factor of D in the per-token loss."""
        return (1 - self.ce_weight) * (self.temperature**2 if self.t2_scale else 1.0)

    @property
    def needs_base(self) -> bool:
        """Whether the loss needs the log-sum-exp at T=1 as well as at T."""
        return bool(self.ce_weight or self.z_loss)


class TeacherTopK(NamedTuple):
    """Checked answers: finite, floored, merged. ids_NK int64 (−1 empty), lp_NK, log_tail_N."""

    ids: Tensor
    lp: Tensor
    log_tail: Tensor


class Gathered(NamedTuple):
    """The statistics of one pass over the LM head on which a sparse loss depends.

    z_NS logits at T, lse_rest_N over v ∉ slots at T, lse_base_N the same at T=1 (None when T = 1).
    """

    z: Tensor
    lse_rest: Tensor | None
    lse_base: Tensor | None


class TokenLosses(NamedTuple):
    per_token: Tensor
    divergence: Tensor
    student_mass: Tensor | None
    lse: Tensor | None
    nll: Tensor | None


class RowLosses(NamedTuple):
    """What a backend computes from the statistics of a chunk.

    entropy [n] if the statistics have a mean; grads: d(W x) of the slots, d lse_rest, d lse_base of
    Σ coef · per_token, if requested.
    """

    rows: TokenLosses
    entropy: Tensor | None
    grads: Stats | None


class _Columns(NamedTuple):
    lp: Tensor  # (N, K) or (N, K+1)
    lq: Tensor  # the same
    empty: Tensor  # (N, K)
    lse: Tensor  # (N,) over everything at T; over S alone for renorm_both
    lse_tail: Tensor | None  # (N,)
    log_q_tail: Tensor | None  # (N,)


def has_new_label(ids_NK: Tensor, labels_N: Tensor) -> Tensor:
    """bool [N]: whether the label is a real token outside the teacher's slots."""
    return (labels_N >= 0) & ~(ids_NK == labels_N.unsqueeze(-1)).any(-1)


def slot_ids(ids_NK: Tensor, label_N: Tensor | None) -> Tensor:
    """The ids of the slots: the teacher's and, if given, the label's where it is not among them.

    [N, K] or int64 [N, K + 1]. They are distinct if the teacher's are; −1 in empty slots.
    """
    if label_N is None:
        return ids_NK
    new = label_N.masked_fill(~has_new_label(ids_NK, label_N), -1)
    return torch.cat([ids_NK, new.unsqueeze(-1)], -1)


def _label_logit(z_NS: Tensor, ids_NK: Tensor, label_N: Tensor) -> Tensor:
    """The logit of the label [N], from its own slot or from that of the teacher's id."""
    same = (ids_NK == label_N.unsqueeze(-1)) & (ids_NK >= 0)
    of_teacher = torch.where(same, z_NS[:, : ids_NK.shape[1]], 0.0).sum(-1)
    return torch.where(same.any(-1), of_teacher, z_NS[:, -1])


def log_tail_of(log_q_S: Tensor, log_q_tail: Tensor) -> Tensor:
    """log(1 − Σ_S q) [N], from whichever form is exact.

    `log_q_tail`, a difference of two log-sum-exps, is used if S holds at least half of the mass.
    Otherwise log1p(−Σ_S q): there the difference would be rounding error of numbers near 10.
    """
    inside = log_q_S.exp().sum(-1)
    return torch.where(inside < 0.5, torch.log1p(-inside.clamp(max=0.5)), log_q_tail)


def _columns(
    gathered: Gathered, teacher: TeacherTopK, label_N: Tensor | None, tail: str
) -> _Columns:
    K = teacher.ids.shape[-1]
    empty = teacher.ids < 0
    floor = floor_of(teacher.lp.dtype)
    z_S = gathered.z[:, :K]
    lse_S = torch.logsumexp(z_S, -1)
    lp = teacher.lp
    if tail in ("renorm_teacher", "renorm_both"):
        # Empty slots are excluded, however little the others hold.
        mass = torch.logsumexp(lp.masked_fill(empty, NEG), -1, keepdim=True)
        lp = (lp - mass).clamp(min=floor, max=0.0).masked_fill(empty, floor)
    if tail == "renorm_both":
        lq = (z_S - lse_S.unsqueeze(-1)).clamp(min=LEAST_LOG_Q).masked_fill(empty, floor)
        return _Columns(lp, lq, empty, lse_S, None, None)
    assert gathered.lse_rest is not None
    lse_tail = gathered.lse_rest
    if label_N is not None:
        z_y = gathered.z[:, K].masked_fill(~has_new_label(teacher.ids, label_N), NEG)
        lse_tail = torch.logaddexp(lse_tail, z_y)
    lse = torch.logaddexp(lse_tail, lse_S)
    lq = (z_S - lse.unsqueeze(-1)).clamp(min=LEAST_LOG_Q).masked_fill(empty, floor)
    log_q_tail = log_tail_of(lq, lse_tail - lse)
    if tail == "bucket":
        # If the ids cover the vocabulary, the bucket holds rounding error only: like an empty slot,
        # it is set to the floor on both sides.
        none = lse_tail < ABSENT
        log_tail = torch.where(none, floor, teacher.log_tail)
        lp = torch.cat([lp, log_tail.unsqueeze(-1)], -1)
        lq = torch.cat([lq, log_q_tail.masked_fill(none, floor).unsqueeze(-1)], -1)
    return _Columns(lp, lq, empty, lse, lse_tail, log_q_tail)


def _outside(divergence: Divergence, tail: str) -> float:
    return (divergence.outside or 0.0) if tail == "renorm_teacher" else 0.0


def _on_ids(divergence: Divergence, tail: str) -> float:
    return divergence.on_ids if tail == "truncate" else 0.0


def _combined(cols: _Columns, options: LossOptions) -> Combined:
    """Return a divergence that is a function of sums over the columns."""
    assert isinstance(options.divergence, str)

    def sums(term: str, w_N: Tensor | None) -> tuple[Tensor, Tensor]:
        rule = resolve(term, 0.0, 0.0, None if w_N is None else w_N.unsqueeze(-1))
        return rule.phi(cols.lp, cols.lq).sum(-1), rule.psi(cols.lp, cols.lq).sum(-1)

    return combine(options.divergence, options.eta, sums)


def _base(gathered: Gathered, teacher: TeacherTopK, label_N: Tensor | None, T: float) -> Tensor:
    """lse₁ [N]: log-sum-exp of the logits at T=1."""
    u_S = torch.where(gathered.z < ABSENT, NEG, gathered.z * T)
    if label_N is not None:
        repeated = ~has_new_label(teacher.ids, label_N)
        u_S = torch.cat([u_S[:, :-1], u_S[:, -1:].masked_fill(repeated.unsqueeze(-1), NEG)], -1)
    rest = gathered.lse_rest if gathered.lse_base is None else gathered.lse_base
    assert rest is not None
    return torch.logaddexp(rest, torch.logsumexp(u_S, -1))


def token_loss_forward(
    gathered: Gathered, teacher: TeacherTopK, label_N: Tensor | None, options: LossOptions
) -> TokenLosses:
    """Per-token loss and statistics, [N] each; differentiable in `gathered`.

    label_N int64 [N] is negative without a label; if given, gathered.z has a last slot, for labels
    that are not among the teacher's ids.
    """
    tail = options.tail
    cols = _columns(gathered, teacher, label_N, tail)
    if options.is_combined:
        D = _combined(cols, options).D
        if tail == "renorm_both":  # a row without ids has no outcome
            D = D.masked_fill(cols.empty.all(-1), 0.0)
    elif isinstance(options.divergence, str):
        rule = resolve(options.divergence, options.beta, options.skew)
        phi = rule.phi(cols.lp, cols.lq)
        if _on_ids(rule, tail):
            phi = phi + _on_ids(rule, tail) * (cols.lp.exp() - cols.lq.exp())
        D = phi.sum(-1)
        if cols.log_q_tail is not None and _outside(rule, tail):
            D = D + _outside(rule, tail) * cols.log_q_tail.exp()
        if rule.constant and tail not in ("renorm_both", "truncate"):
            # Also with the bucket tail: answers stored in 16 bits do not sum to exactly 1.
            D = D + rule.constant * (1 - cols.lp.double().exp().sum(-1)).to(D.dtype)
    else:
        D = call_divergence(options.divergence, cols.lp, cols.lq)
    per_token = D * options.on_divergence
    mass = lse = nll = None
    if gathered.lse_rest is not None:
        mass = (torch.logsumexp(gathered.z[:, : teacher.ids.shape[-1]], -1) - cols.lse).exp()
        if tail == "renorm_both":
            full = _columns(gathered, teacher, label_N, "truncate").lse
            mass = (cols.lse - full).exp()
        if options.temperature == 1.0 or gathered.lse_base is not None:
            lse = _base(gathered, teacher, label_N, options.temperature)
        if label_N is not None and lse is not None:
            z_y = _label_logit(gathered.z, teacher.ids, label_N)
            nll = (lse - z_y * options.temperature).masked_fill(label_N < 0, 0.0)
            per_token = per_token + options.ce_weight * nll
        if options.z_loss and lse is not None:
            per_token = per_token + options.z_loss * lse.square()
    return TokenLosses(per_token, D, mass, lse, nll)


def token_loss_backward(
    gathered: Gathered,
    teacher: TeacherTopK,
    label_N: Tensor | None,
    options: LossOptions,
    coef_N: Tensor,
) -> Gathered:
    """d(Σ coef · per_token) / d(z, lse_rest, lse_base) for a named divergence, in closed form."""
    assert isinstance(options.divergence, str)
    K, tail, T = teacher.ids.shape[-1], options.tail, options.temperature
    cols = _columns(gathered, teacher, label_N, tail)
    if options.is_combined:
        of = _combined(cols, options)
        rule = resolve(of.term, 0.0, 0.0, None if of.w is None else of.w.unsqueeze(-1))
    else:
        of, rule = None, resolve(options.divergence, options.beta, options.skew)
    psi, q = rule.psi(cols.lp, cols.lq), cols.lq.exp()
    if of is not None and of.on_psi is not None:
        psi = psi * of.on_psi.unsqueeze(-1)
    if _on_ids(rule, tail):
        psi = psi - _on_ids(rule, tail) * q
    total = psi.sum(-1, keepdim=True)
    g_tail = None
    if cols.log_q_tail is not None:
        q_tail = cols.log_q_tail.exp()
        psi_tail = psi[:, K] if tail == "bucket" else _outside(rule, tail) * q_tail
        if tail != "bucket":
            total = total + psi_tail.unsqueeze(-1)
        g_tail = psi_tail - q_tail * total[:, 0]
    scale = (coef_N * options.on_divergence).unsqueeze(-1)
    g_z = torch.zeros_like(gathered.z)
    g_S = (psi[:, :K] - q[:, :K] * total).masked_fill(cols.empty, 0.0)
    g_z[:, :K] = scale * g_S
    if g_tail is not None:
        # The gradients of a softmax sum to 0; the smaller side of that sum is exact.
        g_tail = torch.where(q_tail > 0.5, -g_S.sum(-1), g_tail)
    g_rest = None if gathered.lse_rest is None else torch.zeros_like(gathered.lse_rest)
    if g_tail is not None:
        assert cols.lse_tail is not None
        assert gathered.lse_rest is not None
        g_tail = g_tail * scale[:, 0]
        g_rest = g_tail * (gathered.lse_rest - cols.lse_tail).exp()
        if label_N is not None:
            new = has_new_label(teacher.ids, label_N)
            g_z[:, K] = (g_tail * (gathered.z[:, K] - cols.lse_tail).exp()).masked_fill(~new, 0.0)
    g_base = None
    if options.needs_base:
        lse = _base(gathered, teacher, label_N, T)
        has_label = 0.0 if label_N is None else (label_N >= 0).to(coef_N.dtype)
        on_ce = coef_N * options.ce_weight * has_label
        on_lse = on_ce + coef_N * 2 * options.z_loss * lse
        q1 = (gathered.z * T - lse.unsqueeze(-1)).exp()
        g_z = g_z + T * on_lse.unsqueeze(-1) * q1
        if label_N is not None:
            new = has_new_label(teacher.ids, label_N)
            g_z[:, K] = torch.where(new, g_z[:, K] - T * on_ce, 0.0)
            at_label = teacher.ids == label_N.unsqueeze(-1)
            g_z[:, :K] -= torch.where(at_label, T * on_ce.unsqueeze(-1), 0.0)
        rest = gathered.lse_rest if gathered.lse_base is None else gathered.lse_base
        assert rest is not None
        assert g_rest is not None
        g_base = on_lse * (rest - lse).exp()
        if gathered.lse_base is None:
            g_rest, g_base = g_rest + g_base, None
    return Gathered(g_z, g_rest, g_base)


def lse_of(z_NS: Tensor, lse_rest_N: Tensor, unique_NS: Tensor) -> Tensor:
    """lse [N] of the full softmax; unique_NS: slots that are neither empty nor a repeat."""
    return torch.logaddexp(lse_rest_N, torch.logsumexp(torch.where(unique_NS, z_NS, NEG), -1))


def entropy_of(
    z_NS: Tensor, lse_rest_N: Tensor, mean_rest_N: Tensor, lse_N: Tensor, unique_NS: Tensor
) -> Tensor:
    """H [N] of the full softmax at T from its K logits and the rest's mean logit.

    H = lse − E_q[z], E_q[z] = q_rest · mean_rest + Σ_unique q_k z_k, lse from `lse_of`.
    """
    q = (torch.where(unique_NS, z_NS, NEG) - lse_N.unsqueeze(-1)).exp()
    expected = (q * torch.where(unique_NS, z_NS, 0.0)).sum(-1)
    return lse_N - (expected + (lse_rest_N - lse_N).exp() * mean_rest_N)


def first_slots(ids_NK: Tensor) -> Tensor:
    """bool [N, K]: slots that are not empty and whose id is in no earlier slot."""
    order = torch.sort(ids_NK, dim=-1, stable=True)
    is_new = torch.ones_like(order.values, dtype=torch.bool)
    is_new[:, 1:] = order.values[:, 1:] != order.values[:, :-1]
    first = torch.zeros_like(is_new).scatter(-1, order.indices, is_new)
    return first & (ids_NK >= 0)


def merge_answers(ids_NK: Tensor, lp_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (distinct ids, log p, Σ p); repeated ids become one slot with their summed p.

    The other slots of an id become empty: id −1, and log p the floor.
    """
    order = torch.sort(ids_NK, dim=-1, stable=True)
    lp = lp_NK.gather(-1, order.indices)
    is_new = torch.ones_like(order.values, dtype=torch.bool)
    is_new[:, 1:] = order.values[:, 1:] != order.values[:, :-1]
    group = is_new.cumsum(-1) - 1
    floor = floor_of(lp.dtype)
    top = torch.full_like(lp, floor).scatter_reduce(-1, group, lp, "amax")
    total = torch.zeros_like(lp).scatter_add(-1, group, (lp - top.gather(-1, group)).exp())
    merged = torch.where(
        is_new, (top + total.clamp(min=math.exp(floor)).log()).gather(-1, group), lp
    )
    merged_ids = order.values.masked_fill_(~is_new, -1)
    inverse = torch.empty_like(order.indices).scatter_(
        -1, order.indices, torch.arange(ids_NK.shape[-1], device=ids_NK.device).expand_as(ids_NK)
    )
    ids = merged_ids.gather(-1, inverse)
    lp = merged.gather(-1, inverse).masked_fill_(ids < 0, floor)
    return ids, lp, lp.exp().sum(-1)
