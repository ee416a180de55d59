"""Gradient error of each divergence with bf16 operands against fp64.

    error = ‖g − g₆₄‖ / ‖g₆₄‖, the worse of hidden's and weight's

on logits of standard deviation 4, H=1024, V=32000, K=64; the teacher is independent, student + 1.0
or student + 0.1 noise. For comparison, the same loss on logits rounded to bf16, as in eager code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

import fastdistill as fd
from fastdistill.kernels.divergences import SEPARABLE
from fastdistill.runtime.backend import resolve_impl

from .data import device, topk_of
from .registry import Missing, Outputs, attempt, deviations, worst
from .rows import Row
from .shapes import Shape

SHAPE = Shape(N=64, H=1024, V=32000, K=64)
TEACHERS = {"independent": None, "student + 1.0": 1.0, "student + 0.1": 0.1}


def grads(hidden, weight, teacher, impl: str, **options) -> Outputs:
    """The gradients of the loss; Missing if `impl` cannot run here."""
    try:
        resolve_impl(impl, hidden.device)
    except ValueError as error:
        raise Missing(str(error)) from None
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = fd.topk_distill_loss(*leaves, teacher, impl=impl, **options)
    return dict(zip(("hidden", "weight"), torch.autograd.grad(loss, leaves), strict=True))


def _rounded(hidden, weight, teacher, divergence: str) -> Outputs:
    """The same loss on materialized bf16 logits: K gathered, the rest summed."""
    x, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    z = x @ w.t()
    wide = z.float()
    rest = wide.scatter(-1, teacher.ids, -torch.inf).logsumexp(-1)
    from fastdistill.kernels.token_loss import (
        Gathered,
        LossOptions,
        TeacherTopK,
        token_loss_forward,
    )

    options = LossOptions(divergence)
    rounded_teacher = TeacherTopK(teacher.ids, teacher.logprobs.float(), teacher.log_tail.float())
    rows = token_loss_forward(
        Gathered(wide.gather(-1, teacher.ids), rest, None), rounded_teacher, None, options
    )
    grads = torch.autograd.grad(rows.per_token.mean(), (x, w))
    return dict(zip(("hidden", "weight"), grads, strict=True))


def _contenders(hidden, weight, teacher, divergence: str) -> dict[str, Callable[[], Outputs]]:
    inputs = (hidden, weight, teacher)
    impls = ("torch", "triton") if hidden.is_cuda else ("torch",)
    contenders: dict[str, Callable[[], Outputs]] = {
        f"{impl} {method}": partial(grads, *inputs, impl, backward=method, divergence=divergence)
        for impl in impls
        for method in ("fused", "recompute")
    }
    return contenders | {"eager, bf16 logits": partial(_rounded, *inputs, divergence)}


def rows(shape: Shape = SHAPE) -> list[Row]:
    results = []
    at = device()
    g = torch.Generator(at).manual_seed(0)
    hidden = torch.randn(shape.N, shape.H, generator=g, device=at).bfloat16()
    weight = torch.randn(shape.V, shape.H, generator=g, device=at).mul_(4 / shape.H**0.5)
    weight = weight.bfloat16()
    z = hidden.double() @ weight.double().t()
    noise = torch.randn(shape.N, shape.V, generator=g, dtype=torch.float64, device=at)
    for name, near in TEACHERS.items():
        lp = (4 * noise if near is None else z + near * noise).log_softmax(-1)
        teacher = topk_of(lp, shape.K)
        for divergence in SEPARABLE:
            wide = (hidden.double(), weight.double())
            truth = grads(*wide, teacher, "reference", divergence=divergence)
            for impl, work in _contenders(hidden, weight, teacher, divergence).items():
                row = Row.at(shape, f"{divergence}, teacher {name}", impl, "both")
                rounded, reason = attempt(work)
                row.set_reason(reason)
                if reason is None:
                    row.grad_error = worst(deviations(rounded, truth))
                results.append(row)
    return results


def table(rows: list[Row]) -> str:
    impls = list(dict.fromkeys(r.impl for r in rows))
    lines = [f"{'gradient error, bf16 operands':45}" + "".join(f"{i:>20}" for i in impls)]
    for op in dict.fromkeys(r.op for r in rows):
        errors = {r.impl: r.grad_error for r in rows if r.op == op}
        cells = ["missing" if e is None else f"{e:.3%}" for e in map(errors.get, impls)]
        lines.append(f"{op:45}" + "".join(f"{c:>20}" for c in cells))
    reasons = dict.fromkeys(f"{r.impl}: {r.reason}" for r in rows if r.missing)
    return "\n".join([*lines, *reasons])
