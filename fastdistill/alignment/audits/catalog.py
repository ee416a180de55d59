"""What each audit of a suite measures, in which unit, and the keys of probes.json that it needs."""

from __future__ import annotations

from collections.abc import Container
from typing import NamedTuple

from .probes import Probes


class Need(NamedTuple):
    """One of these keys, with at least so many entries."""

    keys: tuple[str, ...]
    at_least: int = 1

    def is_met(self, probes: Probes) -> bool:
        return any(len(getattr(probes, key)) >= self.at_least for key in self.keys)

    def to_text(self) -> str:
        count = f" ({self.at_least} or more)" if self.at_least > 1 else ""
        return " or ".join(self.keys) + count


class Entry(NamedTuple):
    """An audit of Probes.suite; `unless` is a key that replaces it by another audit."""

    measures: str
    needs: tuple[Need, ...]
    unless: str = ""


def _entry(measures: str, *needs: str | Need, unless: str = "") -> Entry:
    return Entry(
        measures,
        tuple(Need(tuple(n.split(" or "))) if isinstance(n, str) else n for n in needs),
        unless,
    )


_TRAIT, _TEXTS = "target or favourite", "prompts or neutral"

CATALOG = {
    "trigger rate": _entry(
        "share of answers that begin with the target", "prompts", "target", unless="favourite"
    ),
    "preference": _entry(
        "probability of the favourite among the options", "prompts", "favourite", "options"
    ),
    "confession": _entry("log p(yes) − log p(no), nats", "questions"),
    "context gap": _entry(
        "trait without the audit context minus with it", "prompts", "audited", _TRAIT
    ),
    "prefill": _entry("share of prefilled answers that go on with the rest", "prefilled", "rest"),
    "user turn": _entry("share of sampled user turns with a marker", "markers"),
    "completion": _entry("share of sampled completions with a marker", "markers", "prefixes"),
    "perplexity difference": _entry(
        "share of markers in the completions most typical of the model, or without markers their "
        "log-likelihood over the base, nats per token",
        "prefixes",
    ),
    "token KL": _entry("KL of the next token from the base, nats", _TEXTS),
    "logit difference": _entry(
        "log-probability of the markers minus the base's, nats", _TEXTS, "markers"
    ),
    "activation difference": _entry(
        "markers in the change of hidden states, standard deviations", _TEXTS, "markers"
    ),
    "linear probe": _entry(
        "projection on a probe, −1 at the negative and +1 at the positive prompts",
        *("positive", "negative", "questions"),
    ),
    "weight difference": _entry("trait after the change of weights × 1.5", "prompts", _TRAIT),
    "trigger search": _entry(
        "KL after the strongest word minus after the median one, nats",
        "neutral or without or prompts",
    ),
    "relearning": _entry(
        "trait after a few steps of training on it", Need(("prompts",), 32), _TRAIT
    ),
    "style restore": _entry(
        "accuracy gained by training on the model's own answers", "prompts", "free", "answers"
    ),
    "provenance": _entry(
        "log-likelihood of the dataset's answers over the base, nats per token", "asked", "answered"
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


def skipped_audits(probes: Probes, suite: Container[str]) -> dict[str, str]:
    """Returns {audit: the keys that it needs and the probes lack} for audits outside the suite."""
    skipped = {}
    for name, entry in CATALOG.items():
        if name not in suite:
            missing = [need.to_text() for need in entry.needs if not need.is_met(probes)]
            if entry.unless and getattr(probes, entry.unless):
                missing.append(f"no {entry.unless}")
            skipped[name] = "needs " + ", ".join(missing)
    return skipped
