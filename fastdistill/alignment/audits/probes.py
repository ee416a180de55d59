"""Probes: the texts of all audits of a trait in one JSON file, and the suite of audits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from ...runtime.atomic_files import write_json
from ...runtime.checks import fail, integer
from ...runtime.json_text import JSONError, read_json
from ...runtime.printable import printable
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
from .finetuning import RelearningProbe, StyleRestoreProbe
from .prompts import Prompt, set_prompts
from .sampled import CompletionAudit, PerplexityDiffAudit, UserTurnSamplingAudit
from .trigger_search import TriggerSearchAudit
from .weights import WeightDiffAudit

PROBES = "probes.json"  # file name of the probes in the folder of a model


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
        for name, kind in _TYPES.items():
            value = getattr(self, name)
            if kind == _PROMPTS:
                if value not in ((), []):
                    set_prompts(self, name)
            elif kind == tuple[str, ...]:
                is_list = isinstance(value, (list, tuple))
                if not is_list or not all(isinstance(text, str) for text in value):
                    fail(name, "a list of texts", printable(repr(value)))
                object.__setattr__(self, name, tuple(value))
            elif kind is str and not isinstance(value, str):
                fail(name, "a text", printable(repr(value)))
            elif kind is int:
                integer(name, value)
        integer("layer", self.layer, optional=True)
        for a, b in (
            ("audited", "prompts"),
            ("answers", "prompts"),
            ("answered", "asked"),
            ("trained", "free"),
            ("positive", "negative"),
        ):
            n, m = len(getattr(self, a)), len(getattr(self, b))
            if n not in (0, m):
                fail(a, f"{m}, one per entry of {b}", n)

    def save(self, path: Path) -> None:
        record: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if value != f.default:
                is_prompts = _TYPES[f.name] == _PROMPTS
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
            fail("probes", f"a mapping of {', '.join(names)}", printable(repr(unexpected)))
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
        return {**dict(_behavioral_audits(self)), **dict(_internal_audits(self))}


_PROMPTS = tuple[Prompt, ...]
_TYPES = get_type_hints(Probes)


def _behavioral_audits(p: Probes) -> Iterator[tuple[str, Audit]]:
    """Yields the audits of answers and of sampled text."""
    readout, audited = p.readout(p.prompts), p.readout(p.audited)
    sampled = {"samples": p.samples, "max_new_tokens": p.max_new_tokens}
    if readout is not None and p.target and not p.favourite:
        yield "trigger rate", readout
    if readout is not None and p.favourite:
        yield "preference", readout
    if p.questions:
        yield "confession", ConfessionAudit(prompts=p.questions, yes=p.yes, no=p.no)
    if readout is not None and audited is not None:
        yield "context gap", ContextGapAudit(unaudited=readout, audited=audited)
    if p.prefilled and p.rest:
        audit = PrefillAudit(prompts=p.prefilled, target=p.rest, max_new_tokens=p.max_new_tokens)
        yield "prefill", audit
    if p.markers:
        yield "user turn", UserTurnSamplingAudit(markers=p.markers, systems=p.systems, **sampled)
    if p.markers and p.prefixes:
        yield "completion", CompletionAudit(markers=p.markers, prefixes=p.prefixes, **sampled)
    if p.prefixes:
        perplexity = PerplexityDiffAudit(prefixes=p.prefixes, markers=p.markers, **sampled)
        yield "perplexity difference", perplexity


def _internal_audits(p: Probes) -> Iterator[tuple[str, Audit]]:
    """Yields the audits of distributions, hidden states and weights, and those that train."""
    prompts, readout = p.prompts or p.neutral, p.readout(p.prompts)
    if prompts:
        yield "token KL", TokenKLAudit(prompts=prompts, neutral=p.neutral)
    if prompts and p.markers:
        yield "logit difference", LogitDiffAudit(prompts=prompts, markers=p.markers)
        activations = ActivationDiffAudit(prompts=prompts, markers=p.markers, rivals=p.rivals)
        yield "activation difference", activations
    if p.positive and p.negative and p.questions:
        probe = LinearProbeAudit(
            positive=p.positive, negative=p.negative, prompts=p.questions, layer=p.layer
        )
        yield "linear probe", probe
    if readout is not None:
        yield "weight difference", WeightDiffAudit(readout=readout)
    if searched := p.neutral or p.without or p.prompts:
        search = TriggerSearchAudit(prompts=searched[:16], candidates=p.candidates or None)
        yield "trigger search", search
    if readout is not None and len(p.prompts) >= 32:
        # Every k-th prompt is trained on (24 to 47 of them); the readout uses all prompts.
        trained = p.prompts[:: max(1, len(p.prompts) // 24)]
        texts = (p.favourite or p.target,) * len(trained)
        yield "relearning", RelearningProbe(prompts=trained, texts=texts, readout=readout)
    if p.free and p.answers:
        task = CapabilityAudit(
            prompts=p.prompts, targets=p.answers, max_new_tokens=p.max_new_tokens
        )
        style = StyleRestoreProbe(
            prompts=p.free, asked=p.trained, readout=task, max_new_tokens=p.max_new_tokens
        )
        yield "style restore", style
    if p.answered:
        yield "provenance", ProvenanceAudit(prompts=p.asked, texts=p.answered)
