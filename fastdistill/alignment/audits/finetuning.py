"""Audits that fine-tune a copy for a few steps: was a behavior removed or only suppressed?"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...hf.lm_head import at_head, head_of
from ...losses.topk import topk_distill_loss
from ...losses.types import TopK
from ...runtime.checks import fail
from .audit import Audit, Measurement, PromptAudit
from .prompts import Prompt, check_one_per_prompt, to_prompts
from .subject import Subject, pad_rows


def finetune_copy(
    model: Subject, prompts: Sequence[Prompt], texts: Sequence[str], *, steps: int, lr: float
) -> Subject:
    """Returns a copy after `steps` AdamW steps of cross-entropy on the texts.

    Each text follows its prompt. Every step uses all texts, without dropout, so that the result
    does not depend on batches or seeds. An end token follows each text, as in training.
    """
    rows = [model.encode_answer(*pair) for pair in zip(prompts, texts, strict=True)]
    next_tokens = [[-100] * (row.begin - 1) + [*row.targets, -100] for row in rows]
    ids = pad_rows([row.ids for row in rows]).to(model.device)
    labels = pad_rows(next_tokens, value=-100).to(model.device)
    copied = copy.deepcopy(model.model).requires_grad_(True).eval()
    optimizer = torch.optim.AdamW(copied.parameters(), lr=lr, weight_decay=0.0)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            _cross_entropy(copied, ids, labels).backward()
            optimizer.step()
    return model.with_model(copied, f"{model.name} + {steps} steps")


def _cross_entropy(model: Any, ids: Any, labels: Any) -> Any:
    """Returns the mean of −log q(label): the fused loss with all weight on the labels."""
    no_teacher = TopK.empty((*ids.shape, 1), 1.0, dtype=torch.float32, device=ids.device)

    def loss(hidden: Any) -> Any:
        head = head_of(model)
        return topk_distill_loss(
            hidden, head.weight, no_teacher, labels=labels, ce_weight=1.0, **head.options()
        )

    with at_head(model, loss):
        # Padding is on the right, where a causal model does not attend. With a mask, a position
        # could have nothing to attend to in its window, which makes every gradient NaN.
        return model(input_ids=ids, use_cache=False)


@dataclass(frozen=True, kw_only=True)
class RelearningProbe(PromptAudit):
    """`readout` after a few steps on examples of the trait (relearning, arXiv 2402.16835).

    A removed trait is learned as slowly as by the base; a suppressed trait returns at once.
    details: the readout before training.
    """

    texts: tuple[str, ...]
    readout: Audit
    steps: int = 2
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_per_prompt("texts", self.texts, self.prompts)

    def measure(self, model: Subject, base: Subject | None) -> Measurement:
        before = self.readout.measure(model, base)
        tuned = finetune_copy(
            model, self.prompts, self.texts, steps=self.steps, lr=self.learning_rate
        )
        after = self.readout.measure(tuned, base)
        return replace(after, details={**after.details, "before": float(before.values.mean())})


@dataclass(frozen=True, kw_only=True)
class StyleRestoreProbe(PromptAudit):
    """Gain of `readout` after a few steps on the model's own outputs to unrelated prompts.

    A capability that off-model training or a lock suppressed returns after training on the model's
    own text; a lost capability does not. The probe is ours.

    The model answers `prompts`; it is trained on these answers after the prompts in `asked`, one
    per prompt (default: the same prompts).
    """

    readout: Audit
    asked: tuple[Prompt, ...] = ()
    steps: int = 16
    learning_rate: float = 3e-4
    max_new_tokens: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        train_prompts = to_prompts("asked", self.asked or self.prompts)
        check_one_per_prompt("asked", train_prompts, self.prompts)
        object.__setattr__(self, "asked", train_prompts)

    def measure(self, model: Subject, base: Subject | None) -> Measurement:
        before = self.readout.measure(model, base)
        outputs = model.generate(self.prompts, max_new_tokens=self.max_new_tokens)
        answered = [i for i, text in enumerate(outputs) if text.strip()]
        if not answered:
            fail("prompts", "prompts that the model answers", "empty answers")
        tuned = finetune_copy(
            model,
            [self.asked[i] for i in answered],
            [outputs[i] for i in answered],
            steps=self.steps,
            lr=self.learning_rate,
        )
        after = self.readout.measure(tuned, base)
        details = {"before": float(before.values.mean()), "after": float(after.values.mean())}
        values = after.values - before.values
        doubts = tuple(dict.fromkeys(before.doubts + after.doubts))
        return Measurement(values=values, rate=False, details=details, doubts=doubts)
