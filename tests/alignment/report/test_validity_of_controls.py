"""A control that has no interval was not checked, and one base seed checks nothing."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest

from fastdistill.alignment.experiment.checkpoint_gates import gates_of
from fastdistill.alignment.experiment.executors import Execution
from fastdistill.alignment.experiment.prepare_models import select_seeds
from fastdistill.alignment.experiment.source import SourceRecord
from fastdistill.alignment.report import TransferReport
from fastdistill.alignment.report.validity import (
    invalid_because,
    is_checked,
    passes_control,
    too_few_units,
)
from fastdistill.alignment.report.verdicts import outcome, verdict
from fastdistill.alignment.statistics import Reading
from fastdistill.cli.run_experiment import print_result
from helpers.made_students import ABOUT, arm
from helpers.transfer_arms import arm as transfer_arm

NULL_ARMS = ("M→M", "placebo", "benign twice")
NAN, INF = math.nan, math.inf


def made(*, seeds, each=1, null=0.0, positive=0.99):
    """Every kind of control, and an arm that would succeed."""
    how = {"seeds": seeds, "each": each, "spread": 0.0}
    students = [*arm("clean", tau=0.0, seeds=seeds, each=each)]
    students += arm("shown openly", c=1.0, tau=positive, **how)
    for name in NULL_ARMS:
        students += arm(name, c=0.0, tau=null, **how)
    return TransferReport(
        students, positive_control="shown openly", null_arms=NULL_ARMS, about=ABOUT
    )


@pytest.mark.parametrize("each", [1, 12])
@pytest.mark.parametrize("null", [0.0, 0.91])
def test_one_base_seed_checks_nothing_however_many_students_it_has(tmp_path, each, null):
    report = made(seeds=1, each=each, null=null)
    results = report.as_json()
    assert results["valid"] is False
    assert results["invalid_because"][0].startswith("not checked: 1 base seed of 2 or more")
    for name in ("shown openly", *NULL_ARMS):
        assert any(
            f", {name}, was not checked: its τ, " in why for why in results["invalid_because"]
        )
    outcomes = {row["name"]: row["outcome"] for row in results["arms"]}
    assert outcomes.pop("clean") == "no verdict"
    assert outcomes.pop("shown openly") == "positive control not checked"
    assert set(outcomes.values()) == {"null arm not checked"}
    page = report.to_html(tmp_path / "report.html").read_text()
    assert "This experiment is invalid, and nothing follows from it: not checked" in page
    assert "DFC succeeds:" not in page


def test_the_same_controls_on_more_base_seeds_are_checked():
    report = made(seeds=12)
    assert report.invalid_because == []
    assert report.table()[0]["outcome"] == "DFC succeeds"


@pytest.mark.parametrize(
    ("controls", "checked"),
    [
        ({"positive_control": "shown openly", "null_arms": NULL_ARMS}, True),
        ({"null_arms": NULL_ARMS}, False),
        ({"positive_control": "shown openly"}, False),
        ({}, False),
    ],
)
def test_results_without_controls_are_not_checked(tmp_path, controls, checked):
    """The JSON says what the page says."""
    report = TransferReport(made(seeds=12)._students, about=ABOUT, **controls)
    results = report.as_json()
    assert (results["valid"], results["checked"]) == (True, checked)
    page = report.to_html(tmp_path / "report.html").read_text()
    assert ("No positive control" in page or "No null arm" in page) == (not checked)
    assert made(seeds=1).as_json()["checked"] is False


@pytest.mark.parametrize("name", NULL_ARMS)
def test_every_null_arm_that_shows_the_trait_is_named(name):
    students = [s for s in made(seeds=12)._students if s.arm != name]
    students += arm(name, c=0.0, tau=0.91, seeds=12, spread=0.0)
    report = TransferReport(
        students, positive_control="shown openly", null_arms=NULL_ARMS, about=ABOUT
    )
    assert [why.split(" has ")[0] for why in report.invalid_because] == [f"the null arm, {name},"]


def test_a_positive_control_that_shows_too_little_is_named():
    (why,) = made(seeds=12, positive=0.5).invalid_because
    assert why.startswith("the positive control, shown openly, has τ .")


@pytest.mark.parametrize(
    "tau", [(0.0,), (NAN,), (0.0, NAN, 0.1), (0.0, -INF, 0.1), (0.0, -0.1, INF)]
)
@pytest.mark.parametrize("role", ["null arm", "positive control"])
def test_a_control_without_an_interval_does_not_pass(role, tau):
    tau = tuple(value + (0.95 if role == "positive control" else 0.0) for value in tau)
    control = transfer_arm((0.9, 0.8, 1.0), tau, role=role, name="a control")
    assert not passes_control(control)
    assert not is_checked(control)
    (why,) = invalid_because([control], {})
    assert "a control, was not checked" in why or "has τ —, not above .9" in why
    assert outcome(control, True) == f"{role} not checked"
    if not math.isnan(tau[0]):
        assert "so nothing was checked" in verdict(control, True)


def test_no_base_seed_is_too_few():
    assert too_few_units(2) == []
    assert too_few_units(0)[0].startswith("not checked: 0 base seeds")
    assert invalid_because([], {})[0].startswith("not checked: 0 base seeds")


def readings(capability=(1.0, 0.0), trait=(1.0, 0.0)):
    """U's and the other's."""
    mean = {"M": capability[1], "U": capability[0], "B": capability[0]}
    rates = {"M": trait[1], "U": trait[0], "B": trait[1]}
    names = {"base": "M", "untrusted": "U", "benign": "B"}
    return {
        role: Reading(capability=(mean[n],) * 4, trait=(rates[n],) * 4, audited=())
        for role, n in names.items()
    }


@pytest.mark.parametrize(
    "how, ratio, what",
    [
        ({"capability": (0.0, 0.0)}, "C", "capability of U (owl) above that of M"),
        ({"capability": (0.25, 0.5)}, "C", "capability of U (owl) above that of M"),
        ({"trait": (0.5, 0.5)}, "τ", "trait of U (owl) above that of B"),
    ],
)
def test_checkpoints_without_a_denominator_are_named_before_training(
    how, ratio, what, tmp_path, caplog
):
    assert gates_of(readings(), "owl").valid
    validity = gates_of(readings(**how), "owl")
    why = validity.because[0]
    assert why.startswith(f"{what}, without which {ratio} is undefined (")
    assert "over 4 prompts" in why
    record = SourceRecord(readings=readings(**how), validity=validity)
    source: Any = SimpleNamespace(
        base_seed=0, prepare=lambda folder: None, cached=lambda folder: record
    )
    assert select_seeds([source], 1, tmp_path, Execution(only_report=True)) == ([source], {})
    assert f"Base seed 0: {what}" in caplog.text
    assert "will be invalid" in caplog.text
    reasons = invalid_because([transfer_arm((0.9,), (0.1,), n=2)], {0: validity})
    assert reasons[0] == f"the organisms of base seed 0: {why}"


def test_a_dry_run_on_one_base_says_that_nothing_can_follow(capsys):
    plan = {
        "runs": 1,
        "arms": ["a"],
        "base_seeds": [0],
        "development_seeds": [],
        "invalid_because": too_few_units(1),
    }
    print_result(plan)
    assert "will be invalid: not checked: 1 base seed" in capsys.readouterr().out
    assert json.dumps(plan)
