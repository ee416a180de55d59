"""One run: its file, its digest, and what is measured."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from fastdistill.alignment.audits.prompts import Prompt
from fastdistill.alignment.experiment import job
from fastdistill.alignment.experiment.digest import digest_of, read_record, write_record
from fastdistill.alignment.experiment.job import SOURCES, Job
from fastdistill.alignment.experiment.stored_answers import StoredAnswers
from fastdistill.alignment.strategies.strategy import Training
from helpers.small_study import Noting, SmallSource

JOB = Job(
    source=SmallSource(seed=1),
    role="untrusted",
    strategies=(Noting(),),
    training=Training(steps=3, batch_size=4, max_new_tokens=3),
    pool={"n": 8},
    checkpoints=3,
    audits=("preference", "no such audit"),
)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    JOB.run(folder)
    return folder, JOB.result(folder)


def test_a_run_holds_readings_on_the_way_and_at_the_end(finished_run):
    _, run = finished_run
    assert [point["step"] for point in run["curve"]] == [1, 2]
    assert run["steps"] == 3
    assert len(run["reading"]["capability"]) == 6
    assert run["reading"]["trait"] != run["curve"][0]["reading"]["trait"]
    assert set(run["audits"]) == {"preference"}
    mean = sum(run["reading"]["trait"]) / 6
    assert run["audits"]["preference"] == pytest.approx(mean, abs=1e-12)
    assert run["contexts"]["behind"]["trait"] != pytest.approx(mean, abs=1e-9)
    assert run["notes"]["noting"]["kept"] == run["lessons"] <= 8


def test_arms_share_the_answers_of_a_teacher(finished_run):
    folder, _ = finished_run
    stored = list((JOB.source.cache(folder / SOURCES) / "answers" / "untrusted").iterdir())
    assert len(stored) == 1
    prompts, calls = [Prompt(user="river"), Prompt(user="stone")], []

    def generate(prompts, **how):
        calls.append(how)
        return ["a", "b"]

    teacher: Any = SimpleNamespace(generate=generate)
    stored_answers = StoredAnswers(teacher=teacher, folder=folder / "other")
    for seed in (1, 1, 2):
        assert stored_answers(prompts, seed=seed) == ["a", "b"]
    assert stored_answers(prompts[:1], seed=1) == ["a", "b"]
    assert calls == [{"seed": 1}, {"seed": 2}, {"seed": 1}]


def test_a_run_that_is_there_is_not_made_again(finished_run, monkeypatch):
    folder, run = finished_run
    monkeypatch.setattr(SmallSource, "load", None)
    JOB.run(folder)
    assert JOB.result(folder) == run


def test_the_same_run_elsewhere_is_the_same(finished_run, tmp_path):
    JOB.run(tmp_path)
    _, first = finished_run
    other = JOB.result(tmp_path)
    assert {k: v for k, v in other.items() if k != "seconds"} == {
        k: v for k, v in first.items() if k != "seconds"
    }


@pytest.mark.parametrize(
    "change",
    [
        {"role": "benign"},
        {"source": SmallSource(seed=2)},
        {"strategies": ()},
        {"strategies": (Noting(word="now"),)},
        {"training": Training(steps=4, batch_size=4, max_new_tokens=3)},
        {"pool": {"n": 9}},
        {"student_seed": 1},
        {"init_role": "untrusted"},
        {"checkpoints": 2},
        {"audits": ()},
        {"gate": {"preference": (0.1, 0.2)}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_a_run_follows_from_is_in_its_digest(change):
    assert replace(JOB, **change).digest != JOB.digest


def test_a_file_of_another_run_is_refused(finished_run, tmp_path):
    _, run = finished_run
    path = JOB.path(tmp_path)
    path.parent.mkdir()
    run = json.loads(json.dumps(run))
    run["config"]["pool"]["n"] = 9
    path.write_text(json.dumps(run))
    with pytest.raises(ValueError, match="expected the run with this digest, got another run"):
        JOB.result(tmp_path)


@pytest.mark.parametrize(
    "change, what",
    [
        (
            lambda run: run["reading"]["trait"].__setitem__(0, 0.25),
            "one that was changed or damaged",
        ),
        (lambda run: run["audits"].update(preference=9.0), "one that was changed or damaged"),
        (lambda run: run.pop("curve"), "one without curve"),
        (lambda run: (run.pop("sha256"), run.pop("reading")), "one without reading"),
        (lambda run: run.clear(), "one without config"),
    ],
)
def test_a_damaged_file_is_refused(finished_run, tmp_path, change, what):
    folder, _ = finished_run
    run = json.loads(JOB.path(folder).read_text())
    change(run)
    JOB.path(tmp_path).parent.mkdir()
    JOB.path(tmp_path).write_text(json.dumps(run))
    with pytest.raises(ValueError, match=f"expected an unmodified record, got {what}"):
        JOB.result(tmp_path)


def test_a_file_of_an_earlier_version_has_no_digest(finished_run, tmp_path):
    _, run = finished_run
    JOB.path(tmp_path).parent.mkdir()
    JOB.path(tmp_path).write_text(json.dumps(run))
    assert JOB.result(tmp_path) == run


def test_a_number_that_is_not_finite_costs_no_run(tmp_path):
    record = {"notes": {"a": float("nan"), 3: [float("inf"), 0.1], "b": (1, True, "x")}}
    write_record(tmp_path / "a.json", record)
    expected = {"notes": {"a": None, "3": [None, 0.1], "b": [1, True, "x"]}}
    assert read_record(tmp_path / "a.json", "notes") == expected


def test_a_digest_does_not_depend_on_the_order_of_keys():
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
    assert digest_of({"a": 1, "b": 2}) != digest_of({"a": 2, "b": 1})


def test_students_of_a_base_seed_share_chance_and_others_do_not():
    seeds = {
        (base_seed, student_seed): replace(
            JOB, source=SmallSource(seed=base_seed), student_seed=student_seed
        ).random_seed
        for base_seed in range(50)
        for student_seed in (0, 1, 1000, 1001)
    }
    assert len(set(seeds.values())) == len(seeds)
    assert replace(JOB, role="benign").random_seed == JOB.random_seed


def test_a_run_uses_the_seed_of_its_base_seed(tmp_path, monkeypatch):
    used = []

    def stop(*args, seed, **options):
        used.append(seed)
        raise InterruptedError

    monkeypatch.setattr(job, "distill", stop)
    for base_seed in (1, 2):
        with pytest.raises(InterruptedError):
            replace(JOB, source=SmallSource(seed=base_seed)).compute(tmp_path)
    assert len(set(used)) == 2
