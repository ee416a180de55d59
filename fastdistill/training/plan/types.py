"""Settings and results of `plan_memory`, and their JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ...losses.support import SUPPORTS
from ...quant.schemes import SCHEMES
from ...runtime import checks
from .optimisers import OPTIMIZERS
from .shapes import Shapes

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Part:
    """Bytes of one kind, and what determines them."""

    name: str
    bytes: int
    how: str


@dataclass(frozen=True)
class Phase:
    """Peak bytes of one phase of an update."""

    name: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that the memory depends on, besides the two models.

    Args:
        seq: tokens per row. batch: rows per micro-batch; several rows are assumed to be of unequal
            length. accumulation: micro-batches per update.
        k: number of the teacher's answers per position; None compares the whole vocabulary.
        support: "teacher", "student" or "union", as in training. With the last two the answers are
            those of a teacher in memory at the ids that the student chooses.
        dtype: type of the student's weights, gradients and activations: "bfloat16", "float16",
            "float32". None is the trainer's default: "float32", or with lora_rank the stored
            dtype.
        optim: adamw_torch_fused, adamw_torch, adamw_8bit (adamw_bnb_8bit) or sgd.
        gradient_checkpointing, backward, lora_rank: as in training.
        teacher_quant: nf4, fp4, int4 or int8. cached: answers come from a cache, and no teacher is
            in memory.

    Raises:
        ValueError: an invalid setting.
    """

    seq: int
    batch: int = 1
    accumulation: int = 1
    k: int | None = 64
    dtype: str | None = None
    optim: str = "adamw_torch_fused"
    gradient_checkpointing: bool = False
    backward: str = "auto"
    teacher_quant: str | None = None
    cached: bool = False
    lora_rank: int | None = None
    support: str = "teacher"

    def __post_init__(self) -> None:
        checks.integer("seq", self.seq, 2)
        checks.integer("batch", self.batch, 1)
        checks.integer("accumulation", self.accumulation, 1)
        checks.integer("k", self.k, 1, optional=True)
        checks.integer("lora_rank", self.lora_rank, 1, optional=True)
        checks.choice("dtype", self.dtype, (*DTYPES, None))
        checks.choice("optim", self.optim, OPTIMIZERS)
        checks.choice("backward", self.backward, ("auto", "fused", "recompute"))
        checks.choice("teacher_quant", self.teacher_quant, (*SCHEMES, None))
        checks.choice("support", self.support, SUPPORTS)
        if self.support != "teacher" and (self.k is None or self.cached):
            settings = "k=None" if self.k is None else "cached"
            hint = "leave support out"
            checks.fail("support", f"'teacher' with {settings}", repr(self.support), hint)

    @property
    def stored_topk(self) -> int | None:
        """The answers per target that are stored until the loss; None: hidden states are stored."""
        return self.k if self.support == "teacher" else None

    def lines(self) -> list[str]:
        """Return lines of key=value for DistillConfig and the command line.

        CACHE stands for a folder that `fastdistill cache build` creates.
        """
        lines = [
            f"max_length={self.seq}",
            f"per_device_train_batch_size={self.batch}",
            f"gradient_accumulation_steps={self.accumulation}",
            f"k={'null' if self.k is None else self.k}",
            f"optim={self.optim}",
            f"gradient_checkpointing={str(self.gradient_checkpointing).lower()}",
            f"backward={self.backward}",
            f"dtype={self.dtype}",
        ]
        if self.support != "teacher":
            lines.append(f"support={self.support}")
        if self.cached:
            lines.append("teacher=CACHE")
        elif self.teacher_quant is not None:
            lines.append(f"teacher_quant={self.teacher_quant}")
        if self.lora_rank is not None:
            lines.append(f"lora_rank={self.lora_rank}")
        return lines


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of one update with some settings.

    The peak is that of the largest phase. It is not the sum of `parts`, which do not all exist at
    the same time.
    """

    settings: Settings
    parts: tuple[Part, ...]
    phases: tuple[Phase, ...]
    allowance: int  # outside torch's allocator, or fragmentation; 0 on a CPU

    @property
    def peak(self) -> int:
        """Peak memory in torch's allocator."""
        return max(phase.bytes for phase in self.phases)

    @property
    def needed(self) -> int:
        """Memory that the device must have."""
        return self.peak + self.allowance

    @property
    def largest(self) -> Part:
        return max(self.parts, key=lambda part: part.bytes)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"peak": self.peak, "needed": self.needed}


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """The first settings that fit with the measures applied, or those closest to fitting."""

    memory: Memory
    measures: tuple[str, ...]
    missing: int  # bytes; 0 if it fits


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The result of `plan_memory`, in bytes; None for values that were not requested."""

    student: Shapes
    teacher: Shapes | None
    memory: Memory
    activations: dict[str, int]  # of the body: "kept", and "checkpointed"
    teacher_weights: dict[str, int]  # in its own type, int8 and nf4; or as stored, if quantized
    cache_per_token: int | None
    cache: int | None
    seconds: float | None
    card: int | None
    proposal: Proposal | None
    assumptions: tuple[str, ...]

    @property
    def peak(self) -> int:
        return self.memory.peak

    @property
    def fits(self) -> bool | None:
        """Whether the requested settings fit the card; None without a card."""
        return None if self.card is None else self.memory.needed <= self.card

    def as_json(self) -> dict[str, Any]:
        content = asdict(self) | {"fits": self.fits, "memory": self.memory.as_json()}
        if self.proposal is not None:
            content["proposal"] |= {
                "memory": self.proposal.memory.as_json(),
                "settings": self.proposal.memory.settings.lines(),
            }
        return content
