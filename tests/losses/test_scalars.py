"""Options of the losses that are no numbers, no tensors or no divergences are refused by name."""

import pytest
import torch

import fastdistill as fd
from helpers.present import present

N, H, V, K = 4, 8, 20, 3


def operands(dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    x, w = torch.randn(N, H, dtype=dtype), torch.randn(V, H, dtype=dtype)
    return x.requires_grad_(), w.requires_grad_()


def sparse(x=None, w=None, teacher=None, **options):
    own = operands()
    teacher = teacher or fd.linear_topk(torch.randn(N, H), torch.randn(V, H), k=K)
    return fd.topk_distill_loss(
        own[0] if x is None else x, own[1] if w is None else w, teacher, **options
    )


def dense(x=None, w=None, **options):
    own = operands()
    other = torch.randn(N, 5), torch.randn(V, 5)
    return fd.linear_distill_loss(
        own[0] if x is None else x, own[1] if w is None else w, *other, **options
    )


LABELS = {"labels": torch.arange(N), "ce_weight": 0.5}
SCALARS = [
    *[("beta", v, {"divergence": "jsd"}) for v in ("x", None, True)],
    *[("skew", v, {"divergence": "skew_reverse_kl"}) for v in ("x", None)],
    *[("ce_weight", v, {"labels": torch.arange(N)}) for v in ("x", None, float("nan"))],
    *[("z_loss", v, {}) for v in ("x", float("inf"), float("nan"))],
    *[("logit_scale", v, {}) for v in ("x", None, float("nan"))],
    *[("ignore_index", v, LABELS) for v in ("x", None, 1.5)],
    *[("t2_scale", v, {}) for v in ("yes", None, 2)],
    ("valid_vocab", True, {}),
    *[("num_items", torch.tensor(v), {}) for v in (-3.0, float("nan"), float("inf"), [1, 2])],
]


@pytest.mark.parametrize("loss", [sparse, dense])
@pytest.mark.parametrize(("name", "value", "others"), SCALARS, ids=str)
def test_a_scalar_that_is_none_is_named(name, value, others, loss):
    with pytest.raises((ValueError, TypeError), match=f"^{name}: expected"):
        loss(**(others | {name: value}))


@pytest.mark.parametrize("loss", [sparse, dense])
def test_numbers_of_other_kinds_are_taken(loss):
    import numpy as np

    for value in (0, 1, np.float32(0.5), np.float64(0.5), torch.tensor(0.5)):
        assert loss(divergence="jsd", beta=value).isfinite()
    for count in (torch.tensor(3), torch.tensor([3.0]), torch.tensor(0), 3):
        assert loss(num_items=count).shape == ()


@pytest.mark.parametrize("loss", [sparse, dense])
def test_operands_without_numbers_are_named(loss):
    x, w = (t.detach() for t in operands())
    for tensors, name in (
        ({"x": x.to("meta"), "w": w.to("meta")}, "hidden"),
        ({"w": w.to_sparse()}, "weight"),
        ({"x": x[:, :0], "w": w[:, :0]}, "hidden"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            loss(**tensors)


def test_a_teacher_without_slots_is_named():
    nobody = fd.TopK(torch.zeros(N, 0, dtype=torch.int64), torch.zeros(N, 0))
    for call in (
        lambda: sparse(teacher=nobody),
        lambda: fd.linear_lse_gather(*operands(), nobody.ids),
        lambda: fd.token_scores(*operands(), teacher=nobody),
    ):
        with pytest.raises(ValueError, match=r"ids: expected at least one slot, got \[4, 0\]"):
            call()


WRONG = {
    "one number": (lambda lp, lq: (lq - lp).square().sum(), r"to \[\d+\], got \[\]"),
    "not summed": (lambda lp, lq: (lq - lp).square(), r"got \[\d+, \d+\]; sum over"),
    "nothing": (lambda lp, lq: None, "got NoneType"),
    "a number": (lambda lp, lq: 1.0, "got float"),
    "the teacher alone": (lambda lp, lq: lp.exp().sum(-1), "got a result without a gradient"),
    "a detached student": (lambda lp, lq: lq.detach().exp().sum(-1), "without a gradient"),
}


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("loss", [sparse, dense])
@pytest.mark.parametrize("which", WRONG)
def test_a_callable_that_is_no_divergence_is_refused(which, loss, impl):
    divergence, words = WRONG[which]
    with pytest.raises(ValueError, match=f"divergence: expected .*{words}"):
        loss(divergence=divergence, impl=impl)
    if loss is sparse:
        with pytest.raises(ValueError, match=f"divergence: expected .*{words}"):
            loss(divergence=divergence, impl=impl, backward="recompute")


@pytest.mark.parametrize("loss", [sparse, dense])
@pytest.mark.parametrize("divergence", ["forward_kl", lambda lp, lq: (lq - lp).square().sum(-1)])
def test_second_derivatives_are_refused(loss, divergence):
    """A penalty on the gradient would be lost otherwise."""
    x, w = operands()
    total = loss(x, w, divergence=divergence)
    with pytest.raises(RuntimeError, match="have no second derivative"):
        torch.autograd.grad(total, x, create_graph=True)[0].square().sum().backward()
    total = loss(x, w, divergence=divergence, impl="reference")
    torch.autograd.grad(total, x, create_graph=True)[0].square().sum().backward()
    assert present(x.grad).any()
