"""Losses, their gradients and error bounds in fp64, written from the formulas on dense logits.

Nothing of fastdistill is imported, so that no error is shared with what is compared. All tensors
have a leading dimension of B independent calls.

The bounds are first-order: each rounding of logits, log-probabilities and sums to the type of the
computation, carried through the derivatives. `δ` is the bound of an error in log q, which is also
the relative one of q; `e` are absolute bounds. Where δ is not small, no bound is valid, and
`conditioned` is False.

Letters: B calls, N tokens, H hidden size, V vocabulary, K slots, O = V + 1 outcomes (the last is
the rest).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

FACTOR = 1.0  # of all first-order bounds
LARGEST_DELTA = 0.02
ABSENT = -1e30


class Student(NamedTuple):
    """Logits of a head; raw = x Wᵀ is what gradients are taken for. e_u and slope have no grad."""

    raw: Tensor
    u: Tensor
    e_u: Tensor
    slope: Tensor  # du/ds


def student(x: Tensor, w: Tensor, bias: Tensor | None, head: dict[str, Any], eps: float) -> Student:
    """u = c·tanh(s / c), s = scale · (x Wᵀ + b), and a bound of its error."""
    scale, cap = head["logit_scale"], head["softcap"]
    raw = (x @ w.mT).requires_grad_()
    s = raw if bias is None else raw + bias[:, None]
    s = s * scale
    u = s if cap is None else cap * torch.tanh(s / cap)
    with torch.no_grad():
        size = x.abs() @ w.abs().mT
        e = eps * ((x.shape[-1] + 8) * abs(scale) * size + 2 * s.abs().nan_to_num(posinf=0.0))
        slope = torch.ones_like(e)
        if cap is not None:
            nearest = (s.abs() - 4 * e).clamp(min=0) / cap
            e = e * (1 - torch.tanh(nearest).square()) + 4 * eps * u.abs()
            slope = 1 - (u / cap).square()
    return Student(raw, u, e, slope)


class LogProbs(NamedTuple):
    """log q, δ, the log-sum-exp and its error."""

    lq: Tensor
    delta: Tensor
    lse: Tensor
    e_lse: Tensor


def log_softmax(z: Tensor, e_z: Tensor, eps: float) -> LogProbs:
    lse = z.logsumexp(-1, keepdim=True)
    lq = z - lse
    with torch.no_grad():
        e_lse = (lq.exp() * e_z).sum(-1, keepdim=True) + eps * (lse.abs().nan_to_num() + 2)
        delta = e_z + e_lse + eps * (lq.abs() + 2)
        delta = torch.where(lq.isneginf(), 0.0, delta)
    return LogProbs(torch.where(lq.isneginf(), ABSENT, lq), delta, lse[..., 0], e_lse[..., 0])


def terms(
    name: str | Callable, lp: Tensor, lq: Tensor, o: dict[str, Any], *, on_ids: bool
) -> Tensor:
    """The summands of a separable divergence; on_ids: with the minimum of each term at q = p."""
    p, q = lp.exp(), lq.exp()
    beta, skew = o["beta"], o["skew"]
    if callable(name):
        return (p - q).square()
    if name == "jsd" and beta in (0.0, 1.0):
        name = "reverse_kl" if beta else "forward_kl"
    if name.startswith("skew") and skew == 0.0:
        name = name[5:]
    if name in ("forward_kl", "argmax_ce"):
        return p * (lp - lq)
    if name == "tvd":
        return 0.5 * (p - q).abs()
    if name == "hellinger":
        return 0.5 * ((lp / 2).exp() - (lq / 2).exp()).square()
    if name == "jsd":
        lm = torch.logaddexp(lp + math.log(beta), lq + math.log(1 - beta))
        return beta * p * (lp - lm) + (1 - beta) * q * (lq - lm)
    if name == "reverse_kl":
        return q * (lq - lp) + on_ids * (p - q)
    share = skew if name == "skew_forward_kl" else 1 - skew  # of p in the mix
    lm = torch.logaddexp(lp + math.log(share), lq + math.log(1 - share))
    if name == "skew_forward_kl":
        return p * (lp - lm) - on_ids * (1 - skew) * (p - q)
    return q * (lq - lm) + on_ids * (1 - skew) * (p - q)


def cost_of_rest(name: str, o: dict[str, Any]) -> float:
    """f(0): the cost per student mass where the teacher is zero."""
    if name == "jsd":
        return 0.0 if o["beta"] == 0 else -(1 - o["beta"]) * math.log1p(-o["beta"])
    if name == "skew_reverse_kl":
        return -math.log(o["skew"])
    return {"tvd": 0.5, "hellinger": 0.5}.get(name, 0.0)


class Rows(NamedTuple):
    """Per-token results and bounds, and the bound of the gradient for z, all for coef = 1."""

    D: Tensor
    e_D: Tensor
    e_dz: Tensor
    conditioned: Tensor  # bool [B, N]
    student_mass: Tensor


def divergence(
    z: Tensor, e_z: Tensor, p: Tensor, slots: Tensor, delta_p: Tensor, log_tail: Tensor,
    e_tail: Tensor, o: dict[str, Any], eps: float,
) -> Rows:  # fmt: skip
    """D(p, q) per token and its bounds.

    Args:
        p: [B, N, V] of the merged slots, floored; slots: bool [B, N, V], which ids have one.
        delta_p: relative error of p. log_tail: [B, N], floored.
        o: the options of the loss.
    """
    name, tail = o["divergence"], o["tail"]
    full = log_softmax(z, e_z, eps)
    inside = full.lq.exp() * slots
    mass = inside.sum(-1)
    lp = torch.where(slots, p, 1.0).log()
    rest_z = z.masked_fill(slots, -torch.inf)
    rest = torch.where(rest_z.isneginf().all(-1), ABSENT, rest_z.logsumexp(-1) - full.lse)
    share = torch.where(slots, 0.0, (full.lq - rest[..., None]).clamp(max=0).exp()).detach()
    delta_rest = (share * full.delta).sum(-1) + eps * (rest.detach().abs().clamp(max=1e4) + 2)
    own = full
    if tail == "renorm_both":
        own = log_softmax(z.masked_fill(~slots, -torch.inf), e_z, eps)
    present, lq, delta, dp = slots, own.lq, own.delta, delta_p
    if tail == "bucket":
        has_rest = (~slots).any(-1, keepdim=True) & (rest[..., None] > ABSENT / 2)
        present = torch.cat([slots, has_rest], -1)
        lp = torch.cat([lp, log_tail[..., None]], -1)
        lq = torch.cat([lq, rest[..., None]], -1)
        delta = torch.cat([delta, delta_rest[..., None]], -1)
        dp = torch.cat([dp, e_tail[..., None]], -1)
    lp, lq = torch.where(present, lp, 0.0), torch.where(present, lq, 0.0)
    lq_leaf = lq
    both = torch.where(present, delta + dp, 0.0)
    P, Q = torch.where(present, lp.exp(), 0.0), torch.where(present, lq.exp(), 0.0)
    kappa = 1.0
    if name in ("nla", "lk_hybrid"):
        overlap = torch.minimum(P, Q).sum(-1)
        if name == "nla":
            D, kappa = -overlap.log(), 0.0
        else:
            w = (-o["eta"] * overlap).exp().detach()
            D = w * (P * (lp - lq)).sum(-1) + (1 - w) * 0.5 * (P - Q).abs().sum(-1)
            kappa = 1 + o["eta"]
        phi = torch.zeros_like(P)
    else:
        phi = terms(name, lp, lq, o, on_ids=tail == "truncate")
        phi = torch.where(present, phi, 0.0)
        D = phi.sum(-1)
        if tail == "renorm_teacher" and not callable(name):
            D = D + cost_of_rest(name, o) * torch.where(slots, 0.0, full.lq.exp()).sum(-1)
        if name == "hellinger" and tail in ("bucket", "renorm_teacher"):
            D = D + 0.5 * (1 - P.sum(-1))
    psi = torch.autograd.grad(D.sum(), lq_leaf, retain_graph=True)[0]
    with torch.no_grad():
        gap = (lp - lq).abs()
        kinks = name in ("tvd", "nla", "lk_hybrid")
        kink = torch.where(present & (gap <= 4 * both + 4 * eps), Q, 0.0) * kinks
        if name == "nla":
            kink = kink / overlap[..., None].clamp(min=1e-37)
        e_psi = psi.abs() * both + kappa * (P + Q) * both + kink
        if name == "nla":
            e_psi = e_psi + psi.abs() * (psi.abs() * both).sum(-1, keepdim=True)
        if tail == "renorm_teacher":
            on_rest = 0.0 if callable(name) else cost_of_rest(name, o)
            e_psi = torch.cat([e_psi, (on_rest * rest.exp() * delta_rest)[..., None]], -1)
            total = psi.sum(-1, keepdim=True).abs() + on_rest * rest.exp()[..., None]
            Q_all = torch.cat([Q, rest.exp()[..., None]], -1)
            delta_all = torch.cat([delta, delta_rest[..., None]], -1)
        else:
            total, Q_all, delta_all = psi.sum(-1, keepdim=True).abs(), Q, delta
        e_out = e_psi + Q_all * (e_psi.sum(-1, keepdim=True) + delta_all * total)
        if tail == "truncate":
            q_rest = rest.exp()
            e_rest = q_rest * (e_psi.sum(-1) + delta_rest * total[..., 0])
        else:
            e_rest = e_out[..., -1] if e_out.shape[-1] > slots.shape[-1] else torch.zeros_like(mass)
        e_dz = torch.where(slots, e_out[..., : slots.shape[-1]], e_rest[..., None] * share)
        q_tail = rest.exp()
        on_tail = psi[..., -1].abs() if tail == "bucket" else torch.zeros_like(q_tail)
        e_dz += torch.where(slots, 0.0, share * full.delta) * (
            on_tail + q_tail * total[..., 0]
        ).unsqueeze(-1)
        e_D = ((P + Q + psi.abs() + phi.abs()) * (both + eps)).sum(-1) + eps * D.abs()
        if name == "nla":
            e_D += (torch.minimum(P, Q) * both).sum(-1) / overlap.clamp(min=1e-37)
        worst = ((P + Q) * both).sum(-1)
        conditioned = worst < LARGEST_DELTA
        if name == "nla":
            conditioned &= overlap > 1e-35
        if name in ("nla", "lk_hybrid"):  # 1 - TV is the overlap of distributions only
            conditioned &= (P.sum(-1) - 1).abs() < 4 * eps * P.shape[-1]
    return Rows(D, e_D, e_dz, conditioned, mass.detach())


class Truth(NamedTuple):
    """Values with bounds, [B] or [B, N], and which calls have a bound, [B].

    grads: name -> (gradient of Σ upstream · coef · ℓ, bound of the norm of its error [B]).
    """

    rows: dict[str, tuple[Tensor, Tensor]]
    grads: dict[str, tuple[Tensor, Tensor]]
    conditioned: Tensor


class Weights(NamedTuple):
    """The factors of the loss of each token, and the upstream gradient, [B, N] each."""

    coef: Tensor
    upstream: Tensor


def loss(
    x: Tensor, w: Tensor, s: Student, rows: Rows, labels: Tensor | None, weights: Weights,
    o: dict[str, Any], eps: float, relative: tuple[float, float],
) -> Truth:  # fmt: skip
    """The weighted loss with cross-entropy and z-loss, and its gradients.

    relative: the budget of values, and of gradients with the rounding of their own type.
    """
    T, scale = o["temperature"], abs(o["logit_scale"])
    on_D = (1 - o["ce_weight"]) * (T * T if o["t2_scale"] else 1.0)
    at_1 = log_softmax(s.u, s.e_u, eps)
    per_token, e = on_D * rows.D, on_D * rows.e_D
    nll = e_nll = None
    used = torch.ones_like(weights.coef)
    if labels is not None:
        used = (labels >= 0).to(per_token)
        at = labels.clamp(min=0).unsqueeze(-1)
        nll = at_1.lse - s.u.gather(-1, at)[..., 0]
        e_nll = at_1.e_lse + s.e_u.gather(-1, at)[..., 0] + eps * nll.abs()
        nll, e_nll = nll * used, e_nll * used
        per_token, e = per_token + o["ce_weight"] * nll, e + o["ce_weight"] * e_nll
    z_loss = o["z_loss"]
    if z_loss:
        per_token = per_token + z_loss * at_1.lse.square()
        e = e + z_loss * (2 * at_1.lse.abs() * at_1.e_lse + eps * at_1.lse.square())
    per_token = torch.where(used > 0, per_token, 0.0)
    factors = weights.coef * used
    total = (factors * weights.upstream * per_token).sum()
    need = [s.raw, s.u]
    d_raw, d_u = torch.autograd.grad(total, need)
    value, rounding = relative
    with torch.no_grad():
        c = (factors * weights.upstream).abs().unsqueeze(-1)
        q1 = at_1.lq.exp()
        on_lse = o["ce_weight"] * (labels is not None) + 2 * z_loss * at_1.lse.abs()
        e_du = on_D * rows.e_dz / T
        e_du += q1 * (on_lse[..., None] * at_1.delta + 2 * z_loss * at_1.e_lse[..., None])
        e_du = torch.where(c > 0, c * e_du, 0.0) + eps * d_u.abs()
        e_draw = e_du * s.slope * scale
        if o["softcap"] is not None:
            e_draw += d_u.abs() * scale * (4 * eps + 2 * s.e_u / o["softcap"])
        bound = (
            FACTOR * e_draw
            + rounding * d_raw.abs()
            + 2**-30 * rounding * d_raw.abs().amax((1, 2), True)
        )

        def rounded(grad: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
            # Rounded when complete, and again when multiplied by the upstream gradient.
            size = errors.flatten(1).norm(dim=1) + 2 * rounding * grad.flatten(1).norm(dim=1)
            return grad, size

        grads = {
            "hidden": rounded(d_raw @ w, bound @ w.abs()),
            "weight": rounded(d_raw.mT @ x, bound.mT @ x.abs()),
            "bias": rounded(d_raw.sum(1), bound.sum(1)),
        }
        e = torch.where(used > 0, FACTOR * e + value * per_token.abs(), 0.0)
        results = {
            "per_token": (per_token, e),
            "divergence": (rows.D * used, used * (FACTOR * rows.e_D + value * rows.D.abs())),
            "lse": (at_1.lse * used, FACTOR * at_1.e_lse + value * at_1.lse.abs()),
            "loss": (factors * per_token, (factors.abs() * e)),
        }
        if nll is not None and e_nll is not None:
            results["nll"] = (nll, FACTOR * e_nll + value * nll.abs())
        conditioned = (rows.conditioned | (used == 0)).all(-1)
        return Truth({k: (v.detach(), b) for k, (v, b) in results.items()}, grads, conditioned)
