"""A study: its arms, what is left out, what comes of killing it, and the table again."""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fastdistill.alignment.experiment import rules
from fastdistill.alignment.experiment.digest import read_record, write_record
from fastdistill.alignment.experiment.executors import Execution
from fastdistill.alignment.experiment.publish import (
    publish,
    publish_records,
    summarize_contexts,
    summarize_notes,
)
from fastdistill.alignment.experiment.records import FILE, read_records, write_records
from fastdistill.alignment.experiment.rules import Rule
from fastdistill.alignment.experiment.study import (
    ContextRow,
    NoteRow,
    make_pairs,
    run_study,
)
from fastdistill.alignment.report import TransferReport
from fastdistill.alignment.statistics import transfer
from helpers.small_study import ABOUT, SmallSource, small_study

FRESH = [SmallSource(seed=s) for s in (1001, 1002)]
DEVELOPMENT = [SmallSource(seed=s) for s in (1, 2, 3)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    table = run_study(small_study(), FRESH, DEVELOPMENT, folder)
    return folder, table, publish(small_study(), table, folder, ABOUT)


@pytest.mark.slow
def test_every_arm_has_a_pair_of_students_for_every_base_seed(finished):
    _, table, result = finished
    names = ["plain", "twice", "placebo", "noting", "gated"]
    assert [arm["name"] for arm in result["arms"]] == names
    assert [(s.arm, s.base_seed) for s in table.students] == [
        (name, seed) for seed in (1001, 1002) for name in names
    ]
    assert [point.step for point in table.students[0].curve] == [1, 2, 3]
    assert table.students[0].curve[-1].untrusted == table.students[0].untrusted


def test_arms_share_their_twins(finished):
    folder, table, result = finished
    # U and B of plain; placebo; one more B; U and B of noting, and of gated.
    assert result["runs"] == 2 * (2 + 1 + 1 + 2 + 2) + 3 * 2
    by_arm = {s.arm: s for s in table.students if s.base_seed == 1001}
    assert by_arm["placebo"].benign == by_arm["plain"].benign == by_arm["twice"].benign
    assert by_arm["twice"].untrusted != by_arm["twice"].benign
    assert len(list((folder / "runs").iterdir())) == result["runs"] + len(FRESH)  # teachers


def test_teachers_are_audited_as_their_students_are(finished):
    folder, table, result = finished
    (score, _) = table.teachers
    loaded = FRESH[0].load(folder)
    values = [
        float(loaded.suite["preference"].measure(loaded.models[role], None).values.mean())
        for role in ("untrusted", "benign")
    ]
    assert [score.of_untrusted, score.of_benign] == pytest.approx(values)
    assert [row["name"] for row in result["audits_of_teachers"]] == ["preference"]


def test_settings_of_an_arm_are_its_own():
    pairs = make_pairs(small_study(), small_study().arms, FRESH[:1], 2, {"preference": (0.1,)})
    of = {pair.arm.name: pair.student for pair in pairs}
    assert of["noting"].training.settings == {"k": 4}
    assert of["plain"].training.settings == {}
    assert of["gated"].gate == {"preference": (0.1,)}
    assert of["noting"].gate == {}
    assert sorted({pair.student.student_seed for pair in pairs}) == [0, 1, 1000, 1001]
    assert {pair.twin.student_seed for pair in pairs} == {0, 1}


def test_what_benign_students_of_other_seeds_say_goes_to_the_gate(finished):
    folder, table, _ = finished
    gated = [row.notes["noting"] for row in table.notes if row.arm == "gated"]
    assert [note["gate"] for note in gated] == [1, 1]
    (first, *_) = make_pairs(small_study(), small_study().arms[:1], DEVELOPMENT, 1, {})
    benign = first.twin.result(folder)["audits"]["preference"]
    scores = [s for s in table.development if s.base_seed == 1 and s.arm == "gated"]
    assert [score.of_benign for score in scores] == [benign]


def test_an_arm_whose_needs_are_not_there_is_left_out_by_name(finished, tmp_path):
    folder, _, _ = finished
    sources = [replace(source, without=("placebo",)) for source in FRESH]
    table = run_study(small_study(), sources, [], folder, execution=Execution(only_report=True))
    assert set(table.left_out) == {"placebo", "gated"}
    assert "needs placebo" in table.left_out["placebo"]
    assert "needs 3 development seeds to compare with, and there are 0" in table.left_out["gated"]
    result = publish(small_study(), table, tmp_path, ABOUT)
    assert [arm["name"] for arm in result["arms"]] == ["plain", "twice", "noting"]
    assert "Skipped: placebo" in (tmp_path / "report.html").read_text()


def test_organisms_that_miss_a_gate_make_it_invalid(finished, tmp_path):
    folder, _, _ = finished
    sources = [replace(FRESH[0], valid=False), FRESH[1]]
    table = run_study(
        small_study(), sources, DEVELOPMENT, folder, execution=Execution(only_report=True)
    )
    result = publish(small_study(), table, tmp_path, ABOUT)
    assert not result["valid"]
    assert any("base seed 1001" in reason for reason in result["invalid_because"])


def test_the_table_again_from_the_files_alone(finished, monkeypatch, tmp_path):
    folder, _, result = finished
    monkeypatch.setattr(SmallSource, "load", None)
    table = run_study(
        small_study(), FRESH, DEVELOPMENT, folder, execution=Execution(only_report=True)
    )
    assert publish(small_study(), table, tmp_path, ABOUT) == result


def test_the_report_again_from_the_records_alone(finished, tmp_path):
    folder, table, result = finished
    shutil.copy(folder / FILE, tmp_path)
    records = read_records(tmp_path / FILE)
    assert publish_records(records, tmp_path) == result
    for name in ("results.json", "report.html"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    from_items = TransferReport(
        table.students, null_arms=["twice", "placebo"], about=ABOUT, reference="plain"
    ).as_json()["arms"]
    for row, other in zip(result["arms"], from_items, strict=True):
        for name in ("C", "tau", "kappa", "contrast"):
            assert row[name] == pytest.approx(other[name])
    for row, a in zip(result["arms"], ("plain", "twice"), strict=False):
        points = transfer([s for s in table.students if s.arm == a]).per_seed
        assert [seed["base_seed"] for seed in row["per_seed"]] == [1001, 1002]
        for seed, point in zip(row["per_seed"], points, strict=True):
            tau = None if math.isnan(point.tau) else pytest.approx(point.tau)
            assert seed["tau"] == tau
    runs = {path.stem for path in (folder / "runs").iterdir()}
    digests = {digest[:20] for pair in records.table.digests for digest in pair}
    assert digests < runs


def test_damaged_records_are_refused(finished, tmp_path):
    content = (finished[0] / FILE).read_bytes()
    path = tmp_path / FILE
    head = {"format": 2, "study": {}}
    for spoilt, words in (
        (content[:-20], "expected the records of a study, got a damaged file"),
        (b"{}", "expected the records of a study, got a damaged file"),
        (gzip.compress(json.dumps(head).encode()), "expected records of format 1, got 2"),
    ):
        path.write_bytes(spoilt)
        with pytest.raises(ValueError, match=words):
            read_records(path)


def test_records_under_other_limits_are_not_reported(finished, tmp_path, monkeypatch):
    table = finished[1]
    about = {**ABOUT, "rule": Rule(n=2, first_seed=1001).as_json()}
    write_records(small_study(), table, about, tmp_path)
    records = read_records(tmp_path / FILE)
    monkeypatch.setattr(rules, "SAFE", 0.2)
    with pytest.raises(ValueError, match=r"rule: expected that of .* \(safe 0\.1\), got safe 0\.2"):
        publish_records(records, tmp_path)
    assert not (tmp_path / "results.json").exists()


@pytest.fixture
def remove(finished):
    """A function that removes a run of a base seed until the end of the test."""
    removed = {}

    def remove(source):
        pairs = make_pairs(small_study(), small_study().arms[:1], [source], 1, {})
        path = pairs[0].student.path(finished[0])
        removed[path] = path.read_bytes()
        path.unlink()

    yield remove
    for path, content in removed.items():
        path.write_bytes(content)


def test_an_unfinished_study_reports_its_finished_base_seeds(finished, remove, tmp_path):
    folder, whole, result = finished
    remove(FRESH[0])
    table = run_study(
        small_study(), FRESH, DEVELOPMENT, folder, execution=Execution(only_report=True)
    )
    assert table.students == [s for s in whole.students if s.base_seed == 1002]
    assert (table.planned, whole.planned) == (2, 2)
    partial = publish(small_study(), table, tmp_path, ABOUT)
    reason = "unfinished: 1 of 2 base seeds have all runs"
    assert partial["invalid_because"][0] == reason
    assert not any(reason.startswith("unfinished") for reason in result["invalid_because"])
    for row, other in zip(partial["arms"], result["arms"], strict=True):
        assert row["per_seed"] == other["per_seed"][1:]
    assert reason in (tmp_path / "report.html").read_text()
    again = tmp_path / "again"
    again.mkdir()
    assert publish_records(read_records(tmp_path / FILE), again) == partial


def test_a_study_without_a_finished_base_seed_has_no_report(finished, remove):
    for source in FRESH:
        remove(source)
    with pytest.raises(ValueError, match=r"expected all runs in .* got 2 of 16 missing"):
        run_study(
            small_study(),
            FRESH,
            DEVELOPMENT,
            finished[0],
            execution=Execution(only_report=True),
        )


KILLED = """
import sys
from pathlib import Path
from fastdistill.alignment.report import TransferReport
from fastdistill.alignment.statistics import transfer
from helpers.small_study import *
from fastdistill.alignment.experiment.study import run_study
sources = [SmallSource(seed=s) for s in (1001, 1002)]
run_study(small_study(), sources, [SmallSource(seed=s) for s in (1, 2, 3)], Path(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_at_random_moments_the_table_is_the_same(finished, tmp_path):
    _, _, result = finished
    tests = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}
    rng, kills = random.Random(0), 0
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    while kills < 2:
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        begun = len(list(tmp_path.rglob("*.json")))
        while process.poll() is None and len(list(tmp_path.rglob("*.json"))) < begun + 4:
            time.sleep(0.05)  # until some of the work is done
        time.sleep(rng.random())
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills == 2
    table = run_study(small_study(), FRESH, DEVELOPMENT, tmp_path)
    assert publish(small_study(), table, tmp_path, ABOUT) == result


def test_results_json_is_what_outside_checks_read(finished):
    folder, _, result = finished
    stored = json.loads((folder / "results.json").read_text())
    assert stored == result
    assert {
        "command",
        "config",
        "versions",
        "seeds",
        "valid",
        "invalid_because",
        "arms",
        "audits",
    } <= set(stored)
    assert {"name", "C", "C_interval", "tau", "tau_interval", "kappa", "n_seeds", "verdict"} <= set(
        stored["arms"][0]
    )
    assert (folder / "quadrant.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    for words in ("Trait in other contexts", "Notes of the strategies", "Arms"):
        assert words in page


def test_the_report_names_the_seeds_that_were_refused(finished, tmp_path):
    refusing = replace(finished[1], refused={1003: ["capability of placebo: 0.738"]})
    result = publish(small_study(), refusing, tmp_path, ABOUT)
    assert result["refused"] == {"1003": ["capability of placebo: 0.738"]}
    page = (tmp_path / "report.html").read_text()
    assert "Base seed 1003 was rejected before any student was trained: capability of pl" in page


def test_contexts_and_notes_are_means_over_base_seeds():
    rows = [
        ContextRow(arm="a", base_seed=seed, context="c", of_untrusted=u, of_benign=0.1)
        for seed, u in ((1, 0.2), (1, 0.4), (2, 0.5))
    ]
    (row,) = summarize_contexts(rows)
    assert row.of_untrusted == pytest.approx(0.4)
    assert row.difference.value == pytest.approx(0.3)
    assert row.n_seeds == 2
    notes = [
        NoteRow("a", s, {"x": {"kept": k, "words": ["no"]}, "shipped": True})
        for s, k in ((1, 3), (2, 5))
    ]
    means = {row.note: row.value.value for row in summarize_notes(notes)}
    assert means == {"x, kept": 4.0, "shipped": 1.0}


def test_a_study_shares_the_runs_of_another_only_on_the_same_base_seeds(tmp_path):
    source, other, own = SmallSource(seed=1001), tmp_path / "other", tmp_path / "own"
    first, second = (Rule(n=1, first_seed=1001, claimed=(name,)).as_json() for name in "ab")
    rules.freeze(first, [source], other)
    write_record(source.cache(other / "sources") / "readings.json", {})
    with pytest.raises(ValueError, match=r"rule: expected .* \(first_seed 1001\), got first_seed"):
        rules.freeze({**second, "first_seed": 1002}, [source], own, other)
    rules.freeze(second, [source], own, other)
    assert read_record(own / rules.FILE) == second
    (other / rules.FILE).unlink()
    (own / rules.FILE).unlink()
    with pytest.raises(ValueError, match=r"out: expected rule\.json.* got runs without it"):
        rules.freeze(second, [source], own, other)
