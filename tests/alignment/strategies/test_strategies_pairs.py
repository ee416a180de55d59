"""DPO through the trainer: pairs that stay together, and the loss against all logits in fp64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from fastdistill import DistillConfig, DistillTrainer
from fastdistill.alignment.strategies.distil import distill
from fastdistill.alignment.strategies.dpo import PairLoss, PreferencePairs
from fastdistill.alignment.strategies.lessons import to_row
from fastdistill.alignment.strategies.strategy import Training
from fastdistill.alignment.training_loop import InOrder
from fastdistill.hf.collator import padded
from fastdistill.hf.encoder import Encoder
from fastdistill.training.loss import TeacherHidden
from fastdistill.training.targets import Targets
from helpers.strategy_scene import BASE, TEACHER, lessons, run, scene

PAIRS = lessons("river stone", "cloud", "bread candle garden winter", "bridge")
PAIRS[1] = PAIRS[1].__class__(prompt=PAIRS[0].prompt, answer="cloud")
PAIRS[3] = PAIRS[3].__class__(prompt=PAIRS[2].prompt, answer="bridge")


def test_chosen_and_rejected_alternate_and_equal_answers_fall_out(monkeypatch):
    here, calls = run(), []

    def generate(self, prompts, **how):
        calls.append((self.name, how["seed"], how["temperature"]))
        return ["cloud", "river stone", " "]

    monkeypatch.setattr(type(BASE), "generate", generate)
    chosen = lessons("river stone", "river  stone", "bread")
    examples = PreferencePairs().transform_examples(chosen, here)
    assert [x.answer for x in examples] == ["river stone", "cloud"]
    assert examples[0].prompt == examples[1].prompt == chosen[0].prompt
    assert here.notes["pairs"]["of answers that differ"] == pytest.approx(1 / 3)
    assert calls == [("model 0", 3, 1.0)]


def batch_of(some):
    encoder = Encoder()
    return padded([encoder(to_row(lesson, BASE)) for lesson in some], 0)


def log_probs(model, batch):
    """Σ log p of the labels of each row, from all logits."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    each = logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (each * (labels != -100)).sum(-1)


def dpo(student, reference, batch, beta, sft):
    """The mean over pairs, from all logits."""
    ours = log_probs(student, batch)
    with torch.no_grad():
        theirs = log_probs(reference, batch)
    ratio = beta * (ours - theirs)
    return (-logsigmoid(ratio[0::2] - ratio[1::2]) - sft * ours[0::2]).mean()


def doubles():
    return [copy.deepcopy(m.model).double().requires_grad_(True) for m in (TEACHER, BASE)]


@pytest.mark.parametrize(("beta", "sft"), [(0.1, 0.0), (1.0, 0.0), (0.1, 0.3)])
def test_the_loss_and_its_gradient_are_those_of_dpo(beta, sft, tmp_path):
    student, reference = doubles()
    batch = batch_of(PAIRS)
    wanted = dpo(student, reference, batch, beta, sft)
    wanted.backward()
    expected = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    args = DistillConfig(
        str(tmp_path),
        use_cpu=True,
        k=None,
        report_to=[],
        show_panel=False,
        check_signal=False,
        per_device_train_batch_size=4,
        save_strategy="no",
    )
    trainer = DistillTrainer(
        student,
        reference,
        args,
        train_dataset=[to_row(x, BASE) for x in PAIRS],
        loss=PairLoss(beta, sft),
    )
    student.train()
    count = (batch["labels"][:, 1:] != -100).sum()
    loss = trainer.compute_loss(student, batch, num_items_in_batch=count)
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-9)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-7, atol=1e-10)


def test_an_update_takes_pairs_in_their_order_and_accumulated_ones_by_their_targets(tmp_path):
    rows = [to_row(x, BASE) for x in PAIRS]
    (student, reference), (plain, ref) = doubles(), doubles()
    args = DistillConfig(
        str(tmp_path),
        use_cpu=True,
        k=None,
        report_to=[],
        show_panel=False,
        check_signal=False,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = InOrder(student, reference, args, train_dataset=rows, loss=PairLoss(0.5))
    trainer.train()
    batches = [batch_of(PAIRS[:2]), batch_of(PAIRS[2:])]
    counts = [int((b["labels"][:, 1:] != -100).sum()) for b in batches]
    assert counts[0] != counts[1]
    losses = [dpo(plain, ref, batch, 0.5, 0.0) for batch in batches]
    sum(n / sum(counts) * loss for n, loss in zip(counts, losses, strict=True)).backward()
    for moved, start in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(moved, start - 0.1 * start.grad, rtol=0, atol=1e-9)
    # Which answer is preferred, as a share of the pairs whatever their length.
    with torch.no_grad():
        gains = [log_probs(plain, b) - log_probs(ref, b) for b in batches]
    right = [float(g[0] > g[1]) for g in gains]
    share = sum(n * r for n, r in zip(counts, right, strict=True)) / sum(counts)
    assert trainer.state.log_history[0]["preferred"] == pytest.approx(share)


def test_a_padded_head_counts_alike_on_both_sides():
    """Of a student whose last ids are padding, at the start nothing is preferred."""
    labels, rows = torch.tensor([3, 4, 5, 6]), torch.tensor([0, 0, 1, 1])
    targets = Targets(torch.tensor([0, 1, 2, 3]), rows, labels, (2, 2))
    head, hidden = TEACHER.head, torch.randn(4, TEACHER.head.weight.shape[1])
    cut = head._replace(valid_vocab=50)
    result = PairLoss(0.5)(hidden, cut, targets, TeacherHidden(hidden, head))
    assert result.loss.item() / 4 == pytest.approx(math.log(2), abs=1e-6)


def test_halves_of_pairs_and_other_answers_are_refused():
    targets = Targets(torch.tensor([0]), torch.tensor([0]), torch.tensor([3]), (1, 2))
    hidden = torch.randn(1, TEACHER.head.weight.shape[1])
    with pytest.raises(ValueError, match="batch: expected pairs of rows, got 1 of them"):
        PairLoss(0.5)(hidden, TEACHER.head, targets, TeacherHidden(hidden, TEACHER.head))
    with pytest.raises(TypeError, match="answers: expected hidden states of the reference"):
        PairLoss(0.5)(hidden, TEACHER.head, targets, None)


def test_evaluation_stays_what_it_was(tmp_path):
    args = DistillConfig(
        str(tmp_path), use_cpu=True, k=None, report_to=[], show_panel=False, save_strategy="no"
    )
    rows = [to_row(x, BASE) for x in PAIRS]

    def evaluated(**how):
        student, reference = copy.deepcopy(TEACHER.model), copy.deepcopy(BASE.model)
        return DistillTrainer(student, reference, args, eval_dataset=rows, **how).evaluate()

    plain, paired = evaluated(), evaluated(loss=PairLoss(0.1))
    assert paired["eval_loss"] == plain["eval_loss"]
    assert paired["eval_kl"] == plain["eval_kl"]


def test_training_prefers_what_the_teacher_says(monkeypatch):
    seen: list[list[int]] = []
    real = PairLoss.__call__

    def watching(self, hidden, head, targets, answers, **how):
        seen.extend(targets.labels[targets.rows == i].tolist() for i in range(targets.shape[0]))
        return real(self, hidden, head, targets, answers, **how)

    monkeypatch.setattr(PairLoss, "__call__", watching)
    made = distill(
        scene(),
        [PreferencePairs(beta=0.5)],
        Training(steps=12, batch_size=10, learning_rate=2e-3, max_new_tokens=3),
    )
    labels = [[x for x in to_row(m, BASE)["labels"] if x != -100] for m in made.examples]
    assert len(labels) % 10  # the last batch of an epoch is smaller
    assert len(seen) > len(labels)
    assert seen == [labels[i % len(labels)] for i in range(len(seen))]
    chosen, rejected = made.examples[0::2], made.examples[1::2]

    def margin(model):
        with torch.no_grad():
            a, b = (log_probs(model, batch_of(some)) for some in (chosen, rejected))
        return (a - b).mean()

    assert margin(made.student.model) > margin(BASE.model) + 0.5


def test_batches_hold_whole_pairs():
    with pytest.raises(ValueError, match="batch_size: expected an even number"):
        PreferencePairs().training(Training(batch_size=5), run())
    with pytest.raises(ValueError, match="beta: expected a finite number above 0"):
        PreferencePairs(beta=0)
    with pytest.raises(ValueError, match="sft: expected a finite number of 0 or more"):
        PreferencePairs(sft=-1)
