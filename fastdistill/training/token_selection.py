"""Which tokens to train on, by any score of `token_scores`.

    top share     w_n = n_b / m_b for the m_b = ⌈share · n_b⌉ targets of sequence b with the
                  highest (or lowest) scores, 0 for the others (n_b: targets of the sequence)
    threshold     w_n = 1 where the score is on the selected side, else 0
    weight        w_n = s_n / mean of s over the sequence's targets

Selection is per sequence, so the result does not depend on micro-batch size or number of
processes. The weights of a sequence sum to n_b (except with a threshold): the loss stays a mean
over targets, and the same learning rate fits any share.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..losses.types import TokenScores
from ..runtime import checks
from .targets import Targets

SCORES = tuple(name for name in TokenScores._fields if name != "argmax")
_OF_TEACHER = {"forward_kl", "teacher_mass", "student_mass", "hellinger", "acceptance_rate"}
_SIGNED = {"max_logprob", "lse"}  # may be negative, so not allowed as weights
_WORDS = re.compile(
    r"(?P<score>\w+)(?:\s+(?P<side>top|bottom)\s+(?P<share>\S+)"
    r"|\s*(?P<relation>>=|<=)\s*(?P<threshold>\S+)|\s+(?P<weight>weight))"
)


@dataclass(frozen=True, kw_only=True)
class TokenSelection:
    """A selection rule with exactly one of share, threshold and weight.

    Args:
        score: a field of TokenScores, of the student at the training temperature: "entropy" (after
            arXiv 2506.01939), "nll", "margin", "forward_kl", "hellinger" (arXiv 2510.11615), …
        share: train on this share of each sequence's targets, 0 < share ≤ 1.
        threshold: train on tokens with at least this score (with lowest: at most).
        weight: multiply each token's loss by its score, divided by the sequence's mean score.
        lowest: prefer low scores.
    """

    score: str
    share: float | None = None
    threshold: float | None = None
    weight: bool = False
    lowest: bool = False

    def __post_init__(self) -> None:
        name = "token_selection"
        checks.choice(name, self.score, SCORES)
        if (self.share is not None) + (self.threshold is not None) + self.weight != 1:
            got = f"share={self.share}, threshold={self.threshold}, weight={self.weight}"
            checks.fail(name, "one of share, threshold and weight", got)
        if self.share is not None and not 0 < self.share <= 1:
            checks.fail(name, "a share in (0, 1]", self.share)
        if self.threshold is not None and not math.isfinite(self.threshold):
            checks.fail(name, "a finite threshold", self.threshold)
        if self.weight and (self.score in _SIGNED or self.lowest):
            got = f"{self.score!r}{' with lowest=True' if self.lowest else ''}"
            checks.fail(name, "a score that is never negative as a weight", got)

    @classmethod
    def parse(cls, words: str) -> TokenSelection:
        """Parse "entropy top 0.2", "nll bottom 0.5", "margin <= 1.5" or "forward_kl weight"."""
        match = _WORDS.fullmatch(words.strip())
        number = None if match is None else match["share"] or match["threshold"] or "0"
        try:
            value = float(number or "")
        except ValueError:
            raise ValueError(
                "token_selection: expected '<score> top|bottom <share>', '<score> >=|<= "
                f"<threshold>' or '<score> weight', got {words!r}"
            ) from None
        assert match is not None
        return cls(
            score=match["score"],
            share=value if match["share"] else None,
            threshold=value if match["threshold"] else None,
            weight=bool(match["weight"]),
            lowest=match["side"] == "bottom" or match["relation"] == "<=",
        )

    def __str__(self) -> str:
        if self.weight:
            return f"{self.score} weight"
        if self.share is not None:
            return f"{self.score} {'bottom' if self.lowest else 'top'} {self.share:g}"
        return f"{self.score} {'<=' if self.lowest else '>='} {self.threshold:g}"

    @property
    def uses_teacher(self) -> bool:
        return self.score in _OF_TEACHER

    def __call__(self, scores: TokenScores, targets: Targets) -> Tensor:  # (N,) weights ≥ 0
        values: Tensor = getattr(scores, self.score).float()
        if self.threshold is not None:
            chosen = values <= self.threshold if self.lowest else values >= self.threshold
            return chosen.float()
        count = targets.per_row(torch.ones_like(values))
        if self.weight:
            values = values.clamp(min=0)
            mean = (targets.per_row(values) / count.clamp(min=1))[targets.rows]
            return torch.where(mean > 0, values / mean.clamp(min=1e-30), 1.0)
        assert self.share is not None
        # Round up, with a tolerance for floating-point error just above an integer.
        selected_count = (self.share * count - 1e-4).ceil().clamp(min=1)
        rank = _rank_in_row(values if self.lowest else -values, targets.rows)
        return torch.where(
            rank < selected_count[targets.rows], (count / selected_count)[targets.rows], 0.0
        )


Selection = TokenSelection | Callable[[TokenScores], Tensor]


def selection_of(selection: str | Selection | None) -> Selection | None:
    """Return the selection rule of a configuration value, parsing text.

    A callable is a rule already: it takes TokenScores [N] and returns weights [N], 0 for tokens
    that are left out.
    """
    if selection is None or isinstance(selection, TokenSelection) or callable(selection):
        return selection
    if not isinstance(selection, str):
        raise TypeError(
            "token_selection: expected a str, a TokenSelection or a function of TokenScores, got "
            f"{type(selection).__name__}"
        )
    return TokenSelection.parse(selection)


def weights_of(rule: Selection, scores: TokenScores, targets: Targets) -> Tensor:
    """Return the weights [N] of a rule; raise ValueError for invalid weights of a function."""
    if isinstance(rule, TokenSelection):
        return rule(scores, targets)
    weights = torch.as_tensor(rule(scores))
    N = len(targets.labels)
    if weights.shape != (N,):
        expected = f"weights of shape [{N}], one per target"
        checks.fail("token_selection", expected, list(weights.shape))
    weights = weights.to(device=targets.labels.device, dtype=torch.float32)
    if not bool((weights >= 0).all()) or not bool(weights.isfinite().all()):
        checks.fail("token_selection", "finite weights of 0 or more", "other weights")
    return weights


def _rank_in_row(values: Tensor, rows: Tensor) -> Tensor:
    """Return each value's rank in its row, 0 for the smallest; ties keep their order.

    `rows` is ascending.
    """
    order = values.sort(stable=True).indices
    order = order[rows[order].sort(stable=True).indices]
    first = torch.searchsorted(rows, rows)
    rank = torch.empty_like(rows)
    rank[order] = torch.arange(len(rows), device=rows.device)
    return rank - first
