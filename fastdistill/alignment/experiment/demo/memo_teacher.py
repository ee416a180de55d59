"""A teacher that memoizes its answers."""

from __future__ import annotations

import torch
from torch import Tensor

from ....losses.types import TopK
from ....runtime.checks import fail
from ....teachers.local import Teacher


class MemoizedTeacher:
    """Keeps a Teacher's answers in memory, for runs that read the same windows several times.

    Windows are unpadded and looked up by their token ids. Memory is tokens · k · 8 bytes.
    """

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.tokenizer = teacher.tokenizer
        self.vocab_size = teacher.vocab_size
        self._known: dict[tuple[bytes, int, float], TopK] = {}

    def topk(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T), all ones
        *,
        k: int,
        temperature: float = 1.0,
    ) -> TopK:  # [B, T, K]
        if attention_mask is not None and not bool((attention_mask == 1).all()):
            fail("attention_mask", "windows without padding", "some")
        keys = [(row.numpy().tobytes(), k, temperature) for row in input_ids.cpu()]
        new = [i for i, key in enumerate(keys) if key not in self._known]
        if new:
            answer = self.teacher.topk(input_ids[new], k=k, temperature=temperature)
            small = answer._replace(ids=answer.ids.to(torch.int32))
            self._known |= {keys[i]: small.at(j) for j, i in enumerate(new)}
        rows = [self._known[key] for key in keys]
        tails = [row.log_tail for row in rows if row.log_tail is not None]
        return TopK(
            torch.stack([row.ids for row in rows]).long(),
            torch.stack([row.logprobs for row in rows]),
            torch.stack(tails) if tails else None,
            temperature,
        )
