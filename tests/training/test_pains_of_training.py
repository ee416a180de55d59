"""Mistakes in training that cost this field the most runs: avoided, or named at once."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import profile

from fastdistill.losses.types import TopK
from fastdistill.teachers.local import Teacher
from helpers.answers import Answers, spread
from helpers.families import build as family
from helpers.training import build, dense, flat, llama, peaked, ragged, step_losses, train, weights


@pytest.mark.slow
def test_accumulation(tmp_path):
    whole = train(tmp_path)
    assert (weights(whole) - flat(llama(0))).abs().max() > 1e-3
    for size in (1, 3, 4, 6):
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 12 // size}
        other = train(tmp_path, **cut)
        assert (weights(other) - weights(whole)).abs().max() < 1e-6
        assert step_losses(other) == pytest.approx(step_losses(whole), rel=1e-5)


@pytest.mark.parametrize("k", [8, None])
def test_evaluation_out_of_memory(tmp_path, k):
    """No tensor of [tokens, vocabulary], neither on the way nor gathered."""
    V, rows = 4096, [{"input_ids": torch.arange(3, 259)} for _ in range(8)]
    student, teacher = llama(0, vocab=V, hidden=16), llama(7, vocab=V, hidden=16, scale=20.0)
    for model in (student, teacher):
        model.config.max_position_embeddings = 512
    trainer = build(
        tmp_path,
        model=student,
        teacher=teacher,
        eval_dataset=rows,
        k=k,
        per_device_eval_batch_size=8,
    )
    trainer.evaluate()
    with profile(profile_memory=True) as seen:
        trainer.evaluate()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    largest = max(e.nbytes() for e in events)
    assert largest <= 8 * 255 * V * 4 / 2, f"{largest:,} bytes at once"


@pytest.mark.parametrize("teacher", ["payload", "model"])
def test_teacher_that_is_zeros(tmp_path, teacher):
    model = llama(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    zeros = lambda ids, k: TopK(spread(ids, k) * 0, torch.zeros(*ids.shape, k))  # noqa: E731
    model_or_answers = model if teacher == "model" else Answers(zeros)
    with pytest.raises(ValueError, match=r"expected the answers of a language model, (but|got)"):
        train(tmp_path, teacher=model_or_answers, k=4)


def test_teacher_without_information(tmp_path):
    same = lambda ids, k: TopK(  # noqa: E731
        torch.arange(k).expand(*ids.shape, k), torch.linspace(-3, -6, k).expand(*ids.shape, k)
    )
    even = lambda ids, k: TopK(spread(ids, k), torch.full((*ids.shape, k), -4.0))  # noqa: E731
    with pytest.raises(ValueError, match="the same answer at all"):
        train(tmp_path, teacher=Answers(same), k=4)
    with pytest.raises(ValueError, match="answers that are all equally likely"):
        train(tmp_path, teacher=Answers(even), k=4)


def honest(ids, k, poison=None, where=None):
    with torch.no_grad():
        answers = Teacher(peaked()).topk(ids, k=k)
    logprobs = answers.logprobs if poison is None else answers.logprobs.masked_fill(where, poison)
    return TopK(answers.ids, logprobs, answers.log_tail)


def test_nan_rows(tmp_path):
    """Where nothing is learnt NaN stays there; where something is, the run stops."""

    def ignored(ids, k):
        last = torch.zeros(*ids.shape, 1, dtype=torch.bool)
        last[:, -1] = True  # predicts beyond the row
        return honest(ids, k, float("nan"), last)

    clean = train(tmp_path, teacher=Answers(honest), check_signal=False)
    poisoned = train(tmp_path, teacher=Answers(ignored), check_signal=False)
    assert torch.equal(weights(clean), weights(poisoned))
    everywhere = lambda ids, k: honest(  # noqa: E731
        ids, k, float("nan"), (ids % 5 == 0).unsqueeze(-1)
    )
    with pytest.raises(ValueError, match="NaN"):
        train(tmp_path, teacher=Answers(everywhere))


def test_minus_inf_padding(tmp_path):
    """Empty slots, whose log-probability is −∞ or anything, change nothing and give no NaN."""

    def padded_by(filling):
        def answer(ids, k):
            answers = honest(ids, 5)
            slots = torch.full((*ids.shape, 3), -1)
            logprobs = torch.cat([answers.logprobs, torch.full(slots.shape, filling)], -1)
            return TopK(torch.cat([answers.ids, slots], -1), logprobs, answers.log_tail)

        return answer

    plain = train(tmp_path, teacher=Answers(lambda i, k: honest(i, 5)), check_signal=False)
    for filling in (-torch.inf, float("nan"), 5.0):
        trainer = train(tmp_path, teacher=Answers(padded_by(filling)), check_signal=False)
        assert (weights(trainer) - weights(plain)).abs().max() < 1e-7, filling


def test_lora_on_the_head(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="Remove lm_head from target_modules"):
        build(tmp_path, peft_config=config)


@pytest.mark.parametrize("k", [8, None])
def test_tied_head(tmp_path, k):
    """One weight gets the gradients of both its uses, and is saved once."""
    model, start = llama(0, tied=True), llama(0, tied=True)
    trainer = train(tmp_path, model=model, k=k, max_steps=1)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    loss = torch.zeros(())
    count = sum(int((row["labels"][1:] != -100).sum()) for row in ragged())
    teacher = peaked()
    for row in ragged():
        keep = row["labels"][1:] != -100
        q = start(input_ids=row["input_ids"][None]).logits[0, :-1][keep].log_softmax(-1)
        with torch.no_grad():
            p = teacher(input_ids=row["input_ids"][None]).logits[0, :-1][keep].log_softmax(-1)
        if k is not None:
            top = p.topk(k, -1).indices
            rest = lambda x, t=top: torch.log1p(-x.gather(-1, t).exp().sum(-1, keepdim=True))  # noqa: E731
            p, q = (torch.cat([x.gather(-1, top), rest(x)], -1) for x in (p, q))
        loss = loss + (p.exp() * (p - q)).sum() / count
    loss.backward()
    expected = start.lm_head.weight - 1e-2 * start.lm_head.weight.grad
    assert (trainer.model.lm_head.weight - expected).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("name", "changes", "lost"),
    [
        ("gemma2", {"final_logit_softcapping": 3.0}, {"final_logit_softcapping": None}),
        ("granite", {"logits_scaling": 13.0}, {"logits_scaling": 1.0}),
    ],
)
def test_softcap_ignored(tmp_path, name, changes, lost):
    """What a family does to its logits is in the loss: it is the one of the model's own logits."""
    student, teacher, rows = family(name, **changes), llama(7, vocab=83, scale=20.0), ragged(5)
    metrics = build(tmp_path, model=student, teacher=teacher, eval_dataset=rows).evaluate()
    kl, nll, _ = dense(student, teacher, rows)
    assert metrics["eval_kl"] == pytest.approx(kl.mean().item(), rel=1e-5)
    assert metrics["eval_nll"] == pytest.approx(nll.mean().item(), rel=1e-5)
    without = dense(family(name, **lost), teacher, rows)[0].mean().item()
    assert abs(metrics["eval_kl"] - without) > 1e-2


def test_frozen_head_paying_for_dw(tmp_path):
    """A frozen head gets no gradient, and no memory of its size is taken for one."""
    V = 20_000
    student = llama(0, vocab=V, hidden=64)
    student.lm_head.weight.requires_grad_(False)
    trainer = build(tmp_path, model=student, teacher=llama(7, vocab=V, scale=20.0), max_steps=1)
    trainer.train()
    with profile(profile_memory=True) as seen:
        inputs = trainer._prepare_inputs(trainer.data_collator(ragged(2)))
        trainer.compute_loss(trainer.model, inputs, num_items_in_batch=30).backward()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in events]
    assert student.lm_head.weight.grad is None
    embedding = student.model.embed_tokens.weight  # the one gradient of that size
    assert sum(size >= student.lm_head.weight.nbytes for size in sizes) <= 1
    assert embedding.grad is not None
