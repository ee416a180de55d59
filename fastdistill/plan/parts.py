"""What a plan says: frozen results of `plan_memory`, and their JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .shapes import Shapes


@dataclass(frozen=True, kw_only=True)
class Part:
    """Bytes of one kind, and how they come about."""

    name: str
    bytes: int
    how: str


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Bytes that live at the peak of a part of one update."""

    name: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the memory depends on, beside the two models."""

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
        """key=value, as DistillConfig and the command line take them; CACHE is a folder that
        `fastdistill cache build` made."""
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
    """One update under some settings. `parts` do not add up to the peak: they are not all there at
    once. The peak is that of the largest phase."""

    settings: Settings
    parts: tuple[Part, ...]
    phases: tuple[Phase, ...]
    allowance: int  # outside torch's allocator, or lost in it; 0 on a CPU

    @property
    def peak(self) -> int:
        """What torch's allocator holds at most."""
        return max(phase.bytes for phase in self.phases)

    @property
    def needed(self) -> int:
        """What the device must have."""
        return self.peak + self.allowance

    @property
    def largest(self) -> Part:
        return max(self.parts, key=lambda part: part.bytes)


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """The first settings that fit, and the measures that led there; or the least that was reached,
    and what it still lacks."""

    memory: Memory
    measures: tuple[str, ...]
    missing: int  # bytes; 0 where it fits


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `plan_memory` found. Bytes throughout; None for what was not asked."""

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
        """Whether the settings as they were given fit the card; None without one."""
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
