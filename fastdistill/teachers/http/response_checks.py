"""Checks that a server's answers are distributions before they are used."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...kernels.token_loss import first_slots
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
    scored: Tensor | None = None,  # [N, K]
) -> None:
    """Raise WrongAnswer, with the row of the request and the position, if an answer is invalid.

    With `scored`, the answer is about these ids, where repeats are empty slots; otherwise it has
    the k likeliest.
    """
    shape = find_shape_error(answer, (sum(lengths),), k, exactly=True)
    if shape is not None:
        raise WrongAnswer(f"{url}: {shape}")
    likeliest = scored is None
    if scored is not None:
        other = (answer.ids != scored.masked_fill(~first_slots(scored), -1)).any(-1)
        if other.any():
            row, position = row_and_position(lengths, int(other.int().argmax()))
            where = f"{url}: row {row}, position {position}"
            raise WrongAnswer(f"{where}: expected the ids of the request, got others")
    rules = AnswerRules(vocab=vocab, empty=not likeliest, ranked=likeliest, nothing=not likeliest)
    wrong = find_invalid(answer, rules)
    if wrong is not None:
        row, position = row_and_position(lengths, wrong.at)
        raise WrongAnswer(f"{url}: row {row}, position {position}: {wrong}")
