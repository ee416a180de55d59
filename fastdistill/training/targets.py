"""Which tokens of a batch are predicted, from where, and in which sequence.

    B sequences · T positions · N targets · H hidden size

Everything behind the student's forward works on the N targets alone: positions that teach nothing
reach neither head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..examples import IGNORE_INDEX
from ..outputs import TopK


class Targets(NamedTuple):
    """The N targets of a batch [B, T] in the order of its positions."""

    sources: Tensor  # (N,) where each is predicted from, in the flattened batch
    rows: Tensor  # (N,) its sequence
    labels: Tensor  # (N,) its token
    shape: tuple[int, int]

    def gather(self, values: Tensor) -> Tensor:  # (B, T, ...) -> (N, ...)
        return values.flatten(0, 1)[self.sources]

    def gather_topk(self, answers: TopK) -> TopK:  # [B, T, K] -> [N, K]
        tail = None if answers.log_tail is None else self.gather(answers.log_tail)
        return TopK(
            self.gather(answers.ids), self.gather(answers.logprobs), tail, answers.temperature
        )

    def take(self, selected: Tensor) -> Targets:
        """Some of them: indices (M,) or a mask (N,)."""
        return Targets(
            self.sources[selected], self.rows[selected], self.labels[selected], self.shape
        )

    def per_row(self, values: Tensor) -> Tensor:  # (N,) -> (B,)
        """Sums over the targets of each sequence; the same bits every time, also on GPUs."""
        B, T = self.shape
        return values.new_zeros(B * T).index_copy(0, self.sources, values).view(B, T).sum(-1)


def targets_of(batch: Mapping[str, Tensor]) -> Targets:
    """Targets of a collated batch: position t predicts labels[t + 1] unless that is −100."""
    labels = batch["labels"]
    B, T = labels.shape
    counted = torch.zeros_like(labels, dtype=torch.bool)
    counted[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    sources = counted.view(-1).nonzero()[:, 0]
    rows = sources.div(T, rounding_mode="floor") if T else sources
    return Targets(sources, rows, labels.reshape(-1)[sources + 1], (B, T))
