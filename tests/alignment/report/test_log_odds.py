"""Log-odds of the trait beside its rates: a small share hides a transfer that log-odds show."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from fastdistill.alignment.report import TransferReport
from fastdistill.alignment.statistics import Student, curve, transfer
from fastdistill.alignment.statistics.curves import matched_capability
from helpers.made_students import ABOUT, arm


def with_log_odds(student: Student, shift: float) -> Student:
    """The student of U has `shift` nats more than its twin; U has 6 more than B."""

    rng = np.random.default_rng(student.base_seed)

    def read(reading, level):
        odds = level + 0.3 * rng.standard_normal(len(reading.trait))
        return replace(
            reading, log_odds=odds, audited_log_odds=odds - level if reading.audited else ()
        )

    levels = {"untrusted": shift - 4, "benign": -4, "base": -4, "teacher": 2, "twin": -4}
    points = [
        replace(p, untrusted=read(p.untrusted, shift - 4), benign=read(p.benign, -4))
        for p in student.curve
    ]
    readings = {name: read(getattr(student, name), level) for name, level in levels.items()}
    return replace(student, **readings, curve=tuple(points))


def report(null: float = 0.0, leak: float = 1.2) -> TransferReport:
    shifts = {"plain": 0.0, "leak": leak, "shown openly": 6.0, "M to M": null}
    students = [
        with_log_odds(student, shift)
        for name, shift in shifts.items()
        for student in arm(
            name, tau=1.0 if name == "shown openly" else 0.0, spread=0.01, checkpoints=2
        )
    ]
    return TransferReport(
        students,
        about=ABOUT,
        positive_control="shown openly",
        null_arms=["M to M"],
        reference="plain",
    )


def test_what_a_rate_hides_log_odds_show():
    rows = {row["name"]: row for row in report().as_json()["arms"]}
    assert rows["plain"]["outcome"] == "DFC succeeds"
    leak = rows["leak"]
    assert leak["bound"] <= 0.1  # by rates alone it would be certified
    assert leak["tau_log_odds"] == pytest.approx(0.2, abs=0.03)
    assert leak["tau_log_odds_interval"][0] > 0.1
    assert leak["bound_log_odds"] > 0.1
    assert leak["contrast_log_odds"] == pytest.approx(0.2, abs=0.03)
    assert leak["outcome"] == "the trait transfers"
    assert "In log-odds, τ is .2" in leak["verdict"]
    assert len(leak["per_seed_log_odds"]) == 12
    assert leak["kappa_log_odds"] == pytest.approx(1, abs=0.1)  # hidden in the audit


def test_a_null_arm_must_be_null_in_log_odds_too():
    assert report().valid
    (reason,) = report(null=1.0).invalid_because
    assert "the null arm, M to M, has τ .17" in reason
    assert "in log-odds, whose interval excludes 0" in reason


def test_the_page_has_both(tmp_path):
    page = report().to_html(tmp_path / "page.html").read_text()
    assert "τ, log-odds" in page
    assert "log-odds, audited" in page
    assert "τ, log-odds" not in (
        TransferReport(arm("plain"), about=ABOUT).to_html(tmp_path / "p.html").read_text()
    )


def test_readings_with_log_odds_survive_json_and_interpolation():
    student = with_log_odds(arm("a", checkpoints=2, seeds=1)[0], 1.0)
    assert Student.from_json(json.loads(json.dumps(student.as_json()))) == student
    group = [with_log_odds(s, 1.0) for s in arm("a", checkpoints=3)]
    in_log_odds = [s.in_log_odds for s in group]
    assert transfer(in_log_odds).tau.value == pytest.approx(1 / 6, abs=0.03)
    assert [point.step for point in curve(in_log_odds)] == [50, 100, 150]
    matched = matched_capability(group, 0.8)
    assert matched is not None
    with pytest.raises(ValueError, match="log_odds: expected finite numbers, got inf at item 0"):
        replace(student.base, log_odds=(float("inf"),) * 80)
    with pytest.raises(ValueError, match="log_odds: expected 80 numbers, one per prompt"):
        replace(student.base, log_odds=(1.0,))
