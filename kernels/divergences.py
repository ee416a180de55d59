"""Separable divergences D = Σ_v φ(log p_v, log q_v) and the location of their minima.

Each of SEPARABLE is one `Divergence`: φ, its derivative ψ = ∂φ/∂log q, and its terms outside the
K ids. `outside` = f(0) is the cost per unit of student mass where the teacher is zero
(Σ_S q f(p/q) + f(0) · (1 − Σ_S q)), for tail="renorm_teacher"; None if f(0) is infinite.
`on_ids` · (p − q) is added to φ on the K ids for tail="truncate", so that every term has its
minimum 0 at q = p: Σ_S φ alone has that minimum only if both sides sum to 1. The squared Hellinger
distance 1 − Σ√(pq) is computed as ½Σ(√p − √q)², which does not cancel when p ≈ q; they differ by
½(1 − M) if the teacher's masses sum to M < 1, which `constant` = ½ adds.

    divergence       φ                                    f(0)                  on_ids
    forward_kl       p (lp − lq)                          0                     0
    reverse_kl       q (lq − lp)                          ∞                     1
    jsd β            β p (lp − lm) + (1−β) q (lq − lm)    (1−β) log 1/(1−β)     0
    tvd              ½ |p − q|                            ½                     0
    hellinger        ½ (√p − √q)²                         ½, and ½ (1 − M)      0
    skew_forward_kl  p (lp − log(αp + (1−α)q))            0                     −(1 − α)
    skew_reverse_kl  q (lq − log((1−α)p + αq))            −log α                1 − α
    with m = βp + (1−β)q. JSD in the convention of GKD (Agarwal et al., arXiv 2306.13649), skewed
    divergences of DistiLLM (Ko et al., arXiv 2402.03898), where their α is 1 − skew for the mix.

Two losses of draft models are functions of the acceptance rate α = Σ_v min(p_v, q_v) = 1 − TV of
a token (Samarin et al., LK losses, arXiv 2602.23881). Their gradient needs sums over all tokens:

    nla        −log α
    lk_hybrid  λ KL(p‖q) + (1 − λ) TV,  λ = exp(−η α), which carries no gradient

`combine` computes them from sums of three separable terms: "tvd", "overlap" with φ = −min(p, q),
and "lk_mix" with φ = λ p (lp − lq) + (1 − λ) ½|p − q| and one λ per token. In both, the overlap
has ψ = −q where q < p, half of it where they are equal, and 0 elsewhere. The derivative of ½|p − q|
is larger by ½q. ψ − q Σψ removes this term, which would cancel digits where α is small. "argmax_ce"
= −log q(argmax p) is forward_kl of a teacher with all mass on one token: the losses replace the
teacher.

Pairs of divergence and tail that have their minimum at the teacher (`minimum_of`):

    bucket          every divergence; argmax_ce at the teacher's most probable token
    renorm_both     every divergence but argmax_ce; only the ratios among the K ids matter
    truncate        every separable divergence but forward_kl, which follows published top-k
                    distillation: its minimum is at p/M on the ids (biased)
    renorm_teacher  none: the minimum is at p/M on the ids (biased). An error if f(0) is infinite

The public functions accept a biased pair only with allow_biased=True.

M is the teacher's mass on the K ids. A callable is used unchanged.

Inputs are finite: callers floor log-probabilities at `floor_of(dtype)`, so 0 · (−∞) cannot occur.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SEPARABLE = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "tvd",
    "hellinger",
    "skew_forward_kl",
    "skew_reverse_kl",
)
COMBINED = ("nla", "lk_hybrid")
NAMES = (*SEPARABLE, *COMBINED, "argmax_ce")
LEAST_OVERLAP = 1e-37  # of α: its reciprocal is finite in fp32

Elementwise = Callable[[Tensor, Tensor], Tensor]


class Divergence(NamedTuple):
    phi: Elementwise
    psi: Elementwise
    outside: float | None
    constant: float = 0.0  # × (1 − Σp): added if the teacher's masses do not sum to 1
    on_ids: float = 0.0  # × (p − q): added on the K ids
    # φ and ψ, with common terms computed once; None if they have none that take time.
    both: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None


def floor_of(dtype: torch.dtype) -> float:
    """The floor of log-probabilities, log(tiny) ≈ −87.3: p is 0 there and log p is finite."""
    return math.log(torch.finfo(torch.float32 if dtype.itemsize < 4 else dtype).tiny)


def call_divergence(divergence: Elementwise, lp: Tensor, lq: Tensor) -> Tensor:
    """D of a user's divergence; checks its shape and that it depends on the student."""
    D = divergence(lp, lq)
    expected_shape = lp.shape[:-1]
    if not isinstance(D, Tensor) or D.shape != expected_shape:
        got = list(D.shape) if isinstance(D, Tensor) else type(D).__name__
        raise ValueError(
            f"divergence: expected the callable to map two {list(lp.shape)} tensors to "
            f"{list(expected_shape)}, got {got}; sum over the last dimension"
        )
    if lq.requires_grad and torch.is_grad_enabled() and not D.requires_grad:
        raise ValueError(
            "divergence: expected the callable to compute with log_q, its second argument, in "
            "PyTorch, got a result without a gradient"
        )
    return D


def plain_name(name: str, beta: float, skew: float) -> str:
    """The divergence that is computed.

    By convention jsd at β = 0 and 1 is forward and reverse KL; a skewed KL at 0 is the KL.
    """
    if name == "jsd" and beta in (0.0, 1.0):
        return "reverse_kl" if beta else "forward_kl"
    if name in ("skew_forward_kl", "skew_reverse_kl") and skew == 0.0:
        return name.removeprefix("skew_")
    return name


def minimum_of(divergence: str | Elementwise, beta: float, skew: float, tail: str) -> str | None:
    """Return the location of the minimum: "teacher", "renormalized teacher", "argmax", or None.

    A callable counts as "teacher"; its author is responsible for that.
    """
    if callable(divergence):
        return "teacher"
    name = plain_name(divergence, beta, skew)
    if name == "argmax_ce":
        return "argmax" if tail == "bucket" else None
    if name in COMBINED:  # without the rest, any q ≥ p on the ids has the largest overlap
        return "teacher" if tail in ("bucket", "renorm_both") else None
    if tail == "renorm_teacher":
        return None if resolve(name, beta, skew).outside is None else "renormalized teacher"
    return "renormalized teacher" if (name, tail) == ("forward_kl", "truncate") else "teacher"


def cost_of_missing(name: str, beta: float, skew: float) -> float | None:
    """Return the cost per teacher mass on tokens that the student lacks; None if infinite."""
    name = plain_name(name, beta, skew)
    if name == "jsd":
        return -beta * math.log(beta)
    if name == "skew_forward_kl":
        return -math.log(skew)
    costs = {"tvd": 0.5, "hellinger": 0.5, "forward_kl": None, "lk_hybrid": None, "argmax_ce": None}
    return costs.get(name, 0.0)


def resolve(name: str, beta: float, skew: float, w: Tensor | None = None) -> Divergence:
    """Return the divergence or term called `name`; `w` is λ of "lk_mix", for each token."""
    name = plain_name(name, beta, skew)
    if name == "forward_kl":
        return Divergence(lambda lp, lq: lp.exp() * (lp - lq), lambda lp, lq: -lp.exp(), 0.0)
    if name == "reverse_kl":
        return Divergence(
            lambda lp, lq: lq.exp() * (lq - lp),
            lambda lp, lq: lq.exp() * (lq - lp + 1),
            None,
            on_ids=1.0,
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
    if name == "overlap":
        return Divergence(lambda lp, lq: -torch.minimum(lp, lq).exp(), _overlap_psi, 0.0)
    if name == "lk_mix":
        assert w is not None
        return _lk_mix(w)
    raise ValueError(f"divergence: expected one of {NAMES} or a callable, got {name!r}")


class Combined(NamedTuple):
    """A loss of `combine`: D, and the separable term whose gradient is on_psi · (ψ − q Σψ).

    total is Σψ. w is λ of "lk_mix". psi_size is a bound of |ψ| per token, None for 1.
    """

    D: Tensor
    total: Tensor
    term: str
    on_psi: Tensor | None = None
    w: Tensor | None = None
    psi_size: Tensor | None = None


def combine(
    name: str, eta: float, sums: Callable[[str, Tensor | None], tuple[Tensor, Tensor]]
) -> Combined:
    """Compute `nla` or `lk_hybrid` of each token from sums over the outcomes.

    Args:
        sums: (term, w) -> (Σφ, Σψ) of a separable term. The last call is for the result's term.
    """
    tv, _ = sums("tvd", None)
    if name == "lk_hybrid":
        w = (-eta * (1 - tv)).exp().detach()
        D, total = sums("lk_mix", w)
        return Combined(D, total, "lk_mix", w=w)
    minus, total = sums("overlap", None)
    alpha = (-minus).clamp(min=LEAST_OVERLAP)
    # Each form is exact where the other one cancels. Autograd takes the first, which has no ½q.
    D = -alpha.log()
    exact = torch.where(alpha < 0.5, D, -torch.log1p(-tv.clamp(max=0.75)))
    return Combined(D + (exact - D).detach(), total, "overlap", on_psi=1 / alpha, psi_size=alpha)


def _overlap_psi(lp: Tensor, lq: Tensor) -> Tensor:
    return (0.5 * torch.sign(lq - lp)).sub_(0.5).mul_(lq.exp())


def _lk_mix(w: Tensor) -> Divergence:
    def phi(lp: Tensor, lq: Tensor) -> Tensor:
        p = lp.exp()
        return w * p * (lp - lq) + (1 - w) * (0.5 * (p - lq.exp()).abs())

    def psi(lp: Tensor, lq: Tensor) -> Tensor:
        return (1 - w) * _overlap_psi(lp, lq) - w * lp.exp()

    def both(lp: Tensor, lq: Tensor) -> tuple[Tensor, Tensor]:
        p, q, gap = lp.exp(), lq.exp(), lp - lq
        tv = (p - q).abs_().mul_(0.5 * (1 - w))
        overlap = torch.sign(gap).mul_(-0.5).sub_(0.5).mul_(q).mul_(1 - w)
        p *= w
        return gap.mul_(p).add_(tv), overlap.sub_(p)

    return Divergence(phi, psi, 0.0, both=both)


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

    def both(lp: Tensor, lq: Tensor) -> tuple[Tensor, Tensor]:
        lm = _log_mix(lp, lq, beta)
        of_q = lq.exp().mul_(lq - lm).mul_(1 - beta)
        return lp.exp().mul_(lp - lm).mul_(beta).add_(of_q), of_q

    return Divergence(phi, psi, -(1 - beta) * math.log1p(-beta), both=both)


def _skew_forward(skew: float) -> Divergence:
    def phi(lp: Tensor, lq: Tensor) -> Tensor:
        return lp.exp() * (lp - _log_mix(lp, lq, skew))

    def psi(lp: Tensor, lq: Tensor) -> Tensor:
        return -(1 - skew) * (lp + lq - _log_mix(lp, lq, skew)).exp()

    return Divergence(phi, psi, 0.0, on_ids=skew - 1)


def _skew_reverse(skew: float) -> Divergence:
    def phi(lp: Tensor, lq: Tensor) -> Tensor:
        return lq.exp() * (lq - _log_mix(lp, lq, 1 - skew))

    def psi(lp: Tensor, lq: Tensor) -> Tensor:
        lm = _log_mix(lp, lq, 1 - skew)
        return lq.exp() * (lq - lm + 1 - skew * (lq - lm).exp())

    return Divergence(phi, psi, -math.log(skew), on_ids=1 - skew)
