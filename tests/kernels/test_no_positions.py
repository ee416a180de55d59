"""Nothing to compare is no error: every function gives what it gives elsewhere, of size zero."""

import pytest
import torch

import fastdistill as fd
from fastdistill.kernels.token_loss import TAILS
from helpers.present import present

HIDDEN, WEIGHT = torch.randn(1, 8), torch.randn(20, 8)
TEACHER = fd.TopK(torch.tensor([[3, 4, 5]]), torch.tensor([[-1.0, -2.0, -3.0]]))
LABELS = torch.tensor([7])


def none(value):
    return value[:0] if isinstance(value, torch.Tensor) else value


def same_kind(empty, full):
    """Field by field: both absent, or of the same type and shape but for the positions."""
    for name, a, b in zip(full._fields, empty, full, strict=True):
        assert (a is None) == (b is None), name
        if isinstance(b, torch.Tensor) and b.dim():
            assert (a.dtype, a.shape) == (b.dtype, (0, *b.shape[1:])), name


@pytest.mark.parametrize("labels", [LABELS, None])
@pytest.mark.parametrize("teacher", [TEACHER, None])
def test_scores(labels, teacher):
    nobody = None if teacher is None else fd.TopK(*map(none, teacher[:2]))
    full = fd.token_scores(HIDDEN, WEIGHT, labels=labels, teacher=teacher)
    same_kind(fd.token_scores(HIDDEN[:0], WEIGHT, labels=none(labels), teacher=nobody), full)


def test_topk_and_the_primitive():
    same_kind(fd.linear_topk(HIDDEN[:0], WEIGHT, 3), fd.linear_topk(HIDDEN, WEIGHT, 3))
    ids = TEACHER.ids
    full = fd.linear_lse_gather(HIDDEN, WEIGHT, ids, with_entropy=True)
    same_kind(fd.linear_lse_gather(HIDDEN[:0], WEIGHT, ids[:0], with_entropy=True), full)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("labels", "ce"), [(LABELS, 0.5), (LABELS, 0.0), (None, 0.0)])
def test_losses_have_the_fields_of_others_and_zero_gradients(tail, reduction, labels, ce):
    """What a rank without targets reports must have the fields that the other ranks report."""
    options = {"tail": tail, "allow_biased": True, "reduction": reduction, "ce_weight": ce}
    full = fd.topk_distill(HIDDEN, WEIGHT, TEACHER, labels=labels, **options)
    x, w = HIDDEN[:0].clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    nobody = fd.TopK(*map(none, TEACHER[:2]))
    empty = fd.topk_distill(x, w, nobody, labels=none(labels), **options)
    same_kind(empty, full)
    empty.loss.sum().backward()
    assert empty.loss.sum() == 0
    assert present(x.grad).shape == (0, 8)
    assert (present(w.grad) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 1])
def test_dense_losses(rows, reduction, dtype):
    """No row, or one that is ignored: the type, the shape and the gradients are those of others."""
    x, w, b = (t.to(dtype) for t in (HIDDEN[:rows], WEIGHT, torch.randn(20)))
    labels = torch.full((rows,), -100)
    inputs = [t.clone().requires_grad_() for t in (x, w, b)]
    teacher = torch.randn(1, 4).to(dtype), torch.randn(20, 4).to(dtype)

    def loss_of(x, w, b, teacher_hidden, labels):
        return fd.linear_distill_loss(
            x, w, teacher_hidden, teacher[1], bias=b, labels=labels, reduction=reduction
        )

    loss = loss_of(inputs[0], inputs[1], inputs[2], teacher[0][:rows], labels)
    full = loss_of(HIDDEN.to(dtype), w, b, teacher[0], LABELS)
    assert loss.dtype == full.dtype
    assert loss.shape == ((rows,) if reduction == "none" else ())
    loss.sum().backward()
    assert loss.sum() == 0
    for t in inputs:
        assert (present(t.grad) == 0).all()
