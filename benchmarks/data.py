"""Random inputs of one case, on the measured device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import fastdistill as fd

from .shapes import Shape


class Data(NamedTuple):
    """Inputs of an op: hidden [N, H] and weight [V, H] are leaves; the rest depends on the op."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    teacher: fd.TopK | None = None
    teacher_hidden: Tensor | None = None
    teacher_weight: Tensor | None = None

    def wide(self) -> Data:
        """The same values in fp64, as new leaves."""
        teacher_hidden, teacher_weight = (None if t is None else t.double() for t in self[4:])
        hidden, weight = (t.detach().double().requires_grad_() for t in self[:2])
        return Data(hidden, weight, self.labels, self.teacher, teacher_hidden, teacher_weight)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _base(shape: Shape, dtype: torch.dtype) -> tuple[Data, torch.Generator]:
    """Logits of standard deviation 4: confident rows and flat ones."""
    at = device()
    g = torch.Generator(at).manual_seed(0)
    hidden = torch.randn(shape.N, shape.H, generator=g, device=at).to(dtype).requires_grad_()
    weight = torch.randn(shape.V, shape.H, generator=g, device=at).mul_(4 / shape.H**0.5)
    labels = torch.randint(shape.V, (shape.N,), generator=g, device=at)
    return Data(hidden, weight.to(dtype).requires_grad_(), labels), g


def topk_of(logprobs: Tensor, k: int) -> fd.TopK:
    """The K most probable tokens of [N, V] log-probabilities, and the tail."""
    best = logprobs.topk(k, -1)
    tail = logprobs.scatter(-1, best.indices, -torch.inf).logsumexp(-1)
    return fd.TopK(best.indices, best.values, tail)


def labeled(shape: Shape, dtype: torch.dtype) -> Data:
    """Labels, and the equivalent one-hot teacher."""
    data, _ = _base(shape, dtype)
    certain = torch.zeros(shape.N, 1, device=data.hidden.device)
    no_tail = torch.full((shape.N,), -torch.inf, device=data.hidden.device)
    return data._replace(teacher=fd.TopK(data.labels.unsqueeze(-1), certain, no_tail))


def sparse(shape: Shape, dtype: torch.dtype) -> Data:
    """A teacher with logits 0.5 from the student's, on the student's K most probable tokens.

    As with a real teacher, they hold most of the mass. K random tokens would hold almost none, and
    the loss would be rounding error.
    """
    data, g = _base(shape, dtype)
    return _with_teacher(data, shape.K, g)


def _with_teacher(data: Data, k: int, g: torch.Generator) -> Data:
    with torch.no_grad():
        ids = fd.linear_topk(data.hidden, data.weight, k, impl="torch").ids
        z = fd.linear_lse_gather(data.hidden, data.weight, ids, impl="torch")
        near = z.logits + 0.5 * torch.randn(z.logits.shape, generator=g, device=ids.device)
        lse = torch.logaddexp(near.logsumexp(-1), z.lse_rest)
    return data._replace(teacher=fd.TopK(ids, near - lse.unsqueeze(-1), z.lse_rest - lse))


def zipf(shape: Shape, dtype: torch.dtype) -> Data:
    """`sparse` with ids that repeat as those of a language model: a prior −log(rank) on the logits.

    The ranks are a random order of the vocabulary. Column 0 holds the prior: 1 in every hidden
    state, −log(rank) in the weight. The frequency of an id among the top K is then close to a power
    of its rank, and a few ids are in the top K of most tokens.
    """
    data, g = _base(shape, dtype)
    with torch.no_grad():
        ranks = torch.randperm(shape.V, generator=g, device=data.weight.device) + 1
        data.weight[:, 0] = -ranks.log()
        data.hidden[:, 0] = 1
    return _with_teacher(data, shape.K, g)


def dense(shape: Shape, dtype: torch.dtype) -> Data:
    """A teacher with its own head, its logits about 0.5 from the student's."""
    data, g = _base(shape, dtype)
    noise = torch.randn(shape.V, shape.H, generator=g, device=data.hidden.device)
    weight = noise.mul_(0.5 / shape.H**0.5).add_(data.weight.detach()).to(dtype)
    return data._replace(teacher_hidden=data.hidden.detach().clone(), teacher_weight=weight)
