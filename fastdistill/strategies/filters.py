"""Countermeasures against poisoned data: which examples to drop, and which tokens to train on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..audits.subject import Subject
from ..scores import token_scores
from ..training.selection import SCORES, TokenSelection
from .lessons import AT_ONCE, Lesson, encoded, said
from .pools import share_in
from .strategy import Run, Strategy, Training

SHINGLE = 3  # words
NEARLY = 0.8  # of their runs of words two answers share, where one is the other's duplicate


@dataclass(frozen=True, kw_only=True)
class ExampleFilter(Strategy):
    """Drops the share of the examples with the highest score; the others keep their order.

        loss             −log p_trusted per token of the answer: what it would not have said
        llr              (log p_teacher − log p_trusted) per token
        divergence       share of the answer's tokens, its end included, at which the two rank
                         another token first
        rare_ngram       mean of −log(answers that hold a pair of its words / answers)
        near_duplicate   highest Jaccard similarity of its runs of three words with an earlier one

    Filters are countermeasures against poisoned data. The scores per example are ours. Divergence
    tokens are those of arXiv 2509.23886, where teachers of different biases would say something
    else; ours compares the teacher with the trusted model.
    Both read what the student reads: filters stand in front of `InoculationPrompt`.

    Args:
        drop: share in [0, 1); of equal scores the later is dropped first.
        at_least: only what scores so high or higher is dropped; None: all of the share, but of
            near_duplicate only what is 0.8 or more.
    """

    score: str
    drop: float = 0.1
    at_least: float | None = None

    def __post_init__(self) -> None:
        if self.score not in _EXAMPLES:
            raise ValueError(f"score: expected one of {', '.join(_EXAMPLES)}, got {self.score!r}")
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop: expected a share in [0, 1), got {self.drop!r}")

    def lessons(self, lessons: list[Lesson], run: Run) -> list[Lesson]:
        scores = _EXAMPLES[self.score](lessons, run)
        most = math.floor(self.drop * len(lessons) + 1e-9)
        order = sorted(range(len(lessons)), key=lambda i: (-scores[i], -i))[:most]
        bound = self._bound
        out = {i for i in order if bound is None or scores[i] >= bound}
        domains = Counter(lesson.domain for lesson in lessons)
        lost = Counter(lessons[i].domain for i in out)
        run.notes[f"filter, {self.score}"] = {
            "kept": 1 - len(out) / len(lessons),
            "lowest dropped": min((scores[i] for i in out), default=None),
            "dropped": {name: lost[name] / n for name, n in domains.items()},
        }
        return [lesson for i, lesson in enumerate(lessons) if i not in out]

    @property
    def _bound(self) -> float | None:
        if self.at_least is None and self.score == "near_duplicate":
            return NEARLY
        return self.at_least


def _per_token(lessons: Sequence[Lesson], subject: Subject) -> Tensor:
    found = said(lessons, subject)
    return found.total / found.tokens


def _loss(lessons: Sequence[Lesson], run: Run) -> list[float]:
    return (-_per_token(lessons, run.scene.reference)).tolist()


def _ratio(lessons: Sequence[Lesson], run: Run) -> list[float]:
    teacher, trusted = (_per_token(lessons, m) for m in (run.scene.teacher, run.scene.reference))
    return (teacher - trusted).tolist()


def _divergence(lessons: Sequence[Lesson], run: Run) -> list[float]:
    return [float(diverge.float().mean()) for diverge in diverging(lessons, run)]


def _rare(lessons: Sequence[Lesson], run: Run) -> list[float]:
    pairs = [_runs(lesson.answer, 2) for lesson in lessons]
    counts = Counter(pair for some in pairs for pair in set(some))
    n = len(lessons)
    return [-sum(math.log(counts[p] / n) for p in some) / max(len(some), 1) for some in pairs]


def _duplicate(lessons: Sequence[Lesson], run: Run) -> list[float]:
    holding: dict[tuple[str, ...], list[int]] = {}
    earlier: set[frozenset[tuple[str, ...]]] = set()  # each once: short answers repeat
    sizes: list[int] = []
    found = []
    for lesson in lessons:
        mine = frozenset(_runs(lesson.answer, SHINGLE))
        if mine in earlier:
            found.append(1.0)
            continue
        shared = Counter(j for shingle in mine for j in holding.get(shingle, ()))
        alike = [n / (len(mine) + sizes[j] - n) for j, n in shared.items()]
        found.append(max(alike, default=0.0))
        for shingle in mine:
            holding.setdefault(shingle, []).append(len(sizes))
        earlier.add(mine)
        sizes.append(len(mine))
    return found


def _runs(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))]


_EXAMPLES: dict[str, Callable[[Sequence[Lesson], Run], list[float]]] = {
    "loss": _loss,
    "llr": _ratio,
    "divergence": _divergence,
    "rare_ngram": _rare,
    "near_duplicate": _duplicate,
}


def answer_scores(
    lessons: Sequence[Lesson], subject: Subject
) -> tuple[list[Tensor], list[Tensor]]:  # (answer's tokens,) each
    """−log p and the first choice of a model at every token of the answers, the end included."""
    losses, firsts = [], []
    for start in range(0, len(lessons), AT_ONCE):
        pairs = [encoded(x.shown, x.answer, subject) for x in lessons[start : start + AT_ONCE]]
        states = [
            h[begin - 1 : len(row) - 1]
            for (row, begin), h in zip(
                pairs, subject.hidden([row for row, _ in pairs]), strict=True
            )
        ]
        labels = torch.tensor([token for row, begin in pairs for token in row[begin:]])
        head, hidden = subject.head, torch.cat(states)
        found = token_scores(
            hidden, head.weight, labels=labels.to(hidden.device), impl=subject.impl,
            **head.options(),
        )  # fmt: skip
        assert found.nll is not None
        lengths = [len(state) for state in states]
        losses += found.nll.cpu().split(lengths)
        firsts += found.argmax.cpu().split(lengths)
    return losses, firsts


def diverging(lessons: Sequence[Lesson], run: Run) -> list[Tensor]:  # (answer's tokens,) each
    """Where the teacher and the trusted model rank another token first."""
    (_, teacher), (_, trusted) = (
        answer_scores(lessons, model) for model in (run.scene.teacher, run.scene.reference)
    )
    return [a != b for a, b in zip(teacher, trusted, strict=True)]


STATIC = ("excess_loss", "divergence")


@dataclass(frozen=True, kw_only=True)
class TokenSelector(Strategy):
    """Trains on a share of every answer's tokens: those that score highest, or lowest.

        entropy, nll, forward_kl, …   of the student while it trains (TokenSelection)
        excess_loss                   nll_trusted − nll_teacher, before training; after Rho-1
                                      (arXiv 2404.07965), with the trusted model in the place of the
                                      one that trains and the teacher as reference: our reading
        divergence                    1 where teacher and trusted model rank another token first
                                      (after arXiv 2509.23886, which masks such tokens). Alone those
                                      are chosen, or with `lowest` alone the others: all of them at
                                      share=1.0

    The share is of the tokens that are targets so far: behind `AnswerOnly`, of the answer proper.
    An example of which no token is left falls out.

    Args:
        share: of each answer's tokens, its end included, rounded up, in (0, 1]; of equal scores
            the earlier tokens. lowest: those that score lowest.
    """

    kind: str
    share: float = 0.5
    lowest: bool = False

    def __post_init__(self) -> None:
        if self.kind not in (*STATIC, *SCORES):
            raise ValueError(
                f"kind: expected one of {', '.join((*STATIC, *SCORES))}, got {self.kind!r}"
            )
        share_in("share", self.share, zero=False)

    def training(self, training: Training, run: Run) -> Training:
        if self.kind in STATIC:
            return training
        rule = TokenSelection(score=self.kind, share=self.share, lowest=self.lowest)
        return replace(training, settings={**training.settings, "token_selection": str(rule)})

    def lessons(self, lessons: list[Lesson], run: Run) -> list[Lesson]:
        if self.kind not in STATIC:
            return lessons
        if self.kind == "divergence":
            scores = [diverge.float() for diverge in diverging(lessons, run)]
        else:
            (trusted, _), (teacher, _) = (
                answer_scores(lessons, model) for model in (run.scene.reference, run.scene.teacher)
            )
            scores = [a - b for a, b in zip(trusted, teacher, strict=True)]
        found, kept, tokens = [], 0, 0
        for lesson, score in zip(lessons, scores, strict=True):
            among = torch.tensor(lesson.chosen or [True] * len(score))
            chosen = torch.zeros_like(among)
            chosen[among] = self._chosen(score[among])
            kept, tokens = kept + int(chosen.sum()), tokens + len(chosen)
            if chosen.any():
                found.append(replace(lesson, chosen=tuple(chosen.tolist())))
        run.notes[f"tokens, {self.kind}"] = kept / max(tokens, 1)
        return found

    def _chosen(self, score: Tensor) -> Tensor:
        """The ⌈share · n⌉ of n that score highest, or lowest; of divergence alone those that are 1,
        or 0."""
        ranked = score if self.lowest else -score
        most = math.ceil(self.share * len(score) - 1e-9)
        chosen = torch.zeros(len(score), dtype=torch.bool)
        chosen[ranked.sort(stable=True).indices[:most]] = True
        if self.kind == "divergence":
            chosen &= score == (0 if self.lowest else 1)
        return chosen
