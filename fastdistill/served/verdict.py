"""Whether what a server sent can be a language model's answer; nothing is used before that."""

from __future__ import annotations

from collections.abc import Sequence

from ..answer_checks import Rules, find_wrong, place, wrong_shape
from ..outputs import TopK


class WrongAnswer(ValueError):
    """A server's answer that no language model gives, or to another question."""


def check_answer(
    answer: TopK,  # [N, K], the rows of one request one behind another
    *,
    k: int,
    vocab: int | None,
    lengths: Sequence[int],
    url: str,
) -> None:
    """Raises WrongAnswer with the row (of that request) and the position."""
    shape = wrong_shape(answer, (sum(lengths),), k, exactly=True)
    if shape is not None:
        raise WrongAnswer(f"{url}: {shape}")
    wrong = find_wrong(answer, Rules(vocab=vocab, empty=False, ranked=True))
    if wrong is not None:
        raise WrongAnswer(f"{url}: {place(lengths, wrong.at)}: {wrong}")
