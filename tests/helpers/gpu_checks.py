"""What tests/test_gpu.py runs: every operator on a device against fp64.

Each check prints nothing and raises on a wrong answer. The cases hide in odd shapes, padded
vocabularies, near-converged teachers, and more than 2³¹ logits. Without a GPU they run in Triton's
interpreter, slowly, which proves the checks and not the device.
"""

from __future__ import annotations

from typing import Any

import torch

import fastdistill as fd
from fastdistill.kernels.divergences import NAMES
from helpers.cases import PAIRS, case, leaves, top_k
from helpers.tolerances import GRADIENT, PROMISED, VALUE, assert_close, relative

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ("triton", "torch")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
OPTIONS: dict[str, Any] = {"softcap": 20.0, "logit_scale": 0.8, "temperature": 1.5}


def on_gpu(c):
    return type(c)(*(t.to(DEVICE) for t in c))


def gradients(c, teacher, dtype, impl, **options):
    x, w, b = leaves(c.hidden, c.weight, c.bias, dtype=dtype)
    loss = fd.topk_distill_loss(x, w, teacher, bias=b, impl=impl, allow_biased=True, **options)
    (loss.sum() * 1.7).backward()
    return loss, x.grad, w.grad, b.grad


def check(results, truth, dtype, what, budget=GRADIENT):
    assert_close(results[0], truth[0], VALUE[dtype] * 5, f"{what} loss")
    for i, (a, t) in enumerate(zip(results[1:], truth[1:], strict=True)):
        assert_close(a, t, max(budget[dtype], 2e-5 if dtype == torch.float32 else 0), f"{what} {i}")


def every_divergence_and_tail():
    c = on_gpu(case(torch.float64, N=37, H=72, V=10007))
    for dtype in DTYPES:
        low = type(c)(*(t.to(dtype) if t.is_floating_point() else t for t in c))
        teacher = top_k(c.teacher_logits, 13)
        for divergence, tail in PAIRS:
            truth = gradients(
                low, teacher, torch.float64, "reference", divergence=divergence, tail=tail
            )
            for impl in IMPLS:
                for backward in ("fused", "recompute"):
                    options = {"divergence": divergence, "tail": tail, "backward": backward}
                    results = gradients(low, teacher, dtype, impl, **options)
                    check(results, truth, dtype, f"{dtype} {divergence} {tail} {impl} {backward}")


def every_option_at_once():
    c = on_gpu(case(torch.float64, N=37, H=72, V=10007))
    labels = c.labels.clone()
    labels[::5] = -100
    options = OPTIONS | {"labels": labels, "ce_weight": 0.3, "z_loss": 1e-3, "valid_vocab": 9001}
    options |= {"token_weight": torch.rand(37, device=DEVICE).double() + 0.5, "t2_scale": True}
    labels[labels >= 9001] = 3
    teacher = top_k(c.teacher_logits[:, :9001], 13, 1.5)
    truth = gradients(c, teacher, torch.float64, "reference", **options)
    for dtype in (torch.float64, torch.float32):
        for impl in IMPLS:
            for backward in ("fused", "recompute"):
                results = gradients(c, teacher, dtype, impl, backward=backward, **options)
                allowed = 1e-9 if dtype == torch.float64 else 1e-4
                for a, t in zip(results[1:], truth[1:], strict=True):
                    assert_close(a, t, allowed, f"{dtype} {impl} {backward}")


def near_convergence():
    c = on_gpu(case(torch.bfloat16, N=256, H=1024, V=32000, near=0.1))
    teacher = top_k(c.teacher_logits, 64)
    for divergence in NAMES:
        truth = gradients(c, teacher, torch.float64, "reference", divergence=divergence)
        for impl in IMPLS:
            for backward in ("fused", "recompute"):
                options = {"divergence": divergence, "backward": backward}
                results = gradients(c, teacher, torch.bfloat16, impl, **options)
                for a, t in zip(results[1:3], truth[1:3], strict=True):
                    assert relative(a, t) <= PROMISED[torch.bfloat16], (divergence, impl, backward)


def primitive_scores_and_topk():
    for dtype in DTYPES:
        for H in (64, 1024):
            c = on_gpu(case(dtype, N=300, H=H, V=5003))
            teacher = top_k(c.teacher_logits, 6, 1.5)
            ids = torch.randint(5003, (300, 70), device=DEVICE)
            ids[:, 3], ids[7] = ids[:, 1], -1
            wide = [t.double() for t in c[:3]]
            for impl in IMPLS:
                for options in ({}, OPTIONS):
                    common: dict[str, Any] = {"with_entropy": True, **options}
                    a = fd.linear_lse_gather(
                        c.hidden, c.weight, ids, bias=c.bias, impl=impl, **common
                    )
                    b = fd.linear_lse_gather(
                        wide[0], wide[1], ids, bias=wide[2], impl="reference", **common
                    )
                    for x, y in zip(a, b, strict=True):
                        assert x is not None
                        assert y is not None
                        assert (x.isinf() == y.isinf()).all()
                        dense = y.masked_fill(y.isinf(), 0)
                        assert_close(x.masked_fill(x.isinf(), 0), dense, 5 * VALUE[dtype])
                arguments: dict[str, Any] = {
                    "labels": c.labels,
                    "teacher": teacher,
                    "temperature": 1.5,
                }
                scores = fd.token_scores(*c[:2], bias=c.bias, impl=impl, **arguments)
                truth = fd.token_scores(*wide[:2], bias=wide[2], impl="reference", **arguments)
                for name, x, y in zip(scores._fields, scores, truth, strict=True):
                    assert x is not None
                    assert y is not None
                    if y.is_floating_point():
                        assert_close(x, y, 1e-3, f"{dtype} {impl} {name}")
                    else:
                        assert x.ne(y).double().mean() < 0.01, f"{dtype} {impl} {name}"
                top = fd.linear_topk(c.hidden, c.weight, 9, bias=c.bias, impl=impl)
                best = fd.linear_topk(wide[0], wide[1], 9, bias=wide[2], impl="reference")
                assert_close(top.logprobs, best.logprobs, 5 * VALUE[dtype])
                assert_close(top.log_tail, best.log_tail, 1e-4)


def dense_teacher():
    c = on_gpu(case(torch.float64, N=37, H=72, V=5003))
    g = torch.Generator(DEVICE).manual_seed(1)
    hidden = torch.randn(37, 40, generator=g, device=DEVICE)
    weight = torch.randn(5008, 40, generator=g, device=DEVICE) * 0.5
    for dtype in DTYPES:
        for divergence in NAMES:
            results = []
            for kind, impl in ((dtype, "triton"), (dtype, "torch"), (torch.float64, "reference")):
                x, w = leaves(c.hidden.to(dtype), c.weight.to(dtype), dtype=kind)
                theirs = (hidden.to(dtype).to(kind), weight.to(dtype).to(kind))
                loss = fd.linear_distill_loss(x, w, *theirs, divergence=divergence, impl=impl)
                (256 * loss).backward()  # float16 cannot hold the gradient of a mean
                results.append((x.grad, w.grad))
            for result in results[:2]:
                for a, t in zip(result, results[2], strict=True):
                    assert_close(a, t, max(GRADIENT[dtype], 5e-5), f"{dtype} {divergence}")


def filtered():
    c = on_gpu(case(torch.bfloat16, N=300, H=256, V=10007))
    teacher = top_k(c.teacher_logits, 13)
    truth = gradients(c, teacher, torch.float64, "reference")
    check(
        gradients(c, teacher, torch.bfloat16, "triton", grad_filter_eps=0.0),
        truth,
        torch.bfloat16,
        "filter",
    )


def more_than_2_to_the_31_logits():
    N, V, H = 33_000, 66_000, 64
    g = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(N, H, generator=g, device=DEVICE).bfloat16()
    weight = (torch.randn(V, H, generator=g, device=DEVICE) / 4).bfloat16()
    ids = torch.randint(V, (N, 4), generator=g, device=DEVICE).sort(-1).values
    ids[-1] = torch.arange(V - 4, V, device=DEVICE)
    last = slice(N - 5, N)
    for impl in IMPLS:
        out = fd.linear_lse_gather(hidden, weight, ids, impl=impl)
        x = hidden[last].double()
        truth = fd.linear_lse_gather(x, weight.double(), ids[last], impl="reference")
        assert_close(out.logits[last], truth.logits, 1e-4)
        assert_close(out.lse_rest[last], truth.lse_rest, 1e-4)
        (x,) = leaves(hidden)
        teacher = fd.TopK(ids, torch.full((N, 4), -2.0, device=DEVICE))
        fd.topk_distill_loss(x, weight, teacher, reduction="sum", impl=impl).backward()
        (y,) = leaves(hidden[last].double())
        part = fd.TopK(ids[last], teacher.logprobs[last])
        fd.topk_distill_loss(y, weight.double(), part, reduction="sum", impl="reference").backward()
        assert x.grad is not None
        assert_close(x.grad[last], y.grad, GRADIENT[torch.bfloat16])


def without_a_host_sync_and_in_a_graph():
    """The stream never waits for the host, so a whole step can be captured and replayed."""
    c = on_gpu(case(torch.bfloat16, N=512, H=128, V=8000))
    teacher = top_k(c.teacher_logits, 16)
    assert teacher.log_tail is not None
    teacher = teacher._replace(logprobs=teacher.logprobs.float(), log_tail=teacher.log_tail.float())
    for backward in ("fused", "recompute"):
        x, w = leaves(c.hidden, c.weight)
        x.grad, w.grad = torch.zeros_like(x), torch.zeros_like(w)

        def step(x=x, w=w, backward=backward):
            x.grad.zero_()
            w.grad.zero_()
            options = {"labels": c.labels, "ce_weight": 0.1, "backward": backward}
            loss = fd.topk_distill_loss(x, w, teacher, impl="triton", **options)
            loss.backward()
            return loss

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(2):
                step()
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        expected = x.grad.clone(), w.grad.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        x.grad.fill_(torch.nan)
        w.grad.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(x.grad, expected[0])  # deterministic, too
        assert torch.equal(w.grad, expected[1])


def compiled():
    c = on_gpu(case(torch.bfloat16, N=64, H=128, V=8000))
    teacher = top_k(c.teacher_logits, 16)

    def run(x, w):
        return fd.topk_distill_loss(x * 2, w, teacher, impl="triton") * 2

    torch._dynamo.reset()
    results = []
    for function in (run, torch.compile(run, fullgraph=True)):
        x, w = leaves(c.hidden, c.weight)
        function(x, w).backward()
        results.append((x.grad, w.grad))
    for a, b in zip(*results, strict=True):
        assert_close(a, b, 1e-2)


# The quick ones first: a run that is stopped has said most.
CHECKS = (
    near_convergence,
    filtered,
    dense_teacher,
    primitive_scores_and_topk,
    every_option_at_once,
    without_a_host_sync_and_in_a_graph,
    more_than_2_to_the_31_logits,
    every_divergence_and_tail,
    compiled,
)
