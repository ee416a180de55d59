"""Losses of draft models against fp64 formulas: values and both gradients, on both backends."""

import math
from typing import Any

import pytest
import torch

import fastdistill as fd
from fastdistill.losses.draft import dpace_weights
from helpers.cases import case, leaves, top_k
from helpers.present import present
from helpers.tolerances import GRADIENT, PROMISED, VALUE, assert_close, relative

IMPLS = ("torch", "triton")
V, PADDING = 301, 5  # no multiple of a tile


def formula(name, p, q, eta=3.0):
    """[n]; p and q may leave out the same outcomes, on which one of them is 0."""
    overlap = torch.minimum(p, q).sum(-1)
    share = (-eta * overlap.detach()).exp()
    return {
        "tvd": lambda: 1 - overlap,
        "nla": lambda: -overlap.log(),
        "lk_hybrid": lambda: (
            share * (p * (p.log() - q.log())).sum(-1) + (1 - share) * (1 - overlap)
        ),
        "argmax_ce": lambda: -q.gather(-1, p.argmax(-1, keepdim=True))[:, 0].log(),
    }[name]()


def scene(dtype, kind):
    """(case, teacher's padded head [V + 5, H]) of a kind of draft."""
    c = case(dtype, V=V, std=40.0 if kind == "confident" else 4.0)
    g = torch.Generator().manual_seed(3)
    noise = torch.randn(V, 16, generator=g, dtype=torch.float64)
    size = 0.05 if kind == "near" else 1.0
    weight = c.weight.double() + size * noise
    return c, torch.cat([weight, 9 * noise[:PADDING]]).to(dtype)


CASES = [
    ("nla", "near", torch.float32),
    ("nla", "confident", torch.float64),
    ("nla", "far", torch.bfloat16),
    ("lk_hybrid", "near", torch.bfloat16),
    ("lk_hybrid", "confident", torch.float32),
    ("lk_hybrid", "far", torch.float16),
    ("nla", "confident", torch.float16),
    ("argmax_ce", "confident", torch.float32),
    ("argmax_ce", "near", torch.bfloat16),
]


@pytest.mark.parametrize(("name", "kind", "dtype"), CASES, ids=str)
def test_over_the_whole_vocabulary(name, kind, dtype):
    c, teacher = scene(dtype, kind)
    labels = c.labels.clone()
    labels[[2, 7]] = -100
    x, w = leaves(c.hidden, c.weight)
    options: dict[str, Any] = {"divergence": name, "eta": 2.0, "labels": labels}
    loss = fd.linear_distill_loss(x, w, c.hidden, teacher, temperature=1.3, **options)
    (7 * loss).backward()
    y, v = leaves(c.hidden, c.weight, dtype=torch.float64)
    p = (c.hidden.double() @ teacher[:V].double().t() / 1.3).softmax(-1)
    D = formula(name, p, (y @ v.t() / 1.3).softmax(-1), eta=2.0)[labels >= 0].mean()
    (7 * D).backward()
    assert_close(loss, D, 10 * VALUE[dtype])
    assert_close(x.grad, y.grad, max(GRADIENT[dtype], 5e-5))
    assert_close(w.grad, v.grad, max(GRADIENT[dtype], 5e-5))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("name", "tail", "backward"),
    [
        ("nla", "bucket", "fused"),
        ("nla", "renorm_both", "fused"),
        ("lk_hybrid", "bucket", "fused"),
        ("lk_hybrid", "bucket", "recompute"),
        ("lk_hybrid", "renorm_both", "recompute"),
        ("argmax_ce", "bucket", "fused"),
    ],
)
def test_over_the_k_tokens_of_a_teacher(name, tail, backward, impl):
    c = case(torch.float64, near=1.0)
    teacher = top_k(c.teacher_logits, 6)
    x, w = leaves(c.hidden, c.weight)
    options = {"divergence": name, "tail": tail, "backward": backward, "impl": impl}
    loss = fd.topk_distill_loss(x, w, teacher, **options)
    (3 * loss).backward()
    y, v = leaves(c.hidden, c.weight)
    rest = present(teacher.log_tail).exp().unsqueeze(-1)
    p, q = teacher.logprobs.exp(), (y @ v.t()).softmax(-1).gather(-1, teacher.ids)
    if tail == "bucket":
        p, q = torch.cat([p, rest], -1), torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1)
    else:
        p, q = (t / t.sum(-1, keepdim=True) for t in (p, q))
    if name == "argmax_ce":
        p = p * torch.tensor([1.0] * 6 + [0.0])  # the rest is no token
    D = formula(name, p, q).mean()
    (3 * D).backward()
    for a, b in ((loss, D), (x.grad, y.grad), (w.grad, v.grad)):
        assert_close(a, b, 1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["nla", "lk_hybrid"])
@pytest.mark.parametrize("near", [0.05, 4.0])
def test_answers_that_repeat_ids_and_leave_slots_empty(name, dtype, near):
    """The row kernel, behind a factor of 100 and weights; ids repeat and slots are empty."""
    c = case(dtype, H=64, V=301, near=near)
    answers = top_k(c.teacher_logits, 6)
    ids, lp = answers.ids.repeat(1, 2), (answers.logprobs - math.log(2)).repeat(1, 2)
    ids[:, 6], lp[:, 6] = -1, -torch.inf  # half of the first token is in the tail
    half = answers.logprobs[:, 0] - math.log(2)
    teacher = fd.TopK(ids, lp, torch.logaddexp(present(answers.log_tail), half))
    weight = torch.linspace(0, 2, 12)
    options: dict[str, Any] = {"divergence": name, "token_weight": weight, "eta": 2.0}
    x, w = leaves(c.hidden, c.weight)
    loss = fd.topk_distill_loss(x, w, teacher, impl="triton", **options)
    (100 * loss).backward()
    y, v = leaves(c.hidden, c.weight, dtype=torch.float64)
    expected = fd.topk_distill_loss(y, v, teacher, impl="reference", **options)
    (100 * expected).backward()
    assert_close(loss, expected, 10 * VALUE[dtype])
    for a, b in ((x.grad, y.grad), (w.grad, v.grad)):
        assert_close(a, b, max(GRADIENT[dtype], 5e-5))


@pytest.mark.parametrize("impl", IMPLS)
def test_of_disjoint_answers_the_gradient_is_finite(impl):
    x, w = leaves(torch.eye(4) * 300, torch.eye(4))
    teacher = fd.TopK(
        torch.arange(4).roll(1)[:, None], torch.zeros(4, 1), torch.full((4,), -torch.inf)
    )
    for name in ("nla", "lk_hybrid"):
        loss = fd.topk_distill_loss(x, w, teacher, divergence=name, impl=impl)
        (1000 * loss).backward()
        assert loss > 1
        assert present(x.grad).isfinite().all()
        assert present(w.grad).isfinite().all()


def test_of_disjoint_models_the_gradient_is_finite():
    """α is 1e-37 or less: its logarithm and both gradients have numbers."""
    x, w = leaves(torch.eye(4) * 300, torch.eye(4))
    for name in ("nla", "lk_hybrid"):
        loss = fd.linear_distill_loss(
            x, w, torch.eye(4).roll(1, 0) * 300, torch.eye(4), divergence=name
        )
        loss.backward()
        assert loss > 1
        assert present(x.grad).isfinite().all()
        assert present(w.grad).isfinite().all()


def test_no_position_counts():
    c, teacher = scene(torch.float32, "far")
    for name in ("nla", "lk_hybrid", "argmax_ce"):
        x, w = leaves(c.hidden, c.weight)
        labels = torch.full((12,), -100)
        loss = fd.linear_distill_loss(x, w, c.hidden, teacher, divergence=name, labels=labels)
        loss.backward()
        assert loss == 0
        assert (present(x.grad) == 0).all()


def test_a_callable_has_one_loss_per_token():
    c, teacher = scene(torch.float64, "far")
    up = torch.linspace(-1, 2, 12).double()

    def nla(log_p, log_q):
        return -torch.minimum(log_p, log_q).exp().sum(-1).log()

    results = []
    for divergence in (nla, "nla"):
        x, w, b = leaves(c.hidden, c.weight, c.bias)
        options: dict[str, Any] = {"divergence": divergence, "bias": b, "reduction": "none"}
        rows = fd.linear_distill_loss(x, w, c.hidden, teacher, **options)
        (rows * up).sum().backward()
        results.append((rows, x.grad, w.grad, b.grad))
    for a, b in zip(*results, strict=True):
        assert_close(a, b, 1e-9)


def test_a_reduced_vocabulary_renormalizes_or_counts():
    c, teacher = scene(torch.float64, "far")
    t2d = torch.arange(V) % 3 != 1
    small = int(t2d.sum())
    z = c.hidden @ teacher.t()
    for name, outside in (("nla", "count"), ("lk_hybrid", "renormalize")):
        x, w = leaves(c.hidden, c.weight[:small])
        options: dict[str, Any] = {"divergence": name, "t2d": t2d, "outside": outside}
        loss = fd.linear_distill_loss(x, w, c.hidden, teacher, **options)
        loss.backward()
        y, v = leaves(c.hidden, c.weight[:small])
        q = (y @ v.t()).softmax(-1)
        p = z[:, :V].softmax(-1)[:, t2d]
        if outside == "renormalize":
            p = p / p.sum(-1, keepdim=True)
        D = formula(name, p, q).mean()
        D.backward()
        by_definition = fd.linear_distill_loss(
            y.detach(), v.detach(), c.hidden, teacher, impl="reference", **options
        )
        for a, b in ((loss, D), (by_definition, D), (x.grad, y.grad), (w.grad, v.grad)):
            assert_close(a, b, 1e-9, name)


def test_refusals_of_a_reduced_vocabulary():
    c, teacher = scene(torch.float64, "far")
    t2d = torch.arange(V) < 100

    def call(rows=100, **options):
        fd.linear_distill_loss(c.hidden, c.weight[:rows], c.hidden, teacher, **options)

    with pytest.raises(ValueError, match=r"t2d: expected 99 True entries, the rows of weight, got"):
        call(rows=99, t2d=t2d)
    with pytest.raises(ValueError, match=r"outside: expected 'renormalize' with divergence='for"):
        call(t2d=t2d, outside="count")
    with pytest.raises(ValueError, match=r"outside: expected 'renormalize' without t2d"):
        call(outside="count")
    with pytest.raises(ValueError, match=r"tail: expected 'bucket' with divergence='argmax_ce'"):
        fd.topk_distill_loss(
            c.hidden, c.weight, top_k(c.teacher_logits, 3), divergence="argmax_ce", tail="truncate"
        )


def test_weights_of_dpace():
    nll = torch.rand(2, 12, dtype=torch.float64)
    mask = torch.rand(2, 12) < 0.7
    weights = dpace_weights(nll, 4, alpha=0.3, mask=mask)
    for row in range(2):
        for start in (0, 4, 8):
            block = range(start, start + 4)
            c = {i: 0.7 * math.exp(-nll[row, i]) + 0.3 if mask[row, i] else 1.0 for i in block}
            for j in block:
                parts = (
                    math.prod(c[i] for i in range(start, m + 1))
                    for m in range(j, start + 4)
                    if mask[row, m]
                )
                expected = sum(parts) if mask[row, j] else 0.0
                assert weights[row, j].item() == pytest.approx(expected)
    with pytest.raises(ValueError, match="nll: expected a last dimension that is a multiple of bl"):
        dpace_weights(nll, 5)


@pytest.mark.slow
def test_the_error_is_that_of_the_table():
    """A draft close to its verifier, in bfloat16, at a width where roundings average."""
    c = case(torch.bfloat16, N=32, H=64, V=1000)
    g = torch.Generator().manual_seed(3)
    teacher = (c.weight.double() + 0.01 * torch.randn(1000, 64, generator=g).double()).bfloat16()
    for name in ("nla", "lk_hybrid"):
        x, w = leaves(c.hidden, c.weight)
        fd.linear_distill_loss(x, w, c.hidden, teacher, divergence=name).backward()
        y, v = leaves(c.hidden, c.weight, dtype=torch.float64)
        p = (c.hidden.double() @ teacher.double().t()).softmax(-1)
        formula(name, p, (y @ v.t()).softmax(-1)).mean().backward()
        for a, b in ((x.grad, y.grad), (w.grad, v.grad)):
            assert relative(present(a), present(b)) <= PROMISED[torch.bfloat16], name


def test_acceptance_length_of_equal_steps():
    """(1 − α^{T + 1}) / (1 − α), equation 1 of Leviathan et al."""
    rate = torch.full((3, 4), 0.7, dtype=torch.float64)
    expected = (1 - 0.7**5) / (1 - 0.7)
    torch.testing.assert_close(fd.acceptance_length(rate), torch.full((3,), expected).double())
    assert fd.acceptance_length(torch.ones(4)) == 5
    assert fd.acceptance_length(torch.zeros(4)) == 1


def test_acceptance_length_over_all_texts_of_the_verifier():
    """Its mean over x ~ p is 1 + Σ_i Σ_x Π_{j ≤ i} min(p, q), the chains that are accepted."""
    g = torch.Generator().manual_seed(0)
    p1, q1 = torch.randn(2, 3, generator=g, dtype=torch.float64).mul(2).softmax(-1)
    p2, q2 = torch.randn(2, 3, 3, generator=g, dtype=torch.float64).mul(2).softmax(-1)
    both = torch.minimum(p1, q1)
    expected = 1 + both.sum() + (both[:, None] * torch.minimum(p2, q2)).sum()
    first = torch.minimum(p1, q1).sum().expand(3)
    rates = torch.stack([first, torch.minimum(p2, q2).sum(-1)], -1)  # for each first token x
    ratios = torch.stack([(q1 / p1).clamp(max=1), torch.zeros(3)], -1)
    mean = (p1 * fd.acceptance_length(rates, ratios)).sum()
    torch.testing.assert_close(mean, expected)


def test_refused_rates():
    rate = torch.full((2, 4), 0.5)
    with pytest.raises(ValueError, match=r"ratio: expected shape \[2, 4\] as acceptance_rate"):
        fd.acceptance_length(rate, rate[0])
    with pytest.raises(ValueError, match=r"acceptance_rate: .* in \[0, 1\], got 0.5 to 1.5"):
        fd.acceptance_length(torch.tensor([0.5, 1.5]))
    with pytest.raises(ValueError, match=r"acceptance_rate: expected shape \[\.\.\., T\]"):
        fd.acceptance_length(rate[:, :0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_argmax_among_tokens_of_next_to_no_probability(dtype):
    """Below e^-87, which is the least probability of a loss, they still have an order."""
    hidden, weight = torch.randn(1, 8, dtype=dtype), torch.randn(20, 8, dtype=dtype)
    teacher = fd.TopK(torch.tensor([[3, 7, 5]]), torch.tensor([[-1e4, -90.0, -120.0]]))
    loss = fd.topk_distill_loss(hidden, weight, teacher, divergence="argmax_ce")
    torch.testing.assert_close(loss, -(hidden @ weight.t()).log_softmax(-1)[0, 7])
