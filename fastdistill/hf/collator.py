"""Collates examples into batches; padding is determined by length, never by token value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..runtime.checks import fail
from .columns import TEACHER_PROMPT
from .encoder import IGNORE_INDEX, EncodedExample, Encoder
from .positions import RowLimit, attended_length


@dataclass(frozen=True, kw_only=True)
class DistillCollator:
    """Pads examples on the right, without shifting: labels[:, t] is the token at position t.

    See `Encoder` for the accepted examples. Tokens with attention_mask 0 on the left or in the
    middle are moved to the end first: positions count attended tokens in every model and layout,
    and unattended tokens are neither read nor learned. Padding is determined by length, so an
    end-of-text token that is also the padding token stays a target. The first token of a row has
    no context and is never a target; masking it here gives every version of transformers the same
    number of targets.
    """

    pad_id: int = 0
    pad_to_multiple_of: int | None = None
    encoder: Encoder = field(default_factory=Encoder)
    # Whether batches have a prompt_mask, for on-policy training.
    prompts: bool = False
    # Adds entries to a batch, such as cached teacher answers.
    more: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    # The row limits of student and teacher.
    limits: tuple[RowLimit, ...] = ()
    # The columns that the teacher reads: batch["columns"] has their values, a list for each.
    columns: tuple[str, ...] = ()
    # Whether a teacher reads the rows, with the prompts of the column teacher_prompt.
    teacher_prompts: bool = False

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        rows = [
            attended_first(self.encoder(example, index, "its batch"))
            for index, example in enumerate(examples)
        ]
        for index, row in enumerate(rows):
            for limit in self.limits:
                limit.check(attended_length(row), "input_ids", index)
        widest = min((limit.tokens for limit in self.limits), default=None)
        batch: dict[str, Any] = padded(
            rows, self.pad_id, self.pad_to_multiple_of, prompts=self.prompts, widest=widest
        )
        if any(row.images for row in rows):
            tensors = [row.images or {} for row in rows]
            batch["images"] = self.encoder.images.joined(tensors, batch["input_ids"])
        if self.more is not None:
            batch |= self.more(batch)
        if self.teacher_prompts:
            batch |= self._teacher_prompts(examples, rows)
        if not self.columns:
            return batch
        return batch | {"columns": {name: self._column(name, examples) for name in self.columns}}

    def _teacher_prompts(
        self, examples: Sequence[Mapping[str, Any]], rows: Sequence[EncodedExample]
    ) -> dict[str, Tensor]:
        """Return teacher_prompt_ids and teacher_prompt_mask [B, P], and answer_start [B].

        A row without the column has its own prompt there.
        """
        prompts = [self.encoder.teacher_prompt(example) for example in examples]
        if all(prompt is None for prompt in prompts):
            return {}
        if self.more is not None:
            hint = "its answers are for the prompts of the student"
            fail(TEACHER_PROMPT, "no such column with a cache or a MappedTeacher", "one", hint)
        parts = [
            row.ids[: row.prompt_length] if prompt is None else prompt
            for row, prompt in zip(rows, prompts, strict=True)
        ]
        return {
            "teacher_prompt_ids": pad_sequence(parts, batch_first=True, padding_value=self.pad_id),
            "teacher_prompt_mask": pad_sequence([torch.ones_like(x) for x in parts], True),
            "answer_start": torch.tensor([row.prompt_length for row in rows]),
        }

    def _column(self, name: str, examples: Sequence[Mapping[str, Any]]) -> list[Any]:
        for index, example in enumerate(examples):
            if example.get(name) is None:
                place = getattr(example, "source", f"example {index} of its batch")
                fail(name, "a value in every example, which the teacher reads", f"none ({place})")
        return [example[name] for example in examples]


def attended_first(row: EncodedExample) -> EncodedExample:
    """Return the row with its unattended tokens moved to the end."""
    attended = row.attention_mask != 0
    order = torch.sort((~attended).byte(), stable=True).indices
    prompt = int(attended[: row.prompt_length].sum())
    return EncodedExample(
        row.ids[order], row.targets[order], row.attention_mask[order], prompt, row.images
    )


def padded(
    rows: Sequence[EncodedExample],
    pad_id: int,
    multiple_of: int | None = None,
    *,
    prompts: bool = False,
    widest: int | None = None,
) -> dict[str, Tensor]:
    """Return input_ids, attention_mask and labels (−100: no target), int64 [B, T].

    `prompts` adds prompt_mask: 1 for the tokens from which an on-policy student continues.
    `widest`: padding beyond it is cut off, since the model has no more positions.
    """
    length = max(len(row.ids) for row in rows)
    if multiple_of:
        length = -(-length // multiple_of) * multiple_of
    if widest is not None and length > widest:
        length = widest
        rows = [row.first_tokens(widest) for row in rows]
    device = rows[0].ids.device
    input_ids = torch.full((len(rows), length), pad_id, device=device)
    labels = torch.full((len(rows), length), IGNORE_INDEX, device=device)
    attention_mask = torch.zeros((len(rows), length), dtype=torch.long, device=device)
    for i, row in enumerate(rows):
        input_ids[i, : len(row.ids)] = row.ids
        labels[i, : len(row.ids)] = row.targets
        attention_mask[i, : len(row.ids)] = row.attention_mask
    labels[:, 0] = IGNORE_INDEX
    labels[attention_mask == 0] = IGNORE_INDEX
    labels[:, 1:][attention_mask[:, :-1] == 0] = IGNORE_INDEX
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    if prompts:
        lengths = torch.tensor([row.prompt_length for row in rows], device=device)
        within = torch.arange(length, device=device) < lengths[:, None]
        batch["prompt_mask"] = within.long() * attention_mask
    return batch
