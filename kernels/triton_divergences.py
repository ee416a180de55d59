"""Separable divergences inside a kernel: (log p, log q, w, …) -> (φ, ψ = ∂φ/∂log q).

divergences.py defines them and names their sources. A kernel takes one of these functions as a
constexpr. `w` is β or the skew, a run-time number; `rest` = 1 − w, `log_w` and `log_rest` come with
it from the host, where they are computed in fp64. log-probabilities are finite.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def log_mix(lp, lq, log_on_p, log_on_q):
    """log(on_p · p + on_q · q)."""
    a = lp + log_on_p
    b = lq + log_on_q
    highest = tl.maximum(a, b)
    return highest + tl.log(1.0 + tl.exp(tl.minimum(a, b) - highest))


@triton.jit
def forward_kl(lp, lq, w, rest, log_w, log_rest):
    p = tl.exp(lp)
    return p * (lp - lq), -p


@triton.jit
def reverse_kl(lp, lq, w, rest, log_w, log_rest):
    q = tl.exp(lq)
    phi = q * (lq - lp)
    return phi, phi + q


@triton.jit
def jsd(lp, lq, w, rest, log_w, log_rest):
    lm = log_mix(lp, lq, log_w, log_rest)
    psi = rest * tl.exp(lq) * (lq - lm)
    return w * tl.exp(lp) * (lp - lm) + psi, psi


@triton.jit
def tvd(lp, lq, w, rest, log_w, log_rest):
    p = tl.exp(lp)
    q = tl.exp(lq)
    sign = tl.where(q > p, 1.0, tl.where(q < p, -1.0, 0.0))
    return 0.5 * tl.abs(p - q), 0.5 * q * sign


@triton.jit
def hellinger(lp, lq, w, rest, log_w, log_rest):
    root_q = tl.exp(0.5 * lq)
    diff = root_q - tl.exp(0.5 * lp)
    return 0.5 * diff * diff, 0.5 * root_q * diff


@triton.jit
def skew_forward_kl(lp, lq, w, rest, log_w, log_rest):
    lm = log_mix(lp, lq, log_w, log_rest)
    return tl.exp(lp) * (lp - lm), -rest * tl.exp(lp + lq - lm)


@triton.jit
def skew_reverse_kl(lp, lq, w, rest, log_w, log_rest):
    lm = log_mix(lp, lq, log_rest, log_w)
    q = tl.exp(lq)
    return q * (lq - lm), q * (lq - lm + 1.0 - w * tl.exp(lq - lm))


@triton.jit
def overlap(lp, lq, w, rest, log_w, log_rest):
    q = tl.exp(lq)
    part = tl.where(lq < lp, 1.0, tl.where(lq > lp, 0.0, 0.5))
    smaller = tl.minimum(lp, lq, propagate_nan=tl.PropagateNan.ALL)
    return -tl.exp(smaller), -part * q


@triton.jit
def lk_mix(lp, lq, w, rest, log_w, log_rest):
    p = tl.exp(lp)
    q = tl.exp(lq)
    part = tl.where(lq < lp, 1.0, tl.where(lq > lp, 0.0, 0.5))
    return w * p * (lp - lq) + rest * (0.5 * tl.abs(p - q)), -w * p - rest * part * q
