"""Losses on the top k of the student, the teacher or both, against fp64 over K + 1 outcomes."""

from __future__ import annotations

import pytest
import torch

import fastdistill as fd
from helpers.present import present

N, V, H, G, K = 12, 67, 9, 7, 5


@pytest.fixture
def scene():
    """(hidden, weight, teacher_hidden, teacher_weight) with a confident and a flat row."""
    g = torch.Generator().manual_seed(3)
    tensors = [torch.randn(*shape, generator=g) for shape in ((N, H), (V, H), (N, G), (V + 5, G))]
    tensors[2][0] *= 20  # nothing is left for the tail
    tensors[2][1] *= 0.01
    return tensors


def truth(hidden, weight, ids, temperature=1.0):
    """log softmax at the ids and log Σ of the others, of each row, in fp64."""
    logprobs = (hidden.double() @ weight.double().T / temperature).log_softmax(-1)
    at, tails = [], []
    for row, slots in zip(logprobs, ids, strict=True):
        real = slots[slots >= 0].unique()
        outside = torch.ones(len(row), dtype=torch.bool)
        outside[real] = False
        tails.append(row[outside].logsumexp(0))
        at.append(row[slots.clamp(min=0)])
    return torch.stack(at), torch.stack(tails)


def test_given_ids_have_their_logprobs_and_an_exact_tail(scene):
    *_, hidden, weight = scene
    ids = (hidden @ weight.T).topk(K + 7).indices[:, torch.tensor([0, 3, 11, 9, 6])]
    ids[2, 3], ids[3, 1] = ids[2, 0], -1
    answers = fd.linear_logprobs_at(hidden, weight, ids, temperature=1.5)
    at, tails = truth(hidden, weight, ids, 1.5)
    assert answers.ids[2, 3] == -1
    used = answers.ids >= 0
    assert torch.equal(answers.ids[used], ids[used])
    assert used.sum() == N * K - 2
    torch.testing.assert_close(answers.logprobs[used].double(), at[used], rtol=1e-5, atol=1e-5)
    tail = present(answers.log_tail).double()
    torch.testing.assert_close(tail, tails, rtol=1e-5, atol=1e-5)
    assert (answers.logprobs[~used] == -torch.inf).all()


def test_the_tail_of_nearly_all_mass_keeps_its_digits():
    """Its logarithm is near 0, and the log-sum-exps whose difference it is are near 88."""
    answers = fd.linear_logprobs_at(
        torch.ones(1, 1), torch.full((5000, 1), 80.0), torch.ones(1, 1).long()
    )
    expected = torch.tensor([-1 / 5000], dtype=torch.float64).log1p()
    torch.testing.assert_close(present(answers.log_tail).double(), expected, rtol=1e-3, atol=0.0)


def chosen(support, hidden, weight, teacher_hidden, teacher_weight):
    own = (hidden @ weight.T).topk(K).indices.tolist()
    theirs = (teacher_hidden @ teacher_weight[:V].T).topk(K).indices.tolist()
    pick = {"teacher": lambda o, t: t, "student": lambda o, t: o, "union": lambda o, t: {*o, *t}}
    sets = [sorted(pick[support](o, t)) for o, t in zip(own, theirs, strict=True)]
    return torch.tensor([s + [-1] * (2 * K - len(s)) for s in sets])


@pytest.mark.parametrize("support", ["teacher", "student", "union"])
def test_loss_and_gradients_are_those_over_the_ids_and_the_rest(scene, support):
    hidden, weight, teacher_hidden, teacher_weight = scene
    x, w = (t.clone().requires_grad_() for t in (hidden, weight))
    loss = fd.linear_distill_loss(
        x, w, teacher_hidden, teacher_weight, k=K, support=support, divergence="reverse_kl"
    )
    (3 * loss).backward()
    ids = chosen(support, *scene)
    x64, w64 = (t.double().requires_grad_() for t in (hidden, weight))
    (lq, q_tail), (lp, p_tail) = (
        truth(x64, w64, ids),
        truth(teacher_hidden, teacher_weight[:V], ids),
    )
    floor = torch.finfo(torch.float32).tiny
    lq, lp = (torch.cat([a, b[:, None]], -1) for a, b in ((lq, q_tail), (lp, p_tail)))
    lp = lp.clamp(min=torch.tensor(floor).log().item())
    used = torch.cat([ids >= 0, torch.ones(N, 1, dtype=torch.bool)], -1)
    expected = (lq.exp() * (lq - lp)).masked_fill(~used, 0.0).sum(-1).mean()
    (3 * expected).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad, present(x64.grad).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(w.grad, present(w64.grad).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"support": "student"}, "support: expected 'teacher' with k=None"),
        ({"k": 4, "support": "mine"}, "support: expected one of 'teacher', 'student', 'union'"),
        ({"k": V + 1}, r"k: expected an integer in 1\.\.67"),
    ],
)
def test_refusals(scene, options, error):
    with pytest.raises(ValueError, match=error):
        fd.linear_distill_loss(*scene, **options)


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("seed", range(3))
def test_reverse_kl_stalls_on_the_teachers_ids_and_not_on_the_students(seed):
    """Most of the teacher's mass is outside its top k, where the bucket compares one number."""
    g = torch.Generator().manual_seed(seed)
    teacher = torch.randn(6, 12, generator=g), torch.eye(40, 12) * 1.5
    start = torch.randn(6, 40, generator=g) * 2

    def left(support, steps):
        """The reverse KL over the whole vocabulary after training on a support."""
        hidden, weight = start.clone().requires_grad_(), torch.eye(40)
        optimizer = torch.optim.Adam([hidden], lr=0.1)
        options = {"divergence": "reverse_kl", "k": 4, "support": support}
        for _ in range(steps):
            optimizer.zero_grad()
            fd.linear_distill_loss(hidden, weight, *teacher, **options).backward()
            optimizer.step()
        with torch.no_grad():
            return float(fd.linear_distill_loss(hidden, weight, *teacher, divergence="reverse_kl"))

    later = left("teacher", 120)
    assert later > 0.9 * left("teacher", 60)
    assert left("student", 120) < later / 3
