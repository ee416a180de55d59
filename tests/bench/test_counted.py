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
from fastdistill.kernels.gpu_slabs import forward_columns
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


# MB beyond the gradients themselves, GEMM passes in NVH, and reductions: one per stored chunk (of
# both heads for dense), or one per slab of 2048 tokens × 4096 columns.
SLABS = 4 * 32


@pytest.mark.parametrize(
    ("run", "limit_mb", "passes", "reductions"),
    [
        (fused, 1102, 6, 4),
        (recompute, 159, 8, SLABS),
        (rows_alone, 37, 0, 0),
        (scoring, 64 * 1.048576, 2, SLABS),
        (streamed_topk, 545, 2, 8),
        (dense, 2170, 8, 2 * 8),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_at_full_size(counted, run, limit_mb, passes, reductions):  # noqa: F811
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
    assert launches.count("triton_reduce:reduce_rows") == reductions


@pytest.mark.parametrize(
    ("vocab", "hidden", "tokens", "columns"),
    [
        (151936, 4096, 2048, 4096),
        (151936, 2048, 2048, 8192),
        (151936, 1024, 2048, 16384),
        (151936, 1024, 512, 32768),
        (32000, 64, 2048, 8192),  # half of the vocabulary: a slab never holds all of it
        (211, 40, 20, 64),
    ],
)
def test_columns_of_a_slab_without_gradients(vocab, hidden, tokens, columns):
    """The fewest that keep the GEMM of a slab at 80 µs, so that the host stays ahead."""
    assert forward_columns(vocab, hidden, tokens) == columns


def test_a_host_read_would_be_seen():
    with FakeTensorMode(), pytest.raises(Exception, match="_local_scalar_dense"):
        torch.empty(3).sum().item()
