"""Leaves out the targets at which a teacher with another tokenizer has no answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..hf.encoder import IGNORE_INDEX, Encoder
from ..hf.token_map import TokenMap
from ..runtime import checks
from ..teachers.mapped import MappedTeacher
from .checks.dataset import some_of


@dataclass(frozen=True)
class SharedTargets:
    """Leaves out the targets of a batch whose position only one tokenizer has.

    Can be pickled for workers: the teacher is left out.
    """

    token_map: TokenMap
    longest_row: int | None

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        shared = self.token_map.shared_positions(ids, mask, self.longest_row)
        return leave_out(batch["labels"], ~shared)


def shared_targets(teacher: Any) -> SharedTargets | None:
    """Return what leaves out targets of a batch; None for a teacher of the student's tokenizer."""
    if not isinstance(teacher, MappedTeacher):
        return None
    return SharedTargets(teacher.token_map, teacher.longest_row)


def leave_out(labels: Tensor, positions: Tensor) -> dict[str, Tensor]:
    """Return labels [B, T] without the targets after these positions (B, T), and their number.

    The number is `unaligned`, [B].
    """
    dropped = torch.zeros_like(labels, dtype=torch.bool)
    dropped[:, 1:] = positions[:, :-1] & (labels[:, 1:] != IGNORE_INDEX)
    return {"labels": labels.masked_fill(dropped, IGNORE_INDEX), "unaligned": dropped.sum(-1)}


def mapped_sums(teacher: Any, batch: Mapping[str, Tensor], targets: int) -> dict[str, Tensor]:
    """Return the sums from which `aligned` and `mapped_mass` are logged; none if not mapped."""
    if "unaligned" not in batch:
        return {}
    unaligned = batch["unaligned"].sum().float()
    sums = {"unaligned": unaligned}
    if isinstance(teacher, MappedTeacher):
        mass, positions = teacher.last_mass if targets else (0.0, 0)
        sums |= {
            "mapped_mass": unaligned.new_tensor(mass),
            "mapped_positions": unaligned.new_tensor(positions),
        }
    return sums


def check_shares_targets(teacher: Any, encoder: Encoder, datasets: Mapping[str, Any]) -> None:
    """Raise ValueError if the tokenizers share no position of a target in a sample of examples."""
    leaves_out = shared_targets(teacher)
    if leaves_out is None:
        return
    for name, dataset in datasets.items():
        rows = [encoder(example, index) for index, example in some_of(dataset)]
        before = after = 0
        for row in rows:
            batch = {"input_ids": row.ids, "attention_mask": row.attention_mask}
            batch = {key: x[None] for key, x in (batch | {"labels": row.targets}).items()}
            before += int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
            after += int((leaves_out(batch)["labels"][:, 1:] != IGNORE_INDEX).sum())
        if before and not after:
            checks.fail(
                name,
                "targets at which both tokenizers have a boundary",
                f"none of {before:,} in {len(rows):,} examples",
                "check that processing_class is the tokenizer of these ids, and use another pair",
            )
