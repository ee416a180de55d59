"""Separable divergences inside a kernel: (log p, log q, w) -> (φ, ψ = ∂φ/∂log q).

divergences.py defines them and names their sources. A kernel takes one of these functions as a
constexpr. `w` is β or the skew, a run-time number. log-probabilities are finite.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def log_mix(lp, lq, on_p):
    """log(on_p · p + (1 − on_p) · q) for 0 < on_p < 1."""
    a = lp + tl.log(on_p)
    b = lq + tl.log(1.0 - on_p)
    highest = tl.maximum(a, b)
    return highest + tl.log(1.0 + tl.exp(tl.minimum(a, b) - highest))


@triton.jit
def forward_kl(lp, lq, w):
    p = tl.exp(lp)
    return p * (lp - lq), -p


@triton.jit
def reverse_kl(lp, lq, w):
    q = tl.exp(lq)
    phi = q * (lq - lp)
    return phi, phi + q


@triton.jit
def jsd(lp, lq, w):
    lm = log_mix(lp, lq, w)
    psi = (1.0 - w) * tl.exp(lq) * (lq - lm)
    return w * tl.exp(lp) * (lp - lm) + psi, psi


@triton.jit
def tvd(lp, lq, w):
    p = tl.exp(lp)
    q = tl.exp(lq)
    sign = tl.where(q > p, 1.0, tl.where(q < p, -1.0, 0.0))
    return 0.5 * tl.abs(p - q), 0.5 * q * sign


@triton.jit
def hellinger(lp, lq, w):
    root_q = tl.exp(0.5 * lq)
    diff = root_q - tl.exp(0.5 * lp)
    return 0.5 * diff * diff, 0.5 * root_q * diff


@triton.jit
def skew_forward_kl(lp, lq, w):
    lm = log_mix(lp, lq, w)
    return tl.exp(lp) * (lp - lm), -(1.0 - w) * tl.exp(lp + lq - lm)


@triton.jit
def skew_reverse_kl(lp, lq, w):
    lm = log_mix(lp, lq, 1.0 - w)
    q = tl.exp(lq)
    return q * (lq - lm), q * (lq - lm + 1.0 - w * tl.exp(lq - lm))
