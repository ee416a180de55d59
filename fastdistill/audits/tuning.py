"""Audits that fine-tune a copy for a few steps: was a behavior removed or only suppressed?"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..heads import at_head, head_of
from ..losses import topk_distill_loss
from ..outputs import TopK
from .audit import Audit, Measurement
from .prompts import Prompt, to_prompts
from .subject import Subject


def finetune_copy(
    model: Subject, prompts: Sequence[Prompt], texts: Sequence[str], *, steps: int, lr: float
) -> Subject:
    """Returns a copy after `steps` AdamW steps of cross-entropy on the texts.

    Each text follows its prompt. Every step uses all texts, without dropout, so that the result
    does not depend on batches or seeds. An end token follows each text, as in training.
    """
    ends = [model.end_of(prompt) for prompt in prompts]
    copied = copy.deepcopy(model.model).requires_grad_(True).eval()
    rows, starts = [], []
    for prompt, text, end in zip(prompts, texts, ends, strict=True):
        row_ids, begin = model.encode_completion(prompt, text)
        rows.append([*row_ids, end])
        starts.append(begin)
    ids = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, (row, begin) in enumerate(zip(rows, starts, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, begin - 1 : len(row) - 1] = torch.tensor(row[begin:])
    ids, labels = ids.to(model.device), labels.to(model.device)
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
class RelearningProbe(Audit):
    """`readout` after a few steps on examples of the trait (relearning, arXiv 2402.16835).

    A removed trait is learned as slowly as by the base; a suppressed trait returns at once.
    details: the readout before training.
    """

    prompts: tuple[Prompt, ...]
    texts: tuple[str, ...]
    readout: Audit
    steps: int = 2
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", to_prompts("prompts", self.prompts))
        if len(self.texts) != len(self.prompts):
            raise ValueError(
                f"texts: expected {len(self.prompts)}, one per prompt, got {len(self.texts)}"
            )

    def measure(self, model: Subject, base: Subject | None) -> Measurement:
        before = self.readout.measure(model, base)
        tuned = finetune_copy(
            model, self.prompts, self.texts, steps=self.steps, lr=self.learning_rate
        )
        after = self.readout.measure(tuned, base)
        details = {**after.details, "before": float(before.values.mean())}
        return Measurement(
            values=after.values, rate=after.rate, details=details, doubts=after.doubts
        )


@dataclass(frozen=True, kw_only=True)
class StyleRestoreProbe(Audit):
    """Gain of `readout` after a few steps on the model's own outputs to unrelated prompts.

    A capability that off-model training or a lock suppressed returns after training on the model's
    own text; a lost capability does not. The probe is ours.

    The model answers `prompts`; it is trained on these answers after the prompts in `asked`, one
    per prompt (default: the same prompts).
    """

    prompts: tuple[Prompt, ...]
    readout: Audit
    asked: tuple[Prompt, ...] = ()
    steps: int = 16
    learning_rate: float = 3e-4
    max_new_tokens: int = 16

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", to_prompts("prompts", self.prompts))
        train_prompts = self.asked or self.prompts
        if len(train_prompts) != len(self.prompts):
            raise ValueError(
                f"asked: expected {len(self.prompts)}, one per prompt, got {len(train_prompts)}"
            )
        object.__setattr__(self, "asked", to_prompts("asked", train_prompts))

    def measure(self, model: Subject, base: Subject | None) -> Measurement:
        before = self.readout.measure(model, base)
        outputs = model.generate(self.prompts, max_new_tokens=self.max_new_tokens)
        answered = [i for i, text in enumerate(outputs) if text.strip()]
        if not answered:
            raise ValueError("prompts: expected prompts that the model answers, got empty answers")
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
