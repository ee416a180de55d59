"""What the Triton backend costs at full size, counted without a GPU: memory, FLOPs, host reads.

Tensors without data go through the backend's own code at (8192, 4096, 128256, K=64) with a GPU's
chunk sizes; GEMMs and kernels are counted instead of run. A read of a value on the host has no
answer here and raises, so what passes never stalls a stream.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastdistill as fd
from fastdistill.kernels import row_scores
from fastdistill.kernels.backends import get_backend
from fastdistill.kernels.head import LMHead
from helpers.counted_memory import (  # noqa: F401  `counted` is a fixture
    NEED,
    Alive,
    H,
    K,
    N,
    V,
    counted,
    dense,
    fused,
    recompute,
    streamed_topk,
)

NVH = N * V * H


def rows_alone(e, h, x, t, coef):
    z = e.gather(h, x, t.ids)
    return e.gather_grads(h, x, t.ids, z, torch.empty_like(z), **NEED)[:2]


def scoring(e, h, x, t, coef):
    row_scores.scores(e, h, x, t.ids, coef)
    return ()


# MB beyond the gradients themselves, and GEMM passes in NVH.
@pytest.mark.parametrize(
    ("run", "limit_mb", "passes"),
    [
        (fused, 1102, 6),
        (recompute, 159, 8),
        (rows_alone, 37, 0),
        (scoring, 64 * 1.048576, 2),
        (streamed_topk, 545, 2),
        (dense, 2170, 8),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_at_full_size(counted, run, limit_mb, passes):  # noqa: F811
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(N, H, dtype=torch.bfloat16)
        w = torch.empty(V, H, dtype=torch.bfloat16)
        t = fd.TopK(torch.empty(N, K, dtype=torch.int64), torch.empty(N, K), torch.empty(N))
        coef = torch.empty(N)
        with Alive(x, w, *t[:3], coef) as alive:
            grads = run(get_backend("triton"), LMHead(w), x, t, coef)
            returned = sum(g.numel() * g.element_size() for g in grads)
    assert (alive.peak - returned) / 1e6 < limit_mb
    flops, launches = counted
    assert sum(flops) == passes * NVH
    assert launches


def test_a_host_read_would_be_seen():
    with FakeTensorMode(), pytest.raises(Exception, match="_local_scalar_dense"):
        torch.empty(3).sum().item()
