"""The sparse losses beside a loss on materialised logits: time, peak memory, gradient error.

Both gradients, forward KL with the bucket tail, .grad tensors allocated before. The contender to
beat is what one writes in PyTorch: logits in the model's dtype, an fp32 log-softmax, K gathered.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastdistill as fd

from .registry import Case, Contender, Gradients, Shape

ISSUE_SHAPE = Shape(N=1024, H=1024, V=151936, K=64)
GATE_SHAPE = Shape(N=96, H=128, V=4000, K=16)


class Data(NamedTuple):
    hidden: Tensor
    weight: Tensor
    teacher: fd.TopK


def make(shape: Shape, dtype: torch.dtype) -> Data:
    """Logits of standard deviation 4 and a teacher 0.5 away from them on K random tokens."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape.N, shape.H, generator=g).to(dtype).requires_grad_()
    weight = torch.empty(shape.V, shape.H)
    weight.normal_(generator=g).mul_(4 / shape.H**0.5)
    weight = weight.to(dtype).requires_grad_()
    ids = torch.stack([torch.randperm(shape.V, generator=g)[: shape.K] for _ in range(shape.N)])
    with torch.no_grad():
        z = fd.linear_lse_gather(hidden, weight, ids)
        near = z.logits + 0.5 * torch.randn(z.logits.shape, generator=g)
        lse = torch.logaddexp(near.logsumexp(-1), z.lse_rest)
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    return Data(hidden, weight, fd.TopK(ids, near - lse.unsqueeze(-1), z.lse_rest - lse))


def reset(data: Data) -> None:
    for leaf in data[:2]:
        assert leaf.grad is not None
        leaf.grad.zero_()


def backward(data: Data, loss: Tensor) -> Gradients:
    loss.backward()
    assert data.hidden.grad is not None
    assert data.weight.grad is not None
    return {"hidden": data.hidden.grad, "weight": data.weight.grad}


def ours(**options):
    def run(data: Data) -> Gradients:
        return backward(data, fd.topk_distill_loss(*data, **options))

    return run


def eager(data: Data) -> Gradients:
    """Materialised: log_softmax of fp32 logits, K gathered, the tail from 1 − Σ."""
    log_q = F.log_softmax((data.hidden @ data.weight.t()).float(), -1).gather(-1, data.teacher.ids)
    log_q_tail = torch.log1p(-log_q.exp().sum(-1).clamp(max=1 - 1e-6))
    log_p, log_p_tail = data.teacher.logprobs, data.teacher.log_tail
    assert log_p_tail is not None
    kl = (log_p.exp() * (log_p - log_q)).sum(-1) + log_p_tail.exp() * (log_p_tail - log_q_tail)
    return backward(data, kl.mean())


def truth(tail: str = "bucket"):
    def run(data: Data) -> Gradients:
        wide = [t.detach().double().requires_grad_() for t in data[:2]]
        loss = fd.topk_distill_loss(*wide, data.teacher, tail=tail, impl="reference")
        grads = torch.autograd.grad(loss, wide)
        return dict(zip(("hidden", "weight"), grads, strict=True))

    return run


def cases(shape: Shape = ISSUE_SHAPE) -> list[Case]:
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        contenders = (
            Contender("eager", eager, exact=False),
            Contender("torch fused", ours(backward="fused")),
            Contender("torch recompute", ours(backward="recompute")),
        )
        common = {"mode": "both", "shape": shape, "dtype": dtype, "make": make, "reset": reset}
        found.append(
            Case("topk_loss", truth=truth(), contenders=contenders, gate_shape=GATE_SHAPE, **common)
        )
        found.append(
            Case(
                "renorm_both",
                truth=truth("renorm_both"),
                contenders=(Contender("torch rows", ours(tail="renorm_both")),),
                gate_shape=GATE_SHAPE,
                **common,
            )
        )
    return found
