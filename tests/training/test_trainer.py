"""One update is Σ loss / Σ targets whatever the batching, and every figure is the dense one."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaForCausalLM

from fastdistill.losses.types import TopK
from fastdistill.teachers.local import Teacher
from fastdistill.training.trainer import DistillTrainer
from helpers.training import VOCAB, config, dense, llama, ragged, step_losses, train, weights


def test_logged_loss_is_the_dense_kl(tmp_path):
    teacher = llama(7, hidden=48, scale=20.0)
    trainer = train(tmp_path, teacher=teacher, max_steps=1)
    kl, nll, _ = dense(llama(0), teacher, ragged())
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(kl.mean().item(), rel=1e-5)
    assert first["divergence"] == pytest.approx(kl.mean().item(), rel=1e-5)
    assert first["nll"] == pytest.approx(nll.mean().item(), rel=1e-5)
    assert 0 < first["teacher_mass"] <= 1
    assert 0 < first["student_mass"] < first["teacher_mass"]


def test_temperature_and_mix_reach_the_loss(tmp_path):
    teacher = llama(7, hidden=48, scale=20.0)
    options = {"temperature": 2.0, "t2_scale": True, "ce_weight": 0.25}
    trainer = train(tmp_path, teacher=teacher, max_steps=1, **options)
    kl, nll, _ = dense(llama(0), teacher, ragged(), temperature=2.0)
    expected = 0.75 * 4.0 * kl.mean() + 0.25 * nll.mean()
    assert step_losses(trainer)[0] == pytest.approx(expected.item(), rel=1e-5)


def test_labels_only_is_the_models_own_cross_entropy(tmp_path):
    trainer = train(tmp_path, teacher=None, ce_weight=1.0, max_steps=1)
    model = llama(0)
    total, count = torch.zeros(()), 0
    for row in ragged():
        n = int((row["labels"][1:] != -100).sum())
        total = total + n * model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss
        count += n
    (total / count).backward()
    assert step_losses(trainer)[0] == pytest.approx((total / count).item(), rel=1e-5)
    expected = torch.cat([(p - 1e-2 * p.grad).detach().flatten() for p in model.parameters()])
    assert (weights(trainer) - expected).abs().max() < 1e-6


def test_evaluation_is_the_dense_one(tmp_path):
    teacher, rows = llama(7, hidden=48, scale=20.0), ragged(7)
    student = llama(0)
    args = config(tmp_path, per_device_eval_batch_size=3)
    metrics = DistillTrainer(student, teacher, args, eval_dataset=rows).evaluate()
    kl, nll, agree = dense(student, teacher, rows)
    assert metrics["eval_loss"] == pytest.approx(kl.mean().item(), rel=1e-5)
    assert metrics["eval_kl"] == pytest.approx(kl.mean().item(), rel=1e-5)
    assert metrics["eval_nll"] == pytest.approx(nll.mean().item(), rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    assert metrics["eval_agreement"] == pytest.approx(agree.mean().item(), abs=1e-9)
    assert 0 < metrics["eval_teacher_mass"] <= 1


def test_evaluation_without_a_teacher_has_no_teacher_figures(tmp_path):
    args = config(tmp_path, ce_weight=1.0)
    metrics = DistillTrainer(llama(0), None, args, eval_dataset=ragged(3)).evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_nll"], rel=1e-6)
    assert not [name for name in metrics if "kl" in name or "agreement" in name]


def test_teacher_is_frozen_and_in_no_checkpoint(tmp_path):
    teacher = llama(7, hidden=48, scale=20.0)
    before = [p.clone() for p in teacher.parameters()]
    trainer = train(tmp_path, teacher=teacher, save_strategy="steps", save_steps=2)
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    assert not any(p.requires_grad for p in teacher.parameters())
    checkpoint = tmp_path / "run" / "checkpoint-2"
    n_weights = sum(p.numel() for p in trainer.model.parameters())
    assert (checkpoint / "model.safetensors").stat().st_size < 4 * n_weights + 20_000
    again = LlamaForCausalLM.from_pretrained(checkpoint)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, trainer.model.get_parameter(name)), name


def test_autocast_trains_in_bfloat16(tmp_path):
    trainer = train(tmp_path, bf16=True)
    assert step_losses(trainer)[0] == pytest.approx(step_losses(train(tmp_path))[0], rel=2e-2)
    assert trainer.model.lm_head.weight.dtype == torch.float32


def test_panel_of_a_dense_teacher_names_what_its_figures_compare(tmp_path):
    lines = dict(train(tmp_path, k=None, max_steps=1).panel.lines())
    assert lines["teacher tokens"] == "the whole vocabulary"
    assert "KL to the teacher (top 53 and tail)" in lines


def test_panel_tells_a_real_teacher_from_its_shuffle(tmp_path):
    class Knowing:  # answers with the next token, at probability 0.9
        def topk(self, input_ids, attention_mask=None, *, k, temperature=1.0):
            follows = torch.roll(input_ids, -1, 1)
            ids = torch.stack([follows, (follows + 1) % VOCAB], -1)
            return TopK(ids, torch.tensor([0.9, 0.05]).log().expand(ids.shape))

    panel = train(tmp_path, teacher=Knowing(), max_steps=1, k=2).panel
    assert panel.informative
    assert panel.teacher_nll == pytest.approx(-math.log(0.9), abs=1e-4)
    assert panel.teacher_nll_shuffled > 1
    assert panel.teacher_mass == pytest.approx(0.95, abs=1e-5)


def test_wrapped_teacher_object_gives_the_same_run(tmp_path):
    model = llama(7, hidden=48, scale=20.0)
    assert torch.equal(
        weights(train(tmp_path, teacher=model)), weights(train(tmp_path, teacher=Teacher(model)))
    )


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("k", [8, None])
@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_quantised_teacher_teaches_nearly_the_same(tmp_path, scheme, k):
    from fastdistill import load_teacher

    teacher = load_teacher(llama(7, hidden=64, scale=20.0), quant=scheme)
    full = train(tmp_path, teacher=llama(7, hidden=64, scale=20.0), k=k)
    trainer = train(tmp_path, teacher=teacher, k=k, eval_dataset=ragged(3))
    assert step_losses(trainer) == pytest.approx(step_losses(full), rel=0.05)
    assert step_losses(trainer) != step_losses(full)
    assert trainer.evaluate()["eval_kl"] > 0
