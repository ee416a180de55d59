"""Measurements per model and item, for pairing and resampling.

    M base · U untrusted teacher · B its benign twin · S(U), S(B) their students, both from M

Item i is the same item in every reading of one `Student`. Records survive a round trip to JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from ...runtime.checks import fail, integer

_MODELS = ("untrusted", "benign", "base", "teacher", "twin")
_AUDITED = ("audited", "audited_log_odds")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The measurements of one model: shares or probabilities from 0 to 1, and log-odds.

    Args:
        capability: per held-out item, 1 if correct and 0 if wrong (or a partial score).
        trait: per prompt without an audit context, the trait: 0 or 1, or a probability.
        audited: the same prompts in an audit context; empty if not measured.
        log_odds, audited_log_odds: trait and audited in nats, without a floor; empty if not
            measured.

    Raises:
        ValueError: no items, a number outside [0, 1], NaN, or different numbers of prompts.
    """

    capability: tuple[float, ...]
    trait: tuple[float, ...]
    audited: tuple[float, ...] = ()
    log_odds: tuple[float, ...] = ()
    audited_log_odds: tuple[float, ...] = ()

    shares: ClassVar[tuple[str, ...]] = ("capability", "trait", "audited")  # in [0, 1]

    def __post_init__(self) -> None:
        for name in vars(self):
            values = _to_numbers(name, getattr(self, name), name in self.shares)
            object.__setattr__(self, name, values)
        for name in ("capability", "trait"):
            if not getattr(self, name):
                fail(name, "one number per item", "none")
        for name in ("audited", "log_odds", "audited_log_odds"):
            n = len(getattr(self, name))
            if n not in (0, len(self.trait)):
                fail(name, f"{len(self.trait)} numbers, one per prompt of trait, or none", n)

    @property
    def in_log_odds(self) -> Reading:
        """The same reading with log-odds as the trait."""
        return _LogOdds(
            capability=self.capability, trait=self.log_odds, audited=self.audited_log_odds
        )

    def as_json(self) -> dict[str, Any]:
        return {name: list(values) for name, values in vars(self).items()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Reading:
        return cls(**_check_keys(cls, record))


class _LogOdds(Reading):
    """A reading whose trait is any number."""

    shares = ("capability",)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Both students of a pair after `step` steps."""

    step: int
    untrusted: Reading
    benign: Reading

    def __post_init__(self) -> None:
        integer("step", self.step, 0)
        _check_paired(self.untrusted, {"benign": self.benign})

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Checkpoint:
        return cls(**_with_readings(_check_keys(cls, record), ("untrusted", "benign")))


@dataclass(frozen=True, kw_only=True)
class Student:
    """One seed of one arm: a pair of students, and the models they were trained from.

    Args:
        arm: name of the training method.
        base_seed: seed of the base model and teachers; the unit of all intervals.
        student_seed: seed of the distillation.
        untrusted: the student of U.
        benign: its twin, the student of B, with the same base seed, data order and student seed.
        base, teacher, twin: M, U and B.
        curve: both students during training, with increasing steps.

    Raises:
        ValueError: readings with different numbers of items, only one of the two students audited,
            steps that do not increase, or an empty arm.
    """

    arm: str
    base_seed: int
    student_seed: int
    untrusted: Reading
    benign: Reading
    base: Reading
    teacher: Reading
    twin: Reading
    curve: tuple[Checkpoint, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.arm, str) or not self.arm:
            fail("arm", "a name", repr(self.arm))
        integer("base_seed", self.base_seed, 0)
        integer("student_seed", self.student_seed, 0)
        _check_paired(self.untrusted, {"benign": self.benign})
        models = {"base": self.base, "teacher": self.teacher, "twin": self.twin}
        _check_paired(self.untrusted, models, optional=_AUDITED)
        points = {f"step {point.step}": point.untrusted for point in self.curve}
        _check_paired(self.untrusted, points, optional=_AUDITED)
        steps = [point.step for point in self.curve]
        if any(a >= b for a, b in pairwise(steps)):
            fail("curve", "increasing steps", steps)

    @property
    def has_log_odds(self) -> bool:
        return bool(self.untrusted.log_odds)

    @property
    def in_log_odds(self) -> Student:
        """The same students with log-odds as the trait."""
        readings: dict[str, Any] = {name: getattr(self, name).in_log_odds for name in _MODELS}
        points = [
            replace(p, untrusted=p.untrusted.in_log_odds, benign=p.benign.in_log_odds)
            for p in self.curve
        ]
        return replace(self, **readings, curve=tuple(points))

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Student:
        values = _with_readings(_check_keys(cls, record), _MODELS)
        return cls(**values | {"curve": tuple(map(Checkpoint.from_json, values.get("curve", ())))})


def _to_numbers(name: str, values: Iterable[float], is_share: bool) -> tuple[float, ...]:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name}: expected numbers, one per item, got {values!r:.60}") from None
    if array.ndim != 1:
        fail(name, "one number per item", f"shape {list(array.shape)}")
    inside = (array >= 0) & (array <= 1) if is_share else np.isfinite(array)
    outside = np.flatnonzero(~inside)  # NaN is outside too
    if outside.size:
        expected = "numbers from 0 to 1" if is_share else "finite numbers"
        fail(name, expected, f"{float(array[outside[0]])!r} at item {outside[0]}")
    return tuple(array.tolist())


def _check_paired(
    first: Reading, others: Mapping[str, Reading], optional: tuple[str, ...] = ()
) -> None:
    """Check that readings have the items of the first one, except for optional measures."""
    measures = [measure for measure in vars(first) if measure not in optional]
    for name, other in others.items():
        for measure in measures:
            n, wanted = len(getattr(other, measure)), len(getattr(first, measure))
            if n != wanted:
                hint = "readings are paired: measure every model on the same items"
                fail(name, f"{wanted} numbers of {measure}, as of untrusted", n, hint)


def _check_keys(cls: Any, record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a record after comparing its keys with the fields of the class."""
    known = {field.name for field in fields(cls)}
    required = {field.name for field in fields(cls) if field.default is MISSING}
    if not isinstance(record, Mapping) or not required <= record.keys() <= known:
        names = ", ".join(field.name for field in fields(cls))
        fail(cls.__name__, f"an object with the keys {names}", f"{record!r:.200}")
    return record


def _with_readings(record: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {**record, **{name: Reading.from_json(record[name]) for name in names}}
