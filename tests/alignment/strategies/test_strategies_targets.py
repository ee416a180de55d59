"""What the student may see of distributions: equations against all logits, and what stays whole."""

from __future__ import annotations

import math

import pytest
import torch

from fastdistill.alignment.strategies.annealing import TAID, ReferenceKL
from fastdistill.alignment.strategies.baselines import OffModelSFT, Undefended
from fastdistill.alignment.strategies.logit_jam import (
    LogitJam,
    _normal,
    distribution,
    mixed,
    outcomes,
)
from fastdistill.alignment.strategies.shift import ShiftDistill
from fastdistill.alignment.strategies.strategy import Training
from fastdistill.losses.types import TopK
from fastdistill.teachers.local import Teacher
from helpers.present import present
from helpers.strategy_scene import BASE, TEACHER, TOKENIZER, run

V = TEACHER.head.vocab_size
IDS = torch.tensor([[1, 5, 9, 14, 3, 7], [1, 6, 2, 8, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
TEACHING = Teacher(TEACHER.model, tokenizer=TOKENIZER)


def log_p(subject, temperature=1.0):  # (B, T, V) fp64
    with torch.no_grad():
        logits = subject.model.double()(IDS, attention_mask=MASK).logits
    subject.model.float()
    return (logits / temperature).log_softmax(-1)


def student_targets(strategy, k=6, temperature=1.0, progress=0.0, student=BASE, **scene):
    here = run(**scene)
    here.progress = progress
    teacher = strategy.teacher(TEACHING, student.model, here)
    return teacher.topk(IDS, MASK, k=k, temperature=temperature)


def whole(answers):
    """Σ p over tokens and tail, where something was answered."""
    there = MASK.bool()
    return outcomes(answers).exp().sum(-1)[there]


def expected(probabilities, ids):
    """Of a distribution over V (fp64): log p at ids, and of the rest."""
    inside = probabilities.gather(-1, ids)
    return inside.log(), torch.log1p(-inside.sum(-1).clamp(max=1))


def agree(answers, probabilities, tolerance=2e-5):
    there = MASK.bool()
    logprobs, tail = expected(probabilities, answers.ids.clamp(min=0))
    torch.testing.assert_close(
        answers.logprobs[there].double(), logprobs[there], rtol=0, atol=tolerance
    )
    if answers.ids.shape[-1] < V:
        torch.testing.assert_close(answers.log_tail[there].double(), tail[there], rtol=0, atol=1e-4)


def test_without_a_defence_the_teacher_is_itself():
    assert Undefended().teacher(TEACHING, None, run()) is TEACHING
    assert OffModelSFT().teacher(TEACHING, None, run()) is None
    assert LogitJam(k=8).teacher(TEACHING, None, run()) is TEACHING


def test_clipping_softening_and_the_rest_are_settings():
    jam = LogitJam(k=8, tail="truncate", temperature=2.0, t2_scale=True, divergence="jsd")
    assert jam.training(Training(settings={"z_loss": 0.1}), run()).settings == {
        "z_loss": 0.1,
        "k": 8,
        "tail": "truncate",
        "temperature": 2.0,
        "t2_scale": True,
        "divergence": "jsd",
    }
    assert LogitJam(k="all").training(Training(), run()).settings == {"k": None}
    for jam, settings in (
        (LogitJam(k="all", noise=1.0), {}),
        (LogitJam(mix=0.1), {"k": None}),
    ):
        with pytest.raises(ValueError, match="k: expected a number with noise or mix, got the who"):
            jam.training(Training(settings=settings), run())
    assert LogitJam(k=4, mix=0.1).training(Training(settings={"k": None}), run()).settings["k"] == 4


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 6, V])
def test_a_mixture_is_one_over_the_whole_vocabulary(k, temperature):
    answers = student_targets(LogitJam(mix=0.3), k=k, temperature=temperature)
    both = 0.7 * log_p(TEACHER, temperature).exp() + 0.3 * log_p(BASE, temperature).exp()
    agree(answers, both)
    torch.testing.assert_close(whole(answers), torch.ones_like(whole(answers)))


def test_the_trusted_model_is_mixed_in_and_not_what_the_student_begins_as():
    answers = student_targets(LogitJam(mix=1.0), base=TEACHER, trusted=BASE)
    agree(answers, log_p(BASE).exp())


def test_noise_is_the_same_in_every_epoch_and_another_elsewhere():
    jam = LogitJam(noise=0.5)
    first, again = student_targets(jam), student_targets(jam)
    assert torch.equal(first.logprobs, again.logprobs)
    plain = TEACHING.topk(IDS, MASK, k=6)
    # The same up to where the rows' tokens are the same: the first position.
    shift = (first.logprobs - plain.logprobs)[:, :4]
    assert torch.allclose(shift[0, 0], shift[1, 0], atol=1e-5)
    assert not torch.allclose(shift[0, 1], shift[1, 1], atol=1e-2)
    torch.testing.assert_close(whole(first), torch.ones_like(whole(first)))
    other = run()
    other.seed = 4
    moved = jam.teacher(TEACHING, BASE.model, other).topk(IDS, MASK, k=6)
    assert not torch.allclose(moved.logprobs[:, :4], first.logprobs[:, :4], atol=1e-2)


def test_noise_is_normal_with_its_deviation():
    torch.manual_seed(0)
    ids = torch.randint(0, V, (64, 32))
    flat = TopK(
        torch.arange(40).expand(64, 32, 40),
        torch.full((64, 32, 40), -4.0),
        torch.full((64, 32), -1.3),
        1.0,
    )
    drawn = _normal(ids, torch.Size((*flat.ids.shape[:2], 41)), 7)
    assert drawn.mean().abs() < 0.01
    assert (drawn.std() - 1).abs() < 0.01
    assert (drawn.pow(4).mean() - 3).abs() < 0.1
    ordered = drawn.flatten()
    assert (ordered[1:] * ordered[:-1]).mean().abs() < 0.01  # neighbours are apart


@pytest.mark.parametrize(
    ("progress", "anneal", "weight"),
    [(0, "linear", 2.0), (0.5, "linear", 1.0), (1, "linear", 0.0), (0.5, "none", 2.0)],
)
def test_the_pull_to_the_reference_wanes(progress, anneal, weight):
    answers = student_targets(ReferenceKL(weight=2.0, anneal=anneal), progress=progress)
    both = (log_p(TEACHER).exp() + weight * log_p(BASE).exp()) / (1 + weight)
    agree(answers, both)


def test_the_gradient_is_that_of_both_divergences():
    """KL(p_U ‖ q) + λ·KL(p_M ‖ q) pulls as (1 + λ)·KL(p ‖ q) does."""
    logits = torch.randn(V, dtype=torch.float64, requires_grad=True)
    u, m = log_p(TEACHER)[0, 2].exp(), log_p(BASE)[0, 2].exp()

    def pull(*targets):
        loss = sum(w * (p * (p.log() - logits.log_softmax(-1))).sum() for w, p in targets)
        return torch.autograd.grad(loss, logits)[0]

    two = pull((1.0, u), (0.5, m))
    one = pull((1.5, (u + 0.5 * m) / 1.5))
    torch.testing.assert_close(one, two)


def test_only_the_forward_divergence_can_be_pulled_so():
    with pytest.raises(ValueError, match="divergence: expected forward_kl with ReferenceKL"):
        ReferenceKL().training(Training(settings={"divergence": "jsd"}), run())
    here = run()
    here.training = LogitJam(divergence="jsd").training(Training(), here)  # behind it
    with pytest.raises(ValueError, match="divergence: expected forward_kl with ReferenceKL"):
        ReferenceKL().teacher(TEACHING, BASE.model, here)


def test_nobody_who_is_asked_is_frozen_or_switched():
    before = [p.requires_grad for p in BASE.model.parameters()]
    assert all(before)
    BASE.model.train()
    try:
        for strategy in (LogitJam(mix=0.5), ReferenceKL(), TAID(), ShiftDistill(amplify=2.0)):
            student_targets(strategy)
            assert BASE.model.training
            assert [p.requires_grad for p in BASE.model.parameters()] == before
    finally:
        BASE.model.eval()


def test_labels_alone_have_no_distribution_to_change():
    for strategy in (LogitJam(noise=1.0), ReferenceKL(), TAID(), ShiftDistill(amplify=2.0)):
        assert strategy.teacher(None, BASE.model, run()) is None


def test_what_neither_model_says_stays_impossible():
    none = torch.full((1, 1), -torch.inf)
    answers = TopK(torch.tensor([[[0, 1]]]), torch.tensor([[[0.0, -torch.inf]]]), none, 1.0)
    other = torch.tensor([[[math.log(0.25), -torch.inf, math.log(0.75)]]])
    made = mixed(answers, other, 0.4)
    assert made.logprobs[0, 0].exp().tolist() == pytest.approx([0.7, 0.0])
    assert present(made.log_tail).exp().item() == pytest.approx(0.3)
    same = mixed(answers, other, 0.0)
    assert torch.equal(same.logprobs, answers.logprobs)
    assert torch.equal(present(same.log_tail), none)
    # Far below what exp() holds in float32: the mixture still has it.
    faint = TopK(torch.tensor([[[0, 1]]]), torch.tensor([[[0.0, -200.0]]]), none, 1.0)
    both = mixed(faint, torch.tensor([[[0.0, -200.0, -torch.inf]]]), 0.5)
    assert both.logprobs[0, 0].tolist() == pytest.approx([0.0, -200.0])


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_the_interpolated_target_goes_from_the_student_to_the_teacher(progress):
    answers = student_targets(TAID(start=0.0, end=1.0), k=V, progress=progress)
    wanted = ((1 - progress) * log_p(BASE) + progress * log_p(TEACHER)).softmax(-1)
    agree(answers, wanted)


def test_the_student_is_asked_as_it_is_now_and_left_as_it_was():
    student = BASE.model
    student.requires_grad_(True).train()
    taid = TAID(start=0.0, end=0.0).teacher(TEACHING, student, run())
    before = taid.topk(IDS, MASK, k=V)
    assert student.training
    assert all(p.requires_grad for p in student.parameters())
    weight = student.lm_head.weight
    copied = weight.data.clone()
    try:
        weight.data.mul_(0.5)
        after = taid.topk(IDS, MASK, k=V)
    finally:
        weight.data.copy_(copied)
        student.eval()
    assert not torch.allclose(before.logprobs[:, :4], after.logprobs[:, :4])


@pytest.mark.parametrize("amplify", [0.0, 0.5, 2.0])
def test_the_shift_is_amplified(amplify):
    pytest.importorskip("peft")
    answers = student_targets(ShiftDistill(rank=2, amplify=amplify), k=V)
    wanted = ((1 - amplify) * log_p(BASE) + amplify * log_p(TEACHER)).softmax(-1)
    agree(answers, wanted, tolerance=2e-4)
    options = ShiftDistill(rank=2).options({"loss": None}, run())
    assert options["peft_config"].r == 2
    assert "loss" in options


def test_padding_stays_empty_and_slots_too():
    empty = TopK.empty((1, 2, 3))
    same = distribution(outcomes(empty), empty)
    assert torch.equal(same.logprobs, empty.logprobs)
    assert torch.equal(present(same.log_tail), present(empty.log_tail))
    answers = TopK(
        torch.tensor([[[3, -1]]]), torch.tensor([[[-0.5, -torch.inf]]]), torch.tensor([[-1.0]]), 1.0
    )
    made = distribution(torch.tensor([[[0.0, 5.0, 0.0]]]), answers)
    assert made.logprobs[0, 0].tolist() == pytest.approx([-0.6931472, -torch.inf])
