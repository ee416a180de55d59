"""The sequences of rows that another framework has packed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..hf.encoder import IGNORE_INDEX


def sequences_of(inputs: Mapping[str, Tensor], labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return the sequences of packed rows as a padded batch, and their positions in the rows.

    Args:
        inputs: input_ids [B, T]. position_ids [B, T], 0 where a sequence begins; without them, each
            row is one sequence. attention_mask [B, T], 0 at padding; without it, there is none.
        labels: [B, T], −100 where nothing is trained. Sequences without a target are left out.

    Returns:
        input_ids, attention_mask and labels [S, L] of S sequences, and [S, L], the index of each of
        their tokens in the flattened rows [B · T].
    """
    ids, places = inputs["input_ids"], inputs.get("position_ids")
    starts = torch.zeros_like(ids, dtype=torch.bool) if places is None else places == 0
    starts[:, 0] = True
    starts_at = starts.flatten().nonzero()[:, 0]
    lengths = torch.diff(starts_at, append=starts_at.new_tensor([ids.numel()])).tolist()
    sequence = starts.flatten().cumsum(0) - 1
    used = torch.zeros_like(starts_at, dtype=torch.bool)
    used[sequence[((labels != IGNORE_INDEX) & ~starts).flatten()]] = True
    used[0] = True  # so that a batch without targets has a sequence

    def padded(values: Tensor, filler: int) -> Tensor:
        parts = values.flatten().split(lengths)
        rows = [part for part, is_used in zip(parts, used.tolist(), strict=True) if is_used]
        return pad_sequence(rows, batch_first=True, padding_value=filler)

    mask = inputs.get("attention_mask")
    attended = torch.ones_like(ids) if mask is None else (mask != 0).long()
    batch = {
        "input_ids": padded(ids, 0),
        "attention_mask": padded(attended, 0),
        "labels": padded(labels, IGNORE_INDEX),
    }
    return batch, padded(torch.arange(ids.numel(), device=ids.device), 0)
