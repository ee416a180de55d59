"""axolotl's top-k loss, in fp64 from its definition, against the drop-in."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastdistill.compat import TopKLogprobLoss
from helpers.cases import leaves
from helpers.present import present
from helpers.tolerances import GRADIENT, VALUE, assert_close

B, T, H, V, K = 2, 9, 16, 50, 5


def data(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*s, generator=g, dtype=torch.float64).to(dtype)
        for s in ((B, T, H), (V, H), (V,))
    )
    teacher = torch.randn(B, T, V, generator=g) * 2
    best = teacher.log_softmax(-1).topk(K, -1)
    mask = torch.ones(B, T, K, dtype=torch.int)
    mask[0, :3] = 0  # positions that nobody taught
    mask[1, 5, 3:] = 0  # fewer tokens at one
    labels = torch.randint(V, (B, T), generator=g)
    labels[0, :4] = -100
    logprobs = best.values.masked_fill(mask == 0, -1e9).log_softmax(-1)
    return hidden, weight, bias, best.indices, logprobs, mask, labels


def dense(x, w, b, ids, logprobs, mask, labels, *, T_, beta, normalize, hard, soft):
    z = F.linear(x, w, b)
    q_all = (z / T_).log_softmax(-1).gather(-1, ids)
    used = mask.bool()
    q = q_all.masked_fill(~used, -torch.inf).log_softmax(-1) if normalize else q_all
    q, p = q[used], logprobs[used].to(q)
    m = (beta * p.exp() + (1 - beta) * q.exp()).log()
    kd = {
        0.0: lambda: p.exp() * (p - q),
        1.0: lambda: q.exp() * (q - p) + (0.0 if normalize else p.exp() - q.exp()),
    }.get(beta, lambda: beta * p.exp() * (p - m) + (1 - beta) * q.exp() * (q - m))().sum()
    ce = F.cross_entropy(z[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return soft * T_**2 * kd + hard * ce


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_loss_and_gradients(temperature, beta, normalize, dtype):
    hidden, weight, bias, *rest = data(dtype)
    ours, truth = leaves(hidden, weight, bias), leaves(hidden, weight, bias, dtype=torch.float64)
    biased = beta == 0.0 and not normalize
    loss = TopKLogprobLoss(
        0.3, 0.7, temperature, beta, normalize_topk=normalize, allow_biased=biased
    )
    value = loss(ours[1], ours[0], *rest, student_bias=ours[2])
    options = {"T_": temperature, "beta": beta, "normalize": normalize, "hard": 0.3, "soft": 0.7}
    expected = dense(*truth, *rest, **options)
    assert_close(value, expected, VALUE[torch.float32])
    (value / 7).backward()
    (expected / 7).backward()
    for a, b in zip(ours, truth, strict=True):
        assert_close(a.grad, b.grad, GRADIENT[torch.float32])


def test_a_biased_loss_needs_an_explicit_choice():
    with pytest.raises(ValueError, match=r"tail: expected 'bucket' or .*allow_biased=True"):
        TopKLogprobLoss(beta=0.0, normalize_topk=False)


def test_either_part_alone():
    hidden, weight, _, *rest = data(torch.float32)
    operands = hidden.double(), weight.double(), torch.zeros(V).double()
    options = {"T_": 1.0, "beta": 0.0, "normalize": True}
    kd = TopKLogprobLoss(0.5, 1.0, beta=0.0, compute_ce_loss=False)(weight, hidden, *rest)
    assert_close(kd, dense(*operands, *rest, hard=0, soft=1, **options), VALUE[torch.float32])
    ce = TopKLogprobLoss(1.0, 0.0)(weight, hidden, *rest)
    assert_close(ce, dense(*operands, *rest, hard=1, soft=0, **options), VALUE[torch.float32])


def test_a_student_that_is_the_teacher_stays_there():
    """beta=1 without renormalization: no gradient where the student gives the teacher's figures."""
    hidden, weight, bias, ids, _, mask, labels = data(torch.float64)
    logprobs = F.linear(hidden, weight, bias).log_softmax(-1).gather(-1, ids)
    loss = TopKLogprobLoss(0.0, 1.0, beta=1.0, normalize_topk=False, compute_ce_loss=False)
    (hidden,) = leaves(hidden)
    value = loss(weight, hidden, ids, logprobs, mask, labels, student_bias=bias)
    value.backward()
    assert abs(value.item()) < 1e-5
    assert present(hidden.grad).abs().max() < 1e-5
