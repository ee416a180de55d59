"""Finding rows by what is in them, and reading their answers from mapped shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..outputs import TopK
from .codec import Packed, narrowed, unpack
from .manifest import CacheError, Manifest
from .shards import KEY, Mapped, key_of


class Reader:
    """Answers by row. Shards are mapped when first touched, in each process for itself."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._shards: dict[int, Mapped] = {}
        self._index: _Index | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}, "_index": None}

    def shard(self, index: int) -> Mapped:
        if index not in self._shards:
            shard = self.manifest.shards[index]
            self._shards[index] = Mapped(self.folder / shard.file, self.manifest.settings, shard)
        return self._shards[index]

    def find(self, tokens: Tensor) -> tuple[int, int] | None:
        """(shard, row) of these tokens (T,), or None."""
        if self._index is None:
            rows = [self.shard(i).keys for i in range(len(self.manifest.shards))]
            self._index = _Index(rows, self.manifest.settings.rows_per_shard)
        return self._index.find(key_of(tokens.numpy()))

    def read(self, ids: Tensor, mask: Tensor | None, k: int, at: int, vocab: int | None) -> TopK:
        """Answers [B, T, k] at the manifest's temperature number `at`; see `TeacherCache.topk`."""
        settings = self.manifest.settings
        T = settings.temperatures[at]
        scale, draws = settings.temperatures[0] / T, settings.draws
        answers = TopK.empty((*ids.shape, settings.k), T, id_dtype=torch.int32)
        for row in range(len(ids)):
            attended = torch.arange(ids.shape[1]) if mask is None else mask[row].nonzero()[:, 0]
            if not len(attended):
                continue
            places, packed = self._row(row, ids[row, attended])
            where = attended if places is None else attended[torch.from_numpy(places.astype(int))]
            own = _row_of(answers, row)
            if len(where) and int(where[-1] - where[0]) == len(where) - 1:
                run = slice(int(where[0]), int(where[-1]) + 1)
                unpack(packed, at, scale, draws, _row_of(own, run))
            else:
                found = TopK.empty((len(where), settings.k), T, id_dtype=torch.int32)
                unpack(packed, at, scale, draws, found)
                own.put(where, found)
        if vocab is not None:
            answers = answers.within(vocab)
        return narrowed(answers, k)

    def _row(self, row: int, tokens: Tensor) -> tuple[Any, Packed]:
        found = self.find(tokens)
        if found is None:
            settings = self.manifest.settings
            raise CacheError(
                f"input_ids: expected rows that {self.folder} was built from, but row {row} "
                f"({len(tokens)} tokens: {', '.join(map(str, tokens[:6].tolist()))}, …) is none of "
                f"its {settings.rows:,}. They were read with max_length={settings.max_length} and "
                "completion_only_loss="
                f"{settings.completion_only}: another tokenizer, chat template, length or packing "
                "gives other rows"
            )
        return self.shard(found[0]).row(found[1])


def _row_of(answers: TopK, row: int | slice) -> TopK:
    tail = answers.log_tail
    assert tail is not None
    return TopK(answers.ids[row], answers.logprobs[row], tail[row], answers.temperature)


class _Index:
    """From a row's key to its shard and place, by the first half of the key, sorted."""

    def __init__(self, keys: list[Any], rows_per_shard: int) -> None:
        whole = np.concatenate([np.zeros((0, KEY), np.uint8), *keys])
        self._keys = whole
        half = np.ascontiguousarray(whole[:, :8]).view("<u8")[:, 0]
        self._order = np.argsort(half, kind="stable")
        self._half = half[self._order]
        self._rows_per_shard = rows_per_shard

    def find(self, key: bytes) -> tuple[int, int] | None:
        half = np.frombuffer(key[:8], "<u8")[0]
        at = int(np.searchsorted(self._half, half))
        while at < len(self._half) and self._half[at] == half:
            row = int(self._order[at])
            if self._keys[row].tobytes() == key:
                return divmod(row, self._rows_per_shard)
            at += 1
        return None
