"""The training loss and evaluation sums, computed from hidden states and the output head.

    N targets · H hidden size · V vocabulary · K teacher tokens · B sequences

The teacher's answers are its top K; or its hidden states and head, for a divergence over the whole
vocabulary; or None, for the labels alone. Every function returns sums over targets. The trainer
divides them once by the number of targets in the whole accumulated batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dense import linear_distill_loss
from ..heads import LMHead
from ..losses import topk_distill
from ..outputs import TokenScores, TopK
from ..primitive import linear_topk
from ..scores import token_scores
from .config import DistillConfig
from .histograms import histograms
from .selection import Selection, TokenSelection, weights_of
from .targets import Targets

# Columns of the per-sequence sums that evaluation gathers instead of logits.
EVAL_COLUMNS = ("tokens", "loss", "nll", "top1", "kl", "agreement", "teacher_mass", "student_mass")
_LOGGED_SUMS = ("divergence", "teacher_mass", "student_mass", "nll", "entropy")
SCORING_TOPK = 64  # K of the scores that compare with a dense teacher


class TeacherHidden(NamedTuple):
    """A teacher's hidden states at the targets, and its head."""

    hidden: Tensor  # (N, G)
    head: LMHead

    def take(self, indices: Tensor) -> TeacherHidden:
        return TeacherHidden(self.hidden[indices], self.head)

    def topk(self, k: int, temperature: float, impl: str) -> TopK:
        k = min(k, self.head.vocab_size)
        options = {"temperature": temperature, "impl": impl, **self.head.options()}
        return linear_topk(self.hidden, self.head.weight, k, **options)


Answers = TopK | TeacherHidden | None  # of N targets; None for the labels alone


class LossResult(NamedTuple):
    """The loss summed over targets, and detached sums of the logged metrics."""

    loss: Tensor  # scalar, carries the gradient
    per_token: Tensor | None  # (N,), before weights; None with a dense teacher
    sums: dict[str, Tensor]


@dataclass(frozen=True)
class Loss:
    """The configured loss at one head.

    ℓ_n = w_n · [(1 − c)·D(p_n, q_n) [·T²] + c·CE(label_n) + ζ·LSE_n²]

    `labels_count` is False for tokens that the student sampled. They are no ground truth, so c is
    set to 0.
    """

    config: DistillConfig
    selection: Selection | None = None

    def __call__(
        self,
        hidden: Tensor,  # (N, H)
        head: LMHead,
        targets: Targets,
        answers: Answers,
        *,
        labels_count: bool = True,
    ) -> LossResult:
        sums = {"tokens": _count(targets.labels)}
        weights = None
        if self.selection is not None:
            weights = torch.zeros_like(targets.labels, dtype=torch.float32)
            if len(weights):
                weights = self._weights(hidden.detach(), head, targets, answers)
            indices = weights.nonzero()[:, 0]
            sums["selected"] = _count(indices)
            hidden, targets, weights = hidden[indices], targets.take(indices), weights[indices]
            answers = _take(answers, indices)
        options = self._options(head, labels_count)
        loss: Callable[..., LossResult] = (
            _teacher_hidden_loss if isinstance(answers, TeacherHidden) else _topk_loss
        )
        result = loss(hidden, head, targets.labels, answers, weights, options)
        return result._replace(sums=sums | {"loss": result.loss.detach().float()} | result.sums)

    def _weights(self, hidden: Tensor, head: LMHead, targets: Targets, answers: Answers) -> Tensor:
        assert self.selection is not None
        rule = self.selection
        if isinstance(rule, TokenSelection) and not rule.uses_teacher:
            answers = None
        scores = self._scores(hidden, head.whole(), targets.labels, self._topk(answers))
        return weights_of(rule, scores, targets)

    def _topk(self, answers: Answers) -> TopK | None:
        if isinstance(answers, TeacherHidden):
            return answers.topk(SCORING_TOPK, self.config.temperature, self.config.impl)
        return answers

    def _scores(
        self, hidden: Tensor, head: LMHead, labels: Tensor, teacher: TopK | None
    ) -> TokenScores:
        return token_scores(
            hidden,
            head.weight,
            labels=labels,
            teacher=teacher,
            temperature=self.config.temperature,
            impl=self.config.impl,
            **head.options(),
        )

    def _options(self, head: LMHead, labels_count: bool) -> dict[str, Any]:
        config = self.config
        return {
            "divergence": config.divergence,
            "beta": config.beta,
            "skew": config.skew,
            "tail": config.tail,
            "allow_biased": config.allow_biased,
            "temperature": config.temperature,
            "t2_scale": config.t2_scale,
            "ce_weight": config.ce_weight if labels_count else 0.0,
            "z_loss": config.z_loss,
            "impl": config.impl,
            "backward": config.backward,
            **head.options(),
        }

    @torch.no_grad()
    def measure(
        self, hidden: Tensor, head: LMHead, targets: Targets, answers: Answers
    ) -> tuple[Tensor, Tensor]:
        """Return per-sequence sums (B, len(EVAL_COLUMNS)), and the `histograms` of token scores.

        Sums run over all targets: training loss, nll and accuracy; and, with a teacher, KL (bucket
        tail of its K; whole vocabulary for a dense teacher), agreement on the most likely token,
        and both masses on its K. Columns that need a teacher are NaN without one.
        """
        head, labels, topk = head.whole(), targets.labels, self._topk(answers)
        options = self._options(head, True) | {"reduction": "none", "backward": "auto"}
        per_token = _per_token(hidden, head, labels, answers, options)
        scores = self._scores(hidden, head, labels, topk)
        kl = scores.forward_kl
        if isinstance(answers, TeacherHidden):
            plain = {"divergence": "forward_kl", "ce_weight": 0.0, "z_loss": 0.0, "t2_scale": False}
            kl = _per_token(hidden, head, labels, answers, options | plain)
        columns: dict[str, Tensor | None] = {
            "tokens": torch.ones_like(scores.lse),
            "loss": per_token,
            "nll": scores.nll,
            "top1": scores.argmax == labels,
            "kl": kl,
            "agreement": None if topk is None else scores.argmax == _first_choice(topk),
            "teacher_mass": scores.teacher_mass,
            "student_mass": scores.student_mass,
        }
        missing = torch.full(
            targets.shape[:1], torch.nan, dtype=torch.float32, device=labels.device
        )
        sums = [columns[name] for name in EVAL_COLUMNS]
        rows = torch.stack(
            [missing if s is None else targets.per_row(s.float()) for s in sums], dim=-1
        )
        return rows, histograms(scores._asdict() | {"forward_kl": kl}, targets)


def _topk_loss(
    hidden: Tensor,
    head: LMHead,
    labels: Tensor,
    teacher: TopK | None,
    weights: Tensor | None,
    options: dict[str, Any],
) -> LossResult:
    out = topk_distill(
        hidden,
        head.weight,
        _empty_topk(labels) if teacher is None else teacher,
        labels=labels,
        token_weight=weights,
        reduction="sum",
        **_without_teacher(options) if teacher is None else options,
    )
    logged = {
        name: getattr(out, name) for name in (_LOGGED_SUMS if teacher is not None else ("nll",))
    }
    sums = {name: x.float().sum() for name, x in logged.items() if x is not None}
    return LossResult(out.loss, out.per_token, sums)


def _teacher_hidden_loss(
    hidden: Tensor,
    head: LMHead,
    labels: Tensor,
    teacher: TeacherHidden,
    weights: Tensor | None,
    options: dict[str, Any],
) -> LossResult:
    loss = _dense_loss(hidden, head, labels, teacher, options, "sum", weights)
    return LossResult(loss, None, {})


_SPARSE_ONLY = ("tail", "allow_biased", "reduction")  # options that a dense loss does not take


def _dense_loss(
    hidden: Tensor,
    head: LMHead,
    labels: Tensor,
    teacher: TeacherHidden,
    options: dict[str, Any],
    reduction: str,
    weights: Tensor | None = None,
) -> Tensor:
    teacher_head = teacher.head
    shared = min(head.vocab_size, teacher_head.vocab_size)
    return linear_distill_loss(
        *(hidden, head.weight, teacher.hidden, teacher_head.weight),
        labels=labels,
        token_weight=weights,
        reduction=reduction,
        teacher_bias=teacher_head.bias,
        teacher_logit_scale=teacher_head.logit_scale,
        teacher_softcap=teacher_head.softcap,
        **{name: v for name, v in options.items() if name not in _SPARSE_ONLY}
        | {"valid_vocab": shared},
    )


def _per_token(
    hidden: Tensor, head: LMHead, labels: Tensor, answers: Answers, options: dict[str, Any]
) -> Tensor:
    if isinstance(answers, TeacherHidden):
        return _dense_loss(hidden, head, labels, answers, options, "none")
    options = _without_teacher(options) if answers is None else options
    teacher = _empty_topk(labels) if answers is None else answers
    return topk_distill(hidden, head.weight, teacher, labels=labels, **options).loss


def _empty_topk(labels: Tensor) -> TopK:
    """Return a teacher with one empty slot: with tail="bucket" its divergence is 0."""
    ids = torch.full((*labels.shape, 1), -1, dtype=torch.int64, device=labels.device)
    return TopK(ids, torch.zeros_like(ids, dtype=torch.float32), temperature=1.0)


def _without_teacher(options: dict[str, Any]) -> dict[str, Any]:
    return options | {"divergence": "forward_kl", "tail": "bucket", "temperature": 1.0}


def _count(rows: Tensor) -> Tensor:
    return torch.tensor(float(len(rows)), dtype=torch.float32, device=rows.device)


def _take(answers: Answers, indices: Tensor) -> Answers:
    if answers is None or isinstance(answers, TeacherHidden):
        return None if answers is None else answers.take(indices)
    tail = None if answers.log_tail is None else answers.log_tail[indices]
    return TopK(answers.ids[indices], answers.logprobs[indices], tail, answers.temperature)


def _first_choice(teacher: TopK) -> Tensor:
    best = teacher.logprobs.masked_fill(teacher.ids < 0, -torch.inf).argmax(-1, keepdim=True)
    return teacher.ids.gather(-1, best)[..., 0]
