"""Batches from token ids: padding is known by length, never by a token's value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True, kw_only=True)
class DistillCollator:
    """Pads examples to one length and aligns nothing: labels[:, t] is the token at position t.

    An example is a mapping with `input_ids`, and optionally `labels` (−100 where the token is no
    target; without them every token is a target) and `attention_mask`. Padded positions are taken
    from the lengths, so an end-of-text token that doubles as the padding token stays a target.
    The first token is predicted from nothing and is never a target; marking it here keeps every
    version of transformers counting the same targets.
    """

    pad_id: int = 0
    pad_to_multiple_of: int | None = None

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        rows = [_checked(example, index) for index, example in enumerate(examples)]
        length = max(len(ids) for ids, _, _ in rows)
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        input_ids = torch.full((len(rows), length), self.pad_id)
        labels = torch.full((len(rows), length), IGNORE_INDEX)
        attention_mask = torch.zeros((len(rows), length), dtype=torch.long)
        for row, (ids, targets, mask) in enumerate(rows):
            input_ids[row, : len(ids)] = ids
            labels[row, : len(ids)] = targets
            attention_mask[row, : len(ids)] = mask
        labels[:, 0] = IGNORE_INDEX
        labels[attention_mask == 0] = IGNORE_INDEX
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _checked(example: Mapping[str, Any], index: int) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(example, Mapping) or "input_ids" not in example:
        got = sorted(example) if isinstance(example, Mapping) else type(example).__name__
        raise ValueError(
            "train_dataset: expected dicts with input_ids (and optionally labels, "
            f"attention_mask), got {got}. Tokenise the text first"
        )
    ids = _row(example["input_ids"], "input_ids", index)
    labels = example.get("labels")
    mask = example.get("attention_mask")
    targets = ids.clone() if labels is None else _row(labels, "labels", index)
    attended = torch.ones_like(ids) if mask is None else _row(mask, "attention_mask", index)
    for name, column in (("labels", targets), ("attention_mask", attended)):
        if len(column) != len(ids):
            raise ValueError(
                f"{name}: expected {len(ids)} values, one per token of input_ids, "
                f"got {len(column)} (example {index} of the batch)"
            )
    return ids, targets, attended


def _row(values: Any, name: str, index: int) -> Tensor:
    row = torch.as_tensor(values)
    if row.dim() != 1 or row.numel() == 0:
        raise ValueError(
            f"{name}: expected a non-empty one-dimensional list of integers, got shape "
            f"{tuple(row.shape)} (example {index} of the batch)"
        )
    if row.is_floating_point():
        raise TypeError(
            f"{name}: expected integers, got {row.dtype} (example {index} of the batch)"
        )
    return row.long()
