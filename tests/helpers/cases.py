"""Inputs that random logits hide bugs from, built once: exact in the dtype asked for."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastdistill import TopK
from fastdistill.kernels.divergences import NAMES, minimum_of
from fastdistill.kernels.token_loss import TAILS

# (divergence, tail) of every pair that is not refused.
PAIRS = [(d, t) for d in NAMES for t in TAILS if minimum_of(d, 0.3, 0.1, t) is not None]


class Case(NamedTuple):
    """hidden [N, H], weight [V, H], bias [V] in dtype; teacher logits [N, V] in fp64."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    teacher_logits: Tensor
    labels: Tensor


def case(
    dtype: torch.dtype = torch.float64,
    *,
    N: int = 12,
    H: int = 16,
    V: int = 67,
    std: float = 4.0,
    near: float | None = None,
    seed: int = 0,
) -> Case:
    """Student logits of standard deviation `std`; the teacher is independent, or student + near."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=g, dtype=torch.float64).to(dtype)
    weight = (torch.randn(V, H, generator=g, dtype=torch.float64) * std / H**0.5).to(dtype)
    bias = torch.randn(V, generator=g, dtype=torch.float64).to(dtype)
    noise = torch.randn(N, V, generator=g, dtype=torch.float64)
    z = hidden.double() @ weight.double().t()
    labels = torch.randint(V, (N,), generator=g)
    return Case(hidden, weight, bias, noise * std if near is None else z + near * noise, labels)


def top_k(logits: Tensor, k: int, temperature: float = 1.0, *, tail: bool = True) -> TopK:
    """The exact payload of fp64 teacher logits, stored in fp32 as a teacher would."""
    lp = (logits / temperature).log_softmax(-1)
    best = lp.topk(k, -1)
    rest = lp.scatter(-1, best.indices, -torch.inf).logsumexp(-1)
    return TopK(best.indices, best.values, rest if tail else None, temperature)


def leaves(*tensors: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Fresh leaves that require grad, optionally in another dtype."""
    return [t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in tensors]
