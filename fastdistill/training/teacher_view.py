"""The rows of a batch as the teacher reads them: with its own prompts, and columns of the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..hf.encoder import IGNORE_INDEX
from .targets import Targets


class TeacherView(NamedTuple):
    """What a teacher reads, and where in it the student's targets are."""

    input_ids: Tensor  # (B, T')
    attention_mask: Tensor  # (B, T')
    targets: Targets  # sources are positions in input_ids
    options: dict[str, Any]  # more arguments of the teacher: `columns`, `images`

    @property
    def labels(self) -> Tensor:
        """The targets [B, T'] after each position; −100 elsewhere."""
        following = torch.full_like(self.input_ids, IGNORE_INDEX)
        following.view(-1)[self.targets.sources] = self.targets.labels
        return following


def teacher_view(teacher: Any, batch: Mapping[str, Any], targets: Targets) -> TeacherView:
    """Return the rows that the teacher reads: [teacher's prompt, the student's answer] or the same.

    The answer begins at answer_start of the batch, or at the first target (of a sampled batch).
    """
    options: dict[str, Any] = {}
    if getattr(teacher, "columns", ()):
        options["columns"] = batch["columns"]
    if "images" in batch:
        options["images"] = batch["images"]
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if "teacher_prompt_ids" not in batch:
        return TeacherView(ids, mask, targets, options)
    B, T = targets.shape
    lengths = mask.sum(-1).tolist()
    starts = _answer_starts(batch).tolist()
    prompt_lengths = batch["teacher_prompt_mask"].sum(-1)
    rows = [
        torch.cat([prompt[:p], row[start:end]])
        for prompt, p, row, start, end in zip(
            batch["teacher_prompt_ids"], prompt_lengths.tolist(), ids, starts, lengths, strict=True
        )
    ]
    spliced = pad_sequence(rows, batch_first=True)
    attended = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    shift = (prompt_lengths.to(ids.device) - torch.tensor(starts, device=ids.device))[targets.rows]
    position = targets.sources - targets.rows * T + shift
    sources = targets.rows * spliced.shape[1] + position
    return TeacherView(
        spliced, attended, targets._replace(sources=sources, shape=(B, spliced.shape[1])), options
    )


def _answer_starts(batch: Mapping[str, Tensor]) -> Tensor:
    if "answer_start" in batch:
        return batch["answer_start"]
    counted = batch["labels"] != IGNORE_INDEX
    return torch.where(counted.any(-1), counted.int().argmax(-1), batch["attention_mask"].sum(-1))
