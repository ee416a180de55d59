"""A teacher that reads the student's own weights: for privileged prompts and for LoRA students."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from ..hf.lm_head import LMHead, evaluating
from ..hf.row_reader import BatchedForward
from ..losses.types import TopK
from ..runtime import checks
from ..teachers.local import Teacher
from .student import is_adapted, without_adapters

WEIGHTS = ("live", "ema", "adapter_off")
AVERAGES = "self_teacher.safetensors"  # in a checkpoint


class SelfTeacher(Teacher):
    """A teacher that reads the student's own weights, in evaluation mode.

        live: θ_teacher = θ      ema: θ_teacher ← decay · θ_teacher + (1 − decay) · θ per update

    With the column `teacher_prompt`, the teacher reads a prompt that the student does not see.

    Args:
        weights: "live" reads the current weights; "ema" their exponential moving average, for which
            it holds a copy of the trained weights (of the adapters, for a LoRA student);
            "adapter_off" reads a student with adapters without them, which is the model that it
            started from.
        decay: of "ema", between 0 and 1.

    Raises:
        ValueError: another value of weights or decay.

    Example:
        DistillTrainer(student, SelfTeacher(), args, train_dataset=rows)  # or teacher="self"
    """

    def __init__(self, weights: str = "live", *, decay: float = 0.999) -> None:
        checks.choice("weights", weights, WEIGHTS)
        checks.between("decay", decay, 0.0, 1.0)
        self.weights, self.decay = weights, decay
        self.averages: dict[str, Tensor] = {}
        self._student: Any = None
        self.frozen = ()
        self.impl, self.valid_vocab, self.quant, self.source = "auto", None, None, None

    def attach(self, student: nn.Module, tokenizer: Any, impl: str = "auto") -> None:
        """Read the weights of this student; DistillTrainer calls it.

        Raises:
            ValueError: "adapter_off" and a student without adapters.
        """
        if self.weights == "adapter_off" and not is_adapted(student):
            hint = "pass peft_config, or SelfTeacher('live')"
            checks.fail("teacher", "a student with adapters for 'adapter_off'", "none", hint)
        self._student, self.tokenizer, self.impl = student, tokenizer, impl
        self.model = without_adapters(student)
        if self.weights == "ema":
            self.averages = {name: p.detach().clone() for name, p in self._trained()}
        with self._reading():
            self.reader = BatchedForward(self.model)

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((n, p) for n, p in self._student.named_parameters() if p.requires_grad)

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages toward the student's weights; without effect unless "ema"."""
        for name, parameter in self._trained() if self.averages else ():
            self.averages[name].lerp_(parameter, 1.0 - self.decay)

    def save(self, folder: str | Path) -> None:
        """Write the averages into the folder of a checkpoint."""
        if self.averages:
            save_file(self.averages, Path(folder, AVERAGES))

    def load(self, folder: str | Path) -> None:
        """Read the averages of a checkpoint.

        Raises:
            ValueError: it has none, or those of another student.
        """
        if not self.averages:
            return
        path = Path(folder, AVERAGES)
        stored = load_file(path) if path.exists() else {}
        if {n: t.shape for n, t in stored.items()} != {
            n: t.shape for n, t in self.averages.items()
        }:
            expected = f"{AVERAGES} with the averages of this student's weights"
            checks.fail("resume_from_checkpoint", expected, f"{len(stored)} others in {folder}")
        for name, average in self.averages.items():
            average.copy_(stored[name])

    @property
    def name(self) -> str:
        return f"the student itself ({self.weights.replace('_', ' ')})"

    @property
    def head(self) -> LMHead:
        head = super().head
        bias = None if head.bias is None else head.bias.detach()
        return head._replace(weight=head.weight.detach(), bias=bias)

    def topk_at(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
        *,
        k: int,
        temperatures: Sequence[float],
        where: Tensor | None = None,  # (B, T) bool
        images: Mapping[str, Tensor] | None = None,
    ) -> list[TopK]:  # [B, T, K] each
        with self._reading():
            return super().topk_at(
                input_ids,
                attention_mask,
                k=k,
                temperatures=temperatures,
                where=where,
                images=images,
            )

    def logprobs_at(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None,  # (B, T)
        ids: Tensor,  # (B, T, K)
        *,
        temperature: float = 1.0,
    ) -> TopK:  # [B, T, K]
        with self._reading():
            return super().logprobs_at(input_ids, attention_mask, ids, temperature=temperature)

    def hidden(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
        *,
        images: Mapping[str, Tensor] | None = None,
    ) -> Tensor:  # (B, T, H)
        with self._reading():
            return super().hidden(input_ids, attention_mask, images=images)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Context in which the student is in evaluation mode and has the teacher's weights."""
        if self._student is None:
            hint = "pass it to DistillTrainer as teacher"
            checks.fail("teacher", "a SelfTeacher with a student", "one without", hint)
        with evaluating(self._student):
            if self.weights == "adapter_off":
                with self._student.disable_adapter():
                    yield
            else:
                self._swap()
                try:
                    yield
                finally:
                    self._swap()

    def _swap(self) -> None:
        """Exchange the memory of the trained weights and their averages, if any."""
        for name, parameter in self._trained() if self.averages else ():
            parameter.data, self.averages[name] = self.averages[name], parameter.data


class FollowStudent(TrainerCallback):
    """Updates the averages of a SelfTeacher after each step of the optimizer."""

    def __init__(self, teacher: SelfTeacher) -> None:
        self.teacher = teacher

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.teacher.update()
