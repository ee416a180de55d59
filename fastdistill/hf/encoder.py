"""Encodes dataset examples (messages, prompt and completion, text, ids) as ids and targets.

    ids [T] · targets [T], the same ids with −100 where a token is no target · attention_mask [T]

Nothing is shifted: targets[t] is ids[t] or −100.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..runtime.checks import fail, integer
from .chat import ChatRenderer, turn_end
from .columns import (
    MASKS,
    TEACHER_PROMPT,
    check_columns,
    check_integers,
    check_mask,
    check_positions,
)
from .images import ImageInputs
from .tokenized import append_end, tokenize, tokenize_pair
from .tokenizers import with_chat_template

IGNORE_INDEX = -100


class EncodedExample(NamedTuple):
    """One encoded example: int64 [T] each.

    `prompt`: how many of the first tokens are the prompt of an on-policy student. None: all tokens
    before the first target, or the whole row if there are none. `images`: tensors of a processor.
    """

    ids: Tensor
    targets: Tensor
    attention_mask: Tensor
    prompt: int | None = None
    images: Mapping[str, Tensor] | None = None

    def truncate(self, length: int | None) -> EncodedExample:
        """Return the row cut to its first `length` attended tokens; padding does not count."""
        attended = self.attention_mask.nonzero()[:, 0].tolist()
        if length is None or len(attended) <= length:
            return self
        return self.first_tokens(attended[length])

    def first_tokens(self, length: int) -> EncodedExample:
        """Return the first `length` tokens, attended or not."""
        prompt = self.prompt if self.prompt is None else min(self.prompt, length)
        return EncodedExample(
            self.ids[:length],
            self.targets[:length],
            self.attention_mask[:length],
            prompt,
            self.images,
        )

    @property
    def prompt_length(self) -> int:
        """The number of prompt tokens at the front."""
        if self.prompt is not None:
            return self.prompt
        attended = self.attention_mask.nonzero()[:, 0].tolist()
        is_counted = (self.targets != IGNORE_INDEX) & (self.attention_mask != 0)
        counted = is_counted.nonzero()[:, 0].tolist()
        if not counted or counted[0] == attended[0]:
            return len(self.ids)
        return int(counted[0])


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Encodes one example.

    - `input_ids`, and optionally `labels`, masks of the targets (`assistant_masks`, as chat
      templates return it, `completion_mask`), and `attention_mask`. Without labels or mask every
      token is a target. With several of them a token must be a target in each. A vision model
      also reads pixel_values and the other tensors of its processor (images.py).
    - `messages`: a conversation, rendered by the tokenizer's chat template (with the example's
      `tools` and `chat_template_kwargs`, if any). Targets are the assistant turns.
    - `prompt` and `completion`: two texts, or two lists of messages. Targets are the completion,
      and after a text the end token. The texts are tokenized together, and a token with characters
      of both is a target. `prompt` alone has no target: it is for on-policy training.
    - `text`: every token is a target, including the end token.

    `teacher_prompt` beside messages or a prompt is a text or messages, as the prompt is: the
    teacher reads it instead of the prompt, and the same answer after it.

    The first of these forms whose column is not None is read. Other columns raise an error unless
    they are text or single values (see columns.py). The tokenizer's tokens for the beginning and
    end of a text occur once, around the whole.

    Args:
        tokenizer: needed for all forms but input_ids.
        completion_only: False makes prompts and other turns targets as well.
        max_length: tokens beyond it are cut off.
        chat_template: used instead of the tokenizer's: a path or the text of a template.
        template_tokens: False leaves out what the template writes before an answer, as an empty
            block of thinking.
        images: the tensors that the student reads with the ids. Placeholder tokens are not targets.
    """

    tokenizer: Any = None
    completion_only: bool = True
    max_length: int | None = None
    chat_template: str | Path | None = None
    template_tokens: bool = True
    images: ImageInputs = field(default_factory=ImageInputs)

    def __post_init__(self) -> None:
        integer("max_length", self.max_length, 1, optional=True)
        tokenizer = with_chat_template(self.tokenizer, self.chat_template)
        object.__setattr__(self, "tokenizer", tokenizer)

    def __call__(
        self, example: Mapping[str, Any], index: int = 0, dataset: str = ""
    ) -> EncodedExample:
        """Return the row of an example, cut at max_length.

        Args:
            example: see above.
            index, dataset: the position of the example in which dataset or batch, for errors. An
                example of JsonLines names its line instead.
        """
        row = self.encode_uncut(example, index, dataset)
        cut = row.truncate(self.max_length)
        if row.images and self.images.is_placeholder(row.ids[len(cut.ids) :]).any():
            hint = "raise it, set it to None, or leave the row out"
            got = f"{self.max_length} in the middle of one (example {index})"
            fail("max_length", "room for the images of a row", got, hint)
        return cut

    def encode_uncut(
        self, example: Mapping[str, Any], index: int = 0, dataset: str = ""
    ) -> EncodedExample:
        """Return the row of an example without cutting it."""
        try:
            form, columns = check_columns(example, self.images.columns)
            if form == "input_ids":
                row = _from_ids(columns)
                if "attention_mask" not in columns:
                    self._check_padding(row.ids, row.targets)
            else:
                row = self._from_text(form, columns)
            return self._with_images(row, columns if form == "input_ids" else {})
        except (ValueError, TypeError) as error:
            place = getattr(example, "source", None)
            if place is None:
                place = f"example {index}" + (f" of {dataset}" if dataset else "")
            raise type(error)(f"{error} ({place})") from None

    def _with_images(self, row: EncodedExample, columns: Mapping[str, Any]) -> EncodedExample:
        images = self.images.read(columns, row.ids)
        if not images:
            return row
        is_text = ~self.images.is_placeholder(row.ids)
        targets = torch.where(is_text, row.targets, IGNORE_INDEX)
        return row._replace(targets=targets, images=images)

    def teacher_prompt(self, example: Mapping[str, Any]) -> Tensor | None:
        """Return the ids (P,) of `teacher_prompt`, up to the answer; None without the column."""
        _, columns = check_columns(example, self.images.columns)
        prompt = columns.get(TEACHER_PROMPT)
        if prompt is None:
            return None
        if not self.completion_only:
            hint = "the teacher does not read the student's prompt"
            fail(TEACHER_PROMPT, "completion_only_loss=True with it", "False", hint)
        rendering = {name: columns[name] for name in ("tools", "chat_template_kwargs")}
        others = {name: value for name, value in rendering.items() if value}
        row = self.encode_uncut({"prompt": prompt, **others})
        if not len(row.ids):
            fail(TEACHER_PROMPT, "at least one token", "an empty text")
        return row.ids

    def _from_text(self, form: str, columns: Mapping[str, Any]) -> EncodedExample:
        if self.tokenizer is None:
            fail(
                "processing_class",
                f"the tokenizer, to read [{form!r}]",
                None,
                "pass processing_class, or a dataset with input_ids",
            )
        prompt: int | None = None
        if form == "text":
            text = tokenize(self.tokenizer, columns["text"], "text", (), special=True)
            ids = [*text.before, *append_end(self.tokenizer, text, self._ends)]
            targets = [True] * len(ids)
        elif isinstance(columns[form], str):
            ids, targets = self._texts(columns["prompt"], columns.get("completion"))
        else:
            ids, targets = self._conversation(form, columns)
        if not ids:
            fail(form, "at least one token", "an empty text")
        if form != "text":
            prompt = targets.index(True) if any(targets) else len(ids)
        if not self.completion_only and any(targets):
            targets = [True] * len(ids)
        tokens = torch.tensor(ids, dtype=torch.int64)
        labels = torch.where(torch.tensor(targets, dtype=torch.bool), tokens, IGNORE_INDEX)
        return EncodedExample(tokens, labels, torch.ones_like(tokens), prompt)

    def _conversation(self, form: str, columns: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
        """Encode messages; without an answer, up to the start of the assistant's next turn."""
        messages, column, first = columns[form], form, 0
        has_answer = any(message["role"] == "assistant" for message in messages)
        if form == "prompt":
            has_answer = "completion" in columns
            if has_answer:
                column, first = "prompt and completion", len(messages)
                messages = [*messages, *columns["completion"]]
        rendering = {"tools": columns["tools"], **columns["chat_template_kwargs"]}
        chat = ChatRenderer(self.tokenizer, column, rendering, self.template_tokens)
        if has_answer:
            return chat.encode(messages, first)
        text, _ = chat.render(messages, prompt=True)
        ids = tokenize(self.tokenizer, text, column, (), special=False).ids
        return ids, [False] * len(ids)

    def _texts(self, prompt: str, completion: str | None) -> tuple[list[int], list[bool]]:
        if completion is None:
            tokens = tokenize(self.tokenizer, prompt, "prompt", (), special=True)
            return [*tokens.before, *tokens.ids], [False] * (len(tokens.before) + len(tokens.ids))
        tokens = tokenize_pair(self.tokenizer, prompt, completion)
        # An empty completion always gets an end token.
        ended = append_end(self.tokenizer, tokens, self._ends if completion else None)
        ends = [True] * (len(ended) - len(tokens.ids))
        return [*tokens.before, *ended], [False] * len(tokens.before) + tokens.inside + ends

    @property
    def _ends(self) -> list[int]:
        ends = (getattr(self.tokenizer, "eos_token_id", None), turn_end(self.tokenizer))
        return [end for end in ends if end is not None]

    def _check_padding(self, ids: Tensor, targets: Tensor) -> None:
        """Raise ValueError for a row without attention_mask whose padding would be trained on.

        Two or more padding tokens at one end count as padding. A single one may be text: its end
        token, or a sampled id. In a padded dataset some row has two.
        """
        pad = getattr(self.tokenizer, "pad_token_id", None)
        if pad is None:
            return
        words = (ids != pad).nonzero()[:, 0].tolist()
        first, last = (words[0], words[-1]) if words else (len(ids), len(ids))
        counted = targets != IGNORE_INDEX
        left = first if first > 1 else 0
        right = len(ids) - 1 - last
        learned = counted[last + 2 :].any() or not counted.any()
        if left or (right > 1 and learned):
            fail(
                "input_ids",
                "attention_mask with padded ids",
                f"{max(left, right)} times the padding token (id {pad}) at the "
                f"{'beginning' if left else 'end'} of the row and no attention_mask",
                "pass attention_mask, as the tokenizer returns it, or leave the padding to the "
                "trainer; if the token is part of the text, pass a mask of ones",
            )


def is_listed(dataset: Any) -> bool:
    """Whether dataset[i] is an example; not so for dicts and pandas tables."""
    listed = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    return listed and not isinstance(dataset, (Mapping, str)) and not hasattr(dataset, "iloc")


def check_example(example: Any) -> None:
    """Raise ValueError or TypeError for an invalid example, without tokenizing it."""
    form, columns = check_columns(example)
    if form == "input_ids":
        _from_ids(columns)


def _from_ids(columns: Mapping[str, Any]) -> EncodedExample:
    ids = check_integers("input_ids", columns["input_ids"])
    if (ids < 0).any():
        fail("input_ids", "token ids of 0 or more", int(ids.min()))
    attended = torch.ones_like(ids)
    if "attention_mask" in columns:
        attended = check_mask("attention_mask", columns["attention_mask"], ids)
        if not attended.any():
            fail("attention_mask", "1 for at least one token", f"0 for all {len(ids)}")
    targets = ids.clone()
    if "labels" in columns:
        targets = check_integers("labels", columns["labels"], ids)
        if ((targets < 0) & (targets != IGNORE_INDEX)).any():
            fail("labels", f"token ids of 0 or more, or {IGNORE_INDEX}", int(targets.min()))
    for name in MASKS:
        if name in columns:
            mask = check_mask(name, columns[name], ids)
            targets = torch.where(mask != 0, targets, IGNORE_INDEX)
    check_positions(columns, ids, attended)
    return EncodedExample(ids, torch.where(attended != 0, targets, IGNORE_INDEX), attended)
