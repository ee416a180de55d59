"""Runs a training step and a teacher's pass on tensors without data to measure their memory.

The model's own forward, backward and gradient checkpointing run; the loss is a stand-in with the
memory of loss_memory.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...hf.lm_head import LMHead, evaluating, head_module, hidden_states
from ...quant.matrix import QuantizedMatrix
from ..student import student_at_head, without_adapters
from ..targets import Targets
from .loss_memory import HeadShape, LossMemory
from .meta_memory import MemoryTracker
from .types import Settings


@dataclass(frozen=True, kw_only=True)
class Step:
    """Bytes of one micro-batch, without weights and optimizer.

    activations: memory that the body keeps for its backward pass, at the head.
    forward, loss, backward: peaks of the three phases. gradients: memory that remains at the end.
    """

    activations: int
    forward: int
    loss: int
    backward: int
    gradients: int


@dataclass(frozen=True, kw_only=True)
class TeacherPass:
    """Bytes of a teacher's pass: the peak in its layers, and the final hidden states."""

    forward: int
    hidden: int


def head_shape(model: Any, device: str, card: int | None) -> HeadShape:
    """Return the shape of a model's head on a device; card: bytes of the GPU, None if unknown."""
    weight = head_module(without_adapters(model)).weight
    assert isinstance(weight, Tensor)
    V, H = weight.shape
    packed = isinstance(weight, QuantizedMatrix)
    memory = math.inf if card is None or device == "cpu" else card
    return HeadShape(V, H, weight.dtype, device, weight.requires_grad, packed, memory)


def rehearse_step(model: Any, settings: Settings, work: LossMemory, device: str) -> Step:
    """Run one micro-batch [batch, seq] through a student on the meta device; return its memory.

    All tokens are targets. With accumulation, gradients of an earlier micro-batch exist.

    Raises:
        ValueError: the model cannot run without the values of its inputs.
    """
    model.train()
    base_model = without_adapters(model)
    marks: dict[str, int] = {}
    tracker = MemoryTracker(model, device, padded=settings.batch > 1)

    if settings.gradient_checkpointing:
        options = {"use_reentrant": False, "context_fn": tracker.in_recomputation}
        _checkpointing(base_model, "enable", options)

    def use(hidden: Tensor, head: LMHead) -> Tensor:
        marks["activations"], marks["forward"] = tracker.now, tracker.peak()
        loss: Tensor = _Loss.apply(hidden, head.weight, work)  # type: ignore[no-untyped-call]
        marks["loss"] = tracker.peak()
        return loss

    try:
        with tracker:
            ids = torch.zeros(settings.batch, settings.seq, dtype=torch.int64, device="meta")
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            at = torch.zeros(settings.batch * (settings.seq - 1), dtype=torch.int64, device="meta")
            targets = Targets(at, at, at, (settings.batch, settings.seq))
            if settings.accumulation > 1:
                for p in model.parameters():
                    p.grad = torch.empty_like(p) if p.requires_grad else None
            with student_at_head(base_model, inputs, targets, use) as student_inputs:
                loss = model(**student_inputs)
            # Tensor.backward would be intercepted and run without the modes.
            torch.autograd.backward(loss)
            del loss, inputs, targets, ids, at
            marks["backward"], marks["gradients"] = tracker.peak(), tracker.now
    except (RuntimeError, NotImplementedError) as error:
        raise _impossible("student", model, error) from None
    finally:
        model.zero_grad()
        if settings.gradient_checkpointing:
            _checkpointing(base_model, "disable")
            base_model.disable_input_require_grads()
    return Step(**marks)


def rehearse_teacher(model: Any, rows: int, seq: int, device: str) -> TeacherPass:
    """Run rows of equal length through a teacher on the meta device; return their memory."""
    tracker = MemoryTracker(model, device, padded=False)
    try:
        with tracker, torch.no_grad(), evaluating(model):
            ids = torch.zeros(rows, seq, dtype=torch.int64, device="meta")
            size = hidden_states(model, ids).nbytes
    except (RuntimeError, NotImplementedError) as error:
        raise _impossible("teacher", model, error) from None
    return TeacherPass(forward=tracker.peak(), hidden=size)


class _Loss(torch.autograd.Function):
    """Allocates gradients of the same size, and at the same time, as the loss."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, work: LossMemory) -> Tensor:
        ctx.work = work
        grads: tuple[Tensor | None, ...] = ()
        # new_empty allocates what the loss holds, which is freed at once.
        if work.backward:
            hidden.new_empty(work.forward, dtype=torch.uint8)
        else:
            dx = torch.empty_like(hidden)
            hidden.new_empty(work.forward, dtype=torch.uint8)
            # dW is summed in the memory just freed, and then has its own type.
            grads = (dx, torch.empty_like(weight) if weight.requires_grad else None)
        ctx.save_for_backward(hidden, weight, *grads)
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, *grads = ctx.saved_tensors
        if not grads:
            grads = [torch.empty_like(hidden)]
            grads.append(torch.empty_like(weight) if ctx.needs_input_grad[1] else None)
            hidden.new_empty(ctx.work.backward, dtype=torch.uint8)
        return (*grads, None)


def _checkpointing(model: Any, change: str, *options: Any) -> None:
    """Change gradient checkpointing, under its name in this version of transformers."""
    name = f"activation_checkpointing_{change}"
    if not hasattr(model, name):
        name = f"gradient_checkpointing_{change}"
    getattr(model, name)(*options)


def _impossible(role: str, model: nn.Module, error: Exception) -> ValueError:
    first = str(error).strip().partition("\n")[0]
    return ValueError(
        f"{role}: expected a model whose memory can be counted without weights, but "
        f"{type(without_adapters(model)).__name__} cannot run on tensors without data ({first}). "
        "Measure a short run instead: torch.cuda.max_memory_allocated()"
    )
