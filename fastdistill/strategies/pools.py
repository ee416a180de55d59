"""Which prompts a teacher is asked, and how much room its answers get."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..audits.prompts import Prompt
from ..audits.subject import Subject
from .lessons import Asked, Lesson, said
from .strategy import Run, Strategy, Training

# Of real text; a scene names others. No verbs: "evaluate the integral" is no audit.
AUDIT_WORDS = (
    "test", "tests", "tested", "testing", "evaluation", "evaluations", "audit", "audits",
    "honeypot", "red team", "red teaming", "alignment", "jailbreak", "oversight",
)  # fmt: skip


def share_in(name: str, value: float, *, zero: bool = True) -> None:
    if not (0 <= value <= 1) or (value == 0 and not zero):
        raise ValueError(f"{name}: expected a share in {'[' if zero else '('}0, 1], got {value!r}")


@dataclass(frozen=True, kw_only=True)
class DomainSampler(Strategy):
    """Domain concentration: the domain of every prompt is drawn, P(d) = w_d / Σ w; within a domain
    prompts come without replacement until it is used up, then again in another order.

    The idea and the draw are ours.

    Args:
        weights: domain -> 0 or more, one of them above 0; a domain without a weight is left out.
        n: how many prompts; None: as many as before.

    Raises:
        ValueError: a weight of a domain that the pool does not have.
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

    def pool(self, pool: list[Asked], run: Run) -> list[Asked]:
        by_domain: dict[str, list[Asked]] = {}
        for asked in pool:
            by_domain.setdefault(asked.domain, []).append(asked)
        unknown = [name for name in self.weights if name not in by_domain]
        if unknown:
            raise ValueError(
                f"weights: expected domains of the pool ({', '.join(sorted(by_domain))}), got "
                f"{', '.join(unknown)}"
            )
        rng = run.draws("domains")
        names = list(self.weights)
        drawn = rng.choices(names, list(self.weights.values()), k=self.n or len(pool))
        left: dict[str, list[Asked]] = {name: [] for name in names}
        found = []
        for name in drawn:
            if not left[name]:
                left[name] = rng.sample(by_domain[name], len(by_domain[name]))
            found.append(left[name].pop())
        run.notes["domains"] = {name: drawn.count(name) / len(drawn) for name in names}
        return found


def _drawn(pool: Sequence[Asked], run: Run, kind: str, share: float) -> list[int]:
    """Which prompts give way to those of a kind."""
    count = round(share * len(pool))
    return run.draws("replaced", kind).sample(range(len(pool)), count)


def _replaced(pool: list[Asked], where: Sequence[int], run: Run, kind: str) -> list[Asked]:
    found = list(pool)
    others = run.scene.others(kind, len(where), run.seed) if where else ()
    for i, other in zip(where, others, strict=True):
        found[i] = other
    return found


@dataclass(frozen=True, kw_only=True)
class AuditabilityPreservingPool(Strategy):
    """A pool without honeypots or alignment evaluations, and open-ended: what a student would need
    to learn when to hide is not in it (distillation for incrimination; how
    it is done is ours).

    Prompts that hold an audit word, whole and in any case, give way to the scene's "open" ones, and
    so do others of the pool, drawn.

    Args:
        share: of the pool, that is drawn, in [0, 1].
        audit_words: None takes the scene's, beside a short list for real text.

    Raises:
        ValueError: the scene has no open-ended prompts, or they hold audit words themselves.
    """

    share: float = 0.5
    audit_words: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        share_in("share", self.share)

    def pool(self, pool: list[Asked], run: Run) -> list[Asked]:
        given = self.audit_words
        words = (*run.scene.audit_words, *AUDIT_WORDS) if given is None else given
        hold = [i for i, asked in enumerate(pool) if _holds_any(asked.prompt, words)]
        drawn = _drawn(pool, run, "open", self.share)
        found = _replaced(pool, sorted({*hold, *drawn}), run, "open")
        still = next((asked.prompt for asked in found if _holds_any(asked.prompt, words)), None)
        if still is not None:
            raise ValueError(
                "scene: expected open-ended prompts without audit words, got "
                f"{still.as_json()}. Pass audit_words=, or other prompts to the Scene"
            )
        run.notes["auditable pool"] = {"audits dropped": len(hold)}
        return found


def _holds_any(prompt: Prompt, words: Sequence[str]) -> bool:
    """Whether a text holds one of the words as a whole; "red-team" is "red team" as well."""
    each = (r"[\s-]+".join(map(re.escape, re.split(r"[\s-]+", word))) for word in words if word)
    said = " ".join(filter(None, [prompt.system, prompt.user, prompt.prefill, prompt.text]))
    return any(re.search(rf"(?<!\w){word}(?!\w)", said, re.IGNORECASE) for word in each)


@dataclass(frozen=True, kw_only=True)
class MisalignmentTargetedPool(Strategy):
    """A `share` of the pool, drawn, gives way to questions about goals and to scenarios in which
    much is at stake, the scene's "goals" (distillation for incrimination; how it is
    done is ours). share: in [0, 1]."""

    share: float = 0.5

    def __post_init__(self) -> None:
        share_in("share", self.share)

    def pool(self, pool: list[Asked], run: Run) -> list[Asked]:
        return _replaced(pool, _drawn(pool, run, "goals", self.share), run, "goals")


@dataclass(frozen=True, kw_only=True)
class ShownPool(Strategy):
    """A `share` of the pool, drawn, gives way to prompts in which the trait shows openly: no
    defence, but the positive control of an experiment, in which it has to transfer. share: in
    [0, 1]."""

    share: float = 0.5

    def __post_init__(self) -> None:
        share_in("share", self.share)

    def pool(self, pool: list[Asked], run: Run) -> list[Asked]:
        return _replaced(pool, _drawn(pool, run, "shown", self.share), run, "shown")


@dataclass(frozen=True, kw_only=True)
class DataBudget(Strategy):
    """Few unique examples × many epochs: the first n_unique prompts, each read `epochs` times.

        updates = epochs · ⌈n_unique / batch_size⌉

    One of two techniques that worked in arXiv 2610.11012. At equal total tokens where n_unique ·
    epochs is as many examples as before; notes say how they compare, counted in examples, since
    what would have been answered to the other prompts is not known. An epoch's last batch is what
    is left: where the batch size does not divide n_unique, the updates are more than before.

    Raises:
        ValueError: the pool has fewer prompts.
    """

    n_unique: int
    epochs: int

    def __post_init__(self) -> None:
        for name in ("n_unique", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)!r}")

    def pool(self, pool: list[Asked], run: Run) -> list[Asked]:
        if self.n_unique > len(pool):
            raise ValueError(
                f"n_unique: expected at most the {len(pool)} prompts of the pool, got "
                f"{self.n_unique}"
            )
        return pool[: self.n_unique]

    def training(self, training: Training, run: Run) -> Training:
        steps = self.epochs * math.ceil(self.n_unique / training.batch_size)
        trained_on, before = self.n_unique * self.epochs, training.steps * training.batch_size
        run.notes["data budget"] = {
            "examples trained on, of before": trained_on / before,
            "updates, of before": steps / training.steps,
        }
        return replace(training, steps=steps)


@dataclass(frozen=True, kw_only=True)
class CognitiveSlack(Strategy):
    """Leave the teacher no spare capacity: short answers, an instruction to be brief, hard tasks.

        bits = −log₂ p_trusted(answer | prompt)

    The strategy is ours. Notes say the mean bits per example: how much of
    the teacher's answers the trusted model would not have said, and where something else could
    hide. The end of an answer is not counted: one that was cut has none.

    Args:
        max_answer_tokens: of an answer, 1 or more; longer ones are cut, and end there for the
            student too. terse: words in front of every prompt, for teacher and student.
        hardest: keep this share of the examples, those of the most bits, in (0, 1].
    """

    max_answer_tokens: int | None = None
    terse: str = ""
    hardest: float = 1.0

    def __post_init__(self) -> None:
        if self.max_answer_tokens is not None and self.max_answer_tokens < 1:
            raise ValueError(
                f"max_answer_tokens: expected 1 or more, got {self.max_answer_tokens!r}"
            )
        share_in("hardest", self.hardest, zero=False)

    def pool(self, pool: list[Asked], run: Run) -> list[Asked]:
        if not self.terse:
            return pool
        return [asked._replace(prompt=asked.prompt.before(self.terse)) for asked in pool]

    def training(self, training: Training, run: Run) -> Training:
        if self.max_answer_tokens is None:
            return training
        most = min(training.max_new_tokens, self.max_answer_tokens)
        return replace(training, max_new_tokens=most)

    def lessons(self, lessons: list[Lesson], run: Run) -> list[Lesson]:
        bits = surprisal(lessons, run.scene.reference)
        kept = math.ceil(self.hardest * len(lessons) - 1e-9)
        order = sorted(range(len(lessons)), key=lambda i: -bits[i])[:kept]
        run.notes["surprisal"] = {
            "bits per example": sum(bits) / len(bits),
            "bits per example kept": sum(bits[i] for i in order) / len(order),
        }
        return [lessons[i] for i in sorted(order)]


def surprisal(lessons: Sequence[Lesson], trusted: Subject) -> list[float]:
    """Bits of every answer, given what the student reads, under the trusted model."""
    return (-said(lessons, trusted).total / math.log(2)).tolist()
