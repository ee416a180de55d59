"""What the student may see of distributions: equations against all logits, and what stays whole."""

from __future__ import annotations

import pytest
import torch

from fastdistill.alignment.strategies.baselines import OffModelSFT, Undefended
from fastdistill.alignment.strategies.shift import ShiftDistill, normalized
from fastdistill.losses.types import TopK
from fastdistill.teachers.local import Teacher
from helpers.present import present
from helpers.strategy_scene import BASE, TEACHER, TOKENIZER, run

V = TEACHER.head.vocab_size
IDS = torch.tensor([[1, 5, 9, 14, 3, 7], [1, 6, 2, 8, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
TEACHING = Teacher(TEACHER.model, tokenizer=TOKENIZER)


def log_p(subject):  # (B, T, V) fp64
    with torch.no_grad():
        logits = subject.model.double()(IDS, attention_mask=MASK).logits
    subject.model.float()
    return logits.log_softmax(-1)


def student_targets(strategy, k=6):
    teacher = strategy.teacher(TEACHING, BASE.model, run())
    return teacher.topk(IDS, MASK, k=k, temperature=1.0)


def test_without_a_defence_the_teacher_is_itself():
    assert Undefended().teacher(TEACHING, None, run()) is TEACHING
    assert OffModelSFT().teacher(TEACHING, None, run()) is None
    assert ShiftDistill(amplify=1.0).teacher(TEACHING, None, run()) is TEACHING


def test_nobody_who_is_asked_is_frozen_or_switched():
    before = [p.requires_grad for p in BASE.model.parameters()]
    assert all(before)
    BASE.model.train()
    try:
        student_targets(ShiftDistill(amplify=2.0))
        assert BASE.model.training
        assert [p.requires_grad for p in BASE.model.parameters()] == before
    finally:
        BASE.model.eval()


def test_labels_alone_have_no_distribution_to_change():
    assert ShiftDistill(amplify=2.0).teacher(None, BASE.model, run()) is None


@pytest.mark.parametrize("k", [3, V])
@pytest.mark.parametrize("amplify", [0.0, 2.0])
def test_the_shift_is_amplified(amplify, k):
    answers = student_targets(ShiftDistill(rank=2, amplify=amplify), k=k)
    ids, there = answers.ids, MASK.bool()

    def of_outcomes(subject):
        p = log_p(subject).exp()
        inside = p.gather(-1, ids.clamp(min=0))
        rest = (1 - inside.sum(-1, keepdim=True)).clamp(min=0) * (k < V)
        return torch.cat([inside, rest], -1).log().clamp(min=-80)

    mixture = (1 - amplify) * of_outcomes(BASE) + amplify * of_outcomes(TEACHER)
    wanted = mixture.log_softmax(-1)[..., :-1]
    torch.testing.assert_close(
        answers.logprobs[there].double(), wanted[there], rtol=0, atol=2e-4 * (1 + amplify)
    )
    whole = (answers.logprobs.exp().sum(-1) + present(answers.log_tail).exp())[there]
    torch.testing.assert_close(whole, torch.ones_like(whole))


def test_an_adapter_of_the_rank_is_added_to_the_options():
    pytest.importorskip("peft")
    options = ShiftDistill(rank=2).options({"loss": None}, run())
    assert options["peft_config"].r == 2
    assert "loss" in options


def test_padding_stays_empty_and_slots_too():
    empty = TopK.empty((1, 2, 3))
    outcomes = torch.cat([empty.logprobs, present(empty.log_tail)[..., None]], -1)
    same = normalized(outcomes, empty)
    assert torch.equal(same.logprobs, empty.logprobs)
    assert torch.equal(present(same.log_tail), present(empty.log_tail))
    answers = TopK(
        torch.tensor([[[3, -1]]]), torch.tensor([[[-0.5, -torch.inf]]]), torch.tensor([[-1.0]]), 1.0
    )
    made = normalized(torch.tensor([[[0.0, 5.0, 0.0]]]), answers)
    assert made.logprobs[0, 0].tolist() == pytest.approx([-0.6931472, -torch.inf])
