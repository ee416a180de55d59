"""Generation from a causal language model by settings that are all ours.

A checkpoint brings generation settings of its own, and transformers fills whatever a call leaves
open from them. Here no module of the model has any but the call's: every field that there is, or
will be, is at transformers' default unless it is an argument below.

Rows are padded on the left and generated from together, if a trial shows that the model gives a row
the same logits so. Otherwise they are generated from one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from . import checks
from .chat import end_ids, is_mark
from .heads import evaluating, generation_settings
from .positions import RowLimit, check_new_tokens, check_room, respects_padding
from .runtime.printable import printable

# (indices of a batch's rows, its width) -> what changes the scores of its next tokens.
Processors = Callable[[list[int], int], Sequence[LogitsProcessor]]

_MOST_IDS = 2**31  # more than tokenizers can decode
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
    """New tokens of each row, up to its first end, which is included.

    The likeliest token is taken each time, after `processors` changed the scores. What a row gets
    depends on no other row.

    Args:
        rows: token ids, one or more each.
        pad_id: fills rows that are shorter than their neighbors. ends: ids that end a row.
        device: of the input ids.
        processors: of each batch.
        synced: other processes generate at the same time and must take as many steps.
        limit: the longest row that the model reads, where a row ends at the latest; None: no limit.
        shorten: False refuses rows that `limit` would end before `max_new_tokens`.

    Raises:
        ValueError: a row as long as `limit`, behind which nothing can be generated; one that may
            not be shortened; the model does not respect padding, and `synced` allows no batches
            of one.
    """
    check_room(limit, rows)
    if limit is not None and (synced or not shorten):
        for i, row in enumerate(rows):
            check_new_tokens(limit, len(row), max_new_tokens, f" (row {i})")
    most = limit.tokens if limit is not None else max(map(len, rows), default=0) + max_new_tokens
    new: list[list[int]] = [[] for _ in rows]
    for batch in _batches(model, rows, synced, most - max_new_tokens):
        width = max(len(rows[i]) for i in batch)
        settings = GenerationConfig(
            max_new_tokens=min(max_new_tokens, most - width),
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
                    processors(batch, width) if processors is not None else []
                ),
                synced_gpus=synced,
            )
        for i, row in zip(batch, out[:, width:].tolist(), strict=True):
            new[i] = _until(row, ends)
    return new


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """Every id that ends a text or a turn: those of the model's generation settings, the
    tokenizer's, and the one with which its chat template ends a turn.

    Raises:
        ValueError: the model's settings hold something that is no token id.
    """
    declared = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = list(declared) if isinstance(declared, (list, tuple)) else [declared]
    ids += end_ids(tokenizer)
    for token in ids:
        if token is not None and (type(token) is not int or not 0 <= token < _MOST_IDS):
            checks.fail("generation_config.eos_token_id", "token ids", printable(repr(token)))
    return sorted({i for i in ids if i is not None})


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of the tokens that a tokenizer holds to be no text."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    ids = {i for i, token in added.items() if getattr(token, "special", False)}
    return ids | set(getattr(tokenizer, "all_special_ids", None) or ())


def ordinary_ends(ends: Sequence[int], tokenizer: Any) -> list[int]:
    """The ends that a text could hold as well: neither special tokens nor marks such as <end>."""
    special = special_ids(tokenizer)
    return [i for i in ends if i not in special and not is_mark(tokenizer.decode([i]))]


def can_batch(model: nn.Module) -> bool:
    """Whether rows may be generated from together; measured once for a model."""
    if model not in _RESPECTS_PADDING:
        _RESPECTS_PADDING[model] = respects_padding(model)
    return _RESPECTS_PADDING[model]


def _batches(
    model: nn.Module, rows: Sequence[Sequence[int]], synced: bool, whole: int
) -> list[list[int]]:
    """Return the indices of rows to generate from together: rows of at most `whole` tokens, which
    may all become as long as they like, and longer ones, which end earlier, with those of their
    length."""
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
            "one that respects the padding of rows, where processes generate together",
            type(model).__name__,
            "it gives a row other logits beside other rows. Generate without sharded weights",
        )
    return each


def _until(row: list[int], ends: Sequence[int]) -> list[int]:
    for i, token in enumerate(row):
        if token in ends:
            return row[: i + 1]
    return row
