"""Any shape: hypothesis draws N, H, V, K, masks and options; torch equals the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdistill as fd
from fastdistill.kernels.divergences import NAMES, minimum_of
from fastdistill.kernels.token_loss import TAILS
from helpers.cases import case, leaves, top_k


@st.composite
def shapes(draw, most=70):
    V = draw(st.integers(2, 400))
    return {
        "N": draw(st.integers(1, most)),
        "H": draw(st.integers(1, 40)),
        "V": V,
        "K": draw(st.integers(1, min(V, 40))),
        "seed": draw(st.integers(0, 2**20)),
    }


@pytest.mark.slow
@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    shape=shapes(20),  # more rows than one tile of token_loss has for K > 16
    divergence=st.sampled_from(NAMES),
    tail=st.sampled_from(TAILS),
    temperature=st.sampled_from([1.0, 0.7, 3.0]),
    beta=st.floats(0, 1),
    skew=st.floats(0, 0.99),
    ce_weight=st.sampled_from([0.0, 0.4]),
    masked=st.floats(0, 1),
    backward=st.sampled_from(["fused", "recompute"]),
)
def test_topk_loss_of_any_shape(
    shape, divergence, tail, temperature, beta, skew, ce_weight, masked, backward
):
    K = shape.pop("K")
    if tail == "renorm_both" and K == 1:
        tail = "bucket"
    if minimum_of(divergence, beta, skew, tail) is None:
        tail = "bucket"
    c = case(**shape, std=2.0)
    labels = c.labels.masked_fill(torch.rand(shape["N"]) < masked, -100)
    t = top_k(c.teacher_logits, K, temperature)
    t.ids[torch.rand(t.ids.shape) < 0.1] = -1
    t = t._replace(log_tail=None)
    results = []
    for impl in ("torch", "triton", "reference"):
        x, w, b = leaves(c.hidden, c.weight, c.bias)
        loss = fd.topk_distill_loss(
            x,
            w,
            t,
            labels=labels,
            divergence=divergence,
            tail=tail,
            temperature=temperature,
            beta=beta,
            skew=skew,
            allow_biased=True,
            ce_weight=ce_weight,
            bias=b,
            impl=impl,
            backward="auto" if impl == "reference" else backward,
        )
        loss.backward()
        results.append((loss, x.grad, w.grad, b.grad))
    *backends, truth = results
    for one in backends:
        for actual, expected in zip(one, truth, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-10)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shape=shapes(), temperature=st.sampled_from([1.0, 2.0]), cut=st.floats(0.5, 1))
def test_topk_and_scores_of_any_shape(shape, temperature, cut):
    K = shape.pop("K")
    c = case(**shape)
    valid = max(K, 2, int(cut * shape["V"]))
    options = {"temperature": temperature, "valid_vocab": valid}
    a = fd.linear_topk(c.hidden, c.weight, K, **options)
    b = fd.linear_topk(c.hidden, c.weight, K, impl="reference", **options)
    torch.testing.assert_close(a.logprobs, b.logprobs)
    torch.testing.assert_close(a.log_tail, b.log_tail)
    labels = c.labels % valid
    result = fd.token_scores(c.hidden, c.weight, labels=labels, teacher=a, **options)
    truth = fd.token_scores(
        c.hidden, c.weight, labels=labels, teacher=a, impl="reference", **options
    )
    for name, s, r in zip(result._fields, result, truth, strict=True):
        budget = 1e-6 if name == "hellinger" else 1e-9  # √ of a difference near zero
        torch.testing.assert_close(s, r, rtol=1e-7, atol=budget, msg=name)
