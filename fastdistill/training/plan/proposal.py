"""Proposes settings that fit, by applying measures from the mildest to the most severe.

Measures accumulate until the run fits. Then measures that are not needed, or save nothing, are
removed, the most severe first.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from .memory import Planner, stored_dtype
from .types import Proposal, Settings

LORA_RANK = 16


class Measure(NamedTuple):
    name: str
    changes: dict[str, Any]


def propose(planner: Planner, start: Settings, card: int) -> Proposal:
    taken: list[Measure] = []
    best = planner.memory(start)
    for measure in () if best.needed <= card else measures(planner, start):
        others = [m for m in taken if m.changes.keys() != measure.changes.keys()]
        memory = planner.memory(_with(start, [*others, measure]))
        if memory.needed < best.needed:
            taken, best = [*others, measure], memory
        if best.needed <= card:
            break
    for measure in reversed(taken):
        fewer = [m for m in taken if m is not measure]
        memory = planner.memory(_with(start, fewer))
        if memory.needed <= max(card, best.needed):
            taken, best = fewer, memory
    return Proposal(
        memory=best,
        measures=tuple(measure.name for measure in taken),
        missing=max(0, best.needed - card),
    )


def measures(planner: Planner, start: Settings) -> Iterator[Measure]:
    """Yield the measures that apply, from those without cost to those that cost quality."""
    teacher_in_memory = planner.configs["teacher"] is not None and not start.cached
    if not start.gradient_checkpointing:
        yield Measure("gradient checkpointing", {"gradient_checkpointing": True})
    if start.backward != "recompute" and start.k is not None:
        yield Measure("loss recomputed in backward", {"backward": "recompute"})
    if teacher_in_memory and planner.packed is None and start.teacher_quant is None:
        for scheme in ("int8", "nf4"):
            yield Measure(f"teacher in {scheme}", {"teacher_quant": scheme})
    batch = start.batch
    while batch > 1:
        batch = next(b for b in range(batch // 2, 0, -1) if start.batch % b == 0)
        accumulation = start.accumulation * start.batch // batch
        yield Measure(
            f"micro-batches of {batch}, accumulated", {"batch": batch, "accumulation": accumulation}
        )
    if start.optim.startswith("adamw") and not start.optim.endswith("8bit"):
        yield Measure("8-bit optimizer", {"optim": "adamw_8bit"})
    if teacher_in_memory and start.stored_topk is not None:
        yield Measure("teacher's answers from a cache", {"cached": True})
    if start.lora_rank is None and importlib.util.find_spec("peft") is not None:
        stored = stored_dtype(planner.configs.get("student"))
        changes: dict[str, Any] = {"lora_rank": LORA_RANK}
        if start.dtype == "float32" and stored != start.dtype:
            # Weights that do not change keep their stored precision.
            changes["dtype"] = stored
        yield Measure(f"adapters of rank {LORA_RANK}", changes)


def _with(start: Settings, taken: list[Measure]) -> Settings:
    changes: dict[str, Any] = {}
    for measure in taken:
        changes |= measure.changes
    return replace(start, **changes)
