"""The training loss and evaluation sums, computed from hidden states and the output head.

    N targets · H hidden size · V vocabulary · K teacher tokens · B sequences

The teacher's answers are its top K; or a teacher that scores any ids, for a divergence over the
whole vocabulary (TeacherHidden) or on a support that the student chooses; or None, for the labels
alone. Every function returns sums over targets. The trainer
divides them once by the number of targets in the whole accumulated batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..hf.lm_head import LMHead
from ..kernels.token_loss import LossOptions
from ..losses.answer_checks import AnswerMonitor, AnswerRules, find_shape_error
from ..losses.arguments import Reduction
from ..losses.dense import distill_dense
from ..losses.linear_head import linear_logprobs_at, linear_topk
from ..losses.scores import token_scores
from ..losses.support import answers_on
from ..losses.topk import distill_topk
from ..losses.types import TokenScores, TopK
from ..teachers.protocols import ScoringTeacher
from .config import DistillConfig
from .histograms import histograms
from .targets import Targets
from .teacher_view import TeacherView
from .token_selection import Selection, TokenSelection, weights_of

# Columns of the per-sequence sums that evaluation gathers instead of logits.
EVAL_COLUMNS = (
    *("tokens", "loss", "nll", "top1", "kl", "agreement", "teacher_mass", "student_mass"),
    *("acceptance_rate", "router_aux_loss"),
)
_LOGGED_SUMS = ("divergence", "teacher_mass", "student_mass", "nll", "entropy")
SCORING_TOPK = 64  # K of the scores that compare with a dense teacher


class TeacherHidden(NamedTuple):
    """A teacher's hidden states at the targets, and its head."""

    hidden: Tensor  # (N, G)
    head: LMHead

    def at(self, indices: Tensor) -> TeacherHidden:
        return TeacherHidden(self.hidden[indices], self.head)

    def topk(self, k: int, temperature: float, impl: str) -> TopK:
        k = min(k, self.head.vocab_size)
        options = self.head.options()
        return linear_topk(
            self.hidden, self.head.weight, k, temperature=temperature, impl=impl, **options
        )

    def logprobs_at(self, ids: Tensor, temperature: float, impl: str) -> TopK:
        options = self.head.options()
        return linear_logprobs_at(
            self.hidden, self.head.weight, ids, temperature=temperature, impl=impl, **options
        )


class ScoringAnswers(NamedTuple):
    """A teacher that scores any ids at the targets of a batch, for example in a server."""

    teacher: ScoringTeacher
    view: TeacherView
    monitor: AnswerMonitor

    def at(self, indices: Tensor) -> ScoringAnswers:
        return self._replace(view=self.view._replace(targets=self.view.targets.take(indices)))

    def topk(self, k: int, temperature: float, impl: str) -> TopK:
        ids, mask, _, options = self.view
        answers = self.teacher.topk(ids, mask, k=k, temperature=temperature, **options)
        return self._checked(answers, k)

    def logprobs_at(self, ids: Tensor, temperature: float, impl: str) -> TopK:
        input_ids, mask, targets, options = self.view
        slots = ids.new_full((input_ids.numel(), ids.shape[-1]), -1)
        slots[targets.sources] = ids
        slots = slots.view(*input_ids.shape, -1)
        answers = self.teacher.logprobs_at(
            input_ids, mask, slots, temperature=temperature, **options
        )
        return self._checked(answers, ids.shape[-1])

    def _checked(self, answers: TopK, slots: int) -> TopK:
        targets = self.view.targets
        problem = find_shape_error(answers, targets.shape, slots)
        if problem is not None:
            raise ValueError(f"teacher: {problem}")
        at_targets = targets.gather_topk(answers.to(self.view.input_ids.device))
        positions = targets.sources % targets.shape[1]
        self.monitor.check(at_targets, targets.rows, positions, AnswerRules(nothing=True))
        return at_targets


# Of N targets; None for the labels alone.
Answers = TopK | TeacherHidden | ScoringAnswers | None


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
            answers = None if answers is None else answers.at(indices)
        compared = self._on_support(hidden, head, answers)
        options = self._options(compared, labels_count)
        reduction = Reduction(targets.labels, weights, kind="sum")
        if isinstance(compared, TeacherHidden):
            loss = distill_dense(hidden, head, compared.hidden, compared.head, options, reduction)
            return LossResult(loss, None, sums | {"loss": loss.detach().float()})
        teacher = _empty_topk(targets.labels) if compared is None else compared
        out = distill_topk(hidden, head, teacher, options, reduction)
        sums["loss"] = out.loss.detach().float()
        for name in ("nll",) if compared is None else _LOGGED_SUMS:
            if (statistic := getattr(out, name)) is not None:
                sums[name] = statistic.float().sum()
        return LossResult(out.loss, out.per_token, sums)

    def _on_support(
        self, hidden: Tensor, head: LMHead, answers: Answers
    ) -> TopK | TeacherHidden | None:
        """Return answers at the ids that the loss compares; they depend on the student's top k."""
        config, impl, T = self.config, self.config.impl, self.config.temperature
        k = config.k
        if answers is None or isinstance(answers, TopK):
            return answers
        if k is None:
            assert isinstance(answers, TeacherHidden)
            return answers
        with torch.no_grad():
            whole = head.whole()
            return answers_on(
                config.support,
                teacher_topk=lambda: answers.topk(k, T, impl),
                student_topk=lambda: linear_topk(
                    hidden, whole.weight, k, temperature=T, impl=impl, **whole.options()
                ),
                logprobs_at=lambda ids: answers.logprobs_at(ids, T, impl),
            )

    def _weights(self, hidden: Tensor, head: LMHead, targets: Targets, answers: Answers) -> Tensor:
        assert self.selection is not None
        rule = self.selection
        if isinstance(rule, TokenSelection) and not rule.uses_teacher:
            answers = None
        scores = self._scores(hidden, head.whole(), targets.labels, self._topk(answers))
        return weights_of(rule, scores, targets)

    def _topk(self, answers: Answers) -> TopK | None:
        if answers is None or isinstance(answers, TopK):
            return answers
        k = self.config.k or SCORING_TOPK
        return answers.topk(k, self.config.temperature, self.config.impl)

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

    def _options(self, answers: Answers, labels_count: bool = True) -> LossOptions:
        config = self.config
        options = LossOptions(
            divergence=config.divergence,
            beta=config.beta,
            skew=config.skew,
            eta=config.eta,
            tail=config.tail,
            allow_biased=config.allow_biased,
            temperature=config.temperature,
            t2_scale=config.t2_scale,
            ce_weight=config.ce_weight if labels_count else 0.0,
            z_loss=config.z_loss,
            impl=config.impl,
            backward=config.backward,
        )
        if answers is not None:
            return options
        return options._replace(divergence="forward_kl", tail="bucket", temperature=1.0)

    @torch.no_grad()
    def measure(
        self, hidden: Tensor, head: LMHead, targets: Targets, answers: Answers
    ) -> tuple[Tensor, Tensor]:
        """Return per-sequence sums (B, len(EVAL_COLUMNS)), and the `histograms` of token scores.

        Sums run over all targets: training loss, nll and accuracy; and, with a teacher, KL and
        acceptance rate (bucket tail of its K; whole vocabulary for a dense teacher), agreement on
        the most likely token, and both masses on its K. Columns that need a teacher are NaN without
        one.
        """
        head, labels, topk = head.whole(), targets.labels, self._topk(answers)
        compared = self._on_support(hidden, head, answers)
        options = self._options(compared)._replace(backward="auto")
        per_token = _per_token(hidden, head, labels, compared, options)
        scores = self._scores(hidden, head, labels, topk)
        kl, acceptance = scores.forward_kl, scores.acceptance_rate
        if isinstance(compared, TeacherHidden):
            alone = LossOptions(temperature=options.temperature, impl=options.impl)
            kl = _per_token(hidden, head, labels, compared, alone)
            tvd = alone._replace(divergence="tvd")
            acceptance = 1 - _per_token(hidden, head, labels, compared, tvd)
        columns: dict[str, Tensor | None] = {
            "tokens": torch.ones_like(scores.lse),
            "loss": per_token,
            "nll": scores.nll,
            "top1": scores.argmax == labels,
            "kl": kl,
            "agreement": None if topk is None else scores.argmax == _first_choice(topk),
            "teacher_mass": scores.teacher_mass,
            "student_mass": scores.student_mass,
            "acceptance_rate": acceptance,
            "router_aux_loss": None,  # of the model's output, which the trainer adds
        }
        missing = torch.full(
            targets.shape[:1], torch.nan, dtype=torch.float32, device=labels.device
        )
        sums = [columns[name] for name in EVAL_COLUMNS]
        rows = torch.stack(
            [missing if s is None else targets.per_row(s.float()) for s in sums], dim=-1
        )
        return rows, histograms(scores._asdict() | {"forward_kl": kl}, targets)


def _per_token(
    hidden: Tensor,
    head: LMHead,
    labels: Tensor,
    answers: TopK | TeacherHidden | None,
    options: LossOptions,
) -> Tensor:
    reduction = Reduction(labels, kind="none")
    if isinstance(answers, TeacherHidden):
        return distill_dense(hidden, head, answers.hidden, answers.head, options, reduction)
    teacher = _empty_topk(labels) if answers is None else answers
    return distill_topk(hidden, head, teacher, options, reduction).loss


def _empty_topk(labels: Tensor) -> TopK:
    """Return a teacher with one empty slot: with tail="bucket" its divergence is 0."""
    ids = torch.full((*labels.shape, 1), -1, dtype=torch.int64, device=labels.device)
    return TopK(ids, torch.zeros_like(ids, dtype=torch.float32), temperature=1.0)


def _count(rows: Tensor) -> Tensor:
    return torch.tensor(float(len(rows)), dtype=torch.float32, device=rows.device)


def _first_choice(teacher: TopK) -> Tensor:
    best = teacher.logprobs.masked_fill(teacher.ids < 0, -torch.inf).argmax(-1, keepdim=True)
    return teacher.ids.gather(-1, best)[..., 0]
