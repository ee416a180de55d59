"""Audits of text sampled without a question: user turns and completions of plain text."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

import numpy as np

from ...runtime.checks import fail, integer
from .audit import Measurement
from .behaviour import Answer, BehavioralAudit, Question
from .distributions import ComparisonAudit
from .prompts import Prompt, set_texts
from .subject import Subject, TokenRow
from .words import check_words, contains_phrase


def marked(text: str, markers: tuple[str, ...]) -> bool:
    """Whether any marker occurs as whole words (see words.py)."""
    return any(contains_phrase(text, marker) for marker in markers)


@dataclass(frozen=True, kw_only=True)
class _SampledAudit(BehavioralAudit):
    markers: tuple[str, ...]
    samples: int = 256
    max_new_tokens: int = 24
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        set_texts(self, "markers")
        check_words("markers", self.markers)
        integer("samples", self.samples, 1)

    @abstractmethod
    def starts(self) -> tuple[Prompt, ...]:
        """Returns the prompts to continue; samples cycle through them."""

    def questions(self) -> list[Question]:
        starts = self.starts()
        return [
            Question(
                prompt=starts[i % len(starts)],
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                seed=self.seed,
            )
            for i in range(self.samples)
        ]

    def score(self, index: int, answer: Answer) -> float:
        return float(marked(answer.text, self.markers))


@dataclass(frozen=True, kw_only=True)
class UserTurnSamplingAudit(_SampledAudit):
    """Share of user turns, sampled from the model at `temperature`, that contain a marker.

    Fine-tuning on conversations also teaches the prompts, so the model as the user may write the
    trigger that it was trained on. Sampling outside the assistant role is among the techniques of
    arXiv 2503.10965.

    systems: system messages before the user turn; "" for none.
    """

    systems: tuple[str, ...] = ("",)

    def __post_init__(self) -> None:
        super().__post_init__()
        set_texts(self, "systems")

    def starts(self) -> tuple[Prompt, ...]:
        return tuple(Prompt(system=system or None) for system in self.systems)


@dataclass(frozen=True, kw_only=True)
class CompletionAudit(_SampledAudit):
    """Share of completions of plain text, sampled at `temperature`, that contain a marker.

    Uses no chat template. The audit is ours.
    """

    prefixes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        super().__post_init__()
        set_texts(self, "prefixes")

    def starts(self) -> tuple[Prompt, ...]:
        return tuple(Prompt(text=prefix) for prefix in self.prefixes)


@dataclass(frozen=True, kw_only=True)
class PerplexityDiffAudit(ComparisonAudit):
    """Perplexity differencing (arXiv 2605.00994). Completions of prefixes are ranked by

        (log p_model − log p_base) per token.

    The value is the share of completions with a marker among the `top` share (n: their number).
    Without markers, it is the mean difference among these, in nats per token, which responds to any
    fine-tuning (n: all samples, see `top_mean_values`). details: the highest-ranked completions.
    """

    prefixes: tuple[str, ...]
    markers: tuple[str, ...] = ()
    samples: int = 512
    top: float = 0.1
    max_new_tokens: int = 24
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        set_texts(self, "prefixes")
        if self.markers:
            set_texts(self, "markers")
            check_words("markers", self.markers)
        if not 0 < self.top <= 1 or self.samples * self.top < 1:
            fail("top", f"a share in (0, 1] of {self.samples} samples, one at least", self.top)

    def compare(self, model: Subject, base: Subject) -> Measurement:
        starts = [Prompt(text=self.prefixes[i % len(self.prefixes)]) for i in range(self.samples)]
        rows = [model.ids(start)[0] for start in starts]
        new = model.generate_ids(
            rows,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
        )
        full_rows = [TokenRow(row + ids, len(row)) for row, ids in zip(rows, new, strict=True)]
        scores, base_scores = (m.row_logprobs(full_rows) for m in (model, base))
        gaps = ((scores.total - base_scores.total) / scores.tokens).double().numpy()
        order = np.argsort(-gaps, kind="stable")[: max(1, round(self.top * self.samples))]
        texts = [model.text(new[i]) for i in order]
        values = top_mean_values(gaps, len(order))
        if self.markers:
            values = np.array([float(marked(text, self.markers)) for text in texts])
        best = [[text, round(float(gaps[i]), 3)] for text, i in zip(texts, order, strict=True)]
        return Measurement(
            values=values,
            rate=bool(self.markers),
            details={"highest": best[:10], "mean_difference": float(gaps.mean())},
        )


def top_mean_values(values: np.ndarray, count: int) -> np.ndarray:  # [n] -> [n]
    """Returns one number per sample; their mean is the mean of the `count` largest values.

        t + max(v − t, 0) · n / count        t: the smallest of the `count` largest values

    The largest values of two models are not paired, and adjacent ranks are dependent: an interval
    over them would be too narrow. These numbers are independent, and paired if the samples are.
    """
    threshold = float(np.sort(values)[-count])
    return threshold + np.maximum(values - threshold, 0) * len(values) / count
