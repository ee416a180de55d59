"""Defenses against poisoned data: filters of examples and of target tokens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...losses.scores import token_scores
from ...runtime.checks import between, choice, positive
from ..audits.subject import Subject
from .lessons import Examples, TrainingExample, answer_logprobs, encoded_batches
from .strategy import RunState, Strategy


@dataclass(frozen=True, kw_only=True)
class ExampleFilter(Strategy):
    """Drops the share of the examples with the highest scores; the others keep their order.

        llr              (log p_teacher − log p_trusted) per token of the answer
        divergence       share of the answer's tokens, its end included, at which teacher and
                         trusted model have different argmax tokens

    The scores per example are ours. Divergence tokens follow arXiv 2509.23886, which compares
    teachers with different biases; this filter compares the teacher with the trusted model. Both
    models read the student's prompt, so put filters before `InoculationPrompt`.

    Args:
        drop: share in [0, 1); of equal scores the later example is dropped first.
        at_least: drop only scores of at least this value. None: no threshold.
    """

    score: str
    drop: float = 0.1
    at_least: float | None = None

    def __post_init__(self) -> None:
        choice("score", self.score, _SCORES)
        between("drop", self.drop, 0, 1, below=True)

    def transform_examples(self, examples: Examples, run: RunState) -> Examples:
        scores = _SCORES[self.score](examples, run)
        n_max = math.floor(self.drop * len(examples) + 1e-9)
        order = sorted(range(len(examples)), key=lambda i: (-scores[i], -i))[:n_max]
        dropped = {i for i in order if self.at_least is None or scores[i] >= self.at_least}
        domains = Counter(example.domain for example in examples)
        n_dropped = Counter(examples[i].domain for i in dropped)
        run.notes[f"filter, {self.score}"] = {
            "kept": 1 - len(dropped) / len(examples),
            "lowest dropped": min((scores[i] for i in dropped), default=None),
            "dropped": {name: n_dropped[name] / n for name, n in domains.items()},
        }
        return [example for i, example in enumerate(examples) if i not in dropped]


def _ratio(examples: Sequence[TrainingExample], run: RunState) -> list[float]:
    teacher, trusted = (
        logprobs.total / logprobs.tokens
        for logprobs in (
            answer_logprobs(examples, model) for model in (run.setup.teacher, run.setup.reference)
        )
    )
    return (teacher - trusted).tolist()


def _diverging(examples: Sequence[TrainingExample], run: RunState) -> list[float]:
    return [float(mask.float().mean()) for mask in divergence_masks(examples, run)]


_SCORES = {"llr": _ratio, "divergence": _diverging}


def answer_scores(
    examples: Sequence[TrainingExample], subject: Subject
) -> tuple[list[Tensor], list[Tensor]]:  # (answer's tokens,) each
    """Return −log p and the argmax of a model at every token of the answers, ends included."""
    losses: list[Tensor] = []
    argmaxes: list[Tensor] = []
    head = subject.head
    for rows in encoded_batches(examples, subject):
        hidden = torch.cat(subject.predicting_states(rows))
        labels = torch.tensor([token for row in rows for token in row.targets])
        scores = token_scores(
            hidden,
            head.weight,
            labels=labels.to(hidden.device),
            impl=subject.impl,
            **head.options(),
        )
        assert scores.nll is not None
        lengths = [len(row.targets) for row in rows]
        losses += torch.split(scores.nll.cpu(), lengths)
        argmaxes += torch.split(scores.argmax.cpu(), lengths)
    return losses, argmaxes


def divergence_masks(
    examples: Sequence[TrainingExample], run: RunState
) -> list[Tensor]:  # (answer's tokens,) each
    """Return True where the teacher and the trusted model have different argmax tokens."""
    (_, teacher), (_, trusted) = (
        answer_scores(examples, model) for model in (run.setup.teacher, run.setup.reference)
    )
    return [a != b for a, b in zip(teacher, trusted, strict=True)]


@dataclass(frozen=True, kw_only=True)
class TokenSelector(Strategy):
    """Trains on the share of every answer's tokens with the highest or lowest scores.

        excess_loss    nll_trusted − nll_teacher, before training; adapted from Rho-1
                       (arXiv 2404.07965), with the trusted model instead of the student and the
                       teacher as reference
        divergence     1 where teacher and trusted model have different argmax tokens, else 0
                       (arXiv 2509.23886 masks such tokens). Selects only tokens with score 1, or
                       with `lowest` only those with score 0; share=1.0 selects all of them

    For scores of the student during training, such as entropy, set `token_selection` in
    `Training.settings`. The share is of the current targets: after `AnswerOnly`, of the answer
    without its reasoning. Examples without targets are dropped.

    Args:
        share: of each answer's tokens, its end included, rounded up, in (0, 1]; ties select the
            earlier tokens. lowest: select the lowest scores.
    """

    kind: str
    share: float = 0.5
    lowest: bool = False

    def __post_init__(self) -> None:
        choice("kind", self.kind, ("excess_loss", "divergence"))
        positive("share", self.share)
        between("share", self.share, 0, 1)

    def transform_examples(self, examples: Examples, run: RunState) -> Examples:
        if self.kind == "divergence":
            scores = [mask.float() for mask in divergence_masks(examples, run)]
        else:
            (trusted, _), (teacher, _) = (
                answer_scores(examples, model) for model in (run.setup.reference, run.setup.teacher)
            )
            scores = [a - b for a, b in zip(trusted, teacher, strict=True)]
        masked, n_targets, n_tokens = [], 0, 0
        for example, score in zip(examples, scores, strict=True):
            targets = torch.tensor(example.loss_mask or [True] * len(score))
            mask = torch.zeros_like(targets)
            mask[targets] = self._select(score[targets])
            n_targets, n_tokens = n_targets + int(mask.sum()), n_tokens + len(mask)
            if mask.any():
                masked.append(replace(example, loss_mask=tuple(mask.tolist())))
        run.notes[f"tokens, {self.kind}"] = n_targets / max(n_tokens, 1)
        return masked

    def _select(self, score: Tensor) -> Tensor:
        """Return the mask of the ⌈share · n⌉ highest or lowest scores.

        For divergence, only scores of 1, or with `lowest` of 0, are selected.
        """
        ranked = score if self.lowest else -score
        n_max = math.ceil(self.share * len(score) - 1e-9)
        mask = torch.zeros(len(score), dtype=torch.bool)
        mask[ranked.sort(stable=True).indices[:n_max]] = True
        if self.kind == "divergence":
            mask &= score == (0 if self.lowest else 1)
        return mask
