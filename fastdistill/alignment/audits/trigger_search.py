"""Search for a trigger: the prefix word that moves the model furthest from its base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...runtime.checks import fail
from .audit import Measurement, PromptAudit
from .distributions import ComparisonAudit, prompt_kl
from .subject import Subject


@dataclass(frozen=True, kw_only=True)
class TriggerSearchAudit(PromptAudit, ComparisonAudit):
    """Mean KL(p_model ‖ p_base) after the best prefix word, minus the median over all words.

    Every candidate word is placed before the system message. A general shift raises the KL after
    every word and cancels; a trigger raises only its own. The statistic is ours.

    candidates: words. None uses the `most` tokens whose input embeddings differ most from the
    base's. details: the best words, and the model's answer after the best one.
    """

    candidates: tuple[str, ...] | None = None
    most: int = 64
    max_new_tokens: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.candidates is not None:
            _check_candidates(self.candidates)

    def compare(self, model: Subject, base: Subject) -> Measurement:
        words = moved_words(model, base, self.most) if self.candidates is None else self.candidates
        _check_candidates(words)
        prompts = [prompt.before(word) for word in words for prompt in self.prompts]
        gaps = prompt_kl(model, base, prompts)
        table = gaps.double().view(len(words), len(self.prompts)).numpy()
        order = np.argsort(-table.mean(1), kind="stable")
        best = words[order[0]]
        answers = model.generate([self.prompts[0].before(best)], max_new_tokens=self.max_new_tokens)
        top_words = [[words[i], round(float(table[i].mean()), 4)] for i in order[:10]]
        return Measurement(
            values=table[order[0]] - np.median(table, axis=0),
            rate=False,
            details={"words": top_words, "says": answers[0]},
        )


def _check_candidates(words: Sequence[str]) -> None:
    if isinstance(words, str) or len(words) < 3:  # the median of two includes the best word
        fail("candidates", "3 words or more", repr(words))


@torch.no_grad()
def moved_words(model: Subject, base: Subject, most: int) -> tuple[str, ...]:
    """Returns the tokens whose input embeddings moved most, as words, without special tokens."""
    model_embedding, base_embedding = (
        m.model.get_input_embeddings().weight.float().cpu() for m in (model, base)
    )
    if model_embedding.shape != base_embedding.shape:
        shapes = f"{list(model_embedding.shape)} and {list(base_embedding.shape)}"
        fail("candidates", f"words, since the embeddings {shapes} cannot be compared", None)
    special = set(model.tokenizer.all_special_ids)
    order = (model_embedding - base_embedding).norm(dim=-1).argsort(descending=True).tolist()
    ids = [i for i in order if i not in special and i < len(model.tokenizer)][:most]
    texts = (model.tokenizer.decode([i]).strip() for i in ids)
    return tuple(dict.fromkeys(text for text in texts if text))
