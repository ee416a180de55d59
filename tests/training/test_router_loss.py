"""The router's loss of a mixture: kept, weighted, accumulated and logged."""

from __future__ import annotations

import logging

import pytest
import torch

from helpers.families import build as of_family
from helpers.training import build, flat, llama, ragged, train

COEFFICIENT = 0.5


def mixture(family="mixtral", **options):
    on = {"output_router_logits": True, "router_aux_loss_coef": COEFFICIENT}
    return of_family(family, **(on | options)).train()


def labels_alone(tmp_path, model, **options):
    return build(tmp_path, model=model, teacher=None, ce_weight=1.0, **options)


def n_targets(batch):
    return int((batch["labels"][:, 1:] != -100).sum())


def figures(trainer):
    return [line["router_aux_loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize(("family", "checkpointing"), [("mixtral", False), ("qwen3_moe", True)])
def test_the_gradient_is_that_of_the_models_own_loss(tmp_path, family, checkpointing):
    student, reference = mixture(family), mixture(family)
    trainer = labels_alone(tmp_path, student)
    if checkpointing:
        newer = hasattr(student, "activation_checkpointing_enable")
        getattr(student, f"{'activation' if newer else 'gradient'}_checkpointing_enable")()
    batch = trainer.data_collator(ragged(6))
    expected = reference(**batch).loss  # with the coefficient times aux_loss
    expected.backward()
    loss = trainer.compute_loss(student.train(), batch)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    routers = 0.0
    for (name, p), q in zip(student.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)
        routers += float(p.grad.norm()) if "gate.weight" in name else 0.0
    assert routers > 1e-3


def test_micro_batches_weigh_it_by_their_targets(tmp_path):
    rows, student, reference = ragged(6), mixture(), mixture()
    total, aux, count = torch.zeros(()), 0.0, 0
    collator = labels_alone(tmp_path, mixture()).data_collator
    for part in (rows[:3], rows[3:]):
        batch = collator(part)
        n = n_targets(batch)
        output = reference(**batch)
        total, aux, count = total + n * output.loss, aux + n * output.aux_loss.item(), count + n
    (total / count).backward()
    expected = torch.cat([(p - 1e-2 * p.grad).detach().flatten() for p in reference.parameters()])
    trainer = labels_alone(
        tmp_path,
        student,
        data=rows,
        max_steps=1,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        eval_dataset=rows,
    )
    trainer.train()
    torch.testing.assert_close(flat(student), expected, rtol=1e-4, atol=1e-5)
    assert figures(trainer) == pytest.approx([aux / count], rel=1e-4)
    logged = trainer.state.log_history[0]["loss"]
    assert logged == pytest.approx(total.item() / count, rel=1e-4)
    evaluated = trainer.evaluate()
    with torch.no_grad():
        whole = student.eval()(**trainer.data_collator(rows)).aux_loss.item()  # of one batch
    assert evaluated["eval_router_aux_loss"] == pytest.approx(whole, rel=1e-4)
    added = evaluated["eval_loss"] - evaluated["eval_nll"]
    assert added == pytest.approx(COEFFICIENT * whole, rel=1e-4)


def test_packed_rows_and_selected_tokens_log_the_same_figure(tmp_path):
    plain, packed, selected = (
        figures(train(tmp_path, model=mixture(), data=ragged(3), max_steps=1, **options))
        for options in ({}, {"packing": True}, {"token_selection": "entropy top 0.5"})
    )
    assert packed == pytest.approx(plain, rel=1e-4)
    assert selected == pytest.approx(plain, rel=1e-4)


def test_a_model_without_such_a_loss_is_refused(tmp_path):
    model = llama(0)
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match=r"model: expected config.router_aux_loss_coef with out"):
        build(tmp_path, model=model)
    model.config.router_aux_loss_coef = 0.1
    with pytest.raises(ValueError, match=r"model: expected an output with aux_loss.*CausalLMOut"):
        train(tmp_path, model=model)


def test_a_router_that_is_trained_without_it_is_reported(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    build(tmp_path, model=mixture(output_router_logits=False))
    assert "trained without its router's loss" in caplog.text
    caplog.clear()
    build(tmp_path, model=mixture())
    assert "router" not in caplog.text
