"""Pairs of checkpoints as the units of a study: their file, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from fastdistill.alignment.experiment.pairs import read_pairs
from helpers.command import call
from helpers.pair_files import write_lines, write_pairs

MORE = ("steps=1", "batch_size=4", "answer_tokens=2", "max_new_tokens=2", "--processes=1", "--json")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"), 5, bad=(1,))


def test_a_line_is_a_pair_and_its_paths_are_relative_to_the_file(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources = read_pairs(file, max_new_tokens=2)
    assert [source.base_seed for source in sources] == [0, 1, 2, 3, 4]
    assert sources[3].teacher == str(file.parent / "u3")
    assert len({source.cache(tmp_path) for source in sources}) == 5
    assert replace(sources[3], index=0).as_json() == sources[3].as_json()  # its place is no result
    assert "twin" in sources[0].features > {"placebo"} - {"placebo"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"teacher": "u0"}, "teacher: expected a line with base, untrusted, benign, probes, pool"),
        ({"benign": None}, "benign: expected a line with base, untrusted, benign, probes, pool"),
        ({"pool": None}, "or pass it as an option"),
        ({"base": 3}, "base: expected a path or the name of one on the hub, got 3"),
        ({"untrusted": "nowhere"}, "'nowhere', where nothing exists"),
        ({"probes": "pool.jsonl"}, "probes: expected a JSON file"),
        ({"untrusted": "u0", "benign": "b0"}, "expected different models or files in each line"),
    ],
)
def test_a_bad_line_is_named(file, change, words):
    rows = [json.loads(line) for line in file.read_text().splitlines()][:3]
    rows[2] |= change
    rows[2] = {key: value for key, value in rows[2].items() if value is not None}
    bad = write_lines(file.parent / "bad.jsonl", rows)
    with pytest.raises(ValueError, match=r"^pairs: ") as error:
        read_pairs(bad)
    assert words in str(error.value)
    assert re.search(r"line 3 of \S*bad.jsonl", str(error.value))


def test_intervals_and_a_gate_come_from_pairs_and_a_bad_one_is_left_out(
    file, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    argv = ("experiment", "double-bind", f"--pairs={file}", f"--out={out}", *MORE)
    code, output, err = call(
        capsys, monkeypatch, *argv, "--seeds=3", "arms=[hard labels]", "--student=lora:2"
    )
    assert code == 0, err
    result = json.loads(output)
    ((students, steps),) = re.findall(r"(\d+) students: .* s each\), (\d+) steps", err)
    assert (int(students), int(steps)) == (result["runs"], result["runs"])  # one step each
    assert list(result["refused"]) == ["1"]
    assert "trait of U (u1) above that of B" in result["refused"]["1"][0]
    assert result["seeds"] == {"base": [0, 2], "development": [], "student": [0]}
    assert {arm["n_seeds"] for arm in result["arms"]} == {2}
    assert all(arm["tau_interval"] is not None for arm in result["arms"])
    assert len(result["config"]["pairs"]) == 3
    assert result["config"]["training"]["student"] == "lora:2"
    again = ("experiment", "double-bind", "--only-report", f"--out={out}", "--json")
    for folder in ("runs", "sources"):
        (out / folder).rename(tmp_path / folder)
    code, output, err = call(capsys, monkeypatch, *again)  # from the records alone
    assert code == 0, err
    assert json.loads(output)["arms"] == result["arms"]
    assert "students:" not in err


def test_the_last_pairs_are_development_and_open_the_gated_arms(
    file, tmp_path, capsys, monkeypatch
):
    argv = ("experiment", "double-bind", f"--pairs={file}", "--preset=full", "--dry-run", *MORE)
    code, output, err = call(capsys, monkeypatch, *argv, "--development-pairs=3")
    assert code == 0, err
    plan = json.loads(output)
    assert (plan["base_seeds"], plan["development_seeds"]) == ([0, 1], [2, 3, 4])
    assert {"audit gate", "filter and distil"} <= set(plan["arms"])
    for more, words in (
        ("--development-pairs=5", "development_pairs: expected 0 to 4, got 5"),
        ("--teacher=u0", "teacher: expected none with pairs, whose lines name it"),
    ):
        code, _, err = call(capsys, monkeypatch, *argv, more)
        assert code == 2
        assert words in err


def test_a_study_without_any_good_pair_ends_before_training(tmp_path, capsys, monkeypatch):
    file = write_pairs(tmp_path, 2, bad=(0, 1))
    argv = ("experiment", "double-bind", f"--pairs={file}", f"--out={tmp_path / 'out'}", *MORE)
    code, _, err = call(capsys, monkeypatch, *argv)
    assert code == 2
    assert "pairs: expected one or more whose models pass their gates, got none: pair 0:" in err
    assert not (tmp_path / "out" / "runs").exists()
