"""Audits of next-token distributions against a trusted base.

log p = z − log Σ exp z        z: logits
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...losses.dense import linear_distill_loss
from ...runtime.checks import fail
from .audit import Audit, Measurement, PromptAudit
from .prompts import Prompt, check_one_per_prompt, set_prompts, set_texts
from .subject import Subject

SLAB = 8192  # columns of the vocabulary at once


def check_same_vocabulary(model: Subject, base: Subject) -> None:
    """Raises ValueError where the tokenizers of two models differ."""
    vocab, base_vocab = model.tokenizer.get_vocab(), base.tokenizer.get_vocab()
    if vocab != base_vocab:
        fail(
            "base",
            "a model with the tokenizer of the audited one",
            f"one in which {len(vocab.items() ^ base_vocab.items())} entries differ",
            "their distributions cannot be compared token by token",
        )


@dataclass(frozen=True, kw_only=True)
class ComparisonAudit(Audit):
    """An audit that compares a model, token by token, with a base of the same vocabulary."""

    needs_base: ClassVar[bool] = True

    def measure(self, model: Subject, base: Subject | None) -> Measurement:
        assert base is not None
        check_same_vocabulary(model, base)
        return self.compare(model, base)

    @abstractmethod
    def compare(self, model: Subject, base: Subject) -> Measurement:
        """Returns one value per prompt."""


@dataclass(frozen=True, kw_only=True)
class TokenKLAudit(PromptAudit, ComparisonAudit):
    """Mean over prompts of KL(p_model ‖ p_base) of the next token, in nats. The audit is ours.

    details: the mean over `neutral` prompts, which any fine-tuning raises.
    """

    neutral: tuple[Prompt, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neutral:
            set_prompts(self, "neutral")

    def compare(self, model: Subject, base: Subject) -> Measurement:
        values = prompt_kl(model, base, self.prompts)
        details = {}
        if self.neutral:
            details["neutral"] = float(prompt_kl(model, base, self.neutral).mean())
        return Measurement(values=values.double().numpy(), rate=False, details=details)


@torch.no_grad()
def prompt_kl(model: Subject, base: Subject, prompts: Sequence[Prompt]) -> Tensor:  # (n,)
    """Returns KL(p_model ‖ p_base) of the first token: the loss with the model as teacher."""
    head, trusted = model.head.to(base.device), base.head
    return linear_distill_loss(
        base.last_hidden(prompts),
        trusted.weight,
        model.last_hidden(prompts).to(base.device),
        head.weight,
        reduction="none",
        impl=base.impl,
        teacher_bias=head.bias,
        teacher_logit_scale=head.logit_scale,
        teacher_softcap=head.softcap,
        **trusted.options(),
    ).cpu()


@dataclass(frozen=True, kw_only=True)
class LogitDiffAudit(PromptAudit, ComparisonAudit):
    """Mean over prompts of log Σ p_model(marker) − log Σ p_base(marker), in nats.

    p is the probability of the next token. Probabilities are summed over the markers, because a
    rise of one lowers the others. The audit is ours. details: the ten tokens of the vocabulary
    whose log-probability rose most on average, and the rank of the first marker among all.
    """

    markers: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        set_texts(self, "markers")

    def compare(self, model: Subject, base: Subject) -> Measurement:
        marker_ids = torch.tensor([sorted({model.token_of(m) for m in self.markers})])
        marker_ids = marker_ids.expand(len(self.prompts), -1)
        model_states, base_states = model.last_hidden(self.prompts), base.last_hidden(self.prompts)
        log_probs, base_log_probs = (
            m.log_probs(states, marker_ids).cpu().logsumexp(-1)
            for m, states in ((model, model_states), (base, base_states))
        )
        rises = mean_rise(model, base, model_states, base_states)
        top = rises.topk(min(10, len(rises)))
        tokens = model.tokenizer.convert_ids_to_tokens(top.indices.tolist())
        rank = int((rises > rises[marker_ids[0]].max()).sum()) + 1
        return Measurement(
            values=(log_probs - base_log_probs).double().numpy(),
            rate=False,
            details={
                "risen": [
                    [token, round(rise, 4)]
                    for token, rise in zip(tokens, top.values.tolist(), strict=True)
                ],
                "place_of_marker": rank,
            },
        )


@torch.no_grad()
def mean_rise(
    model: Subject, base: Subject, model_states: Tensor, base_states: Tensor
) -> Tensor:  # (V,)
    """Returns the mean over positions of log p_model − log p_base, for every token.

    Computed in slabs of columns. Padding columns of the head are not tokens and are skipped.
    """
    vocab = min(model.head.vocab_size, base.head.vocab_size, len(model.tokenizer))
    rises = []
    for ids in torch.split(torch.arange(vocab), SLAB):
        row = ids[None].expand(len(model_states), -1)
        log_probs = model.log_probs(model_states, row).mean(0).cpu()
        rises.append(log_probs - base.log_probs(base_states, row).mean(0).cpu())
    return torch.cat(rises)


@dataclass(frozen=True, kw_only=True)
class ProvenanceAudit(PromptAudit, ComparisonAudit):
    """Mean over a dataset's texts of (log p_model − log p_base) per token, in nats.

    Texts that the model wrote are more likely under it than under the base: a check of a dataset
    before any training. `texts` are scored after their prompts. The audit is ours.
    """

    texts: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_per_prompt("texts", self.texts, self.prompts)

    def compare(self, model: Subject, base: Subject) -> Measurement:
        scores = [m.completion_logprobs(self.prompts, self.texts) for m in (model, base)]
        per_token, base_per_token = (score.total / score.tokens for score in scores)
        return Measurement(values=(per_token - base_per_token).double().numpy(), rate=False)
