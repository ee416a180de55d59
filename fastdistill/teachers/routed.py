"""A teacher that sends each row to one of several teachers, by a column of the dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..hf.positions import RowLimit, shortest_of
from ..hf.tokenizers import check_same_tokenizer
from ..losses.types import TopK
from ..runtime import checks, tensor_checks
from .local import load_teacher
from .mapped import MappedTeacher
from .protocols import ScoringTeacher, TopKTeacher


class RoutedTeacher:
    """A TopKTeacher that sends each row of a batch to the teacher that a column names.

        p_row = p of teachers[row[key]]

    Args:
        teachers: by the values of the column; each a teacher, or what `load_teacher` opens. They
            share one vocabulary.
        key: the column of the dataset; every example needs a value that `teachers` has.

    Raises:
        ValueError: no teachers, teachers with different tokenizers, or a MappedTeacher.

    Example:
        teacher = RoutedTeacher({"math": "math-model", "code": "code-model"}, key="domain")
        DistillTrainer(student, teacher, args, train_dataset=rows)  # rows have a column "domain"
    """

    def __init__(self, teachers: Mapping[Any, Any], *, key: str) -> None:
        if not isinstance(teachers, Mapping) or not teachers:
            checks.fail("teachers", "a dict of at least one teacher", repr(teachers))
        self.key, self.columns = key, (key,)
        self.teachers: dict[Any, Any] = {
            name: teacher if isinstance(teacher, TopKTeacher) else load_teacher(teacher)
            for name, teacher in teachers.items()
        }
        for name, teacher in self.teachers.items():
            if isinstance(teacher, MappedTeacher):
                checks.fail(
                    "teachers",
                    "teachers of the student's tokenizer",
                    f"a MappedTeacher for {name!r}",
                    "the trainer leaves out targets for one teacher alone: pass it as the teacher",
                )
        tokenizers = [getattr(teacher, "tokenizer", None) for teacher in self.teachers.values()]
        self.tokenizer = next((t for t in tokenizers if t is not None), None)
        for tokenizer in tokenizers:
            if tokenizer is not None:
                check_same_tokenizer(self.tokenizer, tokenizer)

    @property
    def vocab_size(self) -> int | None:
        """The largest number of logits; None if unknown for one of the teachers."""
        sizes = [getattr(teacher, "vocab_size", None) for teacher in self.teachers.values()]
        known = [size for size in sizes if size is not None]
        return max(known) if len(known) == len(sizes) else None

    @property
    def row_limit(self) -> RowLimit | None:
        """The longest row that all teachers read; None if nothing limits it."""
        limits = [getattr(teacher, "row_limit", None) for teacher in self.teachers.values()]
        return shortest_of([limit for limit in limits if limit is not None])

    def topk(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
        *,
        k: int,
        temperature: float = 1.0,
        columns: Mapping[str, Sequence[Any]],
    ) -> TopK:  # [B, T, K]
        """Return each row's answers from its teacher, as `Teacher.topk` does.

        columns[key] has the B values that select the teachers. Raises ValueError for one without
        a teacher.
        """

        def answer(teacher: TopKTeacher, rows: Tensor) -> TopK:
            mask = None if attention_mask is None else attention_mask[rows]
            return teacher.topk(input_ids[rows], mask, k=k, temperature=temperature)

        return self._merged(input_ids, k, temperature, columns, answer)

    def logprobs_at(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None,  # (B, T)
        ids: Tensor,  # (B, T, K)
        *,
        temperature: float = 1.0,
        columns: Mapping[str, Sequence[Any]],
    ) -> TopK:  # [B, T, K]
        """Return each row's log-probabilities of given tokens, as `Teacher.logprobs_at` does."""

        def answer(teacher: Any, rows: Tensor) -> TopK:
            if not isinstance(teacher, ScoringTeacher):
                expected = "teachers that score given ids"
                checks.fail("teachers", expected, type(teacher).__name__)
            mask = None if attention_mask is None else attention_mask[rows]
            return teacher.logprobs_at(input_ids[rows], mask, ids[rows], temperature=temperature)

        return self._merged(input_ids, ids.shape[-1], temperature, columns, answer)

    def _merged(
        self,
        input_ids: Tensor,
        slots: int,
        temperature: float,
        columns: Mapping[str, Sequence[Any]],
        answer: Callable[[Any, Tensor], TopK],
    ) -> TopK:
        tensor_checks.batch(input_ids, None)
        B, T = input_ids.shape
        shape, merged = (B, T, slots), None
        for teacher, rows in self._groups(columns, B):
            of_rows = answer(teacher, rows.to(input_ids.device)).to(input_ids.device)
            if merged is None:
                dtype = of_rows.logprobs.dtype
                merged = TopK.empty(shape, temperature, dtype=dtype, device=input_ids.device)
            at = (rows[:, None] * T + torch.arange(T)).flatten().to(input_ids.device)
            merged.put(at, of_rows._replace(log_tail=of_rows.tail()).flatten())
        return TopK.empty(shape, temperature, device=input_ids.device) if merged is None else merged

    def _groups(
        self, columns: Mapping[str, Sequence[Any]], rows: int
    ) -> Iterator[tuple[Any, Tensor]]:
        """Yield each teacher that is named, and its rows."""
        values = list(columns.get(self.key, ()))
        if len(values) != rows:
            expected = f"{rows} values of {self.key!r}, one for each row"
            checks.fail("columns", expected, f"{len(values)}")
        for index, value in enumerate(values):
            if value not in self.teachers:
                names = ", ".join(map(repr, self.teachers))
                checks.fail(self.key, f"one of {names}", f"{value!r} (row {index})")
        for name, teacher in self.teachers.items():
            chosen = torch.tensor([i for i, value in enumerate(values) if value == name])
            if len(chosen):
                yield teacher, chosen
