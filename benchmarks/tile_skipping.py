"""Effect of grad_filter_eps: the share of gradient tiles multiplied, and the error.

    products_share = live 128 × 128 tiles of dz / all of them        error = ‖g − g₆₄‖ / ‖g₆₄‖

with bf16 operands, forward KL, bucket tail, on logits of standard deviation 4, 8 and 16, where
larger means a more peaked student. Without a GPU it needs Triton's interpreter
(TRITON_INTERPRET=1), which multiplies the same tiles. On a GPU, `topk_loss` measures the time.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import fastdistill as fd
from fastdistill.runtime.backend import resolve_impl

from .data import device, topk_of
from .gradient_error import grads
from .registry import Missing, Outputs, attempt, deviations, worst
from .rows import Row
from .shapes import Shape

SHAPE = Shape(N=256, H=128, V=16000, K=16)  # minutes in the interpreter, as it is
WIDTHS = (4.0, 8.0, 16.0)
EPS = (2.0**-16, 2.0**-12, 2.0**-9)


def _skipping(
    hidden: Tensor, weight: Tensor, teacher: fd.TopK, eps: float
) -> tuple[Outputs, float]:
    """Return the gradients and the share of tiles that were multiplied."""
    try:
        resolve_impl("triton", hidden.device)
    except ValueError as error:
        raise Missing(str(error)) from None
    from fastdistill.kernels import triton_filter

    live = []
    find = triton_filter.live_tiles

    def recording(*args):
        live.append(find(*args))
        return live[-1]

    triton_filter.live_tiles = recording
    try:
        gradients = grads(hidden, weight, teacher, "triton", grad_filter_eps=eps)
    finally:
        triton_filter.live_tiles = find
    return gradients, torch.cat([t.flatten() for t in live]).double().mean().item()


def rows(shape: Shape = SHAPE) -> list[Row]:
    results = []
    at = device()
    for width in WIDTHS:
        g = torch.Generator(at).manual_seed(0)
        hidden = torch.randn(shape.N, shape.H, generator=g, device=at).bfloat16()
        weight = torch.randn(shape.V, shape.H, generator=g, device=at)
        weight = weight.mul_(width / shape.H**0.5).bfloat16()
        z = hidden.double() @ weight.double().t()
        noise = torch.randn(z.shape, generator=g, dtype=torch.float64, device=at)
        lp = (z + noise).log_softmax(-1)
        teacher = topk_of(lp, shape.K)
        truth = grads(hidden.double(), weight.double(), teacher, "reference")
        for eps in EPS:
            result, reason = attempt(partial(_skipping, hidden, weight, teacher, eps))
            op = f"grad_filter_eps {eps:.3g}, logits of width {width:g}"
            row = Row.at(shape, op, "triton fused", "both")
            row.set_reason(reason)
            if result is not None:
                row.grad_error = worst(deviations(result[0], truth))
                row.products_share = result[1]
            results.append(row)
    return results


def table(rows: list[Row]) -> str:
    lines = [f"{'tile skipping, bf16 operands':45}{'tiles':>10}{'error':>10}"]
    for row in rows:
        if row.missing or row.products_share is None:
            lines.append(f"{row.op:45} missing: {row.reason}")
        else:
            lines.append(f"{row.op:45}{row.products_share:>10.1%}{row.grad_error:>10.3%}")
    return "\n".join(lines)
