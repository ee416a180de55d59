"""Batches from examples: padding is known by length, never by a token's value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .examples import IGNORE_INDEX, Encoder, Row
from .positions import RowLimit, attended_length


@dataclass(frozen=True, kw_only=True)
class DistillCollator:
    """Pads examples on the right and aligns nothing: labels[:, t] is the token at position t.

    What an example may be is said at `Encoder`. Tokens that an example's attention_mask leaves out,
    on the left or in the middle, are moved behind the others first: positions count attended tokens
    in every model and every layout, and what is not attended is neither read nor learned. Padded
    positions are taken from the lengths, so an end-of-text token that doubles as the padding token
    stays a target. A first token is predicted from nothing and is never a target; marking it here
    keeps every version of transformers counting the same targets.
    """

    pad_id: int = 0
    pad_to_multiple_of: int | None = None
    encoder: Encoder = field(default_factory=Encoder)
    # Whether batches say which tokens are prompts (prompt_mask), for a student that samples.
    prompts: bool = False
    # What else belongs to a batch: the answers of a teacher that lie on disk.
    more: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    # The longest rows that student and teacher read.
    limits: tuple[RowLimit, ...] = ()

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        rows = [
            attended_first(self.encoder(example, index, "its batch"))
            for index, example in enumerate(examples)
        ]
        for index, row in enumerate(rows):
            for limit in self.limits:
                limit.check(attended_length(row), "input_ids", index)
        widest = min((limit.tokens for limit in self.limits), default=None)
        batch = padded(
            rows, self.pad_id, self.pad_to_multiple_of, prompts=self.prompts, widest=widest
        )
        return batch if self.more is None else batch | self.more(batch)


def attended_first(row: Row) -> Row:
    """The row with what its attention mask leaves out at its end."""
    attended = row.attended != 0
    order = torch.sort((~attended).byte(), stable=True).indices
    prompt = int(attended[: row.prompt_length].sum())
    return Row(row.ids[order], row.targets[order], row.attended[order], prompt)


def padded(
    rows: Sequence[Row],
    pad_id: int,
    multiple_of: int | None = None,
    *,
    prompts: bool = False,
    widest: int | None = None,
) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels, int64 [B, T]; −100 wherever no token is predicted.

    With `prompts` also prompt_mask: 1 for the tokens that a student which samples continues from.
    `widest`: padding beyond it is cut off, since a model reads no more positions.
    """
    length = max(len(row.ids) for row in rows)
    if multiple_of:
        length = -(-length // multiple_of) * multiple_of
    if widest is not None and length > widest:
        length = widest
        rows = [row.slots(widest) for row in rows]
    device = rows[0].ids.device
    input_ids = torch.full((len(rows), length), pad_id, device=device)
    labels = torch.full((len(rows), length), IGNORE_INDEX, device=device)
    attention_mask = torch.zeros((len(rows), length), dtype=torch.long, device=device)
    for i, row in enumerate(rows):
        input_ids[i, : len(row.ids)] = row.ids
        labels[i, : len(row.ids)] = row.targets
        attention_mask[i, : len(row.ids)] = row.attended
    labels[:, 0] = IGNORE_INDEX
    labels[attention_mask == 0] = IGNORE_INDEX
    labels[:, 1:][attention_mask[:, :-1] == 0] = IGNORE_INDEX
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    if prompts:
        lengths = torch.tensor([row.prompt_length for row in rows], device=device)
        within = torch.arange(length, device=device) < lengths[:, None]
        batch["prompt_mask"] = within.long() * attention_mask
    return batch
