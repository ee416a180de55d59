"""The plan's formulas of the loss against the kernels' own code, run on tensors without data."""

from typing import Any, cast

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastdistill as fd
from fastdistill.kernels import triton_slabs
from fastdistill.kernels.backends import get_backend
from fastdistill.kernels.head import LMHead
from fastdistill.training.plan import loss_memory as planned
from fastdistill.training.plan.loss_memory import HeadShape
from helpers.counted_memory import (  # noqa: F401  `counted` is a fixture
    Alive,
    counted,
    dense,
    fused,
    recompute,
    streamed_topk,
)

SHAPES = [(2048, 512, 32000), (4096, 1024, 151936), (1000, 256, 8000), (8192, 4096, 128256)]
K = 64


def count(impl, run, dtype, N, H, V):
    """Bytes at the peak, gradients included."""
    with FakeTensorMode(), torch.no_grad():
        x, w = torch.empty(N, H, dtype=dtype), torch.empty(V, H, dtype=dtype)
        t = fd.TopK(torch.empty(N, K, dtype=torch.int64), torch.empty(N, K), torch.empty(N))
        coef = torch.empty(N)
        with Alive(x, w, *t[:3], coef) as alive:
            run(get_backend(impl), LMHead(w), x, t, coef)
    return alive.peak


def expected(device, run, dtype, N, H, V):
    head = HeadShape(V, H, dtype, device)
    dx, dw = N * H * dtype.itemsize, head.weight
    return {
        "fused": lambda: dx + max(dw, planned.fused(head, N, K).forward),
        "recompute": lambda: dx + dw + planned.recomputed(head, N, K).backward,
        "dense": lambda: dx + max(dw, planned.dense(head, head, N).forward),
        "streamed_topk": lambda: planned.topk(head, N, K),
    }[run.__name__]()


CASES = [
    (device, run, dtype, shape)
    for device in ("cpu", "cuda")
    for run in (fused, recompute, dense, streamed_topk)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for shape in SHAPES
    # So many slabs take too long to count; a GPU's are larger.
    if device == "cuda" or shape[0] < 4096
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1].__name__}-{c[2]}-{c[3][0]}")
def test_formulas_are_what_the_kernels_hold(case, request, monkeypatch):
    device, run, dtype, shape = case
    if device == "cuda":
        request.getfixturevalue("counted")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    held = count("triton" if device == "cuda" else "torch", run, dtype, *shape)
    # Half a slab, or what stands on the slots, is no part of the formulas.
    assert expected(*case[:3], *shape) == pytest.approx(held, rel=0.05, abs=5e6)


def test_the_triton_kernels_still_have_these_sizes():
    kernels, plan = cast(Any, (triton_slabs, planned))
    assert kernels.TRITON_BLOCK_TOKENS == plan.TRITON_BLOCK_TOKENS
    assert kernels.TRITON_RECOMPUTE_BYTES == plan.TRITON_RECOMPUTE_BYTES
    for vocab in (50, 3000, 128256):
        assert kernels.triton_slab_columns(vocab) == plan.triton_slab_columns(vocab)
