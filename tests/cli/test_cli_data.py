"""A dry run reads every line as training would, and names the file and the line that is wrong."""

from __future__ import annotations

import json
import sys

import datasets
import pytest


def lines(path, some):
    path.write_text("".join(json.dumps(line) + "\n" for line in some))
    return path


def train(folder, data, *more):
    return (
        *("train", "--student", folder / "student", "--teacher", folder / "teacher"),
        *("--data", data, "--out", folder / "out", "use_cpu=true", "--dry-run", *more),
    )


GOOD = [{"input_ids": [5, 6, 7]}] * 300


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"text": 5}, "text: expected a text, got int 5"),
        ({"input_ids": [5, 6, 7], "position_ids": [0, 1, 0]}, "position_ids: expected 0, 1, 2"),
        ({"input_ids": [5, 1.5]}, "input_ids: expected integers"),
        ({"input_ids": "abc"}, "input_ids: expected a list of integers"),
        ({"text": "a", "pixel_values": [[0.5]]}, "pixel_values: expected only columns"),
        ({"text": "\ud83d"}, "half of a surrogate pair"),
    ],
)
@pytest.mark.parametrize("where", ["data", "eval_data"])
def test_a_line_between_those_that_are_sampled(run, folder, tmp_path, line, words, where):
    bad = lines(tmp_path / "bad.jsonl", [*GOOD[:101], line, *GOOD[102:]])
    good = lines(tmp_path / "good.jsonl", GOOD)
    command = train(folder, bad) if where == "data" else train(folder, good, "--eval-data", bad)
    code, _, err = run(*command)
    assert code != 0
    assert words in err
    assert "line 102 of" in err
    assert "bad.jsonl" in err


def test_counts_are_of_all_lines(run, folder, tmp_path):
    long = {"input_ids": list(range(5, 25)), "labels": [-100] * 15 + list(range(20, 25))}
    data = lines(tmp_path / "data.jsonl", [*GOOD[:99], long])
    code, out, _ = run(
        *train(folder, data, "--json", "max_tokens_per_batch=24", "num_train_epochs=1")
    )
    summary = json.loads(out)
    assert code == 0
    assert summary["steps"] == 13 + 1  # eight short lines a batch, and the long one alone
    assert (summary["tokens"], summary["targets"], summary["longest"]) == (
        99 * 3 + 20,
        99 * 2 + 5,
        20,
    )
    assert summary["cut"] == {}
    code, out, _ = run(*train(folder, data, "--json", "max_length=10"))
    summary = json.loads(out)
    assert (summary["tokens"], summary["targets"], summary["longest"]) == (99 * 3 + 10, 99 * 2, 10)
    assert "cuts 1 of 100 examples" in summary["cut"]["train_dataset"]
    _, out, _ = run(*train(folder, data, "max_length=10"))
    assert "1 lose all their targets" in out


def test_lines_without_a_target_are_counted(run, folder, tmp_path):
    masked = {"input_ids": [5, 6, 7], "labels": [-100] * 3}
    data = lines(tmp_path / "data.jsonl", [*GOOD[:99], masked])
    code, out, _ = run(*train(folder, data, "--json"))
    assert code == 0
    assert json.loads(out)["without_targets"] == {"train_dataset": 1}
    _, out, _ = run(*train(folder, data))
    assert "train_dataset: 1 examples have no target." in out
    _, out, _ = run(*train(folder, lines(tmp_path / "good.jsonl", GOOD), "--json"))
    assert json.loads(out)["without_targets"] == {}


def test_parquet_is_read_as_json_lines_are(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.Dataset.from_list(GOOD[:9]).to_parquet(tmp_path / "data.parquet")
    data = lines(tmp_path / "data.jsonl", GOOD[:9])
    results = [run(*train(folder, name, "--json")) for name in (data, tmp_path / "data.parquet")]
    assert [code for code, _, _ in results] == [0, 0]
    assert results[0][1] == results[1][1]
    code, _, err = run(*train(folder, data, "--eval-data", tmp_path / "none.parquet"))
    assert code == 2
    assert "eval_data: expected a .jsonl, .json, .parquet or .csv file" in err


def test_the_extra_of_hub_datasets_is_named(run, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    code, _, err = run(*train(folder, "owner/name:train"))
    assert code == 2
    assert "fastdistill: data: expected the package datasets, which is not installed; " in err
    assert "pip install 'fastdistill[data]'" in err
