"""Training on the student's top k, or on both: the loss over these ids and the rest."""

from __future__ import annotations

import pytest
import torch

from fastdistill import ServedTeacher, Teacher, TeacherCache
from helpers.served import ours
from helpers.training import VOCAB, build, flat, llama, peaked, ragged, step_losses, train, weights

K = 4


def logits(model, rows):
    """Of every target, fp64."""
    tables = []
    for row in rows:
        keep = row["labels"][1:] != -100
        tables.append(model.double()(input_ids=row["input_ids"][None]).logits[0, :-1][keep])
    return torch.cat(tables)


@pytest.mark.parametrize("support", ["student", "union"])
def test_one_step_is_the_reverse_kl_over_these_ids_and_the_rest(tmp_path, support):
    options = {"k": K, "support": support, "divergence": "reverse_kl", "temperature": 1.5}
    trainer = train(tmp_path, max_steps=1, **options)
    student = llama(0).double()
    z, t = logits(student, ragged()) / 1.5, logits(peaked(), ragged()).detach() / 1.5
    inside = torch.zeros_like(z, dtype=torch.bool).scatter(-1, z.topk(K).indices, True)
    if support == "union":
        inside = inside.scatter(-1, t.topk(K).indices, True)
    lq, lp = z.log_softmax(-1), t.log_softmax(-1)
    q_tail, p_tail = (x.masked_fill(inside, -torch.inf).logsumexp(-1) for x in (lq, lp))
    D = (lq.exp() * (lq - lp)).masked_fill(~inside, 0.0).sum(-1) + q_tail.exp() * (q_tail - p_tail)
    D.mean().backward()
    assert step_losses(trainer)[0] == pytest.approx(D.mean().item(), rel=1e-5)
    torch.optim.SGD(student.parameters(), lr=1e-2).step()
    assert (weights(trainer) - flat(student)).abs().max() < 1e-6


class Elsewhere:
    """A teacher without hidden states, that scores ids."""

    def __init__(self, model):
        self.teacher = Teacher(model)
        self.vocab_size = VOCAB

    def topk(self, input_ids, attention_mask=None, *, k, temperature=1.0):
        return self.teacher.topk(input_ids, attention_mask, k=k, temperature=temperature)

    def logprobs_at(self, input_ids, attention_mask, ids, *, temperature=1.0):
        return self.teacher.logprobs_at(input_ids, attention_mask, ids, temperature=temperature)


RUN = {
    "k": K,
    "divergence": "jsd",
    "token_selection": "entropy top 0.5",
    "per_device_train_batch_size": 5,
    "trainer": {"eval_dataset": ragged(3)},
}


@pytest.mark.parametrize("support", ["student", "union"])
def test_a_server_teaches_as_the_model_does(tmp_path, support):
    at_home = build(tmp_path, support=support, **RUN)
    at_home.train()
    with ours(Teacher(peaked())) as url:
        for teacher in (ServedTeacher(url), Elsewhere(peaked())):
            away = build(tmp_path, teacher=teacher, support=support, **RUN)
            away.train()
            assert (weights(away) - weights(at_home)).abs().max() < 1e-6
            theirs, own = away.evaluate(), at_home.evaluate()
            for name in ("eval_loss", "eval_kl", "eval_agreement", "eval_teacher_mass"):
                assert theirs[name] == pytest.approx(own[name], abs=1e-5), name


def test_metrics_are_those_of_the_teachers_top_k(tmp_path):
    by_support = [
        build(tmp_path, k=K, support=s, eval_dataset=ragged(4)).evaluate()
        for s in ("teacher", "student")
    ]
    for name in ("eval_kl", "eval_agreement", "eval_teacher_mass", "eval_student_mass"):
        assert by_support[0][name] == pytest.approx(by_support[1][name], rel=1e-5), name
    assert by_support[0]["eval_loss"] != pytest.approx(by_support[1]["eval_loss"], rel=1e-3)


def test_teachers_that_cannot_score_ids_are_refused(tmp_path):
    cache = TeacherCache.build(Teacher(peaked()), ragged(), tmp_path / "cache", k=K)
    with pytest.raises(ValueError, match="support: expected 'teacher' with the cache"):
        build(tmp_path, teacher=cache, k=K, support="student")

    class TopOnly:
        topk = Elsewhere.topk

    with pytest.raises(TypeError, match="an object with logprobs_at"):
        build(tmp_path, teacher=TopOnly(), k=K, support="student")
    with pytest.raises(ValueError, match="support: expected 'teacher' with k=None"):
        build(tmp_path, k=None, support="union")


def test_invalid_scores_are_refused(tmp_path):
    class Lies(Elsewhere):
        def logprobs_at(self, *args, **options):
            answers = super().logprobs_at(*args, **options)
            return answers._replace(logprobs=answers.logprobs + 3)

    with pytest.raises(ValueError, match="teacher: expected the answers of a language model"):
        train(tmp_path, teacher=Lies(peaked()), k=K, support="student", check_signal=False)
