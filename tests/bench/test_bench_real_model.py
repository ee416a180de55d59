"""The study of a real language model: its table and picture, from figures made here."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import real_model, student_layers
from benchmarks.real_model import ARMS, ON_POLICY
from fastdistill.alignment.experiment.demo.smollm2.runs import LABELS, TOP_K
from fastdistill.alignment.experiment.demo.smollm2.setting import has_fast_bf16
from fastdistill.runtime.json_text import read_json

COSTS = {arm.name: 3.0 for arm in ARMS} | {"cache": 4.0, "labels": 2.0}
COSTS |= {"sampled": 7.0, "not sampled": 5.0}


def record(arm, seed, added):
    figures = {"nll": 3.0 + added * (1 + 0.1 * seed), "kl": 1.0, "agreement": 0.5, "top1": 0.2}
    points = [
        {"step": step, "text": figures, "chat": figures}
        for step in real_model.steps_of(arm, 4, COSTS)
    ]
    return {"config": {"arm": {"name": arm.name}, "seed": seed}, "points": points}


@pytest.fixture(scope="module")
def result():
    records = [
        record(arm, seed, added)
        for seed in range(3)
        for arm, added in ((TOP_K, 0.0), (LABELS, 0.5), (ON_POLICY, 0.25))
    ]
    return {
        "table": real_model.summarize(records, 4, COSTS),
        "steps_of": {arm.name: real_model.steps_of(arm, 4, COSTS) for arm in ARMS},
        "cpu_seconds": COSTS,
        "start": {"teacher": {kind: {"nll": 2.0} for kind in ("text", "chat")}},
    }


def test_equal_time_is_the_time_of_top_k_kl_with_its_cache(result):
    assert result["steps_of"]["labels"] == [4, 8]
    assert result["steps_of"]["hard labels"] == [4, 4]
    assert result["steps_of"]["on-policy"] == [2]
    for arm, seconds in (("top-k KL", 16), ("labels", 16), ("hard labels", 16), ("on-policy", 12)):
        assert real_model.seconds_of(arm, result["steps_of"][arm][-1], result) == seconds


def test_the_table_has_paired_differences_from_labels(result):
    lines = real_model.markdown(result).splitlines()
    row = next(line for line in lines if line.startswith("| top-k KL | 4 |"))
    assert row.split(" | ")[3:5] == ["3.000 ± 0.000", "-0.550 ± 0.124"]
    assert not any("reverse" in line for line in lines)  # an arm without a finished run


def test_the_conclusion_follows_the_interval(result):
    text = real_model.conclusion(result)
    assert "prose, top-k KL is better than labels at equal time (-0.550" in text
    assert "and better than labels at equal steps (-0.550" in text
    worse = [
        {k: -v if k.startswith("minus") and v else v for k, v in row.items()}
        for row in result["table"]
    ]
    for row in worse:
        low, high = (f"minus_labels_at_equal_time_{name}" for name in ("low", "high"))
        row[low], row[high] = row[high], row[low]
    assert "top-k KL is worse than labels" in real_model.conclusion({**result, "table": worse})


def test_samples_fit_a_cell():
    samples = {"Why?": {"teacher": "a|b\n`c`", "labels": None}}
    assert real_model.samples_table({"samples": samples}).splitlines()[2:] == [
        "| Why? | teacher | `a b 'c'` |"
    ]


def test_arms_that_learn_from_labels_have_the_rate_of_labels():
    arms = real_model.with_rates(ARMS, {"labels": 2.0, "top-k KL": 1.0})
    assert {arm.name for arm in arms if arm.learning_rate == 2.0} == {"labels", "hard labels"}
    assert replace(arms[0], learning_rate=TOP_K.learning_rate) == TOP_K


def test_the_results_are_written_with_their_picture(result, tmp_path):
    drawing = tmp_path / "picture.svg"
    real_model.write(result, tmp_path, drawing)
    assert read_json(tmp_path / "real_model.json", dict)["table"] == result["table"]
    assert (tmp_path / "real_model.csv").read_text().count("\n") == 1 + len(result["table"])
    assert (tmp_path / "real_model.png").stat().st_size > 1000
    texts = re.findall(r">([^<]+)</text>", drawing.read_text("utf-8"))
    assert {"Held-out prose", "Held-out chat answers", "top-k KL", "labels"} <= set(texts)


def test_the_student_keeps_the_layers_that_matter_most():
    worth = {0: 0.0, 1: 3.0, 2: 1.0, 3: 2.0, 4: 4.0}
    keep = student_layers.remove_layers(lambda keep: -sum(worth[i] for i in keep), list(worth), 3)
    assert keep == [0, 1, 4]  # the first one stays
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )
    ids = torch.arange(8).view(2, 4)
    loss = student_layers.loss_of_layers(model, ids)
    with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bf16()):
        assert loss([0, 1]) == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-3)
    assert loss([0]) != loss([0, 1])
