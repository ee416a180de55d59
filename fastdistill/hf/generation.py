"""Greedy generation, independent of a checkpoint's stored generation settings.

transformers fills settings that a call leaves open from the checkpoint's. Here every module of the
model has the call's settings instead: every field has transformers' default unless it is an
argument below.

Rows are left-padded and generated in batches if a trial shows that the model's logits do not depend
on padding. Otherwise each row is generated alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ..runtime import checks
from ..runtime.printable import printable
from .chat import end_ids, is_mark
from .lm_head import evaluating, generation_settings
from .positions import RowLimit, check_new_tokens, check_room, respects_padding

# (indices of a batch's rows, its width) -> logits processors of the batch.
Processors = Callable[[list[int], int], Sequence[LogitsProcessor]]

_MAX_IDS = 2**31  # more than tokenizers can decode
_RESPECTS_PADDING: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@torch.no_grad()
def generate_rows(
    model: Any,
    rows: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    pad_id: int,
    ends: Sequence[int],
    device: torch.device,
    processors: Processors | None = None,
    synced: bool = False,
    limit: RowLimit | None = None,
    shorten: bool = True,
) -> list[list[int]]:
    """Return the new tokens of each row, up to and including its first end token.

    Decoding is greedy, after `processors` changed the scores. No row depends on another.

    Args:
        rows: token ids, at least one each.
        pad_id: pads shorter rows. ends: ids that end a row.
        device: of the input ids.
        processors: of each batch.
        synced: other processes generate at the same time and must take as many steps.
        limit: the longest row that the model reads; generation stops there. None: no limit.
        shorten: False raises ValueError for rows that reach `limit` before `max_new_tokens`.

    Raises:
        ValueError: a row as long as `limit`, which leaves no room for a new token; a row that must
            not be shortened; or a model that does not respect padding with `synced`, which needs
            batches.
    """
    check_room(limit, rows)
    if limit is not None and (synced or not shorten):
        for i, row in enumerate(rows):
            check_new_tokens(limit, len(row), max_new_tokens, f" (row {i})")
    longest = max(map(len, rows), default=0)
    max_length = longest + max_new_tokens if limit is None else limit.tokens
    new: list[list[int]] = [[] for _ in rows]
    for batch in _batches(model, rows, synced, max_length - max_new_tokens):
        width = max(len(rows[i]) for i in batch)
        settings = GenerationConfig(
            max_new_tokens=min(max_new_tokens, max_length - width),
            do_sample=False,
            num_beams=1,
            pad_token_id=pad_id,
            eos_token_id=sorted(ends) or None,
        )
        ids = torch.full((len(batch), width), pad_id)
        mask = torch.zeros_like(ids)
        for at, i in enumerate(batch):
            ids[at, width - len(rows[i]) :] = torch.as_tensor(rows[i])
            mask[at, width - len(rows[i]) :] = 1
        with evaluating(model), generation_settings(model, settings):
            out = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=settings,
                logits_processor=LogitsProcessorList(
                    [] if processors is None else processors(batch, width)
                ),
                synced_gpus=synced,
            )
        for i, row in zip(batch, out[:, width:].tolist(), strict=True):
            length = next((n for n, token in enumerate(row, 1) if token in ends), len(row))
            new[i] = row[:length]
    return new


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """Return all ids that end a text or a turn.

    They come from the model's generation settings, the tokenizer, and its chat template.

    Raises:
        ValueError: the model's settings contain an invalid token id.
    """
    declared = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if not isinstance(declared, (list, tuple)):
        declared = [declared]
    ids = [token for token in (*declared, *end_ids(tokenizer)) if token is not None]
    for token in ids:
        if type(token) is not int or not 0 <= token < _MAX_IDS:
            checks.fail("generation_config.eos_token_id", "token ids", printable(repr(token)))
    return sorted(set(ids))


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids of a tokenizer's special tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    ids = {i for i, token in added.items() if getattr(token, "special", False)}
    return ids | set(getattr(tokenizer, "all_special_ids", None) or ())


def ordinary_ends(ends: Sequence[int], tokenizer: Any) -> list[int]:
    """Return the ends that may occur in text: neither special tokens nor marks such as <end>."""
    special = special_ids(tokenizer)
    return [i for i in ends if i not in special and not is_mark(tokenizer.decode([i]))]


def can_batch(model: nn.Module) -> bool:
    """Whether rows may be generated in batches; measured once per model."""
    if model not in _RESPECTS_PADDING:
        _RESPECTS_PADDING[model] = respects_padding(model)
    return _RESPECTS_PADDING[model]


def _batches(
    model: nn.Module, rows: Sequence[Sequence[int]], synced: bool, whole: int
) -> list[list[int]]:
    """Return batches of row indices: rows of at most `whole` tokens, and longer ones by length.

    Longer rows reach the limit before max_new_tokens, so their batch ends earlier.
    """
    each = [[i] for i in range(len(rows))]
    if len(rows) < 2 and not synced:
        return each
    if can_batch(model):
        groups: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault(max(len(row), whole), []).append(i)
        return list(groups.values())
    if synced:
        checks.fail(
            "model",
            "one that respects padding, since processes generate together",
            type(model).__name__,
            "its logits of a row depend on the batch. Generate without sharded weights",
        )
    return each
