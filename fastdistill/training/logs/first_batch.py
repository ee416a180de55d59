"""A report on the first batch, before the first update.

A real teacher predicts the next token better than the same answers in another order. So each
metric that depends on the order is reported with a shuffled control.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...hf.lm_head import LMHead
from ...losses.linear_head import linear_topk
from ...losses.scores import token_scores
from ...losses.types import TopK
from ..checks.signal import Signal, check_teacher_valid, half_batch_shift, mass_of, signal
from ..config import DistillConfig
from ..histograms import histograms, sum_histograms
from ..loss import SCORING_TOPK, ScoringAnswers, TeacherHidden
from ..targets import Targets

_DIVERGENCE_TEXT = {
    "forward_kl": "KL(teacher ‖ student), forward",
    "reverse_kl": "KL(student ‖ teacher), reverse",
    "jsd": "generalized Jensen–Shannon, beta = {beta:g}",
    "tvd": "total variation",
    "hellinger": "squared Hellinger",
    "skew_forward_kl": "KL(teacher ‖ mix), skew = {skew:g}",
    "skew_reverse_kl": "KL(student ‖ mix), skew = {skew:g}",
    "nla": "negative log of the acceptance rate",
    "lk_hybrid": "KL(teacher ‖ student) and total variation, eta = {eta:g}",
    "argmax_ce": "cross-entropy of the teacher's most likely token",
}
_TAIL_TEXT = {
    "bucket": "compared as one more outcome",
    "truncate": "left out",
    "renorm_teacher": "teacher renormalized over the k tokens",
    "renorm_both": "both renormalized over the k tokens",
}

_OVERLAP_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Metrics of the first batch; KL and NLL are means over its target tokens, in nats.

    tail: how the loss treats it; None if the loss compares the whole vocabulary, where k is that of
    the metrics. support: whose top k the loss compares; the metrics are on the teacher's.
    overlap: share of the teacher's k tokens that are in the student's top k too.
    counts: histograms of the student's token scores, by score (see ../histograms.py).
    """

    objective: str
    tail: str | None
    k: int
    temperature: float
    t2: float
    tokens: int
    masked_share: float
    teacher_mass: float
    teacher_mass_p5: float
    overlap: float
    kl: float
    kl_shuffled: float
    signal: Signal
    sampled: bool = False
    support: str = "teacher"
    counts: dict[str, list[int]] = field(default_factory=dict)

    @property
    def teacher_nll(self) -> float:
        return self.signal.nll

    @property
    def teacher_nll_shuffled(self) -> float:
        return self.signal.nll_shuffled

    @property
    def informative(self) -> bool:
        """Whether the teacher predicts this text better than its own answers in another order."""
        return self.teacher_nll < self.teacher_nll_shuffled

    def mass_text(self) -> str:
        return f"{self.teacher_mass:.4f} mean, {self.teacher_mass_p5:.4f} 5th percentile"

    def lines(self) -> list[tuple[str, str]]:
        text = "the student's own text" if self.sampled else "the text"
        of = {"teacher": "", "student": " of the student", "union": " of both"}[self.support]
        compared = (
            "the whole vocabulary"
            if self.tail is None
            else f"top {self.k}{of}; the rest: {self.tail}"
        )
        return [
            ("objective", self.objective),
            ("temperature", f"T = {self.temperature:g}, divergence × {self.t2:g}"),
            ("teacher tokens", compared),
            (f"covered teacher mass, top {self.k}", self.mass_text()),
            (f"overlap@{self.k}", f"{self.overlap:.1%} of them are in the student's top {self.k}"),
            (
                "target tokens",
                f"{self.tokens:,} ({self.masked_share:.1%} of tokens are not targets)",
            ),
            (
                f"KL to the teacher (top {self.k} and tail)",
                f"{self.kl:.3f} (shuffled teacher {self.kl_shuffled:.3f})",
            ),
            (
                f"teacher's NLL of {text}",
                f"{self.teacher_nll:.3f} (shuffled {self.teacher_nll_shuffled:.3f})",
            ),
        ]

    def show(self) -> None:
        from rich.console import Console
        from rich.table import Table

        console = Console(stderr=True)
        table = Table(title="First batch", title_justify="left", show_header=False, box=None)
        for name, value in self.lines():
            table.add_row(f"[bold]{name}[/bold]", value)
        console.print(table)
        if not self.informative and not self.sampled:
            console.print(
                "The teacher predicts this text no better than its own answers in another order. "
                "Check that it is trained and that it uses this tokenizer.",
                style="yellow",
            )


@torch.no_grad()
def first_batch(
    hidden: Tensor,  # (N, H)
    head: LMHead,
    targets: Targets,
    answers: TopK | TeacherHidden | ScoringAnswers,
    attended: int,
    config: DistillConfig,
    *,
    contexts: Tensor,  # (N,), see `contexts_of`
    sampled: bool,
) -> Panel:
    """Return the metrics of the first batch, which has `attended` tokens besides padding.

    With config.check_signal, raises ValueError if the teacher's answers do not depend on the text.
    """
    teacher = (
        answers
        if isinstance(answers, TopK)
        else answers.topk(config.k or SCORING_TOPK, config.temperature, config.impl)
    )
    labels, head, k = targets.labels, head.whole(), teacher.ids.shape[-1]
    if config.check_signal:
        check_teacher_valid(teacher, labels, contexts, head.vocab_size)
    scoring = {"impl": config.impl, **head.options()}
    # Shifting the students by half a batch makes the same pairs as shifting the teacher.
    aligned, shuffled = (
        token_scores(
            hidden[order],
            head.weight,
            labels=labels,
            teacher=teacher,
            temperature=teacher.temperature,
            **scoring,
        )
        for order in (slice(None), half_batch_shift(len(labels), labels.device))
    )
    assert aligned.forward_kl is not None
    assert shuffled.forward_kl is not None
    assert aligned.nll is not None
    assert shuffled.nll is not None
    subset = slice(_OVERLAP_TOKENS)
    student_ids = linear_topk(hidden[subset], head.weight, min(k, head.vocab_size), **scoring).ids
    teacher_ids = teacher.ids[subset]
    shared = (teacher_ids.unsqueeze(-1) == student_ids.unsqueeze(-2)).any(-1).sum()
    mass = mass_of(teacher)
    return Panel(
        objective=_objective(config, sampled),
        tail=None if config.k is None else _TAIL_TEXT[config.tail],
        support=config.support,
        k=k,
        temperature=config.temperature,
        t2=config.temperature**2 if config.t2_scale else 1.0,
        tokens=len(labels),
        masked_share=1.0 - len(labels) / max(attended, 1),
        teacher_mass=mass.mean().item(),
        teacher_mass_p5=mass.quantile(0.05).item(),
        overlap=shared.item() / max((teacher_ids >= 0).sum().item(), 1),
        kl=aligned.forward_kl.mean().item(),
        kl_shuffled=shuffled.forward_kl.mean().item(),
        signal=signal(teacher, labels, aligned.nll, shuffled.nll, head.vocab_size),
        sampled=sampled,
        counts=sum_histograms(histograms(aligned._asdict(), targets).cpu()),
    )


def _objective(config: DistillConfig, sampled: bool) -> str:
    divergence = _DIVERGENCE_TEXT[config.divergence].format(
        beta=config.beta, skew=config.skew, eta=config.eta
    )
    weight = 0.0 if sampled else config.ce_weight
    if not weight:
        return divergence
    return f"{1 - weight:g} · {divergence} + {weight:g} · cross-entropy of the labels"
