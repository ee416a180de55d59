"""Looks up rows by their tokens and reads their answers from memory-mapped shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...losses.answer_checks import AnswerRules, find_invalid, row_and_position
from ...losses.types import TopK
from .codec import Array, Packed, truncate_k, unpack
from .hidden_states import HiddenLayout, find_not_finite
from .manifest import KEY, CacheError, Manifest
from .shards import Mapped, key_of

_SLOTS = 1 << 22  # checked at a time


class _Part(NamedTuple):
    """Answers of one stored row, for these positions of a row."""

    shard: int
    row: int
    places: Array
    stored_mask: Array | None  # which of the stored answers; None: all


class Reader:
    """Reads answers by row. Each process maps a shard on first use."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        # Empty answers, as for the last token of a Parquet row, have all mass in the tail.
        self._rules = AnswerRules(vocab=manifest.settings.ids, nothing=True, rising=True)
        self._shards: dict[int, Mapped] = {}
        self._index: _Index | None = None
        self._joined: dict[tuple[int, int], list[_Part]] = {}  # of rows stored more than once

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}, "_index": None, "_joined": {}}

    def shard(self, index: int) -> Mapped:
        if index not in self._shards:
            shard = self.manifest.shards[index]
            self._shards[index] = Mapped(self.folder / shard.file, self.manifest.settings, shard)
        return self._shards[index]

    def has(self, tokens: Tensor) -> bool:
        """Whether these tokens (T,) are a stored row."""
        return bool(self._find(tokens))

    def answered(self, tokens: Tensor) -> Tensor:
        """Return which positions of a row (T,) have an answer, bool (T,)."""
        known = torch.zeros(len(tokens), dtype=torch.bool)
        for part in self._parts(tokens):
            known[torch.from_numpy(part.places)] = True
        return known

    def _find(self, tokens: Tensor) -> list[tuple[int, int]]:
        """Return (shard, row) of all stored rows of these tokens (T,), in dataset order."""
        if self._index is None:
            rows = [self.shard(i).keys for i in range(len(self.manifest.shards))]
            self._index = _Index(rows, self.manifest.settings.rows_per_shard)
        return self._index.find(key_of(tokens.numpy()))

    def _parts(self, tokens: Tensor) -> list[_Part]:
        """Return the parts that together answer a row (T,).

        Examples with the same tokens and different targets have answers at different positions.
        An answer depends on the tokens alone, so the parts of all of them are combined."""
        rows = self._find(tokens)
        if not rows:
            return []
        if rows[0] in self._joined:
            return self._joined[rows[0]]
        parts: list[_Part] = []
        missing = np.ones(len(tokens), bool)
        for shard, row in rows:
            places = self.shard(shard).places_of(row, len(tokens))
            new = missing[places]
            if not parts or new.any():
                parts.append(_Part(shard, row, places[new], None if new.all() else new))
                missing[places] = False
            if not missing.any():
                break
        if len(rows) > 1:
            self._joined[rows[0]] = parts
        return parts

    def read(self, ids: Tensor, mask: Tensor | None, k: int, at: int, vocab: int | None) -> TopK:
        """Return answers [B, T, k] at the stored temperature `at`; see `TeacherCache.topk`."""
        settings = self.manifest.settings
        answers = TopK.empty((*ids.shape, k), settings.temperatures[at], id_dtype=torch.int32)
        parts, positions = self._locate(ids, mask)
        if not parts:
            return answers
        stored = self._read_parts(parts, at)
        if vocab is not None:
            stored = stored.within(vocab)
        answers.put(positions, truncate_k(stored, k))
        return answers

    def read_hidden(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Return hidden states [B, T, L + 1, H], zero where nothing is stored."""
        layout = self.manifest.settings.hidden
        assert layout is not None
        shape = (*ids.shape, layout.states, layout.size)
        states = torch.zeros(shape, dtype=getattr(torch, layout.dtype))
        parts, positions = self._locate(ids, mask)
        flat, start = states.flatten(0, 1), 0
        for part in parts:
            shard = self.shard(part.shard)
            columns = shard.row(part.row)[1]
            if part.stored_mask is not None:
                columns = {name: column[part.stored_mask] for name, column in columns.items()}
            stored = layout.unpack(columns)
            if (wrong := find_not_finite(stored)) is not None:
                where = f"row {part.row}, position {part.places[wrong]}"
                raise shard.damaged(f"{where}: hidden: expected finite numbers")
            flat[positions[start : start + len(stored)]] = stored
            start += len(stored)
        return states

    def _locate(self, ids: Tensor, mask: Tensor | None) -> tuple[list[_Part], Tensor]:
        """Return the parts that answer a batch [B, T], and their positions in it, flattened.

        Raises CacheError for a row that is not stored."""
        settings = self.manifest.settings
        parts: list[_Part] = []
        positions = [torch.zeros(0, dtype=torch.int64)]
        for row in range(len(ids)):
            attended = torch.arange(ids.shape[1]) if mask is None else mask[row].nonzero()[:, 0]
            if not len(attended):
                continue
            tokens = ids[row, attended]
            row_parts = self._parts(tokens)
            if not row_parts:
                raise CacheError(
                    f"input_ids: expected rows that {self.folder} was built from, but row {row} "
                    f"({len(tokens)} tokens: {', '.join(map(str, tokens[:6].tolist()))}, …) is "
                    f"none of its {settings.rows:,}. They were read with max_length="
                    f"{settings.max_length} and completion_only_loss={settings.completion_only}: "
                    "another tokenizer, chat template, length or packing gives other rows"
                )
            parts += row_parts
            positions += [
                row * ids.shape[1] + attended[torch.from_numpy(p.places)] for p in row_parts
            ]
        return parts, torch.cat(positions)

    def _read_parts(self, parts: list[_Part], at: int) -> TopK:
        """Return the checked answers of these parts, [Σ P, k of the cache]."""
        settings = self.manifest.settings
        lengths = [len(part.places) for part in parts]
        shape, T = (sum(lengths), settings.k), settings.temperatures[at]
        answers, start = TopK.empty(shape, T, id_dtype=torch.int32), 0
        for part, length in zip(parts, lengths, strict=True):
            shard = self.shard(part.shard)
            packed = Packed(**shard.row(part.row)[1])
            if part.stored_mask is not None:
                packed = packed.at(part.stored_mask)
            out = answers.at(slice(start, start + length))
            self._unpack(shard, packed, at, out, f"row {part.row}")
            start += length
        wrong = find_invalid(answers, self._rules)
        if wrong is not None:
            number, position = row_and_position(lengths, wrong.at)
            part = parts[number]
            where = f"row {part.row}, position {part.places[position]}"
            raise self.shard(part.shard).damaged(f"{where}: {wrong}")
        return answers

    def _unpack(self, shard: Mapped, packed: Packed, at: int, out: TopK, where: str) -> None:
        settings = self.manifest.settings
        if len(packed.ids) and int(packed.blocks.sum(-1, dtype=np.int64).max()) > settings.k:
            raise shard.damaged(f"{where}: blocks: expected at most {settings.k} ids at a position")
        scale = settings.temperatures[0] / settings.temperatures[at]
        unpack(packed, at, scale, settings.draws, out)

    def check(self, index: int) -> None:
        """Raise CacheError if an answer of a shard is no distribution, or a state not finite."""
        settings, shard = self.manifest.settings, self.shard(index)
        tokens = self.manifest.shards[index].tokens
        if shard.places is not None and tokens:
            rises = np.diff(shard.places.astype(np.int64)) > 0
            first = shard.starts[1:-1].astype(np.int64)
            rises[first[(first > 0) & (first < tokens)] - 1] = True
            if not rises.all() or int(shard.places.min()) < 0:
                raise shard.damaged("places: expected increasing numbers from 0 on in every row")
        if settings.hidden is not None:
            _check_states(shard, settings.hidden, tokens)
            return
        size = max(1, _SLOTS // settings.k)
        for start in range(0, tokens, size):
            packed = Packed(**shard.columns).at(slice(start, start + size))
            for at, T in enumerate(settings.temperatures):
                answers = TopK.empty((len(packed.ids), settings.k), T, id_dtype=torch.int32)
                self._unpack(shard, packed, at, answers, f"answers from {start} on")
                wrong = find_invalid(answers, self._rules)
                if wrong is not None:
                    raise shard.damaged(f"answer {start + wrong.at}: {wrong}")


def _check_states(shard: Mapped, layout: HiddenLayout, tokens: int) -> None:
    size = max(1, _SLOTS // (layout.states * layout.size))
    for start in range(0, tokens, size):
        columns = {"hidden": shard.columns["hidden"][start : start + size]}
        wrong = find_not_finite(layout.unpack(columns))
        if wrong is not None:
            raise shard.damaged(f"answer {start + wrong}: hidden: expected finite numbers")


class _Index:
    """Maps a row's key to its shard and index, by binary search for the key's first half."""

    def __init__(self, keys: list[Any], rows_per_shard: int) -> None:
        whole = np.concatenate([np.zeros((0, KEY), np.uint8), *keys])
        self._keys = whole
        half = np.ascontiguousarray(whole[:, :8]).view("<u8")[:, 0]
        self._order = np.argsort(half, kind="stable")
        self._half = half[self._order]
        self._rows_per_shard = rows_per_shard

    def find(self, key: bytes) -> list[tuple[int, int]]:
        half = np.frombuffer(key[:8], "<u8")[0]
        first, last = (np.searchsorted(self._half, half, side) for side in ("left", "right"))
        rows = self._order[first:last].tolist()
        return [divmod(i, self._rows_per_shard) for i in rows if self._keys[i].tobytes() == key]
