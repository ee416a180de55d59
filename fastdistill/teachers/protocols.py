"""Protocols of teachers: a local model, a cache on disk, a server.

A teacher may also have `tokenizer`, which is compared with the student's, `vocab_size`, the number
of logits, and `row_limit`, the longest row that it reads (a RowLimit of hf/positions.py). Missing
ones are not checked. A teacher with `columns`, names of columns of the dataset, gets their values
as columns={name: [value of each row, …]} in every call. A teacher whose answers_all is False leaves
positions without an answer in a cache. All answers must be distributions (see
losses/answer_checks.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from ..hf.lm_head import LMHead
from ..hf.row_reader import BatchedForward
from ..losses.types import TopK


class HiddenStates(NamedTuple):
    """Hidden states of a verifier at every token of a batch, zero at padding."""

    last: Tensor  # (B, T, H), as they enter the head
    layers: Tensor  # (B, T, L, H), the outputs of L decoder layers


@runtime_checkable
class TopKTeacher(Protocol):
    """A teacher that returns its k likeliest next tokens for a batch of token ids."""

    def topk(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
        *,
        k: int,
        temperature: float = 1.0,
    ) -> TopK: ...  # [B, T, K]; position t answers for the token at t + 1


@runtime_checkable
class ScoringTeacher(TopKTeacher, Protocol):
    """A teacher that also returns the log-probabilities of given next tokens."""

    def logprobs_at(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None,  # (B, T)
        ids: Tensor,  # (B, T, K), −1 in empty slots
        *,
        temperature: float = 1.0,
    ) -> TopK: ...  # [B, T, K], with log_tail


@runtime_checkable
class DenseTeacher(Protocol):
    """A teacher that returns the hidden states at its head's input, and the head."""

    @property
    def head(self) -> LMHead: ...

    def hidden(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
    ) -> Tensor: ...  # (B, T, G)


def reader_of(teacher: Any) -> BatchedForward | None:
    """Return what reads the rows of a local Teacher; None for a teacher of another kind."""
    reader = getattr(teacher, "reader", None)
    return reader if isinstance(reader, BatchedForward) else None
