"""Measurements per model and item, for pairing and resampling.

    M base · U untrusted teacher · B its benign twin · S(U), S(B) their students, both from M

Item i is the same item in every reading of one `Student`. Records survive a round trip to JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
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
        _check_same_items(self, "untrusted", "benign")

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Checkpoint:
        return cls(**_with_readings(_check_keys(cls, record), "untrusted", "benign"))


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
        _check_same_items(self, *_MODELS)
        object.__setattr__(self, "curve", tuple(self.curve))
        for point in self.curve:
            if not isinstance(point, Checkpoint):
                raise TypeError(f"curve: expected checkpoints, got {type(point).__name__}")
            for name, items in _items(point.untrusted).items():
                if name not in _AUDITED and items != _items(self.untrusted)[name]:
                    raise ValueError(
                        f"curve: expected {_items(self.untrusted)[name]} numbers of {name} at step "
                        f"{point.step}, as of the student, got {items}"
                    )
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
        values = _with_readings(_check_keys(cls, record), *_MODELS)
        points = values.get("curve", [])
        if not isinstance(points, (list, tuple)):
            fail("curve", "a list of checkpoints", type(points).__name__)
        return cls(**values | {"curve": tuple(map(Checkpoint.from_json, points))})


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


def _items(reading: Reading) -> dict[str, int]:
    return {name: len(values) for name, values in vars(reading).items()}


def _check_same_items(record: Any, *names: str) -> None:
    for name in names:
        if not isinstance(value := getattr(record, name), Reading):
            raise TypeError(f"{name}: expected a Reading, got {type(value).__name__}")
    first = _items(record.untrusted)
    for name in names:
        for measure, items in _items(getattr(record, name)).items():
            # Audited readings of base and teachers are optional.
            if items == first[measure] or (
                measure in _AUDITED and name not in ("untrusted", "benign")
            ):
                continue
            raise ValueError(
                f"{name}: expected {first[measure]} numbers of {measure}, as of untrusted, got "
                f"{items}. Readings are paired: measure every model on the same items"
            )


def _check_keys(cls: Any, record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a record after checking its keys against the fields of the class."""
    if not isinstance(record, Mapping):
        fail(cls.__name__, "an object", type(record).__name__)
    known = [field.name for field in fields(cls)]
    optional = ("curve", "log_odds", *_AUDITED)
    required = [name for name in known if name not in optional]
    missing = [name for name in required if name not in record]
    unknown = [name for name in record if name not in known]
    if missing or unknown:
        problems = [f"no {name!r}" for name in missing] + [f"an unknown {k!r}" for k in unknown]
        fail(cls.__name__, f"the keys {', '.join(known)}", ", ".join(problems))
    return dict(record)


def _with_readings(record: dict[str, Any], *names: str) -> dict[str, Any]:
    for name in names:
        try:
            record[name] = Reading.from_json(record[name])
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from None
    return record
