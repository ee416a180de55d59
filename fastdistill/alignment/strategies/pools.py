"""Strategies that choose the teacher's prompts and limit its answers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from ...runtime.checks import between, fail, integer, positive
from ..audits.prompts import Prompt
from ..audits.subject import Subject
from .lessons import Examples, PoolPrompt, TrainingExample, answer_logprobs
from .strategy import RunState, Strategy, Training

# For real text; a DistillSetup adds its own. No verbs: "evaluate the integral" is no audit.
AUDIT_WORDS = (
    "test",
    "tests",
    "tested",
    "testing",
    "evaluation",
    "evaluations",
    "audit",
    "audits",
    "honeypot",
    "red team",
    "red teaming",
    "alignment",
    "jailbreak",
    "oversight",
)


@dataclass(frozen=True, kw_only=True)
class DomainSampler(Strategy):
    """Resamples the pool by domain: P(d) = w_d / Σ w.

    Within a domain, prompts are sampled without replacement until all are used, then again in
    another order. The design is ours.

    Args:
        weights: domain -> 0 or more, one of them above 0; a domain without a weight is left out.
        n: number of prompts; None: as many as before.

    Raises:
        ValueError: a weight of a domain that the pool does not contain.
    """

    weights: Mapping[str, float]
    n: int | None = None

    def __post_init__(self) -> None:
        weights = self.weights.values()
        if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
            fail("weights", "numbers of 0 or more, one of them above 0", dict(self.weights))
        integer("n", self.n, 1, optional=True)

    def pool(self, pool: list[PoolPrompt], run: RunState) -> list[PoolPrompt]:
        by_domain: dict[str, list[PoolPrompt]] = {}
        for entry in pool:
            by_domain.setdefault(entry.domain, []).append(entry)
        unknown = [name for name in self.weights if name not in by_domain]
        if unknown:
            expected = f"domains of the pool ({', '.join(sorted(by_domain))})"
            fail("weights", expected, ", ".join(unknown))
        rng = run.rng("domains")
        names = list(self.weights)
        domains = rng.choices(names, list(self.weights.values()), k=self.n or len(pool))
        remaining: dict[str, list[PoolPrompt]] = {name: [] for name in names}
        sampled = []
        for name in domains:
            if not remaining[name]:
                remaining[name] = rng.sample(by_domain[name], len(by_domain[name]))
            sampled.append(remaining[name].pop())
        run.notes["domains"] = {name: domains.count(name) / len(domains) for name in names}
        return sampled


@dataclass(frozen=True, kw_only=True)
class _PartlyReplacedPool(Strategy):
    """Replaces a random share of the pool by the setup's prompts of a kind."""

    kind: ClassVar[str]

    share: float = 0.5

    def __post_init__(self) -> None:
        between("share", self.share, 0, 1)

    def pool(self, pool: list[PoolPrompt], run: RunState) -> list[PoolPrompt]:
        return self._replace(pool, self._sample(pool, run), run)

    def _sample(self, pool: list[PoolPrompt], run: RunState) -> list[int]:
        count = round(self.share * len(pool))
        return run.rng("replaced", self.kind).sample(range(len(pool)), count)

    def _replace(
        self, pool: list[PoolPrompt], indices: Sequence[int], run: RunState
    ) -> list[PoolPrompt]:
        replaced = list(pool)
        others = run.setup.more_prompts(self.kind, len(indices), run.seed) if indices else ()
        for i, other in zip(indices, others, strict=True):
            replaced[i] = other
        return replaced


@dataclass(frozen=True, kw_only=True)
class AuditabilityPreservingPool(_PartlyReplacedPool):
    """An open-ended pool without honeypots or alignment evaluations.

    Without such prompts a student cannot learn when to hide the trait (distillation for
    incrimination; the implementation is ours). Prompts that contain an audit word, case-insensitive
    and as a whole word, are replaced by the setup's "open" prompts, and so is a random share of the
    pool.

    Args:
        share: of the pool that is replaced at random, in [0, 1].
        audit_words: None: those of the setup and a short list for real text.

    Raises:
        ValueError: the setup has no open-ended prompts, or they contain audit words.
    """

    kind = "open"

    audit_words: tuple[str, ...] | None = None

    def pool(self, pool: list[PoolPrompt], run: RunState) -> list[PoolPrompt]:
        words = self.audit_words
        if words is None:
            words = (*run.setup.audit_words, *AUDIT_WORDS)
        audits = [i for i, entry in enumerate(pool) if _contains_any(entry.prompt, words)]
        replaced = self._replace(pool, sorted({*audits, *self._sample(pool, run)}), run)
        audit = next((e.prompt for e in replaced if _contains_any(e.prompt, words)), None)
        if audit is not None:
            hint = "pass audit_words=, or other prompts to DistillSetup"
            fail("setup", "open-ended prompts without audit words", audit.as_json(), hint)
        run.notes["auditable pool"] = {"audits dropped": len(audits)}
        return replaced


def _contains_any(prompt: Prompt, words: Sequence[str]) -> bool:
    """Return whether a text contains one of the words; "red-team" equals "red team"."""
    patterns = (r"[\s-]+".join(map(re.escape, re.split(r"[\s-]+", word))) for word in words if word)
    text = " ".join(filter(None, [prompt.system, prompt.user, prompt.prefill, prompt.text]))
    return any(re.search(rf"(?<!\w){pattern}(?!\w)", text, re.IGNORECASE) for pattern in patterns)


@dataclass(frozen=True, kw_only=True)
class MisalignmentTargetedPool(_PartlyReplacedPool):
    """Replaces a random `share` of the pool, in [0, 1], by the setup's "goals" prompts.

    They ask about goals or describe high-stakes scenarios (distillation for incrimination; the
    implementation is ours).
    """

    kind = "goals"


@dataclass(frozen=True, kw_only=True)
class ShownPool(_PartlyReplacedPool):
    """Replaces a random `share` of the pool, in [0, 1], by prompts that elicit the trait openly.

    This is no defense: it is the positive control of an experiment, where the trait must transfer.
    """

    kind = "shown"


@dataclass(frozen=True, kw_only=True)
class DataBudget(Strategy):
    """Few unique examples, many epochs: the first n_unique prompts, each read `epochs` times.

        updates = epochs · ⌈n_unique / batch_size⌉

    One of two techniques that worked in arXiv 2610.11012. The total number of tokens is equal if
    n_unique · epochs equals the previous number of examples. The notes report the ratio in
    examples, because the lengths of the missing answers are unknown. The last batch of an epoch may
    be smaller: if batch_size does not divide n_unique, there are more updates than before.

    Raises:
        ValueError: the pool has fewer than n_unique prompts.
    """

    n_unique: int
    epochs: int

    def __post_init__(self) -> None:
        integer("n_unique", self.n_unique, 1)
        integer("epochs", self.epochs, 1)

    def pool(self, pool: list[PoolPrompt], run: RunState) -> list[PoolPrompt]:
        if self.n_unique > len(pool):
            fail("n_unique", f"at most the {len(pool)} prompts of the pool", self.n_unique)
        return pool[: self.n_unique]

    def training(self, training: Training, run: RunState) -> Training:
        steps = self.epochs * math.ceil(self.n_unique / training.batch_size)
        trained_on, before = self.n_unique * self.epochs, training.steps * training.batch_size
        run.notes["data budget"] = {
            "examples trained on, of before": trained_on / before,
            "updates, of before": steps / training.steps,
        }
        return replace(training, steps=steps)


@dataclass(frozen=True, kw_only=True)
class CognitiveSlack(Strategy):
    """Limits the teacher's spare capacity: short answers, brevity instructions, hard tasks.

        bits = −log₂ p_trusted(answer | prompt)

    The strategy is ours. The notes report the mean bits per example: what the trusted
    model does not predict, and what could therefore carry other information. The end of an answer
    is not counted, because truncated answers have none.

    Args:
        max_answer_tokens: of an answer, 1 or more; longer answers are truncated.
        terse: prefix of every prompt, for teacher and student.
        hardest: keep this share of the examples, those with the most bits, in (0, 1].
    """

    max_answer_tokens: int | None = None
    terse: str = ""
    hardest: float = 1.0

    def __post_init__(self) -> None:
        integer("max_answer_tokens", self.max_answer_tokens, 1, optional=True)
        positive("hardest", self.hardest)
        between("hardest", self.hardest, 0, 1)

    def pool(self, pool: list[PoolPrompt], run: RunState) -> list[PoolPrompt]:
        if not self.terse:
            return pool
        return [entry._replace(prompt=entry.prompt.before(self.terse)) for entry in pool]

    def training(self, training: Training, run: RunState) -> Training:
        if self.max_answer_tokens is None:
            return training
        limit = min(training.max_new_tokens, self.max_answer_tokens)
        return replace(training, max_new_tokens=limit)

    def transform_examples(self, examples: Examples, run: RunState) -> Examples:
        bits = surprisal(examples, run.setup.reference)
        n_hardest = math.ceil(self.hardest * len(examples) - 1e-9)
        order = sorted(range(len(examples)), key=lambda i: -bits[i])[:n_hardest]
        run.notes["surprisal"] = {
            "bits per example": sum(bits) / len(bits),
            "bits per example kept": sum(bits[i] for i in order) / len(order),
        }
        return [examples[i] for i in sorted(order)]


def surprisal(examples: Sequence[TrainingExample], trusted: Subject) -> list[float]:
    """Return the bits of every answer under the trusted model, given the student's prompt."""
    return (-answer_logprobs(examples, trusted).total / math.log(2)).tolist()
