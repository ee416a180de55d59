"""φ and ψ of every named divergence, and the reference against formulas written out by hand."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastdistill.kernels.divergences import SEPARABLE, cost_of_missing, resolve
from fastdistill.losses import reference


def distributions(seed=0, V=11):
    g = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(4, V, generator=g, dtype=torch.float64).softmax(-1) for _ in range(2))
    return p, q


@pytest.mark.parametrize("skew", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", SEPARABLE)
def test_psi_is_the_derivative_of_phi(name, beta, skew):
    rule = resolve(name, beta, skew)
    p, q = distributions()
    lq = q.log().requires_grad_()
    (psi,) = torch.autograd.grad(rule.phi(p.log(), lq).sum(), lq)
    torch.testing.assert_close(rule.psi(p.log(), lq).detach(), psi)


@pytest.mark.parametrize("name", ["jsd", "lk_mix"])
def test_both_at_once_are_phi_and_psi(name):
    p, q = distributions()
    lp, lq = p.log(), torch.where(torch.arange(11) < 3, p, q).log()  # equal at some outcomes
    rule = resolve(name, 0.3, 0.1, torch.linspace(0, 1, 4)[:, None].double())
    assert rule.both is not None
    torch.testing.assert_close(
        rule.both(lp.clone(), lq.clone()), (rule.phi(lp, lq), rule.psi(lp, lq))
    )


HAND: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": lambda p, q: (p * (p / q).log()).sum(-1),
    "reverse_kl": lambda p, q: (q * (q / p).log()).sum(-1),
    "jsd": lambda p, q: (
        0.3 * HAND["forward_kl"](p, 0.3 * p + 0.7 * q)
        + 0.7 * HAND["forward_kl"](q, 0.3 * p + 0.7 * q)
    ),
    "tvd": lambda p, q: 0.5 * (p - q).abs().sum(-1),
    "hellinger": lambda p, q: 1 - (p * q).sqrt().sum(-1),
    "skew_forward_kl": lambda p, q: HAND["forward_kl"](p, 0.1 * p + 0.9 * q),
    "skew_reverse_kl": lambda p, q: HAND["forward_kl"](q, 0.9 * p + 0.1 * q),
}


@pytest.mark.parametrize("name", SEPARABLE)
def test_reference_and_phi_are_the_textbook_formula(name):
    p, q = distributions()
    truth = HAND[name](p, q)
    torch.testing.assert_close(reference.divergence(name, p, q, 0.3, 0.1), truth)
    torch.testing.assert_close(resolve(name, 0.3, 0.1).phi(p.log(), q.log()).sum(-1), truth)


@pytest.mark.parametrize("name", [n for n in SEPARABLE if n != "reverse_kl"])
def test_price_outside_the_support_is_the_limit(name):
    """Σ_S φ + f(0)·q_out is the textbook divergence against a teacher that is zero elsewhere."""
    p, q = distributions()
    p = torch.cat([p[:, :6], torch.zeros(4, 5)], -1)  # M < 1, not renormalised
    tiny = p.clamp(min=1e-300)
    rule = resolve(name, 0.3, 0.1)
    inside = rule.phi(p[:, :6].log(), q[:, :6].log()).sum(-1)
    value = inside + rule.outside * q[:, 6:].sum(-1) + rule.constant * (1 - p.sum(-1))
    torch.testing.assert_close(value, HAND[name](tiny, q))


def test_price_of_tokens_that_the_student_lacks_is_the_limit():
    lp = torch.tensor([0.3], dtype=torch.float64).log()
    for name in SEPARABLE:
        price, limit = cost_of_missing(name, 0.3, 0.1), resolve(name, 0.3, 0.1).phi(lp, lp - 700)
        assert price is None if limit > 9 else price == pytest.approx(limit.item() / 0.3), name


@pytest.mark.parametrize("name", SEPARABLE)
def test_equal_distributions_cost_nothing(name):
    p, _ = distributions()
    assert resolve(name, 0.3, 0.1).phi(p.log(), p.log()).sum(-1).abs().max() < 1e-15


def test_unknown_name():
    with pytest.raises(ValueError, match=r"divergence: expected one of .* got 'kl'"):
        resolve("kl", 0.5, 0.1)


def test_jsd_half_is_bounded_by_log_2():
    a = torch.tensor([[0.0, -700.0]], dtype=torch.float64)
    total = resolve("jsd", 0.5, 0.1).phi(a, a.flip(-1)).sum()
    assert abs(total.item() - math.log(2)) < 1e-12
