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
from dataclasses import replace
from typing import Any

from ...hf.row_reader import CPU_TOKENS, FREE_SHARE, GPU_TOKENS, VALUES_PER_TOKEN
from ...runtime.optional import require
from . import loss_memory as head
from .meta_step import Step, TeacherPass, head_shape, rehearse_step, rehearse_teacher
from .optimisers import optimizer_memory
from .shapes import QuantizedSize, bytes_of, empty_model, packed_size, quantized_size
from .types import DTYPES, Memory, Part, Phase, Settings

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

    `card`: bytes of GPU memory; it limits the chunks of the loss, and its free part the rows of a
    teacher's pass (BatchedForward).
    `packed`: the quantized teacher as it is stored, of load_shapes, or None.
    """

    def __init__(
        self, student: Any, teacher: Any, device: str, card: int | None, packed: Any = None
    ) -> None:
        self.configs = {"student": student, "teacher": teacher}
        self.device, self.card, self.packed = device, card, packed

    @functools.cached_property
    def teacher(self) -> Any:
        config = self.configs["teacher"]
        return empty_model("teacher", config, DTYPES[stored_dtype(config, "bfloat16")])

    def teacher_of(self, settings: Settings) -> Any:
        """Return the teacher that the run holds: as stored, or as loaded before teacher_quant."""
        is_packed = self.packed is not None and settings.teacher_quant is None
        return self.packed if is_packed else self.teacher

    def head_shape(self, model: Any) -> head.HeadShape:
        return head_shape(model, self.device, self.card)

    @functools.cache  # noqa: B019  a planner lives as long as one plan
    def student(self, dtype: str | None, lora_rank: int | None) -> Any:
        model = empty_model("student", self.configs["student"], DTYPES[dtype or "float32"])
        if lora_rank is None:
            return model
        peft = require("peft", "lora_rank", "'fastdistill[peft]'")
        adapters = peft.LoraConfig(r=lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
        return peft.get_peft_model(model, adapters)

    def memory(self, settings: Settings) -> Memory:
        model = self.student(settings.dtype, settings.lora_rank)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = optimizer_memory(settings.optim, trained, self.device)
        step = self.step(settings)
        gradients = sum(p.nbytes for p in trained)
        accumulated = gradients if settings.accumulation > 1 else 0
        teacher = self.teacher_weights(settings)
        held = bytes_of(model) + optimizer.state + teacher.weights + teacher.expanded
        answers = self.answers(settings)
        parts = [
            Part("student weights", bytes_of(model), settings.dtype or "float32"),
            Part(
                "gradients",
                gradients,
                "adapters only" if settings.lora_rank is not None else settings.dtype or "float32",
            ),
            Part("optimizer", optimizer.state + optimizer.scratch, settings.optim),
            Part(
                "activations",
                step.activations - accumulated,
                f"{'gradient' if settings.gradient_checkpointing else 'no'} checkpointing",
            ),
            Part("head and loss", step.loss - step.activations, _loss_text(settings)),
        ]
        phases = []
        if teacher.weights:
            before = held + accumulated + answers
            teacher_pass = self.teacher_pass(settings, before)
            phases.append(Phase("teacher", before + teacher_pass))
            parts += [
                Part("teacher weights", teacher.weights, settings.teacher_quant or "as stored"),
                Part(
                    "teacher's pass",
                    teacher_pass + teacher.expanded,
                    "layers or LM head, whichever is larger",
                ),
            ]
        answers_text = (
            "hidden states" if settings.stored_topk is None else f"top {settings.k} of every target"
        )
        parts.append(Part("answers", answers, answers_text))
        phases += [
            Phase("forward", held + answers + step.forward),
            Phase("loss", held + answers + step.loss),
            Phase("backward", held + step.backward),
            Phase("update", held + gradients + optimizer.scratch),
        ]
        peak = max(phase.bytes for phase in phases)
        return Memory(
            settings=settings,
            parts=tuple(parts),
            phases=tuple(phases),
            allowance=CONTEXT + int(FRAGMENTS * peak) if self.device == "cuda" else 0,
        )

    def step(self, settings: Settings) -> Step:
        """Return the memory of a micro-batch; settings that it ignores do not run it again."""
        accumulation = min(settings.accumulation, 2)
        same = replace(settings, optim="sgd", cached=False)
        if settings.stored_topk is not None:
            same = replace(same, teacher_quant=None)
        return self._step(replace(same, accumulation=accumulation))

    @functools.cache  # noqa: B019
    def _step(self, settings: Settings) -> Step:
        model = self.student(settings.dtype, settings.lora_rank)
        shape, N = self.head_shape(model), settings.batch * (settings.seq - 1)
        if settings.k is None:
            work = head.dense(shape, self.head_shape(self.teacher_of(settings)), N)
        else:
            run = head.recomputed if settings.backward == "recompute" else head.fused
            # Without a teacher, the loss has one empty slot in place of answers.
            topk_size = 1 if self.configs["teacher"] is None else min(settings.k, shape.V)
            if settings.support == "teacher":
                work = run(shape, N, topk_size)
            else:
                of_teacher = self.head_shape(self.teacher_of(settings))
                support = head.on_support(shape, of_teacher, N, topk_size, settings.support)
                work = _after(
                    support, run(shape, N, support.slots), N * shape.H * shape.dtype.itemsize
                )
        return rehearse_step(model, settings, work, self.device)

    def teacher_weights(self, settings: Settings) -> QuantizedSize:
        """Return bytes of weights and the largest expanded layer; 0 without a teacher in memory."""
        if self.configs["teacher"] is None or settings.cached:
            return QuantizedSize(weights=0, expanded=0)
        if settings.teacher_quant is None:
            if self.packed is not None:
                return packed_size(self.packed)
            return QuantizedSize(weights=bytes_of(self.teacher), expanded=0)
        return quantized_size(self.teacher, settings.teacher_quant)

    def teacher_pass(self, settings: Settings, held: int) -> int:
        """Return the peak of a teacher's pass: layers, or hidden states and head, of its rows."""
        teacher = self.teacher_of(settings)
        shape = self.head_shape(teacher)
        hidden_bytes = shape.H * shape.dtype.itemsize
        tokens = self._tokens_in_pass(hidden_bytes, held)
        rows = max(1, min(settings.batch, tokens // settings.seq))
        run = self._teacher_pass(teacher, rows, settings.seq)
        if settings.stored_topk is None:
            return run.forward + settings.batch * settings.seq * hidden_bytes
        N = rows * settings.seq
        k = min(settings.stored_topk, shape.V)
        return max(run.forward, run.hidden + head.topk(shape, N, k))

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
    def _teacher_pass(self, teacher: Any, rows: int, seq: int) -> TeacherPass:
        return rehearse_teacher(teacher, rows, seq, self.device)

    def answers(self, settings: Settings) -> int:
        """Return bytes of the answers: ids and log-probabilities, or hidden states, per target."""
        N = settings.batch * (settings.seq - 1)
        if self.configs["teacher"] is None:
            return N * (_ID + _LOGPROB)
        if settings.stored_topk is not None:
            return N * settings.stored_topk * (_ID + _LOGPROB)
        shape = self.head_shape(self.teacher)
        return N * shape.H * shape.dtype.itemsize


def _after(support: head.SupportMemory, work: head.LossMemory, dx: int) -> head.LossMemory:
    """Return the memory of a loss with that of the answers before it.

    meta_step.py allocates dX of a fused loss in addition, so the peak of the answers excludes it.
    """
    before = support.peak if work.backward else support.peak - dx
    return work._replace(forward=max(before, support.answers + work.forward))


def _loss_text(settings: Settings) -> str:
    if settings.k is None:
        return "dense"
    way = "recompute" if settings.backward == "recompute" else "fused"
    return way if settings.support == "teacher" else f"{way}, support {settings.support}"
