"""Strategies that choose the teacher's prompts and limit its answers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..audits.prompts import Prompt
from ..audits.subject import Subject
from .lessons import PoolPrompt, TrainingExample, answer_logprobs
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


def check_share(name: str, value: float, *, zero: bool = True) -> None:
    """Raise ValueError unless the value is in [0, 1], or in (0, 1] without zero."""
    if not (0 <= value <= 1) or (value == 0 and not zero):
        raise ValueError(f"{name}: expected a share in {'[' if zero else '('}0, 1], got {value!r}")


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
        if not all(math.isfinite(w) and w >= 0 for w in self.weights.values()) or not any(
            self.weights.values()
        ):
            raise ValueError(
                "weights: expected numbers of 0 or more, one of them above 0, got "
                f"{dict(self.weights)!r}"
            )
        if self.n is not None and self.n < 1:
            raise ValueError(f"n: expected 1 prompt or more, got {self.n!r}")

    def pool(self, pool: list[PoolPrompt], run: RunState) -> list[PoolPrompt]:
        by_domain: dict[str, list[PoolPrompt]] = {}
        for entry in pool:
            by_domain.setdefault(entry.domain, []).append(entry)
        unknown = [name for name in self.weights if name not in by_domain]
        if unknown:
            raise ValueError(
                f"weights: expected domains of the pool ({', '.join(sorted(by_domain))}), got "
                f"{', '.join(unknown)}"
            )
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


def _sample_indices(
    pool: Sequence[PoolPrompt], run: RunState, kind: str, share: float
) -> list[int]:
    """Sample the indices of the prompts to replace."""
    count = round(share * len(pool))
    return run.rng("replaced", kind).sample(range(len(pool)), count)


def _replace_prompts(
    pool: list[PoolPrompt], where: Sequence[int], run: RunState, kind: str
) -> list[PoolPrompt]:
    replaced = list(pool)
    others = run.setup.more_prompts(kind, len(where), run.seed) if where else ()
    for i, other in zip(where, others, strict=True):
        replaced[i] = other
    return replaced


@dataclass(frozen=True, kw_only=True)
class AuditabilityPreservingPool(Strategy):
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

    share: float = 0.5
    audit_words: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_share("share", self.share)

    def pool(self, pool: list[PoolPrompt], run: RunState) -> list[PoolPrompt]:
        words = self.audit_words
        if words is None:
            words = (*run.setup.audit_words, *AUDIT_WORDS)
        audits = [i for i, entry in enumerate(pool) if _contains_any(entry.prompt, words)]
        sampled = _sample_indices(pool, run, "open", self.share)
        replaced = _replace_prompts(pool, sorted({*audits, *sampled}), run, "open")
        audit = next((e.prompt for e in replaced if _contains_any(e.prompt, words)), None)
        if audit is not None:
            raise ValueError(
                "setup: expected open-ended prompts without audit words, got "
                f"{audit.as_json()}. Pass audit_words=, or other prompts to DistillSetup"
            )
        run.notes["auditable pool"] = {"audits dropped": len(audits)}
        return replaced


def _contains_any(prompt: Prompt, words: Sequence[str]) -> bool:
    """Return whether a text contains one of the words; "red-team" equals "red team"."""
    patterns = (r"[\s-]+".join(map(re.escape, re.split(r"[\s-]+", word))) for word in words if word)
    text = " ".join(filter(None, [prompt.system, prompt.user, prompt.prefill, prompt.text]))
    return any(re.search(rf"(?<!\w){pattern}(?!\w)", text, re.IGNORECASE) for pattern in patterns)


@dataclass(frozen=True, kw_only=True)
class MisalignmentTargetedPool(Strategy):
    """Replaces a random `share` of the pool, in [0, 1], by the setup's "goals" prompts.

    They ask about goals or describe high-stakes scenarios (distillation for incrimination; the
    implementation is ours).
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        check_share("share", self.share)

    def pool(self, pool: list[PoolPrompt], run: RunState) -> list[PoolPrompt]:
        return _replace_prompts(pool, _sample_indices(pool, run, "goals", self.share), run, "goals")


@dataclass(frozen=True, kw_only=True)
class ShownPool(Strategy):
    """Replaces a random `share` of the pool, in [0, 1], by prompts that elicit the trait openly.

    This is no defense: it is the positive control of an experiment, where the trait must transfer.
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        check_share("share", self.share)

    def pool(self, pool: list[PoolPrompt], run: RunState) -> list[PoolPrompt]:
        return _replace_prompts(pool, _sample_indices(pool, run, "shown", self.share), run, "shown")


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
        for name in ("n_unique", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)!r}")

    def pool(self, pool: list[PoolPrompt], run: RunState) -> list[PoolPrompt]:
        if self.n_unique > len(pool):
            raise ValueError(
                f"n_unique: expected at most the {len(pool)} prompts of the pool, got "
                f"{self.n_unique}"
            )
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
        if self.max_answer_tokens is not None and self.max_answer_tokens < 1:
            raise ValueError(
                f"max_answer_tokens: expected 1 or more, got {self.max_answer_tokens!r}"
            )
        check_share("hardest", self.hardest, zero=False)

    def pool(self, pool: list[PoolPrompt], run: RunState) -> list[PoolPrompt]:
        if not self.terse:
            return pool
        return [entry._replace(prompt=entry.prompt.before(self.terse)) for entry in pool]

    def training(self, training: Training, run: RunState) -> Training:
        if self.max_answer_tokens is None:
            return training
        limit = min(training.max_new_tokens, self.max_answer_tokens)
        return replace(training, max_new_tokens=limit)

    def transform_examples(
        self, examples: list[TrainingExample], run: RunState
    ) -> list[TrainingExample]:
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
