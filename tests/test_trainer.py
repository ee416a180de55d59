"""One update is Σ loss / Σ targets whatever the batching, and every figure is the dense one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from fastdistill.config import DistillConfig
from fastdistill.outputs import TopK
from fastdistill.teacher import Teacher
from fastdistill.trainer import DistillTrainer

VOCAB = 53


def llama(seed: int, *, vocab: int = VOCAB, hidden: int = 32, scale: float = 1.0):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)  # a peaked teacher, so that mistakes are not rounding
    return model


def ragged(n: int = 12):
    """Sequences of 4 to 23 tokens; in some a prompt is no target."""
    rows = []
    for index in range(n):
        g = torch.Generator().manual_seed(index)
        length = 4 + (index * 7) % 20
        ids = torch.randint(3, VOCAB - 3, (length,), generator=g)
        labels = ids.clone()
        labels[: (index % 3) * 2] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def config(tmp_path, **options):
    defaults = {
        "k": 8,
        "max_steps": 2,
        "per_device_train_batch_size": 12,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "show_panel": False,
        "report_to": [],
    }
    return DistillConfig(str(tmp_path / "run"), **(defaults | options))


def train(tmp_path, *, teacher="default", model=None, data=None, **options):
    teacher = llama(7, hidden=48, scale=20.0) if teacher == "default" else teacher
    trainer = DistillTrainer(
        model or llama(0), teacher, config(tmp_path, **options), train_dataset=data or ragged()
    )
    trainer.train()
    return trainer


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def step_losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def dense(student, teacher, rows, *, k=8, temperature=1.0):
    """Per-target KL with bucket tail, nll and agreement, from full logits, row by row."""
    kls, nlls, agree = [], [], []
    for row in rows:
        ids, labels = row["input_ids"][None], row["labels"][1:]
        keep = labels != -100
        with torch.no_grad():
            s = student(input_ids=ids).logits[0, :-1].double()
            t = teacher(input_ids=ids).logits[0, :-1].double()
        p, q = (t / temperature).softmax(-1), (s / temperature).softmax(-1)
        top, index = p.topk(k, dim=-1)
        q_top = q.gather(-1, index)
        p_all = torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1)
        q_all = torch.cat([q_top, 1 - q_top.sum(-1, keepdim=True)], -1)
        kls.append((p_all * (p_all.log() - q_all.log())).sum(-1)[keep])
        nlls.append(F.cross_entropy(s, labels, ignore_index=-100, reduction="none")[keep])
        agree.append((s.argmax(-1) == t.argmax(-1))[keep].double())
    return torch.cat(kls), torch.cat(nlls), torch.cat(agree)


def test_update_does_not_depend_on_gradient_accumulation(tmp_path):
    whole = train(tmp_path)
    parts = train(tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=4)
    single = train(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=12)
    start = torch.cat([p.detach().flatten() for p in llama(0).parameters()])
    assert (weights(whole) - start).abs().max() > 1e-3
    for other in (parts, single):
        assert (weights(other) - weights(whole)).abs().max() < 1e-6
        assert step_losses(other) == pytest.approx(step_losses(whole), rel=1e-5)


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
