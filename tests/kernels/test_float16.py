"""float16 and bfloat16 gradients are finite where the truth is: tokens that share an error, massive
channels, every upstream factor. Truth is fp64 on the same operands."""

from typing import Any
from unittest import mock

import pytest
import torch

import fastdistill as fd
from fastdistill.kernels import gpu_rows
from fastdistill.kernels.backends import get_backend
from fastdistill.runtime import backend
from helpers.tolerances import relative

BUDGET = {torch.float16: 1.5e-3, torch.bfloat16: 1e-2}
UPSTREAM = [1.0, 2.0**-10, 65536.0]


def shared_error(N, V=64, H=32):
    """Every token has the same teacher, which is sure of one token."""
    x, w = torch.randn(N, H) + 1, torch.randn(V, H) / 6
    ids = torch.tensor([5, 6, 7, 8]).expand(N, 4).contiguous()
    lp = torch.tensor([0.97, 0.01, 0.005, 0.005]).log().expand(N, 4).contiguous()
    return x, w, fd.TopK(ids, lp)


def massive_hidden_channel(V=96, H=32):
    x, w = torch.randn(8, H), torch.randn(V, H) * 0.05
    x[:, 0] = 600
    w[:, 0] *= 0.2
    teacher = fd.linear_topk(torch.randn(8, H) * 20, torch.randn(V, H) * 0.05, k=3)
    return x, w, teacher


def massive_weight_channel(V=96, H=32):
    """dX is the product with a channel of W near 1000, which all tokens share."""
    x, w = torch.randn(16, H), torch.randn(V, H) * 0.05
    x[:, 1], w[:, 1] = 1e-3, 1000.0
    w[5, 1] = 200.0
    ids = torch.tensor([5, 6, 7]).expand(16, 3).contiguous()
    lp = torch.tensor([0.9, 0.05, 0.01]).log().expand(16, 3).contiguous()
    return x, w, fd.TopK(ids, lp)


def gradients(loss_of, x, w, bias, dtype, upstream):
    leaves = [t.to(dtype).detach().clone().requires_grad_() for t in (x, w, bias)]
    (loss_of(*leaves) * upstream).backward()
    return [t.grad for t in leaves]


def check(loss_of, x, w, dtype, upstream=1.0):
    """Compare with PyTorch in fp64, where the truth is within the range of dtype."""
    x, w, bias = (t.to(dtype) for t in (x, w, torch.randn(len(w)) / 8))
    actual = gradients(loss_of, x, w, bias, dtype, upstream)
    with mock.patch.object(backend, "automatic", return_value="torch"):
        truth = gradients(loss_of, x, w, bias, torch.float64, upstream)
    for name, a, t in zip(("hidden", "weight", "bias"), actual, truth, strict=True):
        fits = t.abs() < torch.finfo(dtype).max / 1.01
        assert a.isfinite()[fits].all(), name
        a, t = (torch.where(fits, g.double(), 0) for g in (a, t))
        steps = 2.0**-24 if dtype == torch.float16 else 0.0  # no entry is closer than that
        allowed = BUDGET[dtype] * t.norm() + steps * t.numel() ** 0.5
        assert (a - t).norm() <= allowed, f"{name}: {relative(a, t)}"


def in_type(teacher, like):
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return teacher._replace(logprobs=teacher.logprobs.to(wide))


CASES = {
    "shared": lambda: shared_error(32),
    "hidden": massive_hidden_channel,
    "weight": massive_weight_channel,
}
ROUTES: dict[str, dict[str, Any]] = {
    "fused": {"backward": "fused"},
    "recompute": {"backward": "recompute"},
    "rows alone": {"tail": "renorm_both"},
    "mixed": {"divergence": "jsd", "temperature": 2.0, "t2_scale": True, "softcap": 30.0},
    "sum": {"reduction": "sum", "divergence": "reverse_kl"},
    "callable": {"divergence": lambda lp, lq: 300 * (lp.exp() * (lp - lq)).sum(-1)},
}


@pytest.mark.fast_cases(8)
@pytest.mark.parametrize("dtype", list(BUDGET), ids=str)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("which", CASES)
def test_sparse(which, route, dtype, impl_of_auto):
    x, w, teacher = CASES[which]()
    options = ROUTES[route]
    teacher = teacher._replace(temperature=options.get("temperature", 1.0))

    def loss_of(x, w, b):
        return fd.topk_distill_loss(x, w, in_type(teacher, x), bias=b, **options)

    check(loss_of, x, w, dtype)


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("upstream", UPSTREAM)
@pytest.mark.parametrize("backward", ["fused", "recompute"])
def test_upstream_factors(backward, upstream):
    """A loss scale, and a loss that is one small part of a sum."""
    x, w, teacher = shared_error(32)
    labels = torch.randint(64, (32,))

    def loss_of(x, w, b):
        return fd.topk_distill_loss(
            x,
            w,
            in_type(teacher, x),
            bias=b,
            labels=labels,
            ce_weight=0.3,
            z_loss=1e-3,
            backward=backward,
        )

    check(loss_of, x, w, torch.float16, upstream)


@pytest.mark.fast_cases(5)
@pytest.mark.parametrize("chunk", [None, 12])
@pytest.mark.parametrize("dtype", list(BUDGET), ids=str)
@pytest.mark.parametrize("backward", ["fused", "recompute"])
@pytest.mark.parametrize("which", CASES)
def test_dense(which, backward, dtype, chunk, monkeypatch):
    from fastdistill.kernels import dense_loss

    if chunk:
        monkeypatch.setattr(dense_loss, "dense_chunk_tokens", lambda *args: chunk)
    x, w, _ = CASES[which]()
    other = torch.randn(len(w), 8)
    other[5] = 2.0

    def loss_of(x, w, b):
        t = torch.ones(len(x), 8, dtype=x.dtype)
        return fd.linear_distill_loss(x, w, t, other.to(x.dtype), bias=b, backward=backward)

    check(loss_of, x, w, dtype)


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("upstream", UPSTREAM)
def test_dense_callable_and_upstream(upstream):
    """psi of a callable has any size."""
    x, w, _ = shared_error(24)
    other = torch.randn(len(w), 8)

    def loss_of(x, w, b):
        t = torch.ones(len(x), 8, dtype=x.dtype)
        return fd.linear_distill_loss(
            x,
            w,
            t,
            other.to(x.dtype),
            bias=b,
            divergence=lambda lp, lq: 2000 * (lp.exp() * (lp - lq)).sum(-1),
        )

    check(loss_of, x, w, torch.float16, upstream / 2000)


@pytest.mark.fast_cases(3)
@pytest.mark.parametrize("weights", ["equal", "one chunk without weight", "falling", "rising"])
def test_chunks_whose_tokens_weigh_differently(weights, monkeypatch):
    """The lift follows the chunk, and dW is one sum over chunks."""
    from fastdistill.kernels import topk_loss

    monkeypatch.setattr(topk_loss, "chunk_tokens", lambda *args: 8)
    x, w, teacher = shared_error(24)
    scale = {
        "equal": torch.ones(24),
        "one chunk without weight": torch.ones(24).index_fill(0, torch.arange(8, 16), 0.0),
        "falling": 10.0 ** -torch.linspace(0, 8, 24),
        "rising": 10.0 ** torch.linspace(-8, 0, 24),
    }[weights]

    def loss_of(x, w, b):
        return fd.topk_distill_loss(
            x, w, in_type(teacher, x), bias=b, token_weight=scale, reduction="sum"
        )

    check(loss_of, x, w, torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(BUDGET), ids=str)
def test_8192_tokens_that_agree(dtype, impl_of_auto):
    """A frequent token's gradient is the sum over all of them."""
    options: dict[str, Any]
    if impl_of_auto == "triton" and not torch.cuda.is_available():
        N, options = 16, {"token_weight": torch.full((16,), 512.0)}  # as many in the sum
    else:
        N, options = 8192, {}
    x, w, teacher = shared_error(N)
    for reduction in ("mean", "sum"):

        def loss_of(x, w, b, reduction=reduction):
            return fd.topk_distill_loss(
                x, w, in_type(teacher, x), bias=b, reduction=reduction, **options
            ) / (4096 if reduction == "sum" else 1)

        check(loss_of, x, w, dtype)


def test_a_gradient_kept_for_a_second_backward():
    x, w, teacher = shared_error(24)
    x, w = x.half().requires_grad_(), w.half().requires_grad_()
    loss = fd.topk_distill_loss(x, w, teacher)
    loss.backward(retain_graph=True)
    first = w.grad.clone()
    loss.backward()
    torch.testing.assert_close(w.grad, 2 * first)


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_in_place_factor(dtype, impl_of_auto, monkeypatch):
    """The product is rounded once, from the type of the factor."""
    monkeypatch.setattr(gpu_rows, "SCALE_PROGRAMS", 1)
    wide = torch.promote_types(dtype, torch.float32)
    for factor in (1.0, 2.0**17, 1 / 3):
        x, f = (torch.randn(5000) * 2.0**-16).to(dtype), torch.tensor(factor, dtype=wide)
        expected = (x.to(wide) * f).to(dtype)
        assert torch.equal(get_backend(impl_of_auto).scale_(x, f), expected)


def test_a_factor_of_one_changes_no_memory(impl_of_auto, monkeypatch):
    x, (one, two) = torch.ones(4), torch.tensor([1.0, 2.0])
    scale_ = get_backend(impl_of_auto).scale_
    if impl_of_auto == "torch" or torch.cuda.is_available():
        assert scale_(x, one)._version == 0 or x.is_cuda
        return
    from fastdistill.kernels import triton_grad

    monkeypatch.setattr(triton_grad, "round_to", None)  # the interpreter meets it at the store
    scale_(x, one)
    with pytest.raises(Exception, match="NoneType"):
        scale_(x, two)


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("route", ["fused", "recompute", "rows alone", "dense"])
def test_float16_autocast(route):
    """The gradients of fp32 parameters come through float16, whose range dW · grad_scale leaves."""
    x, w, teacher = massive_hidden_channel()
    rounded = [t.half().double().requires_grad_() for t in (x, w)]
    leaves = [t.requires_grad_() for t in (x, w)]

    def loss_of(x, w):
        if route != "dense":
            return fd.topk_distill_loss(x, w, in_type(teacher, x), **ROUTES[route])
        t, other = torch.ones(len(x), 8), torch.linspace(-1, 1, 8 * len(w)).reshape(-1, 8)
        return fd.linear_distill_loss(x, w, t.to(x.dtype), other.half().to(x.dtype))

    with torch.autocast(x.device.type, torch.float16):
        loss = loss_of(*leaves)
    loss.backward()
    loss_of(*rounded).backward()
    for a, t in zip(leaves, rounded, strict=True):
        assert relative(a.grad, t.grad) <= BUDGET[torch.float16]


@pytest.mark.fast_cases(1)
def test_float16_autocast_trains(impl_of_auto):
    """Master weights in fp32, autocast, a loss scale: steps are taken and the loss falls."""
    interpreted = impl_of_auto == "triton" and not torch.cuda.is_available()
    x, w, teacher = shared_error(8 if interpreted else 2048)
    layer, head = torch.nn.Linear(32, 32), torch.nn.Parameter(w.clone())
    optimizer = torch.optim.Adam([*layer.parameters(), head], lr=1e-2)
    scaler = torch.amp.GradScaler(x.device.type, init_scale=65536.0)
    losses = []
    for _ in range(8):
        with torch.autocast(x.device.type, torch.float16):
            loss = fd.topk_distill_loss(layer(x), head, teacher)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert scaler.get_scale() >= 2.0**9
    assert losses[-1] < 0.5 * losses[0]
