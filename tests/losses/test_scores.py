"""token_scores against the dense definitions, and what the scores mean at the edges."""

import pytest
import torch

import fastdistill as fd
from helpers.cases import case, leaves, top_k
from helpers.present import present
from helpers.tolerances import VALUE, assert_close

ARGUMENTS = [(), ("labels",), ("teacher",), ("labels", "teacher")]


@pytest.mark.fast_cases(12)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("names", ARGUMENTS, ids=str)
@pytest.mark.parametrize("dtype", list(VALUE), ids=str)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_against_dense_fp64(impl, dtype, names, temperature):
    c = case(dtype, V=300)
    labels = c.labels.clone()
    labels[3] = -100
    t = top_k(c.teacher_logits, 6, temperature)
    t.ids[2, 4] = -1
    everything = {"labels": labels, "teacher": t}
    options = {k: everything[k] for k in names} | {"temperature": temperature, "softcap": 30.0}
    actual = fd.token_scores(c.hidden, c.weight, bias=c.bias, impl=impl, **options)
    truth = fd.token_scores(
        c.hidden.double(), c.weight.double(), bias=c.bias.double(), impl="reference", **options
    )
    for name, a, b in zip(actual._fields, actual, truth, strict=True):
        assert (a is None) == (b is None), name
        if a is None or b is None:
            continue
        if b.is_floating_point():
            assert_close(a, b, 10 * VALUE[dtype], name)
            assert not a.requires_grad
        else:
            assert (a == b).all(), name


def test_shapes_and_no_gradient():
    c = case()
    (x,) = leaves(c.hidden)
    actual = fd.token_scores(x.view(3, 4, -1), c.weight, labels=c.labels.view(3, 4))
    assert all(t.shape == (3, 4) for t in actual if t is not None)
    assert not any(t.requires_grad for t in actual if t is not None)


@pytest.mark.slow
def test_the_top_label_has_rank_0_and_margin_is_its_lead():
    c = case(torch.float32, V=500)
    z = c.hidden @ c.weight.t()
    order = z.argsort(-1, descending=True)
    for rank in (0, 1, 17, 499):
        result = fd.token_scores(c.hidden, c.weight, labels=order[:, rank])
        assert (present(result.label_rank) == rank).all()
    assert (result.argmax == order[:, 0]).all()
    top = z.log_softmax(-1).topk(2, -1).values
    torch.testing.assert_close(result.margin, top[:, 0] - top[:, 1], atol=1e-4, rtol=1e-4)


def test_equal_distributions_score_zero():
    c = case(torch.float32)
    t = fd.linear_topk(c.hidden, c.weight, 5)
    result = fd.token_scores(c.hidden, c.weight, teacher=t)
    assert present(result.forward_kl).abs().max() < 1e-6
    assert present(result.hellinger).max() < 1e-3
    torch.testing.assert_close(result.teacher_mass, result.student_mass)


def test_of_equal_logits_the_smallest_id_is_the_argmax():
    w = torch.ones(300, 4)
    w[[130, 133, 290]] = 2
    result = fd.token_scores(torch.ones(1, 4), w)
    assert (result.argmax.item(), result.margin.item()) == (130, 0)


def test_uniform_row_has_no_varentropy():
    x, w = torch.zeros(1, 4), torch.randn(1000, 4)
    result = fd.token_scores(x, w)
    assert abs(result.entropy.item() - torch.tensor(1000.0).log().item()) < 1e-5
    assert result.varentropy.item() < 1e-6
    assert result.margin.item() == 0
