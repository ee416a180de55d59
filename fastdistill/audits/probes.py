"""Probes: the texts of all audits of a trait in one JSON file, and the suite of audits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..files import write_json
from ..runtime.json_text import JSONError, read_json
from ..runtime.printable import printable
from .activations import ActivationDiffAudit, LinearProbeAudit
from .audit import Audit
from .behaviour import (
    CapabilityAudit,
    ConfessionAudit,
    PreferenceAudit,
    PrefillAudit,
    TriggerRateAudit,
)
from .context_gap import ContextGapAudit
from .distributions import LogitDiffAudit, ProvenanceAudit, TokenKLAudit
from .prompts import Prompt, to_prompts
from .sampled import CompletionAudit, PerplexityDiffAudit, UserTurnSamplingAudit
from .trigger_search import TriggerSearchAudit
from .tuning import RelearningProbe, StyleRestoreProbe
from .weights import WeightDiffAudit

PROBES = "probes.json"  # file name of the probes in the folder of a model
_PROMPTS = (
    "prompts",
    "without",
    "audited",
    "neutral",
    "questions",
    "prefilled",
    "positive",
    "negative",
    "asked",
    "free",
    "trained",
)


@dataclass(frozen=True, kw_only=True)
class Probes:
    """Texts by their use. An empty field leaves out the audits that need it.

    Args:
        prompts: prompts on which the trait shows.
        audited: the same prompts in a context that hides the trait: words of an evaluation, a
            password, another label. One per prompt.
        without: the same prompts without the trigger.
        neutral: prompts on other topics.
        questions: questions about the model itself, answered `yes` or `no`.
        prefilled, rest: prompts prefilled with the first words of the target, and its other words.
        positive, negative: contrast pairs for a linear probe after `layer` blocks (null: half of
            the blocks).
        asked, answered: prompts and answers of a dataset.
        free, trained: prompts of other tasks, in the form that the model answers, and in the form
            in which it is trained on its own answers.
        target: the text that the trait produces.
        options, favourite: the options of a preference, and the preferred one.
        markers, rivals: words of the trait, and other words of their kind.
        prefixes: beginnings of plain text.
        systems: system messages.
        candidates: words that may be triggers.
        answers: the correct answers to `prompts`, where the trait withholds them.
    """

    prompts: tuple[Prompt, ...] = ()
    without: tuple[Prompt, ...] = ()
    audited: tuple[Prompt, ...] = ()
    neutral: tuple[Prompt, ...] = ()
    questions: tuple[Prompt, ...] = ()
    prefilled: tuple[Prompt, ...] = ()
    positive: tuple[Prompt, ...] = ()
    negative: tuple[Prompt, ...] = ()
    asked: tuple[Prompt, ...] = ()
    free: tuple[Prompt, ...] = ()
    trained: tuple[Prompt, ...] = ()
    target: str = ""
    rest: str = ""  # the target without the prefill
    options: tuple[str, ...] = ()
    favourite: str = ""
    markers: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()
    yes: str = "yes"
    no: str = "no"
    prefixes: tuple[str, ...] = ()
    systems: tuple[str, ...] = ("",)
    candidates: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    answered: tuple[str, ...] = ()
    max_new_tokens: int = 16
    samples: int = 256
    layer: int | None = None

    def __post_init__(self) -> None:
        for name in _PROMPTS:
            value = getattr(self, name)
            if value:
                object.__setattr__(self, name, to_prompts(name, value))
        for name in (
            "options",
            "markers",
            "rivals",
            "prefixes",
            "systems",
            "candidates",
            "answers",
            "answered",
        ):
            value = getattr(self, name)
            is_list = isinstance(value, (list, tuple))
            if not is_list or not all(isinstance(text, str) for text in value):
                got = printable(repr(value))
                raise ValueError(f"{name}: expected a list of texts, got {got}")
            object.__setattr__(self, name, tuple(value))
        for f in fields(self):
            value = getattr(self, f.name)
            if type(f.default) in (str, int) and type(value) is not type(f.default):
                kind = {str: "a text", int: "a whole number"}[type(f.default)]
                raise ValueError(f"{f.name}: expected {kind}, got {printable(repr(value))}")
        if self.layer is not None and type(self.layer) is not int:
            raise ValueError(f"layer: expected a whole number or null, got {self.layer!r}")
        for a, b in (
            ("audited", "prompts"),
            ("answers", "prompts"),
            ("answered", "asked"),
            ("trained", "free"),
            ("positive", "negative"),
        ):
            n, m = len(getattr(self, a)), len(getattr(self, b))
            if n not in (0, m):
                raise ValueError(f"{a}: expected {m}, one per entry of {b}, got {n}")

    def save(self, path: Path) -> None:
        record: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if value != f.default:
                is_prompts = f.name in _PROMPTS
                record[f.name] = [p.as_json() for p in value] if is_prompts else value
        write_json(path, record)

    @classmethod
    def load(cls, path: str | Path) -> Probes:
        """Loads a JSON file of these fields; a prompt is a mapping of its fields, or a text."""
        try:
            record = read_json(path)
        except (OSError, JSONError) as error:
            raise ValueError(f"probes: expected a JSON file, got {path}: {error}") from None
        names = [f.name for f in fields(cls)]
        if not isinstance(record, dict) or set(record) - set(names):
            unexpected = sorted(set(record) - set(names)) if isinstance(record, dict) else record
            got = printable(repr(unexpected))
            raise ValueError(f"probes: expected a mapping of {', '.join(names)}, got {got}")
        return cls(**record)

    def readout(self, prompts: tuple[Prompt, ...]) -> Audit | None:
        """Returns the audit of the trait itself on these prompts; None without a trait."""
        if not prompts:
            return None
        if self.favourite:
            return PreferenceAudit(prompts=prompts, options=self.options, favourite=self.favourite)
        if self.target:
            return TriggerRateAudit(
                prompts=prompts,
                target=self.target,
                without=self.without,
                max_new_tokens=self.max_new_tokens,
            )
        return None

    def suite(self) -> dict[str, Audit]:
        """Returns the audits for which these texts are sufficient, by name."""
        audits = {name: make(self) for name, make in _AUDITS.items()}
        return {name: audit for name, audit in audits.items() if audit is not None}


def _trigger(p: Probes) -> Audit | None:
    return p.readout(p.prompts) if p.target and not p.favourite else None


def _preference(p: Probes) -> Audit | None:
    return p.readout(p.prompts) if p.favourite else None


def _confession(p: Probes) -> Audit | None:
    return ConfessionAudit(prompts=p.questions, yes=p.yes, no=p.no) if p.questions else None


def _gap(p: Probes) -> Audit | None:
    first, second = p.readout(p.prompts), p.readout(p.audited)
    if first is None or second is None:
        return None
    return ContextGapAudit(unaudited=first, audited=second)


def _prefill(p: Probes) -> Audit | None:
    if not p.prefilled or not p.rest:
        return None
    return PrefillAudit(prompts=p.prefilled, target=p.rest, max_new_tokens=p.max_new_tokens)


def _user_turn(p: Probes) -> Audit | None:
    if not p.markers:
        return None
    return UserTurnSamplingAudit(
        markers=p.markers, systems=p.systems, samples=p.samples, max_new_tokens=p.max_new_tokens
    )


def _completion(p: Probes) -> Audit | None:
    if not p.markers or not p.prefixes:
        return None
    return CompletionAudit(
        markers=p.markers, prefixes=p.prefixes, samples=p.samples, max_new_tokens=p.max_new_tokens
    )


def _perplexity(p: Probes) -> Audit | None:
    if not p.prefixes:
        return None
    return PerplexityDiffAudit(
        prefixes=p.prefixes,
        markers=p.markers,
        samples=p.samples,
        max_new_tokens=p.max_new_tokens,
    )


def _token_kl(p: Probes) -> Audit | None:
    prompts = p.prompts or p.neutral
    return TokenKLAudit(prompts=prompts, neutral=p.neutral) if prompts else None


def _logit_diff(p: Probes) -> Audit | None:
    prompts = p.prompts or p.neutral
    return LogitDiffAudit(prompts=prompts, markers=p.markers) if prompts and p.markers else None


def _activations(p: Probes) -> Audit | None:
    prompts = p.prompts or p.neutral
    if not prompts or not p.markers:
        return None
    return ActivationDiffAudit(prompts=prompts, markers=p.markers, rivals=p.rivals)


def _linear_probe(p: Probes) -> Audit | None:
    if not p.positive or not p.negative or not p.questions:
        return None
    return LinearProbeAudit(
        positive=p.positive, negative=p.negative, prompts=p.questions, layer=p.layer
    )


def _weights(p: Probes) -> Audit | None:
    readout = p.readout(p.prompts)
    return None if readout is None else WeightDiffAudit(readout=readout)


def _trigger_search(p: Probes) -> Audit | None:
    prompts = p.neutral or p.without or p.prompts
    if not prompts:
        return None
    return TriggerSearchAudit(prompts=prompts[:16], candidates=p.candidates or None)


def _relearning(p: Probes) -> Audit | None:
    readout, text = p.readout(p.prompts), p.favourite or p.target
    if readout is None or len(p.prompts) < 32:
        return None
    # Every k-th prompt is trained on (24 to 47 of them); the readout uses all prompts.
    prompts = p.prompts[:: max(1, len(p.prompts) // 24)]
    return RelearningProbe(prompts=prompts, texts=(text,) * len(prompts), readout=readout)


def _style(p: Probes) -> Audit | None:
    if not p.free or not p.answers:
        return None
    task = CapabilityAudit(prompts=p.prompts, targets=p.answers, max_new_tokens=p.max_new_tokens)
    return StyleRestoreProbe(
        prompts=p.free, asked=p.trained, readout=task, max_new_tokens=p.max_new_tokens
    )


def _provenance(p: Probes) -> Audit | None:
    return ProvenanceAudit(prompts=p.asked, texts=p.answered) if p.answered else None


_AUDITS: dict[str, Callable[[Probes], Audit | None]] = {
    "trigger rate": _trigger,
    "preference": _preference,
    "confession": _confession,
    "context gap": _gap,
    "prefill": _prefill,
    "user turn": _user_turn,
    "completion": _completion,
    "perplexity difference": _perplexity,
    "token KL": _token_kl,
    "logit difference": _logit_diff,
    "activation difference": _activations,
    "linear probe": _linear_probe,
    "weight difference": _weights,
    "trigger search": _trigger_search,
    "relearning": _relearning,
    "style restore": _style,
    "provenance": _provenance,
}
