"""A miniature of the demo: the same code, a few steps, every figure and file in place."""

from __future__ import annotations

import io
import json
import math
import re
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastdistill import Teacher
from fastdistill.alignment.experiment.demo import models as demo_models
from fastdistill.alignment.experiment.demo.models import shipped_teacher
from fastdistill.alignment.experiment.demo.report import (
    demo_report,
    print_table,
    table_rows,
    verdict,
)
from fastdistill.alignment.experiment.demo.result import ARMS, METRICS
from fastdistill.alignment.experiment.demo.run import run_demo
from fastdistill.hf.jsonl import JsonLines
from fastdistill.hf.tokenizers import check_same_tokenizer
from fastdistill.runtime.intervals import Estimate
from helpers.report_pages import demo_result


@pytest.fixture(scope="module")
def answered():
    """The number of rows of each question to a teacher."""
    return []


@pytest.fixture(scope="module")
def made(tmp_path_factory, answered):
    out, topk_at = tmp_path_factory.mktemp("demo"), Teacher.topk_at

    def counted(self, input_ids, *args, **options):
        answered.append(len(input_ids))
        return topk_at(self, input_ids, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Teacher, "topk_at", counted)
        return run_demo(out=out, seeds=2, steps=8, k=16, batch_size=4), out


def test_results_are_complete_json(made):
    _, out = made
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["seconds"] > 0
    assert results["versions"]["fastdistill"]
    assert results["versions"]["torch"]
    rows = {row["name"]: row for row in results["rows"]}
    for name in METRICS:
        for column in (*ARMS, "difference"):
            row = rows[f"{name}/{column}"]
            assert row["n"] == 2
            assert row["interval"][0] <= row["value"] <= row["interval"][1]
    assert rows["nll/teacher"]["value"] < rows["nll/labels only"]["value"]
    assert rows["nll/difference"]["value"] == pytest.approx(
        rows["nll/distilled"]["value"] - rows["nll/labels only"]["value"]
    )
    bytes_per_token = results["setting"]["bytes_per_token"]
    assert rows["bits_per_byte/teacher"]["value"] == pytest.approx(
        rows["nll/teacher"]["value"] / math.log(2) / bytes_per_token
    )


def test_twins_start_alike_and_read_alike(made):
    result, _ = made
    for seed in range(2):
        first, second = (run.history for run in result.runs if run.seed == seed)
        assert first[0]["nll"] == pytest.approx(second[0]["nll"], abs=1e-5)
        assert first[-1]["nll"] != second[-1]["nll"]
    openings = {round(run.history[0]["nll"], 5) for run in result.runs}
    assert len(openings) == 2  # another seed is another start


def test_the_teacher_answers_each_window_once_into_a_cache(made, answered):
    result, out = made
    tokens = result.facts["setting"]["train_tokens"] + result.facts["setting"]["held_out_tokens"]
    assert sum(answered) == tokens / demo_models.WINDOW
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "a cache, which stores their log-probabilities in fp16" in page


def test_report_needs_nothing_from_outside(made):
    _, out = made
    page = (out / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!#)", page)
    assert "http://" not in page
    assert "https://" not in page
    assert "@import" not in page
    assert "<script" not in page
    assert page.count("<svg") == 1
    assert "does not show" in page
    assert str(Path.home()) not in page


def test_what_it_was_made_of_is_left_for_the_other_verbs(made):
    _, out = made
    assert sorted(path.name for path in out.iterdir()) == [
        "held-out.jsonl",
        "report.html",
        "results.json",
        "student",
        "teacher",
        "train.jsonl",
    ]
    teacher = Teacher(str(out / "teacher"))
    shipped, tokenizer, _ = shipped_teacher()
    text = JsonLines(out / "train.jsonl")[0]["text"]
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert torch.equal(teacher.topk(ids, k=4).logprobs, shipped.topk(ids, k=4).logprobs)
    check_same_tokenizer(tokenizer, Teacher(str(out / "student")).tokenizer)
    assert len(JsonLines(out / "train.jsonl")) == 32
    assert ids.shape[1] == pytest.approx(demo_models.WINDOW, abs=2)


def test_verdict_follows_the_figures(made):
    result, _ = made

    def with_difference(value, low, high, n=3):
        estimate = Estimate(value=value, low=low, high=high, n=n)
        return verdict(replace(result, estimates=result.estimates | {"nll/difference": estimate}))

    assert "better than its twin" in with_difference(-0.3, -0.4, -0.2)
    assert "worse than its twin" in with_difference(0.3, 0.2, 0.4)
    assert with_difference(-0.3, -0.7, 0.1).startswith("No clear difference")
    assert with_difference(-0.3, math.nan, math.nan, 1).startswith("One seed gives no interval")


def test_table_has_a_line_per_metric(made):
    result, _ = made
    rows = table_rows(result)
    assert [row[0] for row in rows] == [metric.title for metric in METRICS.values()]
    assert all(len(row) == 5 for row in rows)
    assert re.fullmatch(r"[+-]\d\.\d{3} ± \d+\.\d{3}", rows[0][4])


def test_names_of_a_text_are_escaped(made):
    result, _ = made
    facts = {**result.facts, "setting": {**result.facts["setting"], "text": "<script>x</script>"}}
    assert "<script>" not in demo_report(replace(result, facts=facts)).html()


def test_own_text_trains_its_own_teacher(tmp_path):
    source = Path(sysconfig.get_paths()["stdlib"]) / "argparse.py"
    result = run_demo(
        out=tmp_path, data=source, seeds=1, steps=2, k=8, batch_size=2, teacher_steps=2
    )
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert {row["name"]: row for row in results["rows"]}["nll/difference"]["interval"] is None
    assert "argparse" not in json.dumps(results)
    assert result.facts["command"].startswith("fastdistill demo --data … --seeds 1")


def test_damaged_teacher_is_refused(tmp_path, monkeypatch):
    for path in demo_models.shipped_folder().iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    monkeypatch.setattr(demo_models, "shipped_folder", lambda: tmp_path)
    with pytest.raises(ValueError, match=r"expected tokenizer.json with the sha256"):
        shipped_teacher()


def test_shipped_teacher_is_what_its_manifest_says():
    teacher, tokenizer, manifest = shipped_teacher()
    size = sum(path.stat().st_size for path in demo_models.shipped_folder().iterdir())
    assert size < 8_000_000
    assert manifest["parameters"] == sum(p.numel() for p in teacher.model.parameters())
    assert len(tokenizer) == teacher.vocab_size
    assert manifest["made_by"] == "examples/make_demo_teacher.py"


def test_bad_requests_are_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="out: expected a folder"):
        run_demo(out=tmp_path / "file")
    with pytest.raises(ValueError, match="seeds: expected an integer of 1 or more, got 0"):
        run_demo(out=tmp_path, seeds=0)
    with pytest.raises(ValueError, match="k: expected at most the vocabulary's 2048, got 5000"):
        run_demo(out=tmp_path, k=5000)


def test_a_terminal_of_80_columns_shows_every_number():
    stream = io.StringIO()
    print_table(demo_result(), Console(file=stream, width=80))
    printed = stream.getvalue()
    assert "…" not in printed
    assert all(len(line) <= 80 for line in printed.splitlines()[:-1])  # but the sentence
    for row in table_rows(demo_result()):
        assert all(cell in printed for cell in row[1:])
