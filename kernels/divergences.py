"""Separable divergences D = Σ_v φ(log p_v, log q_v), and what a mass of q without teacher costs.

Each is one `Divergence`: φ, its derivative ψ = ∂φ/∂log q, and `outside` = f(0), the price per unit
of student mass where the teacher is zero (Σ_S q f(p/q) + f(0) · (1 − Σ_S q)); None where f(0) is
infinite and the sum stays on S. The squared Hellinger distance 1 − Σ√(pq) is written as
½Σ(√p − √q)², which does not cancel when p ≈ q; the two differ by ½(1 − M) when the teacher's masses
sum to M < 1, and `constant` = ½ puts that back.

    forward_kl       p (lp − lq)                              f(0) = 0
    reverse_kl       q (lq − lp)                              f(0) = ∞
    jsd β            β p (lp − lm) + (1−β) q (lq − lm)        f(0) = (1−β) log 1/(1−β)
    tvd              ½ |p − q|                                f(0) = ½
    hellinger        ½ (√p − √q)²                             f(0) = ½, and ½ (1 − M)
    skew_forward_kl  p (lp − log(αp + (1−α)q))                f(0) = 0
    skew_reverse_kl  q (lq − log((1−α)p + αq))                f(0) = −log α
    with m = βp + (1−β)q. JSD in the convention of GKD (Agarwal et al., arXiv 2306.13649), skewed
    divergences of DistiLLM (Ko et al., arXiv 2402.03898), where their α is 1 − skew for the mix.

Inputs are finite: callers floor log-probabilities at `floor_of(dtype)`, so 0 · (−∞) never arises.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

NAMES = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "tvd",
    "hellinger",
    "skew_forward_kl",
    "skew_reverse_kl",
)

Elementwise = Callable[[Tensor, Tensor], Tensor]


class Divergence(NamedTuple):
    phi: Elementwise
    psi: Elementwise
    outside: float | None
    constant: float = 0.0  # × (1 − Σp), what φ lacks where the teacher's masses do not sum to 1


def floor_of(dtype: torch.dtype) -> float:
    """Log-probabilities below log(tiny) ≈ −87.3 count as that: p is 0 there and log p finite."""
    return math.log(torch.finfo(torch.float32 if dtype.itemsize < 4 else dtype).tiny)


def resolve(name: str, beta: float, skew: float) -> Divergence:
    """The divergence called `name`; jsd at β = 0 and 1 is forward and reverse KL by convention."""
    if name == "jsd" and beta in (0.0, 1.0):
        name = "reverse_kl" if beta else "forward_kl"
    if name == "skew_forward_kl" and skew == 0.0:
        name = "forward_kl"
    if name == "skew_reverse_kl" and skew == 0.0:
        name = "reverse_kl"
    if name == "forward_kl":
        return Divergence(lambda lp, lq: lp.exp() * (lp - lq), lambda lp, lq: -lp.exp(), 0.0)
    if name == "reverse_kl":
        return Divergence(
            lambda lp, lq: lq.exp() * (lq - lp), lambda lp, lq: lq.exp() * (lq - lp + 1), None
        )
    if name == "jsd":
        return _jsd(beta)
    if name == "tvd":
        return Divergence(
            lambda lp, lq: 0.5 * (lp.exp() - lq.exp()).abs(),
            lambda lp, lq: 0.5 * lq.exp() * torch.sign(lq - lp),
            0.5,
        )
    if name == "hellinger":
        return Divergence(
            lambda lp, lq: 0.5 * ((lp / 2).exp() - (lq / 2).exp()).square(),
            lambda lp, lq: 0.5 * (lq / 2).exp() * ((lq / 2).exp() - (lp / 2).exp()),
            0.5,
            constant=0.5,
        )
    if name == "skew_forward_kl":
        return _skew_forward(skew)
    if name == "skew_reverse_kl":
        return _skew_reverse(skew)
    raise ValueError(f"divergence: expected one of {NAMES} or a callable, got {name!r}")


def _log_mix(lp: Tensor, lq: Tensor, on_p: float) -> Tensor:
    if on_p in (0.0, 1.0):
        return lp if on_p else lq
    return torch.logaddexp(lp + math.log(on_p), lq + math.log1p(-on_p))


def _jsd(beta: float) -> Divergence:
    def phi(lp: Tensor, lq: Tensor) -> Tensor:
        lm = _log_mix(lp, lq, beta)
        return beta * lp.exp() * (lp - lm) + (1 - beta) * lq.exp() * (lq - lm)

    def psi(lp: Tensor, lq: Tensor) -> Tensor:
        # The derivatives through m cancel: −β p (1−β) q / m − (1−β)² q² / m + (1−β) q = 0.
        return (1 - beta) * lq.exp() * (lq - _log_mix(lp, lq, beta))

    return Divergence(phi, psi, -(1 - beta) * math.log1p(-beta))


def _skew_forward(skew: float) -> Divergence:
    def phi(lp: Tensor, lq: Tensor) -> Tensor:
        return lp.exp() * (lp - _log_mix(lp, lq, skew))

    def psi(lp: Tensor, lq: Tensor) -> Tensor:
        return -(1 - skew) * (lp + lq - _log_mix(lp, lq, skew)).exp()

    return Divergence(phi, psi, 0.0)


def _skew_reverse(skew: float) -> Divergence:
    def phi(lp: Tensor, lq: Tensor) -> Tensor:
        return lq.exp() * (lq - _log_mix(lp, lq, 1 - skew))

    def psi(lp: Tensor, lq: Tensor) -> Tensor:
        lm = _log_mix(lp, lq, 1 - skew)
        return lq.exp() * (lq - lm + 1 - skew * (lq - lm).exp())

    return Divergence(phi, psi, -math.log(skew))
