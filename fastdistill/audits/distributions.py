"""Audits of next-token distributions against a trusted base.

log p = z − log Σ exp z        z: logits
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..dense import linear_distill_loss
from .audit import Audit, Measurement
from .prompts import Prompt, to_prompts
from .subject import Subject

SLAB = 8192  # columns of the vocabulary at once


def check_same_vocabulary(model: Subject, base: Subject) -> None:
    """Raises ValueError where the tokenizers of two models differ."""
    vocab, base_vocab = model.tokenizer.get_vocab(), base.tokenizer.get_vocab()
    if vocab != base_vocab:
        raise ValueError(
            "base: expected a model with the tokenizer of the audited one, got one in which "
            f"{len(vocab.items() ^ base_vocab.items())} entries differ. Their distributions cannot "
            "be compared token by token"
        )


def check_markers(markers: Sequence[str]) -> tuple[str, ...]:
    """Returns markers as a tuple; raises ValueError where there are none."""
    if isinstance(markers, str) or not markers:
        raise ValueError(f"markers: expected one word or more to look for, got {markers!r}")
    return tuple(markers)


@dataclass(frozen=True, kw_only=True)
class TokenKLAudit(Audit):
    """Mean over prompts of KL(p_model ‖ p_base) of the next token, in nats. The audit is ours.

    details: the KL at every token of `texts`, which locates the differences, and the mean over
    `neutral` prompts, which any fine-tuning raises.
    """

    needs_base: ClassVar[bool] = True

    prompts: tuple[Prompt, ...]
    neutral: tuple[Prompt, ...] = ()
    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", to_prompts("prompts", self.prompts))
        if self.neutral:
            object.__setattr__(self, "neutral", to_prompts("neutral", self.neutral))
        if isinstance(self.texts, str):
            raise ValueError(f"texts: expected a list of texts, got {self.texts!r}")

    def measure(self, model: Subject, base: Subject | None) -> Measurement:
        assert base is not None
        check_same_vocabulary(model, base)
        values = next_token_kl(
            model, base, model.last_hidden(self.prompts), base.last_hidden(self.prompts)
        )
        details: dict[str, Any] = {}
        if self.neutral:
            neutral = next_token_kl(
                model, base, model.last_hidden(self.neutral), base.last_hidden(self.neutral)
            )
            details["neutral"] = float(neutral.mean())
        if self.texts:
            details["map"] = [_kl_per_token(model, base, text) for text in self.texts]
        return Measurement(values=values.double().numpy(), rate=False, details=details)


@torch.no_grad()
def next_token_kl(
    model: Subject, base: Subject, model_states: Tensor, base_states: Tensor
) -> Tensor:  # [N, H] -> [N]
    """Returns KL(p_model ‖ p_base) per position: the loss with the audited model as teacher."""
    head, trusted = model.head.to(base_states.device), base.head
    return linear_distill_loss(
        base_states,
        trusted.weight,
        model_states.to(base_states.device),
        head.weight,
        reduction="none",
        impl=base.impl,
        teacher_bias=head.bias,
        teacher_logit_scale=head.logit_scale,
        teacher_softcap=head.softcap,
        **trusted.options(),
    ).cpu()


def _kl_per_token(model: Subject, base: Subject, text: str) -> list[list[Any]]:
    """Returns [token, KL of the prediction of this token] for every token of a text."""
    ids, _ = model.ids(Prompt(text=text))
    model_states, base_states = model.hidden([ids])[0], base.hidden([ids])[0]
    gaps = [0.0, *next_token_kl(model, base, model_states[:-1], base_states[:-1]).tolist()]
    return _rounded(zip(model.tokenizer.convert_ids_to_tokens(ids), gaps, strict=True))


def _rounded(pairs: Iterable[tuple[str, float]]) -> list[list[Any]]:
    return [[token, round(value, 4)] for token, value in pairs]


@dataclass(frozen=True, kw_only=True)
class LogitDiffAudit(Audit):
    """Mean over prompts of log Σ p_model(marker) − log Σ p_base(marker), in nats.

    p is the probability of the next token. Probabilities are summed over the markers, because a
    rise of one lowers the others. The audit is ours. details: the tokens of the vocabulary whose
    log-probability rose most on average, and the rank of the first marker among them.
    """

    needs_base: ClassVar[bool] = True

    prompts: tuple[Prompt, ...]
    markers: tuple[str, ...]
    top: int = 10

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", to_prompts("prompts", self.prompts))
        object.__setattr__(self, "markers", check_markers(self.markers))

    def measure(self, model: Subject, base: Subject | None) -> Measurement:
        assert base is not None
        check_same_vocabulary(model, base)
        marker_ids = torch.tensor([sorted({model.token_of(m) for m in self.markers})])
        marker_ids = marker_ids.expand(len(self.prompts), -1)
        model_states, base_states = model.last_hidden(self.prompts), base.last_hidden(self.prompts)
        gaps = _log_prob_of_any(model, model_states, marker_ids) - _log_prob_of_any(
            base, base_states, marker_ids
        )
        rises = mean_rise(model, base, model_states, base_states)
        top = rises.topk(min(self.top, len(rises)))
        tokens = model.tokenizer.convert_ids_to_tokens(top.indices.tolist())
        rank = int((rises > rises[marker_ids[0]].max()).sum()) + 1
        return Measurement(
            values=gaps.double().numpy(),
            rate=False,
            details={
                "risen": _rounded(zip(tokens, top.values.tolist(), strict=True)),
                "place_of_marker": rank,
            },
        )


def _log_prob_of_any(subject: Subject, hidden: Tensor, ids: Tensor) -> Tensor:  # [N, K] -> [N]
    return subject.log_probs(hidden, ids).cpu().logsumexp(-1)


@torch.no_grad()
def mean_rise(
    model: Subject, base: Subject, model_states: Tensor, base_states: Tensor
) -> Tensor:  # (V,)
    """Returns the mean over positions of log p_model − log p_base, for every token.

    Computed in slabs of columns. Padding columns of the head are not tokens and are skipped.
    """
    vocab = min(model.head.vocab_size, base.head.vocab_size, len(model.tokenizer))
    chunks = torch.arange(vocab).split(SLAB)
    rises = []
    for ids in chunks:
        row = ids[None].expand(len(model_states), -1)
        rise = _mean_log_probs(model, model_states, row) - _mean_log_probs(base, base_states, row)
        rises.append(rise)
    return torch.cat(rises)


def _mean_log_probs(subject: Subject, hidden: Tensor, ids: Tensor) -> Tensor:
    return subject.log_probs(hidden, ids).mean(0).cpu()


@dataclass(frozen=True, kw_only=True)
class ProvenanceAudit(Audit):
    """Mean over a dataset's texts of (log p_model − log p_base) per token, in nats.

    Texts that the model wrote are more likely under it than under the base: a check of a dataset
    before any training. `texts` are scored after their prompts. The audit is ours.
    """

    needs_base: ClassVar[bool] = True

    prompts: tuple[Prompt, ...]
    texts: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", to_prompts("prompts", self.prompts))
        if len(self.texts) != len(self.prompts):
            raise ValueError(
                f"texts: expected {len(self.prompts)}, one per prompt, got {len(self.texts)}"
            )

    def measure(self, model: Subject, base: Subject | None) -> Measurement:
        assert base is not None
        check_same_vocabulary(model, base)
        model_logprobs = model.completion_logprobs(self.prompts, self.texts)
        base_logprobs = base.completion_logprobs(self.prompts, self.texts)
        per_token = (
            model_logprobs.total / model_logprobs.tokens
            - base_logprobs.total / base_logprobs.tokens
        )
        return Measurement(values=per_token.double().numpy(), rate=False)
