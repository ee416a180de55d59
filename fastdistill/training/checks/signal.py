"""Checks that a teacher's answers belong to this text and these positions.

Most failed distillations fail in the first batch: answers that are zeros, shifted or from another
text train without an error. All functions take the answers at N targets and the true tokens.
losses/answer_checks.py checks in every batch that answers are a distribution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from ...hf.encoder import IGNORE_INDEX
from ...losses.types import TopK
from ...runtime import checks

MIN_TOKENS = 64  # targets needed for a decision
# In nats per token: a teacher with a smaller expected gap makes no prediction to test.
_LEAST_EXPECTED_GAP = 0.25
_LEAST_OBSERVED_SHARE = 0.1  # least share of the expected gap that a valid teacher reaches
_MAX_COMPARED = 2048  # targets
_CERTAIN_PROBABILITY = 0.99  # of one token
_SLACK = 0.01  # nats above −log V that still count as uniform


@dataclass(frozen=True, kw_only=True)
class Signal:
    """Means over targets in nats, compared with the same answers shifted by half a batch.

    nll, nll_shuffled: −log p(next token) of the teacher. claimed: the expected gap between them if
    the answers are correct, KL(p ‖ shuffled p). delivered: the observed gap, nll_shuffled − nll,
    with its standard error. student: nll_shuffled − nll of the student, with its standard error.
    """

    nll: float
    nll_shuffled: float
    claimed: float
    delivered: float
    delivered_error: float
    student: float
    student_error: float
    tokens: int

    @property
    def is_plausible(self) -> bool:
        """False if the observed gap is clearly smaller than the expected gap."""
        enough = self.tokens >= MIN_TOKENS and self.claimed >= _LEAST_EXPECTED_GAP
        gap_is_small = self.delivered < _LEAST_OBSERVED_SHARE * self.claimed
        gap_is_certain = self.delivered + 3 * self.delivered_error < self.claimed / 2
        return not (enough and gap_is_small and gap_is_certain)

    @property
    def text_is_predictable(self) -> bool:
        """Whether the student predicts this text better than shuffled text."""
        return self.student > max(0.5, 5 * self.student_error)


def half_batch_shift(n: int, device: torch.device) -> Tensor:
    """Return a shift by half a batch, which leaves the run's random state unchanged."""
    return torch.arange(n, device=device).roll(n // 2)


def signal(
    teacher: TopK,  # [N, K]
    labels: Tensor,  # (N,)
    student_nll: Tensor,  # (N,)
    student_nll_shuffled: Tensor,  # (N,), of the same tokens, half a batch away
    vocab: int,
) -> Signal:
    at = half_batch_shift(len(labels), labels.device)
    shuffled = teacher.at(at)
    nll, nll_shuffled = (-label_logprob(answers, labels, vocab) for answers in (teacher, shuffled))
    gain = nll_shuffled - nll
    student_gain = student_nll_shuffled - student_nll
    subset = slice(_MAX_COMPARED)
    return Signal(
        nll=nll.mean().item(),
        nll_shuffled=nll_shuffled.mean().item(),
        claimed=_distance(teacher.at(subset), shuffled.at(subset), vocab),
        delivered=gain.mean().item(),
        delivered_error=_error(gain),
        student=student_gain.mean().item(),
        student_error=_error(student_gain),
        tokens=len(labels),
    )


def _distance(p: TopK, other: TopK, vocab: int) -> float:
    """Return KL(p ‖ other) over p's K tokens, with the tail of `other` spread evenly."""
    total = torch.zeros(len(p.ids), dtype=torch.float32, device=p.ids.device)
    for slot in range(p.ids.shape[-1]):
        ids, logprobs = p.ids[:, slot], p.logprobs[:, slot].float()
        gap = logprobs - label_logprob(other, ids, vocab)
        total += torch.where(ids >= 0, logprobs.exp() * gap, 0.0).nan_to_num()
    return total.mean().item()


def _error(values: Tensor) -> float:
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.inf


def contexts_of(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return a hash [B, T] of the attended tokens up to each position.

    Different contexts have equal hashes with probability 2⁻⁶⁴.
    """
    attended = (attention_mask != 0).long()
    positions = (attended.cumsum(-1) - 1).clamp(min=0)
    random = torch.Generator().manual_seed(0)
    factors = torch.randint(-(1 << 62), 1 << 62, (input_ids.shape[1],), generator=random) * 2 + 1
    return ((input_ids + 1) * factors.to(input_ids.device)[positions] * attended).cumsum(-1)


def check_teacher_valid(teacher: TopK, labels: Tensor, contexts: Tensor, vocab: int) -> None:
    """Raise ValueError for answers [N, K] that do not depend on the text.

    They are the same after different contexts (N,), or uniform. A valid teacher gives equal answers
    after equal contexts, and may be certain of one token after a few different contexts (for
    example in multiple-choice questions).
    """
    if len(labels) < 2 or (labels == labels[0]).all():
        return  # one position or one repeated token: equal answers are valid
    used = teacher.ids >= 0
    logprobs = teacher.logprobs.float().masked_fill(~used, -torch.inf)
    different = len(torch.unique(contexts))
    certain = logprobs.max().item() > math.log(_CERTAIN_PROBABILITY) and len(labels) < MIN_TOKENS
    same = (teacher.ids == teacher.ids[0]).all() and (logprobs == logprobs[0]).all()
    if same and different > 1 and not certain:
        _fail_invalid(
            f"the same answer at all {len(labels):,} positions, after {different:,} different "
            "contexts"
        )
    values = logprobs[used]
    if teacher.ids.shape[-1] > 1 and len(values):
        equal = (values.max() - values.min()).item() < 1e-6
        if equal and values.max().item() < _SLACK - math.log(vocab):
            _fail_invalid("answers that are all equally likely, as with logits that are all zero")


def check_alignment(teacher: TopK, labels: Tensor, vocab: int) -> None:
    """Raise ValueError for answers [B, T, K] that fit a neighboring position better.

    labels [B, T] hold IGNORE_INDEX at positions without a target.
    """
    counted = labels != IGNORE_INDEX
    common = counted & counted.roll(1, -1) & counted.roll(-1, -1)
    common[..., :1] = common[..., -1:] = False  # positions that roll wrapped around
    if common.sum() < MIN_TOKENS:
        return
    answers = teacher.at(common)
    nll = {s: -label_logprob(answers, labels.roll(s, -1)[common], vocab) for s in (-1, 0, 1)}
    for shift in (-1, 1):
        gain = nll[0] - nll[shift]
        if gain.mean().item() > max(0.5, 5 * _error(gain)):
            side = "next" if shift == -1 else "previous"
            checks.fail(
                "teacher",
                "the answer at position t to predict the token at t + 1",
                f"answers that fit the {side} position better by {gain.mean().item():.2f} nats per "
                f"token over {len(gain):,} tokens",
                "shift the ids and logprobs by one position",
            )


def check_teacher_matches_text(signal: Signal, *, positions_trusted: bool) -> None:
    """Raise ValueError for answers that are confident but do not predict this text.

    With `positions_trusted` (a model in this process), the teacher may be untrained or new to this
    text. Then raises only if the student predicts the text, which shows that the teacher reads
    other tokens than it was trained on.
    """
    if signal.is_plausible or (positions_trusted and not signal.text_is_predictable):
        return
    raise ValueError(
        "teacher: expected answers about this text, got answers that fit it no better than the "
        f"same answers half a batch away: −log p(next token) is {signal.nll:.2f} against "
        f"{signal.nll_shuffled:.2f} nats, and their own confidence implies a gap of "
        f"{signal.claimed:.2f} nats ({signal.tokens:,} tokens). Check that teacher and data use "
        "the same tokenizer and that cached answers belong to these examples. check_signal=False "
        "skips this check"
    )


def label_logprob(teacher: TopK, labels: Tensor, vocab: int) -> Tensor:
    """Return log p(label) [...], with the tail spread evenly over the ids outside the top K."""
    used = teacher.ids >= 0
    hit = used & (teacher.ids == labels.unsqueeze(-1))
    inside = teacher.logprobs.float().masked_fill(~hit, -torch.inf).logsumexp(-1)
    tail = teacher.tail().float().clamp(min=-100.0)
    outside = (vocab - used.sum(-1)).clamp(min=1).log()
    return torch.where(hit.any(-1), inside, tail - outside)


def mass_of(teacher: TopK) -> Tensor:
    """Return Σ p over the top K, [...]."""
    return teacher.logprobs.float().exp().masked_fill(teacher.ids < 0, 0.0).sum(-1)


def _fail_invalid(answers: str) -> NoReturn:
    checks.fail(
        "teacher",
        "the answers of a language model",
        answers,
        "the student would learn nothing from them. Check the weights, the cache and the "
        "positions. check_signal=False skips this check",
    )
