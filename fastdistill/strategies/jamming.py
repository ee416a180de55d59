"""What the student may see of a teacher's distributions: fewer tokens, softened, noisy, mixed.

A teacher's answer at a position is K tokens and a tail, K + 1 outcomes. Whatever is done to them
leaves a distribution: Σ exp(logprobs) + exp(log_tail) = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..audits.subject import Subject
from ..outputs import TopK
from ..packing import read_rows
from ..primitive import linear_lse_gather
from .strategy import Run, Strategy, Training

# (answers [B, T, K], input_ids [B, T], attention_mask) -> answers
Change = Callable[[TopK, Tensor, Tensor], TopK]


class Changed:
    """A TopKTeacher whose answers go through a function. It answers at every attended position."""

    def __init__(self, teacher: Any, change: Change) -> None:
        self.teacher, self.change = teacher, change
        self.tokenizer = getattr(teacher, "tokenizer", None)

    @property
    def vocab_size(self) -> int | None:
        return getattr(self.teacher, "vocab_size", None)

    def topk(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        k: int,
        temperature: float = 1.0,
    ) -> TopK:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        answers = self.teacher.topk(input_ids, mask, k=k, temperature=temperature)
        return self.change(answers, input_ids, mask)


@torch.no_grad()
def said_at(
    model: Subject, input_ids: Tensor, mask: Tensor, answers: TopK
) -> Tensor:  # [B, T, K + 1]
    """log p of a model as it is now, at the answers' ids and of all others together, at their
    temperature. It is neither frozen nor switched to another mode."""
    head, device = model.head, model.device
    at = linear_lse_gather(
        model.reader.hidden(read_rows(input_ids, mask, model.reader.vocab)).to(device),
        head.weight,
        answers.ids.to(device),
        temperature=answers.temperature,
        impl=model.impl,
        **head.options(),
    )
    known = torch.cat([at.logits, at.lse_rest[..., None]], dim=-1) - at.lse[..., None]
    return known.to(answers.logprobs)


def tail_of(answers: TopK) -> Tensor:  # [B, T]
    """log of the mass outside the K tokens."""
    if answers.log_tail is not None:
        return answers.log_tail
    inside = answers.logprobs.exp().sum(-1).clamp(max=1)
    return torch.log1p(-inside)


def outcomes(answers: TopK) -> Tensor:  # [B, T, K + 1]
    """log p of the K tokens and of the tail."""
    return torch.cat([answers.logprobs, tail_of(answers)[..., None]], dim=-1)


def distribution(outcomes: Tensor, answers: TopK) -> TopK:
    """K + 1 unnormalised outcomes as answers at the same ids; where nothing was answered nothing
    is."""
    ids, empty = answers.ids, (answers.ids < 0).all(-1)
    slots = outcomes[..., :-1].masked_fill(ids < 0, -torch.inf)
    known = torch.cat([slots, outcomes[..., -1:]], dim=-1).log_softmax(-1)
    tail = torch.where(empty, tail_of(answers), known[..., -1])
    return TopK(ids, known[..., :-1], tail, answers.temperature)


@dataclass(frozen=True, kw_only=True)
class LogitJam(Strategy):
    """Jam what travels in the distributions: top-k clipping, tail, temperature, noise, mixing.

        p  = (1 − mix) · p_teacher + mix · p_trusted        at the teacher's K tokens, and the tail
        p' = softmax(log p + noise · ε)                     ε ~ N(0, 1), of each of those K + 1

    Ours; listed against subliminal signals without a source. The mixture is exact: its tail is what
    both models give to all other tokens. ε follows from the seed and from the tokens up to the
    position, so that it is the same in every epoch and does not average out.

    Args:
        k, tail, temperature, t2_scale, divergence: as in DistillConfig; None leaves them ("all" for
            k is the whole vocabulary). noise: standard deviation in nats. mix: a share in [0, 1].

    Raises:
        ValueError: an argument out of its range; noise or a mixture over the whole vocabulary,
        where a teacher gives hidden states and no log-probabilities.
    """

    k: int | str | None = None
    tail: str | None = None
    temperature: float | None = None
    t2_scale: bool | None = None
    divergence: str | None = None
    noise: float = 0.0
    mix: float = 0.0

    def __post_init__(self) -> None:
        whole = isinstance(self.k, int) and not isinstance(self.k, bool)
        if self.k not in (None, "all") and not (whole and self.k >= 1):  # type: ignore[operator]
            raise ValueError(f"k: expected a number of 1 or more, 'all' or None, got {self.k!r}")
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise: expected nats of 0 or more, got {self.noise!r}")
        if not 0 <= self.mix <= 1:
            raise ValueError(f"mix: expected a share in [0, 1], got {self.mix!r}")

    def training(self, training: Training, run: Run) -> Training:
        names = ("k", "tail", "temperature", "t2_scale", "divergence")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if given.get("k") == "all":
            given["k"] = None
        settings = {**training.settings, **given}
        if settings.get("k", 1) is None and (self.noise or self.mix):
            raise ValueError("k: expected a number with noise or mix, got the whole vocabulary")
        return replace(training, settings=settings)

    def teacher(self, teacher: Any, student: Any, run: Run) -> Any:
        if teacher is None or not (self.noise or self.mix):
            return teacher
        trusted = run.scene.reference

        def change(answers: TopK, input_ids: Tensor, mask: Tensor) -> TopK:
            if self.mix:
                answers = mixed(answers, said_at(trusted, input_ids, mask, answers), self.mix)
            if self.noise:
                answers = noisy(answers, input_ids, self.noise, run.seed)
            return answers

        return Changed(teacher, change)


def mixed(answers: TopK, other: Tensor, share: float) -> TopK:
    """(1 − share) · answers + share · another distribution [B, T, K + 1] at their ids."""
    ours, theirs = (math.log(part) if part else -math.inf for part in (1 - share, share))
    return distribution(torch.logaddexp(outcomes(answers) + ours, other + theirs), answers)


def noisy(answers: TopK, input_ids: Tensor, nats: float, seed: int) -> TopK:
    known = outcomes(answers)
    return distribution(known + nats * _normal(input_ids, known.shape, seed).to(known), answers)


def _normal(input_ids: Tensor, shape: torch.Size, seed: int) -> Tensor:
    """N(0, 1) from a hash of the tokens up to each position, by Box and Muller."""
    state = torch.full(input_ids.shape[:1], seed * 2 + 1, dtype=torch.int64)
    states = []
    for column in input_ids.cpu().long().unbind(1):
        state = _stirred(state * 31 + column + 1)
        states.append(state)
    places = torch.arange(shape[-1])
    whole = _stirred(torch.stack(states, 1)[..., None] + 7919 * places)
    u, v = (_stirred(whole + salt).remainder(1 << 24).double().add(0.5) / (1 << 24)
            for salt in (1, 2))  # fmt: skip
    return (-2 * u.log()).sqrt() * (2 * torch.pi * v).cos()


def _stirred(x: Tensor) -> Tensor:
    """A finaliser of 64 bits that sends neighbours apart; int64 wraps around."""
    for factor in (-0x61C8864680B583EB, -0x4B47D0C5A1A6D1EB):
        x = (x ^ (x >> 29)) * factor
    return x ^ (x >> 32)
