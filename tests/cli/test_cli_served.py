"""fastdistill train and cache build over a server that takes no long row, k or temperature."""

from __future__ import annotations

import json

import pytest

from fastdistill import ServedTeacher
from fastdistill.alignment.experiment.demo.models import shipped_teacher
from helpers.command import files
from helpers.served import vllm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows of 6 tokens, and one of 16 in the place of number 9: nobody looks there to estimate."""
    folder = files(tmp_path_factory.mktemp("files"))
    rows = [{"input_ids": [5, 6, 7, 8, 9, 10]} for _ in range(12)]
    rows[9] = {"input_ids": list(range(3, 19))}
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def server():
    teacher, _, _ = shipped_teacher()
    with vllm(teacher.model, most=8) as server:
        yield server


def commands(folder, server, out):
    paths = ("--teacher", server.url, "--data", folder / "rows.jsonl", "--out", out)
    return {
        "train": ("train", "--student", folder / "student", *paths, "max_steps=1"),
        "build": ("cache", "build", *paths),
    }


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("dry", [("--dry-run",), ()], ids=["dry", "run"])
@pytest.mark.parametrize("verb", ["train", "build"])
def test_a_row_that_is_too_long_is_named_before_the_start(run, folder, server, tmp_path, verb, dry):
    server.listed = {"max_model_len": 17}
    code, _, err = run(*commands(folder, server, tmp_path / "out")[verb], "k=4", *dry)
    assert code == 2
    assert "rows of at most 15 tokens" in err
    assert "16 tokens in row 9" in err
    assert "max_length=15" in err
    assert "--max-model-len 17" in err
    server.listed = {"max_model_len": 18}
    code, _, err = run(*commands(folder, server, tmp_path / "fits")[verb], "k=4", *dry)
    assert code == 0, err


@pytest.mark.parametrize("verb", ["train", "build"])
def test_a_k_or_temperature_that_is_not_given(run, folder, server, tmp_path, verb):
    server.listed = {}
    command = commands(folder, server, tmp_path / "out")[verb]
    code, _, err = run(*command, "k=9", "--dry-run")
    assert (code, "k: expected at most 8" in err) == (2, True)
    tempered = "temperature=2" if verb == "train" else "temperatures=1,2"
    code, _, err = run(*command, "k=4", tempered, "--dry-run")
    assert (code, "temperature: expected 1" in err) == (2, True)


def test_the_server_is_asked_about_one_short_row(server):
    server.listed = {"max_model_len": 5}
    client = ServedTeacher(server.url)
    server.seen.clear()
    client.check(k=4, temperature=1.0)
    assert [len(request["prompt"][0]) for request, _ in server.seen] == [4]
    client.close()
