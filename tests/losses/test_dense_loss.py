"""linear_distill_loss and its Liger-shaped face against fp64 dense autograd."""

import pytest
import torch

import fastdistill as fd
from fastdistill.compat import FusedLinearJSD
from fastdistill.kernels.divergences import NAMES
from helpers.cases import case, leaves
from helpers.present import present
from helpers.tolerances import GRADIENT, VALUE, assert_close

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def teacher_of(dtype, N=12, V=67, G=9):
    """Hidden [N, G] and a padded head [V + 5, G]: other width, other padding than the student."""
    g = torch.Generator().manual_seed(7)
    hidden = torch.randn(N, G, generator=g).to(dtype)
    return hidden, torch.randn(V + 5, G, generator=g).to(dtype)


def run(c, teacher, dtype, impl, **options):
    x, w, b = leaves(c.hidden, c.weight, c.bias, dtype=dtype)
    theirs = leaves(*teacher, dtype=dtype)
    loss = fd.linear_distill_loss(x, w, *theirs, bias=b, impl=impl, **options)
    (loss * torch.linspace(1, 2, loss.numel()).view(loss.shape)).sum().backward()
    assert all(t.grad is None for t in theirs)
    return loss, x.grad, w.grad, b.grad


@pytest.mark.fast_cases(12)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", NAMES)
def test_against_dense_fp64(divergence, dtype, reduction):
    c = case(dtype)
    teacher = teacher_of(dtype)
    options = {"divergence": divergence, "beta": 0.3, "reduction": reduction}
    actual = run(c, teacher, dtype, "auto", **options)
    truth = run(c, teacher, torch.float64, "reference", **options)
    for i, (a, b) in enumerate(zip(actual, truth, strict=True)):
        assert_close(a, b, (GRADIENT if i else VALUE)[dtype])


@pytest.mark.fast_cases(8)
@pytest.mark.parametrize(
    ("divergence", "backward"),
    [*[(n, b) for n in NAMES for b in ("fused", "recompute")], ("callable", "fused")],
)
def test_every_option_at_once(divergence, backward):
    if divergence == "callable":
        divergence = lambda lp, lq: (lp.exp() - lq.exp()).square().sum(-1)  # noqa: E731
    c = case()
    labels = c.labels.clone()
    labels[[1, 4]] = -100
    options = {
        "divergence": divergence,
        "labels": labels,
        "temperature": 1.7,
        "t2_scale": True,
        "ce_weight": 0.3,
        "z_loss": 1e-3,
        "softcap": 15.0,
        "logit_scale": 0.6,
        "teacher_softcap": 9.0,
        "teacher_logit_scale": 1.3,
        "token_weight": torch.rand(12).double(),
        "num_items": 9,
    }
    actual = run(c, teacher_of(torch.float64), torch.float64, "auto", backward=backward, **options)
    truth = run(c, teacher_of(torch.float64), torch.float64, "reference", **options)
    for a, b in zip(actual, truth, strict=True):
        assert_close(a, b, 1e-9)


def test_refusals():
    c = case()
    teacher = teacher_of(torch.float64)
    with pytest.raises(ValueError, match=r"teacher_hidden: expected positions \[12\], got \[11\]"):
        fd.linear_distill_loss(c.hidden, c.weight, teacher[0][:11], teacher[1])
    with pytest.raises(ValueError, match="teacher_weight: expected shape"):
        fd.linear_distill_loss(c.hidden, c.weight, teacher[0], c.weight)
    with pytest.raises(ValueError, match="backward: expected 'recompute' or 'auto'"):
        fd.linear_distill_loss(c.hidden, c.weight, *teacher, reduction="none", backward="fused")


def test_all_masked_and_shapes():
    c = case()
    hidden, weight = teacher_of(torch.float64)
    x, w = leaves(c.hidden.view(3, 4, -1), c.weight)
    loss = fd.LinearDistillLoss(divergence="jsd")(x, w, hidden.view(3, 4, -1), weight)
    torch.testing.assert_close(
        loss, fd.linear_distill_loss(c.hidden, c.weight, hidden, weight, divergence="jsd")
    )
    masked = fd.linear_distill_loss(
        x, w, hidden.view(3, 4, -1), weight, labels=torch.full((3, 4), -100)
    )
    masked.backward()
    assert masked == 0
    assert (present(x.grad) == 0).all()


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_fused_linear_jsd_has_ligers_convention(beta):
    c = case()
    hidden, weight = teacher_of(torch.float64, V=62)
    labels = c.labels.clone()
    labels[5:] = -100
    x, w = leaves(c.hidden, c.weight)
    FusedLinearJSD(jsd_beta=beta, temperature=2.0)(x, w, hidden, weight, labels).backward()
    y, v = leaves(c.hidden, c.weight)
    q, p = ((a / 2).log_softmax(-1) for a in (y @ v.t(), hidden @ weight.t()))

    def kl(a, b):
        return (a.exp() * (a - b)).sum(-1)

    m = torch.log(beta * p.exp() + (1 - beta) * q.exp())
    jsd = {0.0: kl(p, q), 1.0: kl(q, p)}.get(beta, beta * kl(p, m) + (1 - beta) * kl(q, m))
    jsd[:5].mean().backward()
    assert_close(x.grad, y.grad, 1e-9)
    assert_close(w.grad, v.grad, 1e-9)
