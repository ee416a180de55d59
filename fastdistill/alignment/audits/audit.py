"""Base class of audits: one value per prompt, for the model and for its controls.

An audit is a frozen dataclass of its settings. `measure` returns one value per prompt; `run` forms
the estimate, repeats it for every control over the same prompts, and compares them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar

import numpy as np

from ...runtime.backend import versions
from ...runtime.checks import fail
from ...runtime.intervals import (
    Estimate,
    effective_size,
    mean_of_clusters,
    mean_of_runs,
    paired_difference,
    rate_difference,
    share_of_clusters,
    stderr_of_clusters,
    wilson,
)
from ...runtime.printable import printable
from .prompts import Prompt, set_prompts
from .result import AuditResult, Control
from .subject import Subject, to_subject


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The values of one model.

    values: [n], one per prompt; 0 or 1 each where `rate`. doubts: warnings about the values.
    clusters: one number per value, equal where the prompts are equal; None where all differ.
    log_odds: [n], log p/(1 − p) of values that are probabilities, where the audit knows them.
    texts: the answers, one per value, where the audit reads answers.
    """

    values: np.ndarray
    rate: bool
    details: dict[str, Any] = field(default_factory=dict)
    doubts: tuple[str, ...] = ()
    clusters: tuple[int, ...] | None = None
    log_odds: np.ndarray | None = None
    texts: tuple[str, ...] = ()

    @property
    def estimate(self) -> Estimate:
        if self.clusters is not None:
            of_clusters = share_of_clusters if self.rate else mean_of_clusters
            return of_clusters(self.values.tolist(), self.clusters)
        if self.rate:
            return wilson(int(self.values.sum()), len(self.values))
        return mean_of_runs(self.values.tolist())

    @property
    def stderr(self) -> float:
        if self.clusters is not None and not self.rate:
            return stderr_of_clusters(self.values.tolist(), self.clusters)
        n = len(self.values) if self.clusters is None else effective_size(self.clusters)
        if len(set(self.clusters or range(len(self.values)))) < 2:
            return math.nan
        return float(self.values.std(ddof=0 if self.rate else 1) / math.sqrt(n))


@dataclass(frozen=True, kw_only=True)
class Audit(ABC):
    """An audit; `run` returns its result."""

    needs_base: ClassVar[bool] = False

    @abstractmethod
    def measure(self, model: Subject, base: Subject | None) -> Measurement:
        """Returns one value per prompt. `base` is the trusted model, for audits that need one."""

    def units(self) -> Sequence[Hashable] | None:
        """Returns what each value depends on; equal entries are one unit. None: all differ."""
        readout = getattr(self, "readout", None)
        return readout.units() if isinstance(readout, Audit) else getattr(self, "prompts", None)

    def run(
        self,
        model: Any,
        *,
        base: Any = None,
        controls: Mapping[str, Any] | None = None,
    ) -> AuditResult:
        """Audits `model`, and each of `controls` in the same way.

        Args:
            model: a Subject, or the path of a checkpoint.
            base: the trusted model, for audits that compare with one.
            controls: name -> model without the trait, such as the base or the student of a benign
                teacher. Only a difference from controls is evidence: models without a secret
                confess to one in up to 20 % of answers.

        Raises:
            ValueError: base is missing for an audit that compares with it.
            TypeError: not a model.
        """
        if self.needs_base and base is None:
            expected = f"the trusted model that {type(self).__name__} compares with"
            fail("base", expected, "none", "pass base=Subject(model, tokenizer) or a path")
        audited = to_subject("model", model)
        trusted = None if base is None else to_subject("base", base)
        measurement = self.measure_with_warnings(audited, trusted)
        control_measurements = {
            name: self.measure_with_warnings(to_subject(f"controls[{name!r}]", control), trusted)
            for name, control in (controls or {}).items()
        }
        return self.to_result(audited.name, measurement, control_measurements)

    def measure_with_warnings(self, model: Subject, base: Subject | None) -> Measurement:
        """Measures a model, with warnings about answers that ended early.

        They may end at a common word or at the last position; a checkpoint controls both.
        """
        word_ends, position_ends = model.ended_at_words.copy(), model.ended_at_positions.copy()
        measurement = self.measure(model, base)
        doubts = measurement.doubts
        if new_word_ends := model.ended_at_words - word_ends:
            words = ", ".join(
                printable(repr(model.tokenizer.decode([i]))) for i in sorted(new_word_ends)[:5]
            )
            doubts += (
                f"{new_word_ends.total()} answers ended at {words}: end tokens by the generation "
                "settings of the model, but not special tokens",
            )
        if (new_position_ends := model.ended_at_positions - position_ends) and (
            limit := model.reader.row_limit
        ):
            doubts += (
                f"{new_position_ends.total()} answers were cut off before their max_new_tokens, "
                f"since {limit.reader} reads {limit.tokens} tokens{limit.hint}",
            )
        return replace(measurement, doubts=doubts)

    def to_result(
        self, model: str, measurement: Measurement, controls: Mapping[str, Measurement]
    ) -> AuditResult:
        """Returns the result of existing measurements, as `run` does.

        Equal prompts are one unit: n and the intervals count the different ones.
        """
        clusters = clusters_of(self.units(), len(measurement.values))
        measurement = replace(measurement, clusters=clusters)
        controls = {name: replace(control, clusters=clusters) for name, control in controls.items()}
        estimate = measurement.estimate
        # Warnings about a control also invalidate the comparison.
        control_doubts = tuple(
            f"{name}: {d}" for name, control in controls.items() for d in control.doubts
        )
        return AuditResult(
            audit=type(self).__name__,
            model=model,
            value=estimate.value,
            stderr=measurement.stderr,
            interval=(estimate.low, estimate.high),
            n=estimate.n,
            controls={
                name: _compare_with_control(measurement, control)
                for name, control in controls.items()
            },
            config=to_config(self),
            versions=versions(),
            details=measurement.details,
            doubts=measurement.doubts + control_doubts,
            values=tuple(measurement.values.tolist()),
            texts=measurement.texts,
        )


@dataclass(frozen=True, kw_only=True)
class PromptAudit(Audit):
    """An audit over given prompts; a string is the user turn of one."""

    prompts: tuple[Prompt, ...]

    def __post_init__(self) -> None:
        set_prompts(self, "prompts")


def clusters_of(units: Sequence[Hashable] | None, n: int) -> tuple[int, ...] | None:
    """Returns a number per value, equal where its units are; None where all of the n differ."""
    if units is None or len(units) != n or len(set(units)) == n:
        return None
    numbers: dict[Hashable, int] = {}
    return tuple(numbers.setdefault(unit, len(numbers)) for unit in units)


def _compare_with_control(measurement: Measurement, control: Measurement) -> Control:
    estimate = control.estimate
    if measurement.rate:
        difference = rate_difference(measurement.estimate, estimate)
    elif measurement.clusters is not None:
        gaps = (measurement.values - control.values).tolist()
        difference = mean_of_clusters(gaps, measurement.clusters)
    else:
        difference = paired_difference(measurement.values.tolist(), control.values.tolist())
    return Control(
        value=estimate.value,
        stderr=control.stderr,
        interval=(estimate.low, estimate.high),
        n=estimate.n,
        difference=difference,
    )


def to_config(audit: Any) -> dict[str, Any]:
    """Returns the fields of an audit as JSON, nested audits included."""
    return {"audit": type(audit).__name__} | {
        f.name: _to_json(getattr(audit, f.name)) for f in fields(audit)
    }


def _to_json(value: Any) -> Any:
    if isinstance(value, Prompt):
        return value.as_json()
    if isinstance(value, Mapping):
        return {str(key): _to_json(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(part) for part in value]
    return to_config(value) if is_dataclass(value) else value
