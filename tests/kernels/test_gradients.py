"""Gradients of the Triton backend in blocks smaller than a call: the sums are the same."""

from typing import Any

import pytest
import torch

import fastdistill as fd
from fastdistill.kernels import gpu_gather, gpu_slabs
from helpers.cases import case, leaves, top_k
from helpers.tolerances import GRADIENT, assert_close

pytest.importorskip("triton", reason="needs triton")


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("H", [24, 200])
def test_recompute_in_blocks_of_tokens(dtype, H, monkeypatch):
    """A slab of all tokens is too large: dW of the slab is one sum over blocks, in fp32.

    With H = 200 the slab lies in the memory of the returned dX, all tokens of it with bfloat16.
    """
    sizes = {"RECOMPUTE_BYTES": 1 << 10, "RECOMPUTE_TILE": (8, 16), "SLAB_COLUMNS": (16, 32)}
    for name, value in sizes.items():
        monkeypatch.setattr(gpu_slabs, name, value)
    c = case(dtype, N=18, V=35, H=H)
    c.hidden[:, 0] *= 100
    c.weight[:, 0] *= 1e-2
    teacher = top_k(c.teacher_logits, 5)
    extras: dict[str, Any] = {"labels": c.labels, "ce_weight": 0.3, "z_loss": 1e-3}

    def gradients(dtype: torch.dtype, **options: Any) -> list[Any]:
        x, w, b = leaves(c.hidden, c.weight, c.bias, dtype=dtype)
        (fd.topk_distill_loss(x, w, teacher, bias=b, **options) * 1.7).backward()
        return [x.grad, w.grad, b.grad]

    actual = gradients(dtype, impl="triton", backward="recompute", **extras)
    truth = gradients(torch.float64, impl="reference", **extras)
    for a, t in zip(actual, truth, strict=True):
        assert_close(a, t, GRADIENT[dtype])


@pytest.mark.parametrize("has_weight", [True, False])
def test_runs_of_frequent_ids(has_weight, monkeypatch):
    """Ids with Zipf frequencies: runs over many parts, runs that end with one, and empty slots."""
    monkeypatch.setattr(gpu_gather, "RUN_TILE", {"BE": 4, "BC": 8, "BH": 16, "num_warps": 4})
    N, S, V, H = 40, 3, 12, 20
    x = torch.randn(N, H, dtype=torch.bfloat16)
    ids = torch.multinomial(1 / torch.arange(1, V).float(), N * S, replacement=True).view(N, S)
    ids[:3] = -1
    g, spare = torch.randn(N, S), torch.full((N, H), torch.nan, dtype=torch.bfloat16)

    def sums(**options: Any) -> tuple[Any, Any]:
        dw, db = torch.zeros(V, H) if has_weight else None, torch.zeros(V)
        gpu_gather.weight_grad(x, ids, g, dw, db, **options)
        return dw, db

    dw, db = sums()
    flat = ids.clamp(min=0).view(-1)
    entries = (g.double() * (ids >= 0)).unsqueeze(-1) * x.double().unsqueeze(1)
    truth = torch.zeros(V).double().index_add(0, flat, (g.double() * (ids >= 0)).view(-1))
    assert_close(db, truth, 1e-6)
    for again in (sums(spare=spare), sums(add=True)):
        assert torch.equal(again[1], db)
        assert dw is None or torch.equal(again[0], dw)
    if dw is not None:
        truth = torch.zeros(V, H).double().index_add(0, flat, entries.view(-1, H))
        assert_close(dw, truth, 1e-6)
        assert not spare.isnan().all()  # parts were there
