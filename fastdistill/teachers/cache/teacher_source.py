"""Answers the rows of a cache with a teacher: a model, a server, anything with topk."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...hf.row_reader import groups
from ...losses.answer_checks import find_shape_error
from ...losses.types import TopK
from ..protocols import reader_of
from .build import PendingRow
from .hidden_states import HiddenLayout
from .manifest import CacheError, Settings
from .sampled_targets import draw

_TOKENS = 16384  # per call, padding included; a Teacher regroups them by its own budget


class FromTeacher:
    """Answers groups of rows of similar length; the groups depend on the shard alone."""

    def __init__(self, teacher: Any) -> None:
        self.teacher = teacher
        self.answers_all = getattr(teacher, "answers_all", True)
        # Answers stay on the model's device until they are packed: sorting is slow on a CPU.
        self.device = "cpu" if reader_of(teacher) is None else teacher.head.weight.device

    def answers(
        self, rows: list[PendingRow], settings: Settings, shard: int
    ) -> Iterator[tuple[list[int], list[TopK] | Tensor]]:
        # A generator per shard, so that its draws do not depend on other shards, from a hash of 32
        # bits: a CPU generator ignores the higher half of its seed.
        key = f"{settings.seed or 0} {shard}".encode()
        digest = hashlib.blake2b(key, digest_size=4).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        lengths = [len(row.tokens) if len(row.places) else 0 for row in rows]
        for group in groups(lengths, _TOKENS, False, math.inf):
            ids, mask, where = (x.to(self.device) for x in _batch([rows[i] for i in group]))
            with _fixed_batches(self.teacher, settings.tokens_per_batch):
                answers: list[TopK] | Tensor
                if settings.hidden is not None:
                    answers = self._states(ids, mask, settings.hidden)[where]
                elif settings.targets == "sampled":
                    answers = self._sampled_answers(ids, mask, where, settings, generator)
                else:
                    answers = self._topk_answers(ids, mask, where, settings)
            yield group, answers

    def _topk_answers(
        self, ids: Tensor, mask: Tensor, where: Tensor, settings: Settings
    ) -> list[TopK]:
        k, temperatures = settings.k, settings.temperatures
        if reader_of(self.teacher) is not None:
            answers = self.teacher.topk_at(ids, mask, k=k, temperatures=temperatures, where=where)
        else:
            answers = [self.teacher.topk(ids, mask, k=k, temperature=T) for T in temperatures]
        for answer in answers:
            wrong = find_shape_error(answer, ids.shape, k)
            if wrong is not None:
                raise CacheError(f"teacher: {wrong}")
        return [answer.at(where.to(answer.ids.device)) for answer in answers]

    def _states(self, ids: Tensor, mask: Tensor, layout: HiddenLayout) -> Tensor:
        """Return the states of a batch, [B, T, L + 1, H] on the device of `ids`."""
        states: Tensor
        if not layout.layers:
            states = self.teacher.hidden(ids, mask)[:, :, None]
        else:
            last, layers = self.teacher.hidden_states(ids, mask, layers=layout.layers)
            states = torch.cat([layers, last[:, :, None]], 2)
        expected = (*ids.shape, layout.states, layout.size)
        if states.shape != expected:
            raise CacheError(
                f"teacher: expected hidden states {list(expected)}, got {list(states.shape)}"
            )
        return states.to(ids.device)

    def _sampled_answers(
        self, ids: Tensor, mask: Tensor, where: Tensor, settings: Settings, generator: Any
    ) -> list[TopK]:
        head = self.teacher.head
        hidden = self.teacher.hidden(ids, mask)
        hidden = hidden[where.to(hidden.device)].to(head.weight.device)
        return [draw(hidden, head, settings.k, settings.temperatures[0], generator)]


@contextmanager
def _fixed_batches(teacher: Any, tokens_per_batch: int | None) -> Iterator[None]:
    """Fix a Teacher's token budget, which depends on the free memory by default.

    Other batches round otherwise."""
    reader = getattr(teacher, "reader", None)
    if reader is None:
        yield
        return
    before, reader.tokens_per_batch = reader.tokens_per_batch, tokens_per_batch
    try:
        yield
    finally:
        reader.tokens_per_batch = before


def _batch(rows: list[PendingRow]) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, mask and answered positions of padded rows, [B, T] each."""
    ids = pad_sequence([row.tokens for row in rows], batch_first=True)
    mask = pad_sequence([torch.ones_like(row.tokens) for row in rows], batch_first=True)
    where = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        where[i, row.places] = True
    return ids, mask, where
