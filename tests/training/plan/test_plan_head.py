"""The memory of the loss, run without data: against real losses on a CPU, and with all slabs."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fastdistill as fd
from benchmarks.memory import peak_mb
from fastdistill.kernels import gpu_launch, gpu_slabs, torch_dense, torch_slabs
from fastdistill.kernels.head import LMHead, blocks
from fastdistill.losses.support import answers_of_head
from fastdistill.training.plan import loss_memory as planned
from fastdistill.training.plan.loss_memory import HeadShape

K = 8
RUNS: dict[str, Any] = {
    "fused": lambda shape, N: planned.fused.__wrapped__(shape, N, K),
    "recomputed": lambda shape, N: planned.recomputed.__wrapped__(shape, N, K),
    "dense": lambda shape, N: planned.dense.__wrapped__(shape, shape, N),
    "topk": lambda shape, N: planned.topk.__wrapped__(shape, N, K),
    "union": lambda shape, N: planned.on_support.__wrapped__(shape, shape, N, K, "union").peak,
}


def all_slabs(head: LMHead, rows: int, group: int = 1) -> Iterator[slice]:
    return blocks(head.vocab_size, rows)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", [*list(RUNS)[:-1], pytest.param("union", marks=pytest.mark.slow)])
def test_four_slabs_use_the_memory_of_all(name, device, monkeypatch):
    monkeypatch.setattr(gpu_launch, "jitted", None)  # no kernel is launched or imported
    shapes = [
        (HeadShape(V, 64, dtype, device), N)
        for V, N, dtype in (
            (30_000, 200, torch.bfloat16),
            (24_001, 70, torch.float16),
        )
    ]
    rehearsed = [RUNS[name](*shape) for shape in shapes]
    for module in (gpu_slabs, torch_dense, torch_slabs):
        monkeypatch.setattr(module, "vocabulary_slabs", all_slabs)
    assert rehearsed == [RUNS[name](*shape) for shape in shapes]


@pytest.mark.parametrize("name", ["fused", "dense", "topk"])
def test_a_gpu_of_8_gib_has_chunks_of_an_eighth(name):
    """64 GiB and more have the largest chunks, whose logits are nearly all of this memory."""
    small, large = (
        RUNS[name](HeadShape(128256, 64, torch.bfloat16, "cuda", gpu_memory=gib << 30), 32768)
        for gib in (8, 64)
    )
    if name != "topk":
        small, large = small.forward, large.forward
    assert small < large / 4


def measured(name: str, dtype: torch.dtype, N: int, H: int, V: int) -> float:
    """Bytes that the public function adds at its peak on a CPU, gradients included."""
    x, w = torch.randn(N, H, dtype=dtype), torch.randn(V, H, dtype=dtype)
    teacher, head = fd.linear_topk(x, w, K), LMHead(w)
    labels = torch.zeros(N, dtype=torch.int64)
    x, w = x.requires_grad_(), w.requires_grad_()

    def run():
        if name == "topk":
            fd.linear_topk(x, w, K)
        elif name == "union":
            answers_of_head("union", K, x, head, x, head, temperature=1.0, impl="auto")
        elif name == "dense":
            fd.linear_distill_loss(x, w, x.detach(), w.detach()).backward()
        else:
            backward = {"fused": "fused", "recomputed": "recompute"}[name]
            fd.topk_distill(x, w, teacher, labels=labels, backward=backward).loss.backward()
        x.grad = w.grad = None

    return 1e6 * peak_mb(run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RUNS)
def test_the_rehearsal_is_what_a_cpu_holds(name, dtype):
    N, H, V = 256, 96, 9_000
    dx, dw = N * H * dtype.itemsize, V * H * dtype.itemsize
    memory = RUNS[name](HeadShape(V, H, dtype, "cpu"), N)
    if name in ("topk", "union"):
        expected = memory
    else:
        expected = max(dx + max(memory.forward, dw), dx + dw + memory.backward)
    assert expected == pytest.approx(measured(name, dtype, N, H, V), rel=0.05)
