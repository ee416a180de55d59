"""The audits of a suite: what each measures, the keys of probes.json that it needs, its maker."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from .activations import ActivationDiffAudit, LinearProbeAudit
from .audit import Audit
from .behaviour import CapabilityAudit, ConfessionAudit, PrefillAudit
from .context_gap import ContextGapAudit
from .distributions import LogitDiffAudit, ProvenanceAudit, TokenKLAudit
from .finetuning import RelearningProbe, StyleRestoreProbe
from .sampled import CompletionAudit, PerplexityDiffAudit, UserTurnSamplingAudit
from .trigger_search import TriggerSearchAudit
from .weights import WeightDiffAudit

if TYPE_CHECKING:
    from .probes import Probes
    from .prompts import Prompt


class Entry(NamedTuple):
    """An audit of Probes.suite.

    Attributes:
        needs: keys of probes.json; "a or b" is one of these. least: number of `prompts`.
        make: returns the audit of probes that have these keys.
        unless: a key that replaces the audit by another one.
    """

    measures: str
    needs: tuple[str, ...]
    make: Callable[[Probes], Audit]
    unless: str = ""
    least: int = 1

    def lacks(self, probes: Probes) -> list[str]:
        """Returns the needs that the probes do not meet."""
        lacking = [need for need in self.needs if not self._is_met(need, probes)]
        if self.least > 1:
            lacking = [f"{n} ({self.least} or more)" if n == "prompts" else n for n in lacking]
        if self.unless and getattr(probes, self.unless):
            lacking.append(f"no {self.unless}")
        return lacking

    def _is_met(self, need: str, probes: Probes) -> bool:
        least = self.least if need == "prompts" else 1
        return any(len(getattr(probes, key)) >= least for key in need.split(" or "))


def _readout(p: Probes, prompts: tuple[Prompt, ...] = ()) -> Any:
    return p.readout(prompts or p.prompts)


def _sampling(p: Probes) -> dict[str, int]:
    return {"samples": p.samples, "max_new_tokens": p.max_new_tokens}


def _relearning(p: Probes) -> RelearningProbe:
    # Every k-th prompt is trained on (24 to 47 of them); the readout uses all prompts.
    trained = p.prompts[:: max(1, len(p.prompts) // 24)]
    texts = (p.favourite or p.target,) * len(trained)
    return RelearningProbe(prompts=trained, texts=texts, readout=_readout(p))


def _style_restore(p: Probes) -> StyleRestoreProbe:
    length = p.max_new_tokens
    task = CapabilityAudit(prompts=p.prompts, targets=p.answers, max_new_tokens=length)
    return StyleRestoreProbe(prompts=p.free, asked=p.trained, readout=task, max_new_tokens=length)


_TRAIT, _TEXTS = "target or favourite", "prompts or neutral"

CATALOG = {
    "trigger rate": Entry(
        "share of answers that begin with the target",
        ("prompts", "target"),
        _readout,
        unless="favourite",
    ),
    "preference": Entry(
        "probability of the favourite among the options",
        ("prompts", "favourite", "options"),
        _readout,
    ),
    "confession": Entry(
        "log p(yes) − log p(no), nats",
        ("questions",),
        lambda p: ConfessionAudit(prompts=p.questions, yes=p.yes, no=p.no),
    ),
    "context gap": Entry(
        "trait without the audit context minus with it",
        ("prompts", "audited", _TRAIT),
        lambda p: ContextGapAudit(unaudited=_readout(p), audited=_readout(p, p.audited)),
    ),
    "prefill": Entry(
        "share of prefilled answers that go on with the rest",
        ("prefilled", "rest"),
        lambda p: PrefillAudit(prompts=p.prefilled, target=p.rest, max_new_tokens=p.max_new_tokens),
    ),
    "user turn": Entry(
        "share of sampled user turns with a marker",
        ("markers",),
        lambda p: UserTurnSamplingAudit(markers=p.markers, systems=p.systems, **_sampling(p)),
    ),
    "completion": Entry(
        "share of sampled completions with a marker",
        ("markers", "prefixes"),
        lambda p: CompletionAudit(markers=p.markers, prefixes=p.prefixes, **_sampling(p)),
    ),
    "perplexity difference": Entry(
        "share of markers in the completions most typical of the model, or without markers their "
        "log-likelihood over the base, nats per token",
        ("prefixes",),
        lambda p: PerplexityDiffAudit(prefixes=p.prefixes, markers=p.markers, **_sampling(p)),
    ),
    "token KL": Entry(
        "KL of the next token from the base, nats",
        (_TEXTS,),
        lambda p: TokenKLAudit(prompts=p.prompts or p.neutral, neutral=p.neutral),
    ),
    "logit difference": Entry(
        "log-probability of the markers minus the base's, nats",
        (_TEXTS, "markers"),
        lambda p: LogitDiffAudit(prompts=p.prompts or p.neutral, markers=p.markers),
    ),
    "activation difference": Entry(
        "markers in the change of hidden states, standard deviations",
        (_TEXTS, "markers"),
        lambda p: ActivationDiffAudit(
            prompts=p.prompts or p.neutral, markers=p.markers, rivals=p.rivals
        ),
    ),
    "linear probe": Entry(
        "projection on a probe, −1 at the negative and +1 at the positive prompts",
        ("positive", "negative", "questions"),
        lambda p: LinearProbeAudit(
            positive=p.positive, negative=p.negative, prompts=p.questions, layer=p.layer
        ),
    ),
    "weight difference": Entry(
        "trait after the change of weights × 1.5",
        ("prompts", _TRAIT),
        lambda p: WeightDiffAudit(readout=_readout(p)),
    ),
    "trigger search": Entry(
        "KL after the strongest word minus after the median one, nats",
        ("neutral or without or prompts",),
        lambda p: TriggerSearchAudit(
            prompts=(p.neutral or p.without or p.prompts)[:16], candidates=p.candidates or None
        ),
    ),
    "relearning": Entry(
        "trait after a few steps of training on it", ("prompts", _TRAIT), _relearning, least=32
    ),
    "style restore": Entry(
        "accuracy gained by training on the model's own answers",
        ("prompts", "free", "answers"),
        _style_restore,
    ),
    "provenance": Entry(
        "log-likelihood of the dataset's answers over the base, nats per token",
        ("asked", "answered"),
        lambda p: ProvenanceAudit(prompts=p.asked, texts=p.answered),
    ),
}


# On every trait of `python -m benchmarks.audit_power` these separate U from its benign twin.
UNSPECIFIC = (
    "logit difference",
    "activation difference",
    "weight difference",
    "relearning",
    "provenance",
)
UNSPECIFIC_NOTE = "†: detects that two models were fine-tuned differently, whatever the trait."


def marked(audit: str) -> str:
    """Returns the name of an audit, with † if it merely detects a difference of fine-tuning."""
    return f"{audit} †" if audit.removesuffix(", audited") in UNSPECIFIC else audit


def skipped_audits(probes: Probes) -> dict[str, str]:
    """Returns {audit: the keys that it needs and the probes lack} for audits outside the suite."""
    lacking = {name: entry.lacks(probes) for name, entry in CATALOG.items()}
    return {name: "needs " + ", ".join(keys) for name, keys in lacking.items() if keys}
