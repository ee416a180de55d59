"""What the teacher says about the first batch, before the student has moved.

Most failed distillations fail in the first batch: a payload of zeros, of another position or of
another text trains a student smoothly towards nothing. Two controls tell: a teacher that answers
knows the next token better than the same answers in another order, and better than the same
answers one position early or late.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import DistillConfig
from .data import IGNORE_INDEX
from .heads import LMHead
from .outputs import TopK
from .scores import token_scores

_DIRECTION = {
    "forward_kl": "KL(teacher ‖ student), forward",
    "reverse_kl": "KL(student ‖ teacher), reverse",
    "jsd": "generalised Jensen–Shannon, beta = {beta:g}",
    "tvd": "total variation",
    "hellinger": "squared Hellinger",
    "skew_forward_kl": "KL(teacher ‖ mix), skew = {skew:g}",
    "skew_reverse_kl": "KL(student ‖ mix), skew = {skew:g}",
}
_TAIL = {
    "bucket": "compared as one more outcome",
    "truncate": "the teacher counts as zero there",
    "renorm_teacher": "teacher renormalised over the k tokens",
    "renorm_both": "both renormalised over the k tokens",
}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The first batch in figures; KL and NLL are means over its target tokens, in nats."""

    objective: str
    tail: str
    k: int
    temperature: float
    t2: float
    tokens: int
    masked_share: float
    teacher_mass: float
    teacher_mass_p5: float
    kl: float
    kl_shuffled: float
    teacher_nll: float
    teacher_nll_shuffled: float

    @property
    def informative(self) -> bool:
        """Whether the teacher fits this text better than its own answers in another order."""
        return self.teacher_nll < self.teacher_nll_shuffled

    def lines(self) -> list[tuple[str, str]]:
        mass = f"{self.teacher_mass:.4f} mean, {self.teacher_mass_p5:.4f} 5th percentile"
        return [
            ("objective", self.objective),
            ("temperature", f"T = {self.temperature:g}, divergence × {self.t2:g}"),
            ("teacher tokens", f"top {self.k}; the rest: {self.tail}"),
            ("covered teacher mass", mass),
            ("target tokens", f"{self.tokens:,} ({self.masked_share:.1%} of tokens are no target)"),
            ("KL to the teacher", f"{self.kl:.3f} (shuffled teacher {self.kl_shuffled:.3f})"),
            (
                "teacher's NLL of the text",
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
        if not self.informative:
            console.print(
                "The teacher fits this text no better than its own answers in another order. Is it "
                "trained, and are these its tokens?",
                style="yellow",
            )


@torch.no_grad()
def first_batch(
    hidden: Tensor,  # (B, T, H)
    head: LMHead,
    labels: Tensor,  # (B, T)
    teacher: TopK,  # [B, T, K]
    attended: Tensor,  # (B, T) bool, False on padding
    config: DistillConfig,
    *,
    aligned_by_construction: bool,
) -> Panel:
    """Measure the first batch; raises where the teacher's answers cannot be real."""
    counted = labels != IGNORE_INDEX
    hidden_NH, labels_N = hidden[counted], labels[counted]
    teacher_N = _pick(teacher, counted)
    refuse_unreal(teacher_N, labels_N)
    if not aligned_by_construction:
        refuse_misaligned(teacher, labels, head.vocab_size)
    # Half a batch away rather than at random: the run's random stream must not move.
    order = torch.arange(len(labels_N), device=labels.device).roll(len(labels_N) // 2)
    shuffled_N = _pick(teacher_N, order)
    kl, kl_shuffled = (
        token_scores(
            hidden_NH,
            head.weight,
            teacher=answers,
            temperature=teacher.temperature,
            impl=config.impl,
            **head.options(),
        ).forward_kl
        for answers in (teacher_N, shuffled_N)
    )
    assert kl is not None
    assert kl_shuffled is not None
    mass = _mass(teacher_N)
    t2 = config.temperature**2 if config.t2_scale else 1.0
    objective = _DIRECTION[config.divergence].format(beta=config.beta, skew=config.skew)
    if config.ce_weight:
        weight = config.ce_weight
        objective = f"{1 - weight:g} · {objective} + {weight:g} · cross-entropy of the labels"
    nll, nll_shuffled = (
        -label_logprob(answers, labels_N, head.vocab_size).mean().item()
        for answers in (teacher_N, shuffled_N)
    )
    return Panel(
        objective=objective,
        tail=_TAIL[config.tail],
        k=teacher.ids.shape[-1],
        temperature=config.temperature,
        t2=t2,
        tokens=len(labels_N),
        masked_share=1.0 - len(labels_N) / max(int(attended.sum()), 1),
        teacher_mass=mass.mean().item(),
        teacher_mass_p5=mass.quantile(0.05).item(),
        kl=kl.mean().item(),
        kl_shuffled=kl_shuffled.mean().item(),
        teacher_nll=nll,
        teacher_nll_shuffled=nll_shuffled,
    )


def refuse_unreal(teacher: TopK, labels: Tensor) -> None:
    """Payloads [N, K] that no language model gives: NaN, mass above 1, uniform, or constant."""
    used = teacher.ids >= 0
    logprobs = teacher.logprobs.float().masked_fill(~used, -torch.inf)
    if torch.isnan(logprobs).any():
        raise _unreal("its log-probabilities contain NaN")
    mass = _mass(teacher)
    if (mass > 1.001).any():
        raise _unreal(f"its probabilities sum to {mass.max().item():.4g} at one position")
    if len(labels) < 2 or (labels == labels[0]).all():
        return  # one position, or one token over and over: an honest teacher may repeat itself
    if (teacher.ids == teacher.ids[0]).all() and (logprobs == logprobs[0]).all():
        raise _unreal(f"it gives the same answer at all {len(labels):,} positions")
    values = logprobs[used]
    if teacher.ids.shape[-1] > 1 and (values.max() - values.min()).item() < 1e-6:
        raise _unreal("all its answers are equally likely, as from logits that are all zero")


def refuse_misaligned(teacher: TopK, labels: Tensor, vocab: int) -> None:
    """Compare with the neighbouring positions: answers that fit those much better are shifted."""
    counted = labels != IGNORE_INDEX
    common = counted & counted.roll(1, -1) & counted.roll(-1, -1)
    common[..., :1] = common[..., -1:] = False  # what roll brought round the edge
    if common.sum() < 64:
        return
    answers = _pick(teacher, common)
    nll = {s: -label_logprob(answers, labels.roll(s, -1)[common], vocab) for s in (-1, 0, 1)}
    for shift in (-1, 1):
        gain = nll[0] - nll[shift]
        error = gain.std().item() / math.sqrt(len(gain))
        if gain.mean().item() > max(0.5, 5 * error):
            side = "next" if shift == -1 else "previous"
            raise ValueError(
                "teacher: expected position t to answer for the token at t + 1, but its answers "
                f"fit the {side} position better by {gain.mean().item():.2f} nats per token over "
                f"{len(gain):,} tokens. Shift its ids and logprobs by one position"
            )


def label_logprob(teacher: TopK, labels: Tensor, vocab: int) -> Tensor:
    """log p(label), the mass outside the payload spread evenly over the ids outside it. [...]"""
    used = teacher.ids >= 0
    hit = used & (teacher.ids == labels.unsqueeze(-1))
    inside = teacher.logprobs.float().masked_fill(~hit, -torch.inf).logsumexp(-1)
    tail = torch.log1p(-_mass(teacher).clamp(max=1 - 2**-24))
    if teacher.log_tail is not None:
        tail = teacher.log_tail
    outside = (vocab - used.sum(-1)).clamp(min=1).log()
    return torch.where(hit.any(-1), inside, tail - outside)


def _mass(teacher: TopK) -> Tensor:
    return teacher.logprobs.float().exp().masked_fill(teacher.ids < 0, 0.0).sum(-1)


def _pick(teacher: TopK, where: Tensor) -> TopK:
    tail = None if teacher.log_tail is None else teacher.log_tail[where]
    return TopK(teacher.ids[where], teacher.logprobs[where], tail, teacher.temperature)


def _unreal(reason: str) -> ValueError:
    return ValueError(
        f"teacher: expected the answers of a language model, but {reason}. Training would teach "
        "the student nothing: check the weights, the cache, or the positions"
    )
