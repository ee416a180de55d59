"""The losses of speculators, from heads and from logits, against fp64 formulas and speculators."""

import math
from functools import partial
from typing import Any

import pytest
import torch

from fastdistill.compat import speculators as losses
from helpers.cases import leaves
from helpers.present import present
from helpers.tolerances import assert_close

T, H, V = 8, 6, 40
NAMES = ("kl_div", "rkl", "jsd", "ce", "tv", "nla", "lk_hybrid")


def scene():
    """The draft's hidden states and head, and the verifier's."""
    hidden, verifier = torch.randn(2, 1, T, H, dtype=torch.float64)
    weight, verifier_weight = torch.randn(2, V, H, dtype=torch.float64)
    return hidden, weight, verifier, verifier_weight


def formula(name, p, q):
    kl = lambda a, b: (a * (a / b).log()).sum(-1)  # noqa: E731
    alpha = torch.minimum(p, q).sum(-1)
    share = (-3 * alpha.detach()).exp()
    return {
        "kl_div": lambda: kl(p, q),
        "rkl": lambda: kl(q, p),
        "jsd": lambda: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2,
        "ce": lambda: -q.gather(-1, p.argmax(-1, keepdim=True))[..., 0].log(),
        "tv": lambda: 1 - alpha,
        "nla": lambda: -alpha.log(),
        "lk_hybrid": lambda: share * kl(p, q) + (1 - share) * (1 - alpha),
    }[name]()


@pytest.mark.parametrize("name", NAMES)
def test_each_loss_over_heads_and_over_logits(name):
    hidden, weight, verifier, verifier_weight = scene()
    ((loss_fn, factor),) = losses.resolve_loss_config(name).values()
    x, w, y, v, z = leaves(hidden, weight, hidden, weight, hidden @ weight.t())
    targets = losses.HeadLogits(verifier, verifier_weight)
    p = (verifier @ verifier_weight.t()).softmax(-1)
    truth = formula(name, p, (y @ v.t()).softmax(-1))
    by_head = loss_fn(losses.HeadLogits(x, w), targets)
    by_logits = loss_fn(z, p.log())
    assert factor == 1
    for rows in (truth, by_head, by_logits):
        assert rows.shape == (1, T)
        (rows * torch.arange(T)).sum().backward()
    for a, b in ((by_head, truth), (by_logits, truth), (x.grad, y.grad), (w.grad, v.grad)):
        assert_close(a, b, 1e-9)
    assert_close(present(z.grad).flatten(0, 1).t() @ hidden[0], v.grad, 1e-9)


def test_masks_decays_and_sums():
    hidden, weight, verifier, verifier_weight = scene()
    draft, targets = losses.HeadLogits(hidden, weight), losses.HeadLogits(verifier, verifier_weight)
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1]])
    steps = torch.arange(T)[None] % 4
    rows = {
        name: losses.resolve_loss_config(name)[name][0](draft, targets) for name in ("ce", "tv")
    }
    config = losses.resolve_loss_config('{"ce": 0.25, "tv": 2}', "eager")
    decay: Any = partial(losses.exp_loss_decay, gamma=0.5)
    total, values = losses.compound_loss(draft, targets, mask, steps, config, decay)
    for name in ("ce", "tv"):
        expected = (rows[name] * mask * 0.5**steps).sum() / (5 + 1e-5)
        assert_close(values[f"{name}_loss"], expected, 1e-12)
    assert_close(total, 0.25 * values["ce_loss"] + 2 * values["tv_loss"], 1e-12)
    decay = partial(losses.dpace_loss_decay, loss_mask=mask, block_size=4, dpace_alpha=0.5)
    by_dpace = losses.loss_function(draft, targets, mask, steps, losses.ce_loss, decay)
    q = [0.5 * math.exp(-nll) + 0.5 for nll in rows["ce"][0]]
    weights = [0, q[1] + q[1] * q[2], q[1] * q[2], 0, 0]
    weights += [q[5] * (1 + q[6] * (1 + q[7])), q[5] * q[6] * (1 + q[7]), q[5] * q[6] * q[7]]
    expected = (rows["ce"][0] * torch.tensor(weights)).sum() / (5 + 1e-5)
    assert_close(by_dpace, expected, 1e-6)
    flash = losses.dflash_loss_decay(torch.arange(4.0), gamma=2.0)
    assert_close(flash, torch.tensor([0, 1, math.exp(-0.5), math.exp(-1)]), 1e-6)
    assert draft[:, 3:].shape == (1, T - 3, V)


def test_nla_has_the_floor_of_speculators():
    (z,) = leaves(torch.eye(4)[None] * 40)
    rows = losses.neg_log_acceptance_loss(z, torch.eye(4)[None].roll(1, 1) * 40)
    rows.sum().backward()
    assert_close(rows, torch.full((1, 4), -math.log(1e-5)), 1e-6)
    assert (present(z.grad) == 0).all()


@pytest.mark.parametrize("implementation", ["fused", "eager"])
def test_the_verifier_gets_no_gradient(implementation):
    hidden, weight, verifier, verifier_weight = leaves(*scene())
    for name in NAMES:
        ((loss_fn, _),) = losses.resolve_loss_config(name, implementation).values()
        targets = losses.HeadLogits(verifier, verifier_weight)
        loss_fn(losses.HeadLogits(hidden, weight), targets).sum().backward()
    assert verifier.grad is None
    assert verifier_weight.grad is None
    assert present(hidden.grad).norm() > 0


def test_refusals():
    wide = torch.zeros(1, 2, 9000)
    with pytest.raises(ValueError, match=r"logits: expected HeadLogits, or logits of at most 8192"):
        losses.kl_div_loss(wide, wide)
    with pytest.raises(ValueError, match=r"targets: expected shape \[1, 2, 9\] as logits, got"):
        losses.kl_div_loss(wide[..., :9], wide[..., :8])
    with pytest.raises(ValueError, match=r"spec: expected one of 'kl_div', .*, got 'kl'"):
        losses.resolve_loss_config("kl")
    with pytest.raises(ValueError, match=r"implementation: expected one of 'fused', 'eager'"):
        losses.resolve_loss_config("tv", "triton")


@pytest.mark.peers
@pytest.mark.parametrize("name", NAMES)
def test_speculators_own_losses_are_equal(name):
    theirs = pytest.importorskip("speculators.losses")
    ((their_fn, _),) = theirs.resolve_loss_config(name, "eager").values()
    ((loss_fn, _),) = losses.resolve_loss_config(name).values()
    logits, targets = torch.randn(2, 1, T, V) * 3
    z, y = leaves(logits, logits)
    ours, truth = loss_fn(z, targets), their_fn(y, targets)
    for rows in (ours, truth):
        (rows * torch.arange(T)).sum().backward()
    assert_close(ours, truth, 1e-5)
    assert_close(z.grad, y.grad, 1e-5)
