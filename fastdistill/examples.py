"""From an example of a dataset to token ids and targets: messages, prompt + completion, text, ids.

    input_ids [T] · targets [T], the same ids with −100 where a token is no target · attended [T]

Nothing is shifted: targets[t] is input_ids[t] or −100.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
FORMS = "input_ids, messages, prompt and completion, or text"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Row(NamedTuple):
    """One sequence: int64 [T] each."""

    ids: Tensor
    targets: Tensor
    attended: Tensor


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Reads one example.

    - `input_ids`, and optionally `labels`, or a mask of the targets (`assistant_masks`, as chat
      templates return it, or `completion_mask`), and `attention_mask`. Without labels or mask every
      token is a target.
    - `messages`: a conversation, rendered by the tokenizer's chat template (with `tools` where the
      example has them). Targets are the assistant's turns.
    - `prompt` and `completion`: two texts, or two lists of messages. Targets are the completion,
      and after a text the end token. `prompt` alone has no target: it is for on-policy training.
    - `text`: every token is a target, the end token behind it too.

    Args:
        tokenizer: needed for all but input_ids.
        completion_only: False makes prompts and other turns targets as well.
        max_length: tokens beyond it are cut off.
    """

    tokenizer: Any = None
    completion_only: bool = True
    max_length: int | None = None

    def __call__(self, example: Mapping[str, Any], index: int = 0) -> Row:
        """`index` is named in errors: where in its batch or dataset the example is."""
        if not isinstance(example, Mapping):
            raise ValueError(
                f"train_dataset: expected dicts with {FORMS}, got {type(example).__name__}"
            )
        if "input_ids" in example:
            row = _from_ids(example, index)
        else:
            row = self._from_text(example)
        return row if self.max_length is None else Row(*(c[: self.max_length] for c in row))

    def _from_text(self, example: Mapping[str, Any]) -> Row:
        known = {"messages", "prompt", "text"} & example.keys()
        if not known:
            raise ValueError(f"train_dataset: expected dicts with {FORMS}, got {sorted(example)}")
        if self.tokenizer is None:
            raise ValueError(
                f"processing_class: expected the tokenizer, to read {sorted(known)}, got None. "
                "Pass processing_class, or a dataset with input_ids"
            )
        rendering = {"tools": example.get("tools"), **(example.get("chat_template_kwargs") or {})}
        if "messages" in example:
            ids, said = self._conversation(example["messages"], rendering)
        elif "prompt" in example:
            ids, said = self._completion(example["prompt"], example.get("completion"), rendering)
        else:
            ids = self._with_end(self.tokenizer(example["text"])["input_ids"])
            said = [True] * len(ids)
        if not ids:
            raise ValueError(f"{known.pop()}: expected at least one token, got an empty text")
        if not self.completion_only and any(said):
            said = [True] * len(ids)
        tokens = torch.tensor(ids, dtype=torch.int64)
        targets = torch.where(torch.tensor(said, dtype=torch.bool), tokens, IGNORE_INDEX)
        return Row(tokens, targets, torch.ones_like(tokens))

    def _completion(
        self, prompt: Any, completion: Any, rendering: Mapping[str, Any]
    ) -> tuple[list[int], list[bool]]:
        if not isinstance(prompt, str):
            if completion is not None:
                return self._conversation([*prompt, *completion], rendering, first=len(prompt))
            text = self._render(prompt, rendering, add_generation_prompt=True)
            ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            return ids, [False] * len(ids)
        ids = list(self.tokenizer(prompt)["input_ids"])
        if completion is None:
            return ids, [False] * len(ids)
        more = self._with_end(self.tokenizer(completion, add_special_tokens=False)["input_ids"])
        return ids + more, [False] * len(ids) + [True] * len(more)

    def _with_end(self, ids: Sequence[int]) -> list[int]:
        end = getattr(self.tokenizer, "eos_token_id", None)
        return [*ids] if end is None or (ids and ids[-1] == end) else [*ids, end]

    def _conversation(
        self, messages: Sequence[Any], rendering: Mapping[str, Any], first: int = 0
    ) -> tuple[list[int], list[bool]]:
        """Ids, and which of them the assistant says in turns from `first` on.

        A template with {% generation %} says so itself. Stock templates have none: there the text
        up to a turn, and up to its end, tells, as long as later turns leave earlier ones as they
        were.
        """
        template = str(getattr(self.tokenizer, "chat_template", None) or "")
        if first == 0 and _GENERATION.search(template):
            found = self.tokenizer.apply_chat_template(
                list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
                **rendering,
            )  # fmt: skip
            return list(found["input_ids"]), [bool(m) for m in found["assistant_masks"]]
        whole = self._render(messages, rendering)
        spans = []
        for i, message in enumerate(messages):
            if message.get("role") != "assistant" or i < first:
                continue
            before = self._render(messages[:i], rendering, add_generation_prompt=True)
            behind = self._render(messages[: i + 1], rendering)
            if not (whole.startswith(behind) and behind.startswith(before)):
                raise ValueError(
                    "messages: expected a chat template that leaves earlier turns as they are when "
                    f"others follow, but it renders turn {i} differently then (as Qwen3's drops "
                    "earlier thinking), so the assistant's tokens cannot be told. Pass prompt and "
                    "completion, or a chat template with {% generation %}"
                )
            spans.append((len(before), len(behind)))
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(
                "processing_class: expected a fast tokenizer, which knows where in a text a token "
                f"is, got {type(self.tokenizer).__name__}"
            )
        read = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        said = [
            any(start < end and low <= start and end <= high for low, high in spans)
            for start, end in read["offset_mapping"]
        ]
        return list(read["input_ids"]), said

    def _render(self, messages: Any, rendering: Mapping[str, Any], **options: Any) -> str:
        return self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, **options, **rendering
        )


def _from_ids(example: Mapping[str, Any], index: int) -> Row:
    ids = _column(example["input_ids"], "input_ids", index)
    attended = torch.ones_like(ids)
    if example.get("attention_mask") is not None:
        attended = _column(example["attention_mask"], "attention_mask", index, like=ids)
    if example.get("labels") is not None:
        return Row(ids, _column(example["labels"], "labels", index, like=ids), attended)
    for name in ("assistant_masks", "completion_mask"):
        if example.get(name) is not None:
            said = _column(example[name], name, index, like=ids).bool()
            return Row(ids, torch.where(said, ids, IGNORE_INDEX), attended)
    return Row(ids, ids.clone(), attended)


def _column(values: Any, name: str, index: int, like: Tensor | None = None) -> Tensor:
    row = torch.as_tensor(values)
    if row.dim() != 1 or row.numel() == 0:
        raise ValueError(
            f"{name}: expected a non-empty one-dimensional list of integers, got shape "
            f"{tuple(row.shape)} (example {index})"
        )
    if row.is_floating_point():
        raise TypeError(f"{name}: expected integers, got {row.dtype} (example {index})")
    if like is not None and len(row) != len(like):
        raise ValueError(
            f"{name}: expected {len(like)} values, one per token of input_ids, got {len(row)} "
            f"(example {index})"
        )
    return row.long()
