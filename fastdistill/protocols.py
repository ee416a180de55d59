"""What the trainer asks of a teacher, whatever it is: a model here, a cache on disk, a server.

A teacher may also have `tokenizer`, which proves that ids mean the same on both sides,
`vocab_size`, the columns of its head, and `row_limit`, the longest row that it reads (a RowLimit of
positions.py): where they are missing, nothing is compared. All answers have to be a distribution
(see answer_checks.py).
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from .heads import LMHead
from .outputs import TopK


@runtime_checkable
class TopKTeacher(Protocol):
    """Whatever answers a batch of token ids with the teacher's k likeliest next tokens."""

    def topk(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
        *,
        k: int,
        temperature: float = 1.0,
    ) -> TopK: ...  # [B, T, K]; position t answers for the token at t + 1


@runtime_checkable
class DenseTeacher(Protocol):
    """Whatever gives the hidden states that enter the teacher's head, and the head."""

    @property
    def head(self) -> LMHead: ...

    def hidden(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
    ) -> Tensor: ...  # (B, T, G)
