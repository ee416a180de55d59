"""Benchmarks of large models, in small: the same models and losses, and failures that are told."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import large_step, large_student, large_teacher
from benchmarks.large_models import CONFIGS, build, narrow, ours
from benchmarks.large_step import FULL, QLORA, Running, longest
from benchmarks.large_student import Case
from benchmarks.memory import held_mb
from benchmarks.quant_peers import bnb4_eval
from benchmarks.registry import GateError
from benchmarks.rows import Row
from benchmarks.shapes import Shape
from benchmarks.teacher_topk import MOST_MISPLACED
from helpers.present import present

SMALL = Shape(N=48, H=128, V=300, K=8)


def small(name="qwen3-8b"):
    return narrow(CONFIGS[name](), SMALL)


@pytest.mark.parametrize(
    ("name", "billions"), [("llama-3.1-8b", 8.03), ("qwen3-8b", 8.19), ("qwen3-32b", 32.76)]
)
def test_the_shapes_are_the_published_ones(name, billions):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.bfloat16)
    assert model.num_parameters() / 1e9 == pytest.approx(billions, abs=0.005)


def test_a_model_is_built_whole():
    made = build(small(), dtype=torch.float32)
    fresh = AutoModelForCausalLM.from_config(small(), dtype=torch.float32).eval()
    fresh.load_state_dict(made.state_dict())
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(made(ids).logits, fresh(ids).logits)
    assert made.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(made.lm_head.weight, build(small(), seed=1).lm_head.weight)


@pytest.mark.peers
def test_whatever_quantises_it_the_weights_are_the_same():
    pytest.importorskip("bitsandbytes")
    whole, four = build(small()), build(small(), ours("nf4", "exact"))
    theirs = build(small(), bnb4_eval)
    assert held_mb(four) < held_mb(whole)
    assert torch.equal(four.lm_head.weight, whole.lm_head.weight)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        a, b, c = (m(ids).logits.float() for m in (whole, four, theirs))
    assert (b - c).norm() < 0.01 * a.norm() < (a - b).norm() < 0.5 * a.norm()


@pytest.mark.slow
def test_answers_of_a_teacher_are_compared():
    by_contender = {r.impl: r for r in large_teacher.rows(SMALL, models=("qwen3-8b",))}
    assert list(by_contender) == list(large_teacher.CONTENDERS)
    assert present(by_contender["ours"].grad_error) <= MOST_MISPLACED
    assert present(by_contender["ours, nf4"].output_mb) < present(by_contender["ours"].output_mb)
    assert "fp8" in present(by_contender["ours, nf4 fp8"].reason)  # no GPU
    table = large_teacher.table(list(by_contender.values()))
    assert "missing: " in table
    assert f"{by_contender['ours'].N / present(by_contender['ours'].ms_median):.2f}" in table


def test_no_contender_starts_when_time_is_out(monkeypatch):
    monkeypatch.setattr(large_teacher, "IN_ALL", -1)
    rows = large_teacher.rows(SMALL, models=("qwen3-8b",))
    assert {row.reason for row in rows} == {"not run, out of time"}
    monkeypatch.setattr(large_student, "IN_ALL", 0)
    *late, _, _, _ = large_student.rows(SMALL, [Case(QLORA, "ours")])
    assert [row.reason for row in late] == ["not there after 0 s"] * 3


def test_ours_are_refused_where_they_name_other_tokens(monkeypatch):
    def other(model, k):
        return lambda ids: torch.full((ids.numel(), k), SMALL.V)

    monkeypatch.setattr(large_teacher, "materialized", other)
    with pytest.raises(GateError, match="of our ids are not transformers'"):
        large_teacher.rows(SMALL, models=("qwen3-8b",))


def gradient(way, contender, folder):
    running = Running(way, contender, SMALL, str(folder))
    batch = running.batch(SMALL.N)
    count = (batch["labels"][:, 1:] != -100).sum()
    running.trainer.training_step(running.model, dict(batch), count)
    gradients = [p.grad.flatten().float() for p in running.model.parameters() if p.requires_grad]
    return torch.cat(gradients)


@pytest.mark.peers
@pytest.mark.parametrize("way", [FULL, QLORA])
def test_steps_with_and_without_logits_have_one_gradient(way, tmp_path):
    pytest.importorskip("bitsandbytes")
    theirs = gradient(way, "materialised", tmp_path)
    mine = gradient(way, "ours", tmp_path)
    best = gradient(way, "ours, top 64", tmp_path)
    assert theirs.norm() > 0
    assert (mine - theirs).norm() < 0.05 * theirs.norm()  # bf16 logits there
    assert (best - theirs).norm() > 0.05 * theirs.norm()  # another loss: 8 of 300


def test_rows_of_a_step_come_as_they_are_made(capsys):
    rows: list[Row] = []
    large_step.rows(FULL, "ours, cached", SMALL, rows.append)
    assert [row.op for row in rows] == large_student.ops(FULL)
    step, *longest_rows = rows
    assert not step.missing
    assert present(step.peak_mb) > present(step.output_mb) > 0
    assert all(row.reason == "a cap on memory needs a CUDA device" for row in longest_rows)
    assert "tokens/s" in large_student.table(rows)


@pytest.mark.peers
def test_a_process_that_fails_is_a_missing_row():
    rows = large_student.of_process(Case(FULL, "nobody"), SMALL)
    assert [row.missing for row in rows] == [True] * 3
    assert rows[0].reason == "unknown contender 'nobody'"
    assert present(rows[1].reason).startswith("exit code 0")
    (late, *_) = large_student.of_process(Case(FULL, "ours"), SMALL, 0.01)
    assert late.reason == "not there after 0.01 s"


@pytest.mark.slow
def test_what_is_planned_stands_beside_what_is_measured():
    row = large_student.planned("ours, cached", large_step.SHAPE)
    with_teacher = large_student.planned("ours, top 64", large_step.SHAPE)
    peak_mb = present(row.peak_mb)
    assert 8.19 * (2 + 2 + 2) * 1e3 < peak_mb < 80e3  # bf16, bf16, two 8-bit moments or more
    assert present(with_teacher.peak_mb) > peak_mb + 15e3


@pytest.mark.parametrize("limit", [0, 255, 256, 300, 1000, 5000, 65536, 10**9])
def test_the_longest_row_is_found_to_an_eighth(limit):
    lengths = []

    def fits(tokens):
        lengths.append(tokens)
        return tokens <= limit

    length = longest(fits, 256, 65536)
    assert length <= limit
    assert length == min(length, 65536)
    if limit < 256:
        assert length == 0
    elif limit < 65536:
        assert limit < length * 1.126
    else:
        assert length == 65536
    assert len(lengths) <= 12


def test_a_fallback_for_a_missing_package_is_recorded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(large_step, "installed", {}.get)
    name, note = large_step.optimizer(FULL)
    assert (name, note) == (
        "adamw_torch",
        "adamw_torch, not adamw_8bit: bitsandbytes is not installed",
    )
    row = Row.at(SMALL, "large_step_full", "ours", "both")
    row.note, row.ms_median = note, 1.0
    assert large_student.table([row]).endswith(f"({note})")
    monkeypatch.setattr(large_step, "installed", {"bitsandbytes": "0.50"}.get)
    assert large_step.optimizer(FULL) == ("adamw_8bit", None)
