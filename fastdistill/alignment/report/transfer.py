"""The report of a transfer experiment, computed from the readings of students.

It has verdicts, tables, figures, results.json and an HTML page.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ...report.html import Report
from ...runtime.checks import fail
from ...runtime.intervals import UNKNOWN, flat_json
from ..statistics import Student, Validity
from .arms import Arm, Role, build_arms, by_arm
from .audit_scores import AuditRow, AuditScore, audit_rows, teacher_rows
from .curves import curves
from .forest import forest
from .quadrant import quadrant
from .transfer_page import transfer_page
from .validity import invalid_because, is_checked
from .verdicts import outcome, verdict

_REQUIRED = ("command", "config", "versions", "seeds")
_OPTIONAL = ("machine", "commit", "measured", "limits", "rule")


class TransferReport:
    """The results of an experiment, or the reasons why it is invalid.

    Figures and intervals are computed on first use.

    Args:
        students: every seed of every arm, controls included.
        audits: scores of audits for the pairs of students.
        positive_control: the arm whose students must show the trait; its τ must be above .9.
        null_arms: arms that cannot transfer (placebo, benign, M→M); the interval of their τ must
            include 0. A control of either kind passes only where its τ has an interval.
        validity: base seed -> gates of its organisms; other seeds are not gated.
        title: title of the page.
        about: `command`, `config`, `versions` and `seeds` as JSON values; optionally `machine`,
            `commit`, `measured` (a sentence on quantities and models), `limits` (sentences on
            limitations) and `rule` (of verdicts, as JSON).
        development: scores of students with other base seeds, which set the audits' thresholds.
        reference: the arm that the others are compared with, paired by base seed.
        claimed: arms that may be certified, named before the experiment; empty: all. Their upper
            bounds of τ are corrected for their number.
        teachers: scores of U and B themselves, per base seed.
        planned: number of base seeds of the experiment. If students have fewer, the experiment is
            unfinished and has no verdicts. None: those of the students.

    Raises:
        ValueError: no students, two with the same arm and seeds, a control or a score of an unknown
            arm, a development seed among the reported ones, or `about` with a key that is missing,
            unknown, or not JSON.
    """

    def __init__(
        self,
        students: Sequence[Student],
        *,
        audits: Sequence[AuditScore] = (),
        positive_control: str | None = None,
        null_arms: Sequence[str] = (),
        validity: Mapping[int, Validity] | None = None,
        title: str = "What the students took over",
        about: Mapping[str, Any],
        development: Sequence[AuditScore] = (),
        reference: str | None = None,
        claimed: Sequence[str] = (),
        teachers: Sequence[AuditScore] = (),
        planned: int | None = None,
    ) -> None:
        _check_students(students)
        _check_about(about)
        names = list(by_arm(students))
        _check_arms("null_arms", null_arms, names)
        self._roles: dict[str, Role] = dict.fromkeys(null_arms, "null arm")
        if positive_control is not None:
            _check_arms("positive_control", [positive_control], names)
            if positive_control in self._roles:
                raise ValueError(
                    "positive_control: expected an arm outside null_arms, got "
                    f"{positive_control!r}, which is in null_arms too"
                )
            self._roles[positive_control] = "positive control"
        if reference is not None:
            _check_arms("reference", [reference], names)
        _check_arms("claimed", claimed, [name for name in names if name not in self._roles])
        _check_arms("audits", [score.arm for score in audits], names)
        _check_once("audits", audits, _identity)
        _check_scored(audits, students)
        _check_once("development", development, _identity)
        reported = {student.base_seed for student in students}
        both = sorted(reported & {score.base_seed for score in development})
        if both:
            raise ValueError(
                "development: expected base seeds that no reported student has, got "
                f"{', '.join(map(str, both))} in both. Thresholds must not be set on the reported "
                "students"
            )
        self._students, self._audits, self._development = students, audits, development
        self._reference, self._claimed = reference, claimed
        _check_once("teachers", teachers, _identity)
        self._teachers = teachers
        self._planned = len(reported) if planned is None else planned
        self._validity, self._title, self._about = validity or {}, title, dict(about)

    @cached_property
    def audit_rows(self) -> tuple[AuditRow, ...]:
        return audit_rows(self._audits, self._development, self._teachers)

    @cached_property
    def arms(self) -> tuple[Arm, ...]:
        return build_arms(
            self._students,
            self._roles,
            self.audit_rows,
            reference=self._reference,
            claimed=self._claimed,
        )

    @cached_property
    def invalid_because(self) -> list[str]:
        """The reasons why the experiment is invalid; empty where it is valid."""
        reasons = invalid_because(self.arms, self._validity)
        if (finished := len({s.base_seed for s in self._students})) < self._planned:
            reasons.insert(0, f"unfinished: {finished} of {self._planned} base seeds have all runs")
        return reasons

    @property
    def valid(self) -> bool:
        return not self.invalid_because

    @property
    def checked(self) -> bool:
        """Whether there are controls of both kinds, each with an interval of τ.

        Without them an experiment may be valid, but does not show that it would detect a transfer,
        or none.
        """
        checked_roles = {arm.role for arm in self.arms if is_checked(arm)}
        controls = [arm for arm in self.arms if arm.role != "arm"]
        return {"positive control", "null arm"} <= checked_roles and all(map(is_checked, controls))

    def verdicts(self) -> dict[str, str]:
        """Returns the verdict of each arm in words."""
        return {arm.name: verdict(arm, self.valid) for arm in self.arms}

    def table(self) -> list[dict[str, Any]]:
        """Returns a row per arm; None for unknown values.

        `p_holm` is the two-sided p of τ = 0. `tau_matched` is τ where C first reaches .8, for arms
        with checkpoints in which every student does. `bound` is the corrected one-sided upper bound
        of τ. `contrast` is τ minus that of the reference, and `contrast_p_holm` the Holm-adjusted p
        of no difference.
        """
        return [
            flat_json(
                {
                    "name": arm.name,
                    "C": arm.capability,
                    "tau": arm.tau,
                    "tau_matched": arm.matched or UNKNOWN,
                    "kappa": (arm.transfer.kappa or UNKNOWN).finite_value,
                    "n_seeds": arm.n,
                    "p_holm": arm.p,
                    "bound": arm.bound if arm.bound is not None and isfinite(arm.bound) else None,
                    "contrast": UNKNOWN if arm.contrast is None else arm.contrast.difference,
                    "contrast_p_holm": None if arm.contrast is None else arm.contrast.p,
                    "outcome": outcome(arm, self.valid),
                    "verdict": verdict(arm, self.valid),
                    **({} if arm.log_odds is None else _in_log_odds(arm.log_odds)),
                }
            )
            for arm in self.arms
        ]

    def audit_table(self) -> list[dict[str, Any]]:
        """Returns a row per audit and arm; `interval` and `n` belong to the AUROC."""
        return [row.as_json() for row in self.audit_rows]

    def quadrant(self) -> Figure:
        """Returns the quadrant plot: C against τ, with a mark per seed and intervals per arm."""
        return quadrant(self.arms, valid=self.valid)

    def forest(self) -> Figure:
        """Returns the forest plot: τ of every arm with its interval, next to C."""
        return forest(self.arms, valid=self.valid)

    def curves(self) -> Figure:
        """Returns C and τ over training. Raises ValueError where no arm has checkpoints."""
        return curves(self.arms, valid=self.valid)

    def as_json(self) -> dict[str, Any]:
        """Returns the content of results.json."""
        arms = [
            {**{k: v for k, v in row.items() if k != "p_holm"}, "per_seed": _per_seed(arm)}
            for row, arm in zip(self.table(), self.arms, strict=True)
        ]
        return {
            **{key: self._about[key] for key in (*_REQUIRED, "rule") if key in self._about},
            "reference": self._reference,
            "valid": self.valid,
            "checked": self.checked,
            "invalid_because": list(self.invalid_because),
            "arms": arms,
            "audits": self.audit_table(),
            "audits_of_teachers": [row.as_json() for row in teacher_rows(self._teachers)],
        }

    def page(self) -> Report:
        return transfer_page(
            self._title,
            self.arms,
            self.invalid_because,
            self._students,
            self._about,
            self._reference,
            teacher_rows(self._teachers),
        )

    def to_html(self, path: str | Path) -> Path:
        """Writes a self-contained HTML file, which needs no network, and returns its path."""
        self.page().write(Path(path))
        return Path(path)


def _in_log_odds(arm: Arm) -> dict[str, Any]:
    return {
        "tau_log_odds": arm.tau,
        "kappa_log_odds": (arm.transfer.kappa or UNKNOWN).finite_value,
        "p_holm_log_odds": arm.p,
        "bound_log_odds": arm.bound if arm.bound is not None and isfinite(arm.bound) else None,
        "contrast_log_odds": UNKNOWN if arm.contrast is None else arm.contrast.difference,
        "contrast_p_holm_log_odds": None if arm.contrast is None else arm.contrast.p,
        "per_seed_log_odds": [
            point.tau if isfinite(point.tau) else None for point in arm.transfer.per_seed
        ],
    }


def _per_seed(arm: Arm) -> list[dict[str, Any]]:
    """Returns C, τ and κ of every pair of students; None where one is undefined."""
    return [
        {
            "base_seed": point.base_seed,
            "student_seed": point.student_seed,
            **{
                name: value if value is not None and isfinite(value) else None
                for name, value in (
                    ("C", point.capability),
                    ("tau", point.tau),
                    ("kappa", point.kappa),
                )
            },
        }
        for point in arm.transfer.per_seed
    ]


def _identity(score: AuditScore) -> Hashable:
    return score.audit, score.arm, score.base_seed, score.student_seed


def _check_students(students: Sequence[Student]) -> None:
    if not students:
        fail("students", "one or more", "none")
    _check_once("students", students, lambda s: (s.arm, s.base_seed, s.student_seed))
    for name, group in by_arm(students).items():
        n_with_curves = sum(bool(student.curve) for student in group)
        if 0 < n_with_curves < len(group):
            raise ValueError(
                f"students: expected checkpoints of all students of {name!r} or of none, got them "
                f"of {n_with_curves} of {len(group)}"
            )


def _check_once(argument: str, entries: Iterable[Any], identity: Callable[[Any], Hashable]) -> None:
    for key, times in Counter(map(identity, entries)).items():
        if times > 1:
            fail(argument, "each once", f"{key} {times} times")


def _check_scored(audits: Sequence[AuditScore], students: Sequence[Student]) -> None:
    reported = {(s.arm, s.base_seed, s.student_seed) for s in students}
    for score in audits:
        if (score.arm, score.base_seed, score.student_seed) not in reported:
            raise ValueError(
                f"audits: expected scores of reported students, got one of base seed "
                f"{score.base_seed} in {score.arm!r}. Scores that set thresholds go to development"
            )


def _check_arms(argument: str, selected: Iterable[str], names: Sequence[str]) -> None:
    if isinstance(selected, str):
        fail(argument, "names of arms", f"the text {selected!r}", "give a list")
    for name in selected:
        if name not in names:
            fail(argument, f"arms that students have ({', '.join(names)})", repr(name))


def _check_about(about: Mapping[str, Any]) -> None:
    missing = [key for key in _REQUIRED if key not in about]
    unknown = [key for key in about if key not in (*_REQUIRED, *_OPTIONAL)]
    if missing or unknown:
        raise ValueError(
            f"about: expected {', '.join(_REQUIRED)}, and optionally {', '.join(_OPTIONAL)}, got "
            f"{', '.join(map(str, about)) or 'nothing'}. The page must allow to repeat the "
            "experiment"
        )
    try:
        json.dumps(dict(about), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"about: expected JSON values, got something else: {error}") from None
