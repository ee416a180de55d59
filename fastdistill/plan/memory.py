"""The memory of one update, by part and by phase, without loading student or teacher.

held      = student's weights + optimizer's state + teacher's weights and expanded layer
teacher   = held [+ gradients so far] + max(its layers, hidden states + top k) + answers
forward   = held + answers + peak of the body's forward pass      [gradients so far are in it]
loss      = held + answers + activations + what the loss holds
backward  = held + peak of the remaining activations and the gradients
update    = held + gradients + the optimizer's temporaries
peak      = the largest of these five
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..packing import CPU_TOKENS, FREE_SHARE, GPU_TOKENS, VALUES_PER_TOKEN
from . import head
from .optimisers import OptimizerMemory, optimizer_memory
from .parts import Memory, Part, Phase, Settings
from .rehearsal import Step, TeacherPass, head_shape, rehearse_step, rehearse_teacher
from .shapes import bytes_of, empty_model, quantized_size

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Memory outside torch's allocator: CUDA context, libraries and their workspaces, kernels.
CONTEXT = 700 * 10**6
# Share of the peak that the allocator loses to fragmentation.
FRAGMENTS = 0.05
_ID, _LOGPROB = 8, 4


def stored_dtype(config: Any, otherwise: str = "float32") -> str:
    """Return the name of the weight dtype in a config.json, or `otherwise`."""
    stored = getattr(config, "dtype", None)
    return next((name for name, dtype in DTYPES.items() if dtype == stored), otherwise)


class Planner:
    """Plans with two configurations on one device; runs every pass once without data.

    `card`: bytes of GPU memory; its free part limits the rows of a teacher's pass (BatchedForward).
    """

    def __init__(self, student: Any, teacher: Any, device: str, card: int | None) -> None:
        self.configs = {"student": student, "teacher": teacher}
        self.device, self.card = device, card

    @functools.cached_property
    def teacher(self) -> Any:
        config = self.configs["teacher"]
        return empty_model("teacher", config, DTYPES[stored_dtype(config, "bfloat16")])

    @functools.cache  # noqa: B019  a planner lives as long as one plan
    def student(self, dtype: str, lora_rank: int | None) -> Any:
        model = empty_model("student", self.configs["student"], DTYPES[dtype])
        return model if lora_rank is None else _adapted(model, lora_rank)

    def memory(self, settings: Settings) -> Memory:
        model = self.student(settings.dtype, settings.lora_rank)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = optimizer_memory(settings.optim, trained, self.device)
        step = self.step(settings)
        gradients = sum(p.nbytes for p in trained)
        accumulated = gradients if settings.accumulation > 1 else 0
        weights, expanded = self.teacher_weights(settings)
        held = bytes_of(model) + optimizer.state + weights + expanded
        answers, teacher_peak = self.answers(settings), 0
        if weights:
            teacher_peak = self.teacher_pass(settings, held + accumulated + answers)
        phases = {
            "teacher": held + accumulated + answers + teacher_peak,
            "forward": held + answers + step.forward,
            "loss": held + answers + step.loss,
            "backward": held + step.backward,
            "update": held + gradients + optimizer.scratch,
        }
        if not weights:
            del phases["teacher"]
        peak = max(phases.values())
        on_gpu = self.device == "cuda"
        return Memory(
            settings=settings,
            parts=_parts(settings, bytes_of(model), gradients, optimizer, step, accumulated)
            + _teacher_parts(settings, weights, expanded, teacher_peak, answers),
            phases=tuple(Phase(name=name, bytes=size) for name, size in phases.items()),
            allowance=CONTEXT + int(FRAGMENTS * peak) if on_gpu else 0,
        )

    def step(self, settings: Settings) -> Step:
        return self._step(
            settings.dtype,
            settings.lora_rank,
            settings.batch,
            settings.seq,
            settings.k,
            settings.backward,
            settings.gradient_checkpointing,
            settings.accumulation > 1,
        )

    @functools.cache  # noqa: B019
    def _step(
        self,
        dtype: str,
        lora_rank: int | None,
        batch: int,
        seq: int,
        k: int | None,
        backward: str,
        checkpointing: bool,
        accumulating: bool,
    ) -> Step:
        model = self.student(dtype, lora_rank)
        shape, N = head_shape(model, self.device), batch * (seq - 1)
        if k is None:
            work = head.dense(shape, head_shape(self.teacher, self.device), N)
        else:
            run = head.recomputed if backward == "recompute" else head.fused
            # Without a teacher, the loss has one empty slot in place of answers.
            topk_size = 1 if self.configs["teacher"] is None else min(k, shape.V)
            work = run(shape, N, topk_size + 1)
        return rehearse_step(
            "student",
            model,
            batch,
            seq,
            work,
            self.device,
            checkpointing=checkpointing,
            accumulating=accumulating,
        )

    def teacher_weights(self, settings: Settings) -> tuple[int, int]:
        """Return bytes of (weights, largest expanded layer); zeros without a teacher in memory."""
        if self.configs["teacher"] is None or settings.cached:
            return 0, 0
        if settings.teacher_quant is None:
            return bytes_of(self.teacher), 0
        size = quantized_size("teacher", self.teacher, settings.teacher_quant)
        return size.weights, size.expanded

    def teacher_pass(self, settings: Settings, held: int) -> int:
        """Return the peak of a teacher's pass: layers, or hidden states and head, of its rows."""
        shape = head_shape(self.teacher, self.device)
        tokens = self._tokens_in_pass(shape.H * shape.dtype.itemsize, held)
        rows = max(1, min(settings.batch, tokens // settings.seq))
        run = self._teacher_pass(rows, settings.seq)
        if settings.k is None:
            return run.forward + settings.batch * settings.seq * shape.H * shape.dtype.itemsize
        N = rows * settings.seq
        return max(run.forward, run.hidden + head.topk(shape, N, min(settings.k, shape.V)))

    def _tokens_in_pass(self, hidden_bytes: int, held: int) -> int:
        """Return BatchedForward's budget of tokens; on a GPU, from a share of the free memory."""
        if self.device == "cpu":
            return CPU_TOKENS
        free = GPU_TOKENS[1] * VALUES_PER_TOKEN * hidden_bytes / FREE_SHARE
        if self.card is not None:
            free = max(0, self.card - CONTEXT - held)
        fits = int(free * FREE_SHARE) // (VALUES_PER_TOKEN * hidden_bytes)
        return min(max(fits, GPU_TOKENS[0]), GPU_TOKENS[1])

    @functools.cache  # noqa: B019
    def _teacher_pass(self, rows: int, seq: int) -> TeacherPass:
        return rehearse_teacher("teacher", self.teacher, rows, seq, self.device)

    def answers(self, settings: Settings) -> int:
        """Return bytes of the answers: ids and log-probabilities, or hidden states, per target."""
        N = settings.batch * (settings.seq - 1)
        if self.configs["teacher"] is None:
            return N * (_ID + _LOGPROB)
        if settings.k is not None:
            return N * settings.k * (_ID + _LOGPROB)
        shape = head_shape(self.teacher, self.device)
        return N * shape.H * shape.dtype.itemsize


def _parts(
    settings: Settings,
    weights: int,
    gradients: int,
    optimizer: OptimizerMemory,
    step: Step,
    accumulated: int,
) -> tuple[Part, ...]:
    gradients_text = settings.dtype if settings.lora_rank is None else "adapters only"
    activations_text = (
        "gradient checkpointing" if settings.gradient_checkpointing else "no checkpointing"
    )
    recompute = settings.backward == "recompute" and settings.k is not None
    loss_text = "dense" if settings.k is None else "recompute" if recompute else "fused"
    return (
        Part(name="student weights", bytes=weights, how=settings.dtype),
        Part(name="gradients", bytes=gradients, how=gradients_text),
        Part(name="optimizer", bytes=optimizer.state + optimizer.scratch, how=settings.optim),
        Part(name="activations", bytes=step.activations - accumulated, how=activations_text),
        Part(name="head and loss", bytes=step.loss - step.activations, how=loss_text),
    )


def _teacher_parts(
    settings: Settings, weights: int, expanded: int, teacher_peak: int, answers: int
) -> tuple[Part, ...]:
    answers_text = "hidden states" if settings.k is None else f"top {settings.k} of every target"
    parts = (Part(name="answers", bytes=answers, how=answers_text),)
    if not weights:
        return parts
    quant = settings.teacher_quant or "as stored"
    return (
        Part(name="teacher weights", bytes=weights, how=quant),
        Part(
            name="teacher's pass",
            bytes=teacher_peak + expanded,
            how="layers or LM head, whichever is larger",
        ),
        *parts,
    )


def _adapted(model: Any, rank: int) -> Any:
    try:
        import peft
    except ImportError:
        raise ImportError("lora_rank: expected peft to be installed: pip install peft") from None
    config = peft.LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)
