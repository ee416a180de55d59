"""Peak memory of the loss in bytes, without the gradients that it returns.

The host code of the kernels runs on the meta device: it allocates what it allocates on a device,
and LiveMemory counts it. Products and kernels do nothing there, Triton is not imported, and a loop
over the vocabulary takes a few slabs (`vocabulary_slabs`). All tokens have labels, as in training.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels import dense_loss, lse_gather, topk_loss
from ...kernels import topk as topk_kernel
from ...kernels.backends import get_backend
from ...kernels.engines import Backend
from ...kernels.head import LMHead, Stats, needed, on_planned_gpu
from ...kernels.token_loss import (
    Gathered,
    LossOptions,
    TeacherTopK,
    entropy_of,
    lse_of,
    slot_ids,
    token_loss_forward,
)
from ...losses.arguments import to_teacher_rows
from ...losses.linear_head import answers_of
from ...losses.support import answers_on
from ...losses.types import SelectedLogits, TopK
from ...quant.matrix import QuantizedMatrix
from ...quant.schemes import Int8Weight
from .meta_memory import LiveMemory

_OPTIONS = LossOptions()


class HeadShape(NamedTuple):
    """Shape, dtype and device of an output head; kernels on a GPU choose chunks by its memory."""

    V: int
    H: int
    dtype: torch.dtype
    device: str  # "cpu" or "cuda"
    trained: bool = True  # whether the loss computes its gradient
    packed: bool = False  # a QuantizedMatrix
    gpu_memory: float = math.inf  # bytes

    def operands(self, N: int) -> tuple[LMHead, Tensor]:
        """Return the head and N hidden states, without data."""
        weight = torch.empty(self.V, self.H, dtype=self.dtype, device="meta")
        if self.packed:
            qdata, scale = weight.to(torch.int8), torch.empty(self.V, device="meta")
            codes = Int8Weight(shape=(self.V, self.H), block=self.H, qdata=qdata, scale=scale)
            weight = QuantizedMatrix(codes, self.dtype)
        return LMHead(weight), weight.new_empty(N, self.H)

    @contextmanager
    def counted(self, *tensors: Tensor) -> Iterator[LiveMemory]:
        """Context that counts what operations allocate beyond `tensors` on this device."""
        with on_planned_gpu(self.gpu_memory), LiveMemory(*tensors) as memory:
            yield memory

    @property
    def backend(self) -> Backend:
        return get_backend("triton" if self.device == "cuda" else "torch")

    @property
    def needed(self) -> dict[str, Any]:
        return needed((True, self.trained, False))


class LossMemory(NamedTuple):
    """Bytes inside the loss, without hidden states, weight, answers and returned gradients.

    `forward` may be reached before dW exists in its final type, and includes it.
    """

    forward: int
    backward: int


class SupportMemory(NamedTuple):
    """Bytes of a teacher's answers on a support, at the peak and afterwards; slots per token."""

    peak: int
    answers: int
    slots: int


@functools.cache
def fused(shape: HeadShape, N: int, k: int) -> LossMemory:
    """Return the memory of the fused loss of N tokens with k answers each."""
    (head, x), answers = shape.operands(N), _Answers.empty(N, k)
    with shape.counted(head.weight, x, *answers) as memory, torch.no_grad():
        ids, teacher = answers.slots()
        out = topk_loss.fused(
            shape.backend,
            head,
            x,
            ids,
            teacher,
            answers.labels,
            answers.coef,
            _OPTIONS,
            base=False,
            entropy=True,
            **shape.needed,
            device_type=shape.device,
        )
    return LossMemory(memory.peak - _bytes(out.dx), 0)


@functools.cache
def recomputed(shape: HeadShape, N: int, k: int) -> LossMemory:
    """Return the memory of the loss that recomputes the logits in its backward pass."""
    (head, x), answers = shape.operands(N), _Answers.empty(N, k)
    with shape.counted(head.weight, x, *answers) as memory:
        ids, teacher = answers.slots()
        with torch.no_grad():
            stats = lse_gather.lse_gather(shape.backend, head, x, ids, moment=True, base=False)
        leaves = [t.requires_grad_() for t in stats if t is not None]
        loss = _token_losses(stats, ids, teacher, answers)
        forward, memory.peak = memory.peak, memory.now
        upstream = torch.autograd.grad(loss, leaves, materialize_grads=True)
        with torch.no_grad():
            dx, dw, _ = shape.backend.recompute(
                head,
                x,
                ids,
                stats,
                Stats._make((*upstream, None)),
                **shape.needed,
                hidden_type=x.dtype,
            )
    return LossMemory(forward, memory.peak - _bytes(dx, dw))


@functools.cache
def dense(shape: HeadShape, teacher_shape: HeadShape, N: int) -> LossMemory:
    """Return the memory of the loss of N tokens with the whole vocabulary of a teacher."""
    (head, x), (teacher, y) = shape.operands(N), teacher_shape.operands(N)
    coef = _empty(N)
    with shape.counted(head.weight, x, teacher.weight, y, coef) as memory, torch.no_grad():
        out = dense_loss.dense(
            shape.backend,
            head,
            x,
            dense_loss.DenseTeacher(teacher, y),
            None,
            coef,
            _OPTIONS,
            **shape.needed,
            device_type=shape.device,
        )
    return LossMemory(memory.peak - _bytes(out.dx), 0)


@functools.cache
def topk(shape: HeadShape, N: int, k: int) -> int:
    """Return the memory of a top k of N tokens, with the answers."""
    head, x = shape.operands(N)
    with shape.counted(head.weight, x) as memory, torch.no_grad():
        topk_kernel.topk(shape.backend, head, x, k, (1.0,))
    peak: int = memory.peak
    return peak


@functools.cache
def on_support(
    shape: HeadShape, teacher_shape: HeadShape, N: int, k: int, support: str
) -> SupportMemory:
    """Return the memory of a teacher's answers on a support that needs the student's top k."""
    (head, x), (teacher, y) = shape.operands(N), teacher_shape.operands(N)

    def best(shape: HeadShape, head: LMHead, x: Tensor) -> TopK:
        return TopK(*topk_kernel.topk(shape.backend, head, x, k, (1.0,))[0])

    def logprobs_at(ids: Tensor) -> TopK:
        run = lse_gather.lse_gather
        stats = run(teacher_shape.backend, teacher, y, ids, moment=False, base=False)
        lse = lse_of(stats.z_ids, stats.lse_rest, ids >= 0)
        return answers_of(ids, SelectedLogits(stats.z_ids, stats.lse_rest, None, lse), 1.0)

    with shape.counted(head.weight, x, teacher.weight, y) as memory, torch.no_grad():
        answers = answers_on(
            support,
            teacher_topk=lambda: best(teacher_shape, teacher, y),
            student_topk=lambda: best(shape, head, x),
            logprobs_at=logprobs_at,
        )
    return SupportMemory(memory.peak, _bytes(*answers[:3]), answers.ids.shape[-1])


class _Answers(NamedTuple):
    """A teacher's answers to N tokens, their labels and their factors in the sum."""

    ids: Tensor  # [N, k]
    logprobs: Tensor  # [N, k]
    log_tail: Tensor  # [N]
    labels: Tensor  # [N]
    coef: Tensor  # [N]

    @classmethod
    def empty(cls, N: int, k: int) -> _Answers:
        return cls(
            _empty(N, k, dtype=torch.int64),
            _empty(N, k),
            _empty(N),
            _empty(N, dtype=torch.int64),
            _empty(N),
        )

    def slots(self) -> tuple[Tensor, TeacherTopK]:
        """Return the ids, with those of the labels, and the answers for the kernels."""
        teacher = to_teacher_rows(TopK(*self[:3]), _OPTIONS).teacher
        return slot_ids(teacher.ids, self.labels), teacher


def _token_losses(stats: Stats, ids: Tensor, teacher: TeacherTopK, answers: _Answers) -> Tensor:
    """Return the summed loss; its statistics are computed, too, as in gradient_paths.recomputed."""
    gathered = Gathered(stats.z_ids, stats.lse_rest, None)
    rows = token_loss_forward(gathered, teacher, answers.labels, _OPTIONS)
    assert stats.mean_rest is not None
    unique = ids >= 0
    lse = lse_of(stats.z_ids, stats.lse_rest, unique)
    entropy_of(stats.z_ids, stats.lse_rest, stats.mean_rest, lse, unique)
    return (answers.coef * rows.per_token).sum()


def _empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.nbytes for t in tensors if t is not None)
