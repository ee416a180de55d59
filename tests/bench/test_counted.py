"""What the Triton backend costs at full size, counted without a GPU: memory, FLOPs, calls.

Tensors without data go through the backend's own code at (8192, 4096, 128256, K=64) with a GPU's
chunk sizes; GEMMs and kernels are counted instead of run. A read of a value on the host has no
answer here and raises, so what passes never stalls a stream.
"""

from dataclasses import replace

import pytest
import torch

from benchmarks.counted import on_gpu
from benchmarks.gpus import H200
from benchmarks.predict import operands
from benchmarks.shapes import Shape
from fastdistill.hf.lm_head import LMHead
from fastdistill.kernels import row_scores
from fastdistill.kernels.backends import get_backend
from fastdistill.kernels.gpu_slabs import forward_columns
from fastdistill.kernels.head import Stats, chunk_tokens, dense_chunk_tokens
from fastdistill.kernels.token_loss import TeacherTopK
from fastdistill.training.config import DistillConfig
from fastdistill.training.loss import Loss
from fastdistill.training.targets import Targets
from helpers.counted_memory import (
    NEED,
    Alive,
    H,
    K,
    N,
    V,
    dense,
    draft,
    fused,
    recompute,
    streamed_topk,
)
from helpers.present import present

NVH = N * V * H


def rows_alone(e, h, x, t, coef):
    z = e.gather(h, x, t.ids)
    return e.gather_grads(h, x, t.ids, z, torch.empty_like(z), **NEED)[:2]


def scoring(e, h, x, t, coef):
    row_scores.scores(e, h, x, TeacherTopK(*t[:3]), None, None)
    return ()


# MB beyond the gradients themselves, GEMM passes in NVH, and reductions: one per stored chunk (two
# for both heads of dense), or per slab of 2048 × 4096.
SLABS = 4 * 32


@pytest.mark.parametrize(
    ("run", "limit_mb", "passes", "reductions"),
    [
        (fused, 1102, 6, 4),
        (recompute, 159, 8, SLABS),
        (rows_alone, 37, 0, 0),
        (scoring, 64 * 1.048576, 2, SLABS),
        (streamed_topk, 545, 2, 10),
        (dense, 2170, 8, 2 * 4),
        (draft, 2170, 8, 2 * 4),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_at_full_size(run, limit_mb, passes, reductions):
    with on_gpu(H200) as calls, torch.no_grad():
        data = operands(Shape(N, H, V, K), torch.bfloat16)
        x, w, t = data.hidden, data.weight, present(data.teacher)
        coef = torch.empty(N, device="cuda")
        with Alive(x, w, *t[:3], coef) as alive:
            grads = run(get_backend("triton"), LMHead(w), x, t, coef)
            returned = sum(g.numel() * g.element_size() for g in grads)
    assert (alive.peak - returned) / 1e6 < limit_mb
    assert calls.flops == passes * NVH
    assert sum(n for name, n in calls.kernels().items() if ":reduce_" in name) == reductions


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


@pytest.mark.parametrize(
    ("memory_gib", "vocab", "tokens", "chunk", "dense_chunk"),
    [
        (141, 128256, 8192, 2048, 2048),
        (141, 151936, 6640, 1664, 1660),  # one more chunk would sum dW in fp32
        (141, 151936, 8192, 2048, 2048),  # 1664 tokens take 1.0 GB and an fp32 dW of 2.5 GB
        (141, 262208, 32768, 1023, 511),  # as many as 1 GiB has
        (24, 128256, 32768, 768, 384),
        (4, 128256, 32768, 128, 65),
        (4, 128256, 8192, 2048, 2048),
    ],
)
def test_the_chunks_of_a_gpu(memory_gib, vocab, tokens, chunk, dense_chunk):
    """Chunks of 1/64 of the memory, or four chunks, if a 16-bit dW needs less memory with them."""
    with on_gpu(replace(H200, memory=memory_gib << 30)):
        head = LMHead(torch.empty(vocab, 4096, dtype=torch.bfloat16, device="cuda"))
        assert chunk_tokens(head, tokens, True) == chunk
        assert dense_chunk_tokens(head, tokens, True) == dense_chunk
        step, _ = get_backend("triton").topk_memory(head, tokens, K, (1.0,))
        assert step * 4 * vocab < min(512 << 20, (memory_gib << 30) / 64)


def test_recompute_at_any_number_of_tokens():
    """Four calls of the device per slab of 2048 columns: logits, dz, dX, dW."""
    tokens, slabs = 4 * N, -(-V // 2048)
    with on_gpu(H200) as calls, torch.no_grad():
        data = operands(Shape(tokens, H, V, K), torch.bfloat16)
        x, w, ids = data.hidden, data.weight, present(data.teacher).ids
        row = torch.empty(tokens, device="cuda")
        stats = Stats(torch.empty(tokens, K, device="cuda"), row, None, None)
        calls.clear()
        with Alive(x, w, ids, *stats[:2]) as alive:
            run = get_backend("triton").recompute
            dx, dw, _ = run(LMHead(w), x, ids, stats, stats, **NEED, hidden_type=x.dtype)
    assert calls.flops == 6 * tokens * V * H
    assert calls.counts()["gemms"] == 3 * slabs
    assert calls.kernels()["triton_grad:grad_rows"] == slabs
    sum_of_dx = 4 * tokens * H
    assert alive.peak - present(dx).nbytes - present(dw).nbytes < 1.3 * sum_of_dx


def test_a_host_read_would_be_seen():
    with on_gpu(H200), pytest.raises(Exception, match="_local_scalar_dense"):
        torch.empty(3, device="cuda").sum().item()


def test_a_training_step_with_stored_answers():
    """The calls of its loss, forward and backward; test_predict.py has those of other functions."""
    with on_gpu(H200) as calls:
        data = operands(Shape(2048, 1024, 151936, 64), torch.bfloat16)
        at = torch.empty(2048, dtype=torch.int64, device="cuda")
        targets = Targets(at, at, data.labels, (1, 2048))
        calls.clear()
        result = Loss(DistillConfig())(data.hidden, LMHead(data.weight), targets, data.teacher)
        torch.autograd.grad(result.loss, (data.hidden, data.weight))
    counts = calls.counts()
    assert counts["gemms"] <= 6, counts
    assert counts["launches"] <= 11, counts
    assert counts["operators"] <= 86, counts
