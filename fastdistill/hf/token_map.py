"""Aligns the tokens of two tokenizers by the bytes of a text, and maps ids by token string.

student   |The| cat|fish| sat|        both have a boundary after "The" and "catfish": compared
teacher   |The| catfish| s|at|        after " cat": left out
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..losses.types import TopK
from .token_bytes import TokenBytes
from .tokenizers import tokenizer_fingerprint, tokenizer_of


class AlignedRow(NamedTuple):
    """A row as the teacher reads it, and the positions that both tokenizers share.

    Up to position student[i] of its row the student has read the same bytes as the teacher up to
    position teacher[i] of `ids`.
    """

    ids: list[int]
    student: list[int]
    teacher: list[int]


class TokenMap:
    """Aligns rows and maps ids between a student's and a teacher's tokenizer.

        position i of the student ~ j of the teacher   if bytes(student₀…ᵢ) = bytes(teacher₀…ⱼ)
        id v of the teacher -> id u of the student     if bytes(v) = bytes(u)

    The tokens for the beginning and for the end of a text correspond, and other special tokens that
    have the same text. Other special tokens of the student are text for the teacher, and the
    positions before them are left out.

    The comparison of next-token distributions at shared boundaries, with token strings as common
    outcomes, is that of GOLD (Patiño et al., 2025, in TRL) for tokens that both vocabularies have.
    GOLD compares the other tokens by rank, as ULD (Boizard et al., arXiv 2402.12030); here they are
    one outcome, the tail.

    Args:
        student_tokenizer, teacher_tokenizer: fast tokenizers of transformers with byte-level BPE or
            SentencePiece tokens, or processors with one.

    Raises:
        ValueError: the bytes of a tokenizer's tokens are unknown, or it changes texts.

    Example:
        tokens = TokenMap(student_tokenizer, teacher_tokenizer)
        teacher = MappedTeacher("teacher-model", tokens)
    """

    def __init__(self, student_tokenizer: Any, teacher_tokenizer: Any) -> None:
        self.student_tokenizer = tokenizer_of(student_tokenizer)
        self.teacher_tokenizer = tokenizer_of(teacher_tokenizer)
        self._student = student = TokenBytes.of(self.student_tokenizer, "student_tokenizer")
        self._teacher = teacher = TokenBytes.of(self.teacher_tokenizer, "teacher_tokenizer")
        digests = [tokenizer_fingerprint(side.tokenizer) for side in (student, teacher)]
        self.is_identity = digests[0] == digests[1]
        self.student_vocab = max((*student.texts, *student.special)) + 1
        self._specials = _shared_specials(student, teacher)
        self._own_beginning = _beginning(self.student_tokenizer)
        self._beginning = _beginning(self.teacher_tokenizer)
        self._literals = {  # of special tokens that are text for the teacher
            i: text.encode()
            for i, text in student.special.items()
            if i not in self._specials and i not in self._own_beginning
        }
        self.to_student = torch.full((max((*teacher.texts, *teacher.special)) + 1,), -1)
        for text, i in teacher.ids.items():
            self.to_student[i] = student.ids.get(text, -1)
        for own, other in self._specials.items():
            self.to_student[other] = own

    def align(self, row: Sequence[int], limit: int | None = None) -> AlignedRow:
        """Return a student's row (T,) as the teacher reads it, and the positions they share.

        Args:
            limit: the longest row that the teacher reads. Its row is cut there, and positions
                beyond are left out.
        """
        if self.is_identity:
            positions = list(range(len(row)))[:limit]
            return AlignedRow(list(row)[:limit], positions, positions)
        begins = bool(row and self._beginning) and row[0] in self._own_beginning
        has_beginning = not begins and bool(row) and self._specials.get(row[0]) in self._beginning
        reading = _Reading(self._teacher, [] if has_beginning else self._beginning)
        ends = []  # units that the student has read after each token
        starts_text = self._student.adds_space
        for at, token in enumerate(row):
            other = self._specials.get(token)
            if at == 0 and begins:
                pass  # the teacher's own token is there
            elif other is not None:
                reading.read_special(other)
            elif token in self._student.texts:
                piece = self._student.texts[token]
                reading.text += piece.removeprefix(b" ") if starts_text else piece
            else:
                reading.text += self._literals.get(token, b"")
            # A space before a text is no part of it.
            starts_text = self._student.adds_space and token in self._student.special
            ends.append(reading.start + len(reading.text))
        reading.read_text()
        # Of several tokens that end at the same byte, the last one has read everything before it.
        own = {end: i for i, end in enumerate(ends)}
        others = {end: i for i, end in enumerate(reading.ends[:limit])}
        left_out = reading.text_starts if self._starts_differ else set()
        # The teacher would answer with the letters of the name of a special token.
        left_out |= {ends[i] for i, token in enumerate(row[1:]) if token in self._literals}
        shared = [e for e in own if e in others and e <= reading.equal and e not in left_out]
        return AlignedRow(
            reading.ids[:limit], [own[e] for e in shared], [others[e] for e in shared]
        )

    @property
    def _starts_differ(self) -> bool:
        """Whether the first token of a text has a space before it for one tokenizer only."""
        return self._student.adds_space != self._teacher.adds_space

    def map(self, answers: TopK) -> TopK:
        """Return a teacher's answers [..., K] in ids of the student.

        Slots without a counterpart are empty, and their mass is added to the tail.
        """
        if self.is_identity:
            return answers
        table = self.to_student.to(answers.ids.device)
        inside = (answers.ids >= 0) & (answers.ids < len(table))
        mapped = table[answers.ids.long().clamp(0, len(table) - 1)].masked_fill(~inside, -1)
        lost = (answers.ids >= 0) & (mapped < 0)
        lost_mass = answers.logprobs.masked_fill(~lost, -torch.inf).logsumexp(-1)
        return TopK(
            mapped,
            answers.logprobs.masked_fill(lost, -torch.inf),
            torch.logaddexp(answers.tail().to(lost_mass), lost_mass),
            answers.temperature,
        )

    def shared_positions(
        self, input_ids: Tensor, attention_mask: Tensor, limit: int | None = None
    ) -> Tensor:  # (B, T) bool
        """Return the positions of a student's batch [B, T] that `align` compares."""
        shared = torch.zeros(input_ids.shape, dtype=torch.bool)
        for b, (row, mask) in enumerate(zip(input_ids.cpu(), attention_mask.cpu(), strict=True)):
            attended = mask.nonzero()[:, 0]
            shared[b, attended[self.align(row[attended].tolist(), limit).student]] = True
        return shared.to(input_ids.device)


class _Reading:
    """The row that the teacher reads, with the units of each token: bytes and special tokens."""

    def __init__(self, teacher: TokenBytes, beginning: list[int]) -> None:
        self.teacher = teacher
        self.ids, self.ends = [*beginning], [0] * len(beginning)
        self.start, self.text = 0, bytearray()  # what is not tokenized yet, and where it starts
        self.text_starts: set[int] = set()
        self.equal = math.inf  # units up to which both rows have the same bytes

    def read_special(self, token: int) -> None:
        self.read_text()
        self.start += 1
        self.ids.append(token)
        self.ends.append(self.start)

    def read_text(self) -> None:
        if not self.text:
            return
        ids = self.teacher.encode(self.text.decode("utf-8", "replace"))
        pieces = self.teacher.pieces(ids)
        if self.teacher.adds_space and pieces[0].startswith(b" "):
            pieces[0] = pieces[0][1:]
        whole = b"".join(pieces)
        if whole != self.text:  # the teacher normalizes it, or it is no UTF-8
            pairs = enumerate(zip(whole, self.text, strict=False))
            shorter = min(len(whole), len(self.text))
            common = next((i for i, (a, b) in pairs if a != b), shorter)
            self.equal = min(self.equal, self.start + common)
        self.text_starts.add(self.start)
        self.ids += ids
        self.ends += [self.start + end for end in accumulate(map(len, pieces))]
        self.start += len(self.text)
        self.text.clear()


def _shared_specials(student: TokenBytes, teacher: TokenBytes) -> dict[int, int]:
    """Return the special tokens of the student with their counterparts, one to one."""
    ends = [getattr(side.tokenizer, "eos_token_id", None) for side in (student, teacher)]
    by_text = {text: i for i, text in teacher.special.items()}
    beginnings = [next(iter(_beginning(side.tokenizer)), None) for side in (student, teacher)]
    same_text = ([i, by_text.get(text)] for i, text in student.special.items())
    pairs: dict[int, int] = {}
    for own, other in (ends, beginnings, *same_text):
        if own is None or other is None or own in pairs or other in pairs.values():
            continue
        pairs[own] = other
    return pairs


def _beginning(tokenizer: Any) -> list[int]:
    """Return the tokens that a tokenizer puts before a text: its BOS, or none."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return [bos] if bos is not None and tokenizer("a")["input_ids"][0] == bos else []
