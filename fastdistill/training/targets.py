"""The targets of a batch: predicted tokens, their source positions and their sequences.

    B sequences · T positions · N targets · H hidden size

Everything after the student's forward works on the N targets alone: other positions reach neither
head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..hf.encoder import IGNORE_INDEX
from ..losses.types import TopK


class Targets(NamedTuple):
    """The N targets of a batch [B, T], in the order of positions."""

    sources: Tensor  # (N,) position that predicts the target, in the flattened batch
    rows: Tensor  # (N,) sequence of the target
    labels: Tensor  # (N,) token of the target
    shape: tuple[int, int]

    def gather(self, values: Tensor) -> Tensor:  # (B, T, ...) -> (N, ...)
        return values.flatten(0, 1)[self.sources]

    def gather_topk(self, answers: TopK) -> TopK:  # [B, T, K] -> [N, K]
        return answers.map(self.gather)

    def take(self, selected: Tensor) -> Targets:
        """Return the targets at indices (M,) or under a mask (N,)."""
        return Targets(
            self.sources[selected], self.rows[selected], self.labels[selected], self.shape
        )

    def per_row(self, values: Tensor) -> Tensor:  # (N,) -> (B,)
        """Return sums over the targets of each sequence; deterministic on GPUs too."""
        B, T = self.shape
        return values.new_zeros(B * T).index_copy(0, self.sources, values).view(B, T).sum(-1)


def targets_of(batch: Mapping[str, Tensor]) -> Targets:
    """Return the targets of a batch: position t predicts labels[t + 1] unless that is −100."""
    labels = batch["labels"]
    B, T = labels.shape
    counted = torch.zeros_like(labels, dtype=torch.bool)
    counted[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    sources = counted.view(-1).nonzero()[:, 0]
    rows = sources.div(T, rounding_mode="floor") if T else sources
    return Targets(sources, rows, labels.reshape(-1)[sources + 1], (B, T))
