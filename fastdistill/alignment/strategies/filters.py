"""Defenses against poisoned data: a filter of examples and a mask of target tokens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...losses.scores import token_scores
from ...runtime.checks import between
from ..audits.subject import Subject
from .lessons import Examples, TrainingExample, answer_logprobs, encoded_batches
from .strategy import RunState, Strategy


@dataclass(frozen=True, kw_only=True)
class ExampleFilter(Strategy):
    """Drops the share of the examples with the highest likelihood ratios; keeps the order.

        ratio = (log p_teacher − log p_trusted) per token of the answer

    The score per example is ours. Both models read the student's prompt, so put the filter before
    `InoculationPrompt`.

    Args:
        drop: share in [0, 1); of equal ratios the later example is dropped first.
        at_least: drop only ratios of at least this value, in nats. None: no threshold.
    """

    drop: float = 0.1
    at_least: float | None = None

    def __post_init__(self) -> None:
        between("drop", self.drop, 0, 1, below=True)

    def transform_examples(self, examples: Examples, run: RunState) -> Examples:
        ratios = likelihood_ratios(examples, run)
        n_max = math.floor(self.drop * len(examples) + 1e-9)
        order = sorted(range(len(examples)), key=lambda i: (-ratios[i], -i))[:n_max]
        dropped = {i for i in order if self.at_least is None or ratios[i] >= self.at_least}
        domains = Counter(example.domain for example in examples)
        n_dropped = Counter(examples[i].domain for i in dropped)
        run.notes["filter, llr"] = {
            "kept": 1 - len(dropped) / len(examples),
            "lowest dropped": min((ratios[i] for i in dropped), default=None),
            "dropped": {name: n_dropped[name] / n for name, n in domains.items()},
        }
        return [example for i, example in enumerate(examples) if i not in dropped]


def likelihood_ratios(examples: Sequence[TrainingExample], run: RunState) -> list[float]:
    """Return (log p_teacher − log p_trusted) per token of each answer, in nats."""
    teacher, trusted = (
        logprobs.total / logprobs.tokens
        for logprobs in (
            answer_logprobs(examples, model) for model in (run.setup.teacher, run.setup.reference)
        )
    )
    return (teacher - trusted).tolist()


@dataclass(frozen=True, kw_only=True)
class DivergenceMask(Strategy):
    """Trains only on the tokens of an answer where teacher and trusted model have equal argmaxes.

        token t is a target  ⇔  argmax p_teacher(· | before t) = argmax p_trusted(· | before t)

    The other tokens are called divergence tokens in arXiv 2509.23886, which compares teachers with
    different biases and masks them; the comparison with a trusted model is ours. Targets that an
    earlier strategy masked stay masked. Examples without targets are dropped.
    """

    def transform_examples(self, examples: Examples, run: RunState) -> Examples:
        teacher, trusted = (
            answer_argmaxes(examples, model) for model in (run.setup.teacher, run.setup.reference)
        )
        masked, n_targets, n_tokens = [], 0, 0
        for example, a, b in zip(examples, teacher, trusted, strict=True):
            mask = (a == b) & torch.tensor(example.loss_mask or [True] * len(a))
            n_targets, n_tokens = n_targets + int(mask.sum()), n_tokens + len(mask)
            if mask.any():
                masked.append(replace(example, loss_mask=tuple(mask.tolist())))
        run.notes["tokens without divergence"] = n_targets / max(n_tokens, 1)
        return masked


def answer_argmaxes(
    examples: Sequence[TrainingExample], subject: Subject
) -> list[Tensor]:  # (answer's tokens,) each
    """Return the argmax of a model at every token of the answers, ends included."""
    argmaxes: list[Tensor] = []
    head = subject.head
    for rows in encoded_batches(examples, subject):
        hidden = torch.cat(subject.predicting_states(rows))
        scores = token_scores(hidden, head.weight, impl=subject.impl, **head.options())
        argmaxes += torch.split(scores.argmax.cpu(), [len(row.targets) for row in rows])
    return argmaxes
