"""A teacher with another tokenizer than the student's, as a teacher in the student's ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..hf.token_map import TokenMap
from ..hf.tokenizers import tokenizer_fingerprint
from ..losses.answer_checks import find_shape_error
from ..losses.types import TopK
from ..runtime import checks, tensor_checks
from .identity import identity_of, tokenizer_identity
from .local import Teacher, load_teacher
from .protocols import TopKTeacher

_LEAST_POSITIONS = 64  # answers before their mass is compared with min_mass


class MappedTeacher:
    """A TopKTeacher that reads the student's rows with a tokenizer of its own.

        p'(u) = p(v) for each id v of the top K with a counterpart u; the rest is the tail

    It answers where both tokenizers have a boundary after the same bytes (see `TokenMap`). The
    trainer leaves the other targets out of the loss, and logs `aligned`, the share of targets that
    it compares, and `mapped_mass`, the mass of the K ids that has a counterpart.

    Args:
        teacher: any teacher with topk, or what `load_teacher` opens, in the teacher's tokens.
        token_map: of the student's and the teacher's tokenizer.
        min_mass: the least mean of `mapped_mass` over the run, in 0..1. Below it training stops,
            once 64 positions are compared.

    Raises:
        ValueError: the teacher has another tokenizer than token_map.

    Example:
        teacher = MappedTeacher("teacher-model", TokenMap(tokenizer, teacher_tokenizer))
        DistillTrainer(student, teacher, args, train_dataset=rows, processing_class=tokenizer)
    """

    answers_all = False  # positions of one tokenizer alone have no answer

    def __init__(
        self,
        teacher: TopKTeacher | PreTrainedModel | str | Path,
        token_map: TokenMap,
        *,
        min_mass: float = 0.5,
    ) -> None:
        if not isinstance(token_map, TokenMap):
            raise TypeError(f"token_map: expected a TokenMap, got {type(token_map).__name__}")
        checks.between("min_mass", min_mass, 0, 1)
        self.teacher: Any = teacher if isinstance(teacher, TopKTeacher) else load_teacher(teacher)
        self.token_map, self.min_mass = token_map, min_mass
        self.columns = tuple(getattr(self.teacher, "columns", ()))
        self._mass, self._positions = 0.0, 0
        self.last_mass = (0.0, 0)  # of the last answer: Σ mapped_mass, and positions
        own, theirs = token_map.teacher_tokenizer, getattr(self.teacher, "tokenizer", None)
        if theirs is not None and tokenizer_fingerprint(own) != tokenizer_fingerprint(theirs):
            hint = "pass TokenMap(student_tokenizer, teacher.tokenizer)"
            checks.fail("token_map", "a map from the tokenizer of the teacher", "another", hint)
        if hasattr(self.teacher, "check_tokenizer"):  # of a cache or a server
            self.teacher.check_tokenizer(own)

    @property
    def tokenizer(self) -> Any:
        """The student's tokenizer, whose ids the answers have."""
        return self.token_map.student_tokenizer

    @property
    def vocab_size(self) -> int | None:
        """The number of ids that an answer can have; None if unknown."""
        if self.token_map.is_identity:
            return getattr(self.teacher, "vocab_size", None)
        return self.token_map.student_vocab

    @property
    def longest_row(self) -> int | None:
        """The number of its own tokens that the teacher reads; None if nothing limits it."""
        limit = getattr(self.teacher, "row_limit", None)
        return None if limit is None else limit.tokens

    @property
    def identity(self) -> dict[str, Any]:
        """The identity of the teacher and its tokenizer, for a cache."""
        digest, _ = tokenizer_identity(self.token_map.teacher_tokenizer)
        inner = identity_of(self.teacher)
        known = {"teacher_kind": inner.pop("kind"), "teacher_tokenizer_sha256": digest}
        return inner | known

    def topk(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
        *,
        k: int,
        temperature: float = 1.0,
        where: Tensor | None = None,  # (B, T) bool
        **options: Any,
    ) -> TopK:  # [B, T, K]
        """Return the teacher's answers in ids of the student.

        Args:
            input_ids, attention_mask: the student's rows, as in `Teacher.topk`.
            k: of the teacher, before ids are mapped. temperature: as in `Teacher.topk`.
            where: the positions to answer; None is all.
            options: more arguments of the teacher's topk.

        Returns:
            TopK on input_ids' device, as `TokenMap.map` returns it. The payload is empty where the
            tokenizers have no common boundary, or `where` is False.

        Raises:
            ValueError: less than min_mass of the answers so far has a counterpart.
        """
        tensor_checks.batch(input_ids, attention_mask)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        device = input_ids.device
        positions = [row.nonzero()[:, 0] for row in mask.cpu()]
        aligned = [
            self.token_map.align(row[at].tolist(), self.longest_row)
            for row, at in zip(input_ids.cpu(), positions, strict=True)
        ]
        rows = [torch.tensor(row.ids, dtype=torch.int64) for row in aligned]
        ids = pad_sequence(rows, batch_first=True)
        attended = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        source = _flat([at[row.student] for at, row in zip(positions, aligned, strict=True)], mask)
        at = _flat([torch.tensor(row.teacher, dtype=torch.int64) for row in aligned], ids)
        if where is not None:
            chosen = where.flatten().cpu()[source]
            source, at = source[chosen], at[chosen]
        if isinstance(self.teacher, Teacher):
            answered = torch.zeros_like(ids, dtype=torch.bool)
            answered.view(-1)[at] = True
            options["where"] = answered.to(device)
        answers = self.teacher.topk(
            ids.to(device), attended.to(device), k=k, temperature=temperature, **options
        )
        problem = find_shape_error(answers, ids.shape, k)
        if problem is not None:
            raise ValueError(f"teacher: {problem}")
        answers = answers.flatten().at(at.to(answers.ids.device))
        mapped = self.token_map.map(answers)
        self._count(answers, mapped)
        out = TopK.empty(
            (*input_ids.shape, answers.ids.shape[-1]),
            temperature,
            dtype=answers.logprobs.dtype,
            device=device,
        )
        out.put(source.to(device), mapped._replace(log_tail=mapped.tail()).to(device))
        return out

    def _count(self, answers: TopK, mapped: TopK) -> None:
        """Count the mass with a counterpart; raise ValueError if it is too little."""
        before, after = (
            answer.logprobs.double().exp().masked_fill(answer.ids < 0, 0.0).sum(-1)
            for answer in (answers, mapped)
        )
        mass, positions = (after / before.clamp(min=1e-30)).sum().item(), len(before)
        self._mass, self._positions = self._mass + mass, self._positions + positions
        self.last_mass = (mass, positions)
        if self._positions >= _LEAST_POSITIONS and self._mass < self.min_mass * self._positions:
            checks.fail(
                "teacher",
                f"a vocabulary in which {self.min_mass:.0%} of the mass of its top K are tokens of "
                "the student, too (min_mass)",
                f"{self._mass / self._positions:.1%} at {self._positions:,} positions",
                "the student would learn from the tail alone: use a teacher with more common "
                "tokens, or a smaller min_mass",
            )


def _flat(columns: Sequence[Tensor], batch: Tensor) -> Tensor:
    """Return positions of the rows of a batch [B, T] as positions of the flattened batch."""
    return torch.cat([row * batch.shape[1] + at for row, at in enumerate(columns)])
