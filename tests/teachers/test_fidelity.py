"""The report is that of a dense fp64 KL over the whole vocabulary, and warns where it should."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch

from fastdistill import FidelityReport, load_teacher
from fastdistill.quant import quantize_model, save_quantized
from fastdistill.runtime.intervals import bootstrap_ratio
from fastdistill.teachers.local import Teacher
from helpers.families import VOCAB, build, padded, texts
from helpers.present import present

ROWS = texts((9, 4, 12, 7, 2, 11))


def batch(side="right"):
    ids, mask = padded(ROWS, side)
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def log_softmax(model, vocab=VOCAB):
    """fp64, of every position that predicts a token of ROWS."""
    model.eval()
    rows = [model(input_ids=row[None]).logits[0, :-1, :vocab].double() for row in ROWS]
    return torch.cat(rows).log_softmax(-1)


def dense_kl(p, q):
    return (p.exp() * (p - q)).sum(-1)


def assert_same(report, expected):
    """But for rounding: where weights lie in memory decides how products are summed."""
    assert (report.tokens, report.sequences) == (expected.tokens, expected.sequences)
    assert report.top1_agreement == expected.top1_agreement
    assert report.kl == pytest.approx(expected.kl, rel=1e-5)
    assert report.kl_interval == pytest.approx(expected.kl_interval, rel=1e-5)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher")
    build("gptj").save_pretrained(path)  # with a bias in the head
    return path


@pytest.mark.parametrize("family", ["llama", "gemma2", "gptj", "granite", "qwen3_moe"])
def test_kl_and_agreement_are_the_dense_ones(family):
    quantised = quantize_model(build(family), "nf4", compute="exact")
    full = build(family)
    p, q = log_softmax(full), log_softmax(quantised)
    kl, same = dense_kl(p, q), (p.argmax(-1) == q.argmax(-1)).double()
    teacher = load_teacher(quantised, tokens_per_batch=13)  # in several pieces
    assert kl.mean() > 1e-3
    for side in ("right", "left"):
        report = teacher.fidelity(batch(side), against=full)
        assert report.kl == pytest.approx(kl.mean().item(), rel=1e-4)
        assert report.top1_agreement == pytest.approx(same.mean().item(), abs=1e-9)
        assert (report.tokens, report.sequences) == (len(kl), len(ROWS))
    clusters = [i for i, row in enumerate(ROWS) for _ in row[1:]]
    expected = bootstrap_ratio(kl.tolist(), [1.0] * len(kl), clusters)
    assert report.kl_interval == pytest.approx((expected.low, expected.high), rel=1e-4)
    assert report.kl_interval[0] < report.kl < report.kl_interval[1]
    assert report.top1_interval[0] < report.top1_agreement <= report.top1_interval[1]
    assert report.student_kl is report.ratio is None
    assert report.warning is None


def test_full_precision_weights_are_found_again(stored):
    teacher = load_teacher(stored, quant="nf4", compute="exact")
    report = teacher.fidelity(batch())
    for against in (stored, str(stored), build("gptj"), load_teacher(stored)):
        assert_same(teacher.fidelity(batch(), against=against), report)
    p, q = log_softmax(build("gptj")), log_softmax(teacher.model)
    assert report.kl == pytest.approx(dense_kl(p, q).mean().item(), rel=1e-4)


def test_rows_as_a_training_takes_them(stored):
    teacher = load_teacher(stored, quant="int4", compute="exact")
    expected = teacher.fidelity(batch())
    assert_same(teacher.fidelity([{"input_ids": row} for row in ROWS]), expected)
    ids, mask = padded(ROWS, "right")
    labels = ids.masked_fill(mask == 0, -100)
    assert_same(teacher.fidelity({**batch(), "labels": labels}), expected)
    labels[:, :4] = -100
    kl = dense_kl(log_softmax(build("gptj")), log_softmax(teacher.model))
    counted = torch.cat([torch.arange(1, len(row)) >= 4 for row in ROWS])
    report = teacher.fidelity({**batch(), "labels": labels})
    assert report.tokens == counted.sum()
    assert report.kl == pytest.approx(kl[counted].mean().item(), rel=1e-4)


@pytest.mark.filterwarnings("ignore:teacher. quantization changed it")
def test_student_may_be_a_model_or_its_distance(stored):
    teacher = load_teacher(stored, quant="nf4", compute="exact")
    student = build("llama", vocab_size=VOCAB + 6).train()  # padded, as heads often are
    student.model.norm.eval()
    modes = [m.training for m in student.modules()]
    report = teacher.fidelity(batch(), student=student)
    assert [m.training for m in student.modules()] == modes, "the student was left changed"
    assert all(p.requires_grad for p in student.parameters())
    expected = dense_kl(log_softmax(teacher.model), log_softmax(student, VOCAB)).mean().item()
    assert report.student_kl == pytest.approx(expected, rel=1e-4)
    assert report.ratio == pytest.approx(report.kl / expected, rel=1e-4)
    assert_same(teacher.fidelity(batch(), student=report.student_kl), report)


def test_above_five_percent_it_warns(stored):
    teacher = load_teacher(stored, quant="nf4", compute="exact")
    kl = teacher.fidelity(batch()).kl
    with pytest.warns(UserWarning, match=r"10\.0% of its KL .* Use quant='int8', compute='exact'"):
        report = teacher.fidelity(batch(), student=10 * kl)
    assert "limit 5%): the student would learn quantization error" in present(report.warning)
    assert str(report).count("\n") == 0
    assert f"KL(full ‖ quantized) {kl:.3g} nats/token [" in str(report)
    assert "39 tokens of 6 sequences; 10.0% of KL(teacher ‖ student)" in str(report)
    assert teacher.fidelity(batch(), student=21 * kl).warning is None


def test_one_sequence_has_no_interval_and_perfect_agreement_has_one():
    quantised = quantize_model(build("llama"), "int8", compute="exact")
    teacher, full = load_teacher(quantised), build("llama")
    report = teacher.fidelity({"input_ids": ROWS[0][None]}, against=full)
    assert all(math.isnan(x) for x in (*report.kl_interval, *report.top1_interval))
    report = teacher.fidelity(batch(), against=full)
    assert report.kl < 0.01
    same = Teacher(build("llama")).fidelity(batch(), against=full)
    assert same.kl == pytest.approx(0, abs=1e-6)
    assert same.top1_agreement == 1.0
    assert 0.8 < same.top1_interval[0] < 1.0, "39 tokens do not prove that all agree"


def test_what_cannot_be_compared_is_refused(stored, tmp_path):
    missing = "against: expected the full-precision model or its path, as this teacher was not"
    quantised = quantize_model(build("llama"), "nf4", compute="exact")
    save_quantized(quantised, tmp_path)
    for teacher in (load_teacher(quantised), load_teacher(tmp_path), load_teacher(stored)):
        with pytest.raises(ValueError, match=missing):
            teacher.fidelity(batch())
    teacher = load_teacher(quantised)
    with pytest.raises(ValueError, match="against: expected the full-precision model, got the tea"):
        teacher.fidelity(batch(), against=quantised)
    with pytest.raises(TypeError, match="against: expected a model, Teacher or path, got int"):
        teacher.fidelity(batch(), against=3)
    with pytest.raises(ValueError, match="against: expected a head of 83 tokens as the teacher's"):
        teacher.fidelity(batch(), against=build("llama", vocab_size=90))
    full = build("llama")
    for student in (0.0, float("nan"), cast(Any, [])):
        with pytest.raises(ValueError, match="student: expected a finite number above 0"):
            teacher.fidelity(batch(), against=full, student=student)
    with pytest.raises(TypeError, match="batch: expected a dict with input_ids, or several, got"):
        teacher.fidelity([], against=full)
    with pytest.raises(TypeError, match="input_ids: expected a tensor"):
        teacher.fidelity(cast(Any, {"ids": 3}), against=full)
    with pytest.raises(ValueError, match="batch: expected sequences of two tokens or more"):
        teacher.fidelity({"input_ids": ROWS[0][:1, None]}, against=full)
    with pytest.raises(ValueError, match=r"labels: expected shape \[6, 12\] as input_ids"):
        teacher.fidelity({**batch(), "labels": ROWS[0][None]}, against=full)


def test_report_is_public():
    assert FidelityReport.__module__ == "fastdistill.teachers.fidelity"
