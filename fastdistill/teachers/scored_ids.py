"""The check of token ids that a teacher is to score."""

from __future__ import annotations

import torch
from torch import Tensor

from ..hf.row_reader import Rows
from ..runtime import checks, tensor_checks


def check_scored_ids(ids: Tensor, rows: Rows, vocab: int) -> None:
    """Raise unless ids are int [B, T, K] in −1..vocab − 1 at the attended positions of rows."""
    tensor_checks.tensor("ids", ids, tensor_checks.INTS)
    if ids.dim() != 3 or ids.shape[:2] != rows.shape or not ids.shape[2]:
        checks.fail("ids", f"shape {[*rows.shape, 'K']} with K ≥ 1", list(ids.shape))
    attended = ids.flatten(0, 1)[rows.where.to(ids.device)]
    if attended.numel():
        low, high = torch.stack(attended.aminmax()).tolist()
        if low < -1 or high >= vocab:
            expected = f"tokens in 0..{vocab - 1}, or −1 for an empty slot"
            checks.fail("ids", expected, low if low < -1 else high)
