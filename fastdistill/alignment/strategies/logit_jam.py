"""Transformations of a teacher's distributions: clipping, temperature, noise and mixing.

A teacher's answer at a position has K tokens and a tail, K + 1 outcomes. Every transformation
returns a distribution: Σ exp(logprobs) + exp(log_tail) = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...hf.row_reader import read_rows
from ...losses.linear_head import linear_lse_gather
from ...losses.types import TopK
from ...runtime.checks import between, fail, integer
from ..audits.subject import Subject
from .strategy import RunState, Strategy, Training

# (answers [B, T, K], input_ids [B, T], attention_mask) -> answers
Transform = Callable[[TopK, Tensor, Tensor], TopK]


class TransformedTeacher:
    """A TopKTeacher that applies a function to the answers at every attended position."""

    def __init__(self, teacher: Any, transform: Transform) -> None:
        self.teacher, self.transform = teacher, transform
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
        return self.transform(answers, input_ids, mask)


@torch.no_grad()
def logprobs_at(
    model: Subject, input_ids: Tensor, mask: Tensor, answers: TopK
) -> Tensor:  # [B, T, K + 1]
    """Return log p of a model at the answers' ids and of all other tokens together.

    Uses the temperature of the answers. The model is neither frozen nor switched to eval mode.
    """
    head, device = model.head, model.device
    gathered = linear_lse_gather(
        model.reader.hidden(read_rows(input_ids, mask, model.reader.vocab)).to(device),
        head.weight,
        answers.ids.to(device),
        temperature=answers.temperature,
        impl=model.impl,
        **head.options(),
    )
    logprobs = (
        torch.cat([gathered.logits, gathered.lse_rest[..., None]], dim=-1) - gathered.lse[..., None]
    )
    return logprobs.to(answers.logprobs)


def tail_of(answers: TopK) -> Tensor:  # [B, T]
    """Return the log of the mass outside the K tokens."""
    if answers.log_tail is not None:
        return answers.log_tail
    inside = answers.logprobs.exp().sum(-1).clamp(max=1)
    return torch.log1p(-inside)


def outcomes(answers: TopK) -> Tensor:  # [B, T, K + 1]
    """Return log p of the K tokens and of the tail."""
    return torch.cat([answers.logprobs, tail_of(answers)[..., None]], dim=-1)


def distribution(outcomes: Tensor, answers: TopK) -> TopK:
    """Normalize K + 1 outcomes into answers at the same ids; empty positions stay empty."""
    ids, empty = answers.ids, (answers.ids < 0).all(-1)
    columns = outcomes[..., :-1].masked_fill(ids < 0, -torch.inf)
    logprobs = torch.cat([columns, outcomes[..., -1:]], dim=-1).log_softmax(-1)
    tail = torch.where(empty, tail_of(answers), logprobs[..., -1])
    return TopK(ids, logprobs[..., :-1], tail, answers.temperature)


@dataclass(frozen=True, kw_only=True)
class LogitJam(Strategy):
    """Degrade the teacher's distributions: top-k clipping, tail, temperature, noise, mixing.

        p  = (1 − mix) · p_teacher + mix · p_trusted        at the teacher's K tokens, and the tail
        p' = softmax(log p + noise · ε)                     ε ~ N(0, 1), of each of those K + 1

    A defense against subliminal signals; the design is ours. The mixture is exact: its tail is the
    mass of both models on all other tokens. ε is a hash of the seed and of the tokens up to the
    position. It is the same in every epoch, so it does not average out.

    Args:
        k, tail, allow_biased, temperature, t2_scale, divergence: as in DistillConfig; None leaves
            them unchanged. k="all" is the whole vocabulary.
        noise: standard deviation in nats. mix: a share in [0, 1].

    Raises:
        ValueError: an argument out of its range; noise or mixing over the whole vocabulary, for
        which a teacher returns hidden states instead of log-probabilities.
    """

    k: int | str | None = None
    tail: str | None = None
    allow_biased: bool | None = None
    temperature: float | None = None
    t2_scale: bool | None = None
    divergence: str | None = None
    noise: float = 0.0
    mix: float = 0.0

    def __post_init__(self) -> None:
        if self.k != "all":
            integer("k", self.k, 1, optional=True, hint='"all" is the whole vocabulary')
        between("noise", self.noise, 0)
        between("mix", self.mix, 0, 1)

    def training(self, training: Training, run: RunState) -> Training:
        names = ("k", "tail", "allow_biased", "temperature", "t2_scale", "divergence")
        overrides = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if overrides.get("k") == "all":
            overrides["k"] = None
        settings = {**training.settings, **overrides}
        if settings.get("k", 1) is None and (self.noise or self.mix):
            fail("k", "a number with noise or mix", "the whole vocabulary")
        return replace(training, settings=settings)

    def teacher(self, teacher: Any, student: Any, run: RunState) -> Any:
        if teacher is None or not (self.noise or self.mix):
            return teacher
        trusted = run.setup.reference

        def transform(answers: TopK, input_ids: Tensor, mask: Tensor) -> TopK:
            if self.mix:
                answers = mixed(answers, logprobs_at(trusted, input_ids, mask, answers), self.mix)
            if self.noise:
                answers = noisy(answers, input_ids, self.noise, run.seed)
            return answers

        return TransformedTeacher(teacher, transform)


def mixed(answers: TopK, other: Tensor, share: float) -> TopK:
    """Return (1 − share) · answers + share · another distribution [B, T, K + 1] at their ids."""
    log_keep, log_share = (math.log(part) if part else -math.inf for part in (1 - share, share))
    return distribution(torch.logaddexp(outcomes(answers) + log_keep, other + log_share), answers)


def noisy(answers: TopK, input_ids: Tensor, nats: float, seed: int) -> TopK:
    """Return the answers with Gaussian noise of `nats` on every log-probability."""
    logprobs = outcomes(answers)
    noise = _normal(input_ids, logprobs.shape, seed).to(logprobs)
    return distribution(logprobs + nats * noise, answers)


def _normal(input_ids: Tensor, shape: torch.Size, seed: int) -> Tensor:
    """Return N(0, 1) samples from a hash of the tokens up to each position (Box–Muller)."""
    state = torch.full(input_ids.shape[:1], seed * 2 + 1, dtype=torch.int64)
    states = []
    for column in input_ids.cpu().long().unbind(1):
        state = _mix64(state * 31 + column + 1)
        states.append(state)
    places = torch.arange(shape[-1])
    whole = _mix64(torch.stack(states, 1)[..., None] + 7919 * places)
    u, v = (
        _mix64(whole + salt).remainder(1 << 24).double().add(0.5) / (1 << 24) for salt in (1, 2)
    )
    return (-2 * u.log()).sqrt() * (2 * torch.pi * v).cos()


def _mix64(x: Tensor) -> Tensor:
    """Return a 64-bit hash finalizer of x; int64 overflow wraps around."""
    for factor in (-0x61C8864680B583EB, -0x4B47D0C5A1A6D1EB):
        x = (x ^ (x >> 29)) * factor
    return x ^ (x >> 32)
