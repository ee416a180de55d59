"""Every divergence × tail × dtype × way to the gradient against fp64 dense autograd."""

import pytest
import torch

import fastdistill as fd
from fastdistill.kernels.token_loss import TAILS
from helpers.cases import PAIRS, case, leaves, top_k
from helpers.present import present
from helpers.tolerances import GRADIENT, VALUE, assert_close

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def both(c, teacher, *, dtype, upstream=1.0, bias=True, **options):
    """((loss, dX, dW, db), the fp64 truth) of one call."""
    results = []
    for run_dtype, impl in ((dtype, "auto"), (torch.float64, "reference")):
        x, w, b = leaves(c.hidden, c.weight, c.bias, dtype=run_dtype)
        shared = {"allow_biased": True} | options
        if impl == "reference":
            shared.pop("backward", None)
        loss = fd.topk_distill_loss(x, w, teacher, bias=b if bias else None, impl=impl, **shared)
        (loss.sum() * upstream).backward()
        results.append((loss, x.grad, w.grad, b.grad if bias else None))
    return results


def check(actual, truth, dtype, what=""):
    assert_close(actual[0], truth[0], VALUE[dtype], f"{what} loss")
    for name, a, b in zip(("hidden", "weight", "bias"), actual[1:], truth[1:], strict=True):
        if b is not None:
            # Entries of the bias's gradient cancel over tokens after dz was rounded to 16 bits.
            cancels = name == "bias" and dtype == torch.bfloat16
            budget = 3 * 2**-9 if cancels else GRADIENT[dtype]
            assert_close(a, b, budget, f"{what} {name}.grad")


@pytest.mark.fast_cases(24)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("divergence", "tail"), PAIRS)
@pytest.mark.parametrize("backward", ["fused", "recompute"])
def test_against_dense_fp64(divergence, tail, dtype, backward):
    c = case(dtype)
    actual, truth = both(
        c,
        top_k(c.teacher_logits, 7),
        dtype=dtype,
        divergence=divergence,
        tail=tail,
        beta=0.3,
        backward=backward,
    )
    check(actual, truth, dtype)


@pytest.mark.parametrize("backward", ["fused", "recompute"])
@pytest.mark.parametrize(("divergence", "tail"), [*PAIRS, *(("callable", t) for t in TAILS)])
def test_every_option_at_once(divergence, tail, backward):
    """Temperature, T², CE, z-loss, token weights, softcap, scale, ignored labels, upstream 1.7."""
    c = case(torch.float64)
    if divergence == "callable":
        divergence = chi_square
    weights = torch.rand(12, dtype=torch.float64) + 0.5
    labels = c.labels.clone()
    labels[[0, 5]] = -100
    actual, truth = both(
        c,
        top_k(c.teacher_logits, 7, 1.5),
        dtype=torch.float64,
        divergence=divergence,
        tail=tail,
        temperature=1.5,
        t2_scale=True,
        labels=labels,
        ce_weight=0.3,
        z_loss=1e-3,
        skew=0.2,
        token_weight=weights,
        softcap=20.0,
        logit_scale=0.8,
        beta=0.7,
        backward=backward,
        upstream=1.7,
    )
    check(actual, truth, torch.float64)


def chi_square(log_p, log_q):
    """Σ q (p/q − 1)²: a divergence the library does not name."""
    return ((2 * log_p - log_q).exp() - 2 * log_p.exp() + log_q.exp()).sum(-1)


@pytest.mark.parametrize(("beta", "same"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_jsd_ends_are_the_two_kls(beta, same):
    c = case()
    t = top_k(c.teacher_logits, 7)
    jsd = fd.topk_distill_loss(c.hidden, c.weight, t, divergence="jsd", beta=beta)
    torch.testing.assert_close(jsd, fd.topk_distill_loss(c.hidden, c.weight, t, divergence=same))


def test_callable_equal_to_a_name():
    c = case()
    t = top_k(c.teacher_logits, 7)

    def forward_kl(log_p, log_q):
        assert log_p.shape[-1] == 8  # K + 1 columns under the bucket tail
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    ours, named = leaves(c.hidden, c.hidden)
    fd.topk_distill_loss(ours, c.weight, t, divergence=forward_kl).backward()
    fd.topk_distill_loss(named, c.weight, t).backward()
    assert_close(ours.grad, named.grad, 1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_and_statistics_agree(reduction):
    c = case()
    labels = c.labels.clone()
    labels[3:6] = -100
    t = top_k(c.teacher_logits, 7)
    x, y = leaves(c.hidden, c.hidden)
    options = {"labels": labels, "ce_weight": 0.2, "reduction": reduction, "temperature": 1.0}
    out = fd.topk_distill(x, c.weight, t, **options)
    ref = fd.topk_distill(y, c.weight, t, impl="reference", **options)
    for name, a, b in zip(out._fields, out, ref, strict=True):
        assert_close(a, b, 1e-10, name)
        assert name == "loss" or not present(a).requires_grad
    assert (out.per_token[3:6] == 0).all()
    out.loss.square().sum().backward()
    ref.loss.square().sum().backward()
    assert_close(x.grad, y.grad, 1e-9)
    assert (present(x.grad)[3:6] == 0).all()


def test_num_items_and_leading_dimensions():
    c = case()
    t = top_k(c.teacher_logits, 7)
    total = fd.topk_distill_loss(c.hidden, c.weight, t, reduction="sum")
    for items in (30, torch.tensor(30)):
        mean = fd.topk_distill_loss(c.hidden, c.weight, t, num_items=items)
        torch.testing.assert_close(mean, total / 30)
    shaped = fd.TopK(t.ids.view(3, 4, 7), t.logprobs.view(3, 4, 7), present(t.log_tail).view(3, 4))
    out = fd.topk_distill(c.hidden.view(3, 4, -1), c.weight, shaped)
    assert out.per_token.shape == (3, 4)
    torch.testing.assert_close(out.loss, total / 12)


def test_gradient_reaches_token_weights():
    c = case()
    t = top_k(c.teacher_logits, 7)
    gradients = []
    for impl, backward in (("reference", "auto"), ("auto", "fused"), ("auto", "recompute")):
        (w,) = leaves(torch.rand(12, dtype=torch.float64, generator=torch.manual_seed(1)))
        (x,) = leaves(c.hidden)
        loss = fd.topk_distill_loss(x, c.weight, t, token_weight=w, impl=impl, backward=backward)
        (loss * 3).backward()
        gradients.append(w.grad)
    assert_close(gradients[1], gradients[0], 1e-10)
    assert_close(gradients[2], gradients[0], 1e-10)


def test_modules_are_the_functions():
    c = case()
    t = top_k(c.teacher_logits, 7)
    module = fd.TopKDistillLoss(divergence="jsd", beta=0.2)
    torch.testing.assert_close(
        module(c.hidden, c.weight, t),
        fd.topk_distill_loss(c.hidden, c.weight, t, divergence="jsd", beta=0.2),
    )
    assert "divergence='jsd'" in repr(module)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_recompute_where_hidden_is_wider_than_a_slab(dtype):
    """Slabs then live in the memory that dX is written to at the end."""
    c = case(dtype, H=256, V=200)
    actual, truth = both(c, top_k(c.teacher_logits, 7), dtype=dtype, backward="recompute")
    check(actual, truth, dtype)
