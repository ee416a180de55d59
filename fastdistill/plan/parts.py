"""Results of `plan_memory`, and their JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .shapes import Shapes


@dataclass(frozen=True, kw_only=True)
class Part:
    """Bytes of one kind, and what determines them."""

    name: str
    bytes: int
    how: str


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Peak bytes of one phase of an update."""

    name: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that the memory depends on, besides the two models."""

    seq: int
    batch: int = 1
    accumulation: int = 1
    k: int | None = 64
    dtype: str = "float32"
    optim: str = "adamw_torch_fused"
    gradient_checkpointing: bool = False
    backward: str = "auto"
    teacher_quant: str | None = None
    cached: bool = False
    lora_rank: int | None = None

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
        if self.teacher_quant is not None and not self.cached:
            lines.append(f"teacher_quant={self.teacher_quant}")
        if self.cached:
            lines.append("teacher=CACHE")
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
    teacher_weights: dict[str, int]  # in its own type, int8 and nf4
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
    def parts(self) -> tuple[Part, ...]:
        return self.memory.parts

    @property
    def fits(self) -> bool | None:
        """Whether the requested settings fit the card; None without a card."""
        return None if self.card is None else self.memory.needed <= self.card

    def as_json(self) -> dict[str, Any]:
        content = asdict(self) | {"fits": self.fits, "memory": _memory_to_json(self.memory)}
        if self.proposal is not None:
            content["proposal"] = {
                "memory": _memory_to_json(self.proposal.memory),
                "measures": list(self.proposal.measures),
                "missing": self.proposal.missing,
                "settings": self.proposal.memory.settings.lines(),
            }
        return content | {"assumptions": list(self.assumptions)}


def _memory_to_json(memory: Memory) -> dict[str, Any]:
    return {
        "settings": asdict(memory.settings),
        "parts": [asdict(part) for part in memory.parts],
        "phases": [asdict(phase) for phase in memory.phases],
        "peak": memory.peak,
        "allowance": memory.allowance,
        "needed": memory.needed,
    }
