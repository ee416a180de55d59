"""Checks that a server's answers are distributions before they are used."""

from __future__ import annotations

from collections.abc import Sequence

from ...losses.answer_checks import AnswerRules, find_invalid, find_shape_error, row_and_position
from ...losses.types import TopK


class WrongAnswer(ValueError):
    """A server's answer is invalid, or belongs to another request."""


def check_answer(
    answer: TopK,  # [N, K], the concatenated rows of one request
    *,
    k: int,
    vocab: int | None,
    lengths: Sequence[int],
    url: str,
) -> None:
    """Raise WrongAnswer, with the row of the request and the position, if an answer is invalid."""
    shape = find_shape_error(answer, (sum(lengths),), k, exactly=True)
    if shape is not None:
        raise WrongAnswer(f"{url}: {shape}")
    wrong = find_invalid(answer, AnswerRules(vocab=vocab, empty=False, ranked=True))
    if wrong is not None:
        row, position = row_and_position(lengths, wrong.at)
        raise WrongAnswer(f"{url}: row {row}, position {position}: {wrong}")
