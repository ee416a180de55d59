"""Whether what a server sent can be a language model's answer; nothing is used before that."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..outputs import TopK

ROUNDING = 1e-3  # above a logprob of 0, and above a mass of 1


class WrongAnswer(ValueError):
    """A server's answer that no language model gives, or to another question."""


def place(lengths: Sequence[int], at: int) -> str:
    """Where entry `at` of rows of these lengths, one behind another, lies."""
    for row, length in enumerate(lengths):
        if at < length:
            return f"row {row}, position {at}"
        at -= length
    raise IndexError(at)


def refuse_wrong(
    answer: TopK,  # [N, K], the rows of one request one behind another
    *,
    k: int,
    vocab: int | None,
    lengths: Sequence[int],
    url: str,
) -> None:
    """Raises WrongAnswer with the row (of that request) and the position."""
    ids, logprobs = answer.ids, answer.logprobs.double()
    n = sum(lengths)
    if ids.shape != (n, k) or logprobs.shape != (n, k):
        raise WrongAnswer(
            f"{url}: expected {n} positions with {k} entries each, got {list(ids.shape)} ids and "
            f"{list(logprobs.shape)} logprobs"
        )
    if not n:
        return
    best, mass = logprobs.max(-1).values, logprobs.exp().sum(-1)
    outside = (ids < 0) if vocab is None else (ids < 0) | (ids >= vocab)
    ordered = ids.sort(-1).values
    flattest = -math.inf if vocab is None else -math.log(vocab) - ROUNDING
    verdicts: list[tuple[Tensor, str, Tensor]] = [
        (logprobs.isnan().any(-1), "numbers for log-probabilities", logprobs),
        (best > ROUNDING, "log-probabilities, at most 0", logprobs),
        (outside.any(-1), f"ids in 0..{'' if vocab is None else vocab - 1}", ids),
        ((ordered[:, 1:] == ordered[:, :-1]).any(-1), f"{k} different ids", ids),
        (mass > 1 + ROUNDING, "probabilities that sum to 1 at most", mass),
        ((best < flattest) | best.isneginf(), "a likeliest token above the average", logprobs),
    ]
    if answer.log_tail is not None:
        tail = answer.log_tail.double()
        whole = (mass + tail.exp() - 1).abs() <= ROUNDING
        verdicts.append((~whole, "the ids and the tail to have a mass of 1", mass + tail.exp()))
    for bad, expected, values in verdicts:
        if bad.any():
            at = int(bad.nonzero()[0, 0])
            got = ", ".join(f"{x:g}" for x in torch.atleast_1d(values[at])[:8].tolist())
            raise WrongAnswer(f"{url}: {place(lengths, at)}: expected {expected}, got {got}")
