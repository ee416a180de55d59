"""A teacher with more ids than the student, which says so or does not, behind every route: both are
cut to the common ids as in process, or the ids are refused where they first come."""

from __future__ import annotations

import logging
from contextlib import ExitStack

import pytest
import torch

from fastdistill import ServedTeacher, TeacherCache
from fastdistill.losses.types import TopK
from fastdistill.teachers.local import Teacher
from helpers.served import vllm
from helpers.training import VOCAB, build, llama, ragged, step_losses

MORE, K = VOCAB + 16, 20


def larger(padding=0.05):
    """Rows of the head behind the student's were never trained, or are real tokens."""
    model = llama(1, vocab=MORE, scale=80.0)
    with torch.no_grad():
        model.lm_head.weight[VOCAB:].mul_(padding)
    return model


class Silent:
    """A TopKTeacher of one's own that says nothing of its vocabulary."""

    def __init__(self, model):
        self.inner = Teacher(model)

    def topk(self, input_ids, attention_mask=None, *, k, temperature=1.0):
        return self.inner.topk(input_ids, attention_mask, k=k, temperature=temperature)


class Honest(Silent):
    vocab_size = MORE


@pytest.fixture
def serve():
    with ExitStack() as stack:
        yield lambda model: stack.enter_context(vllm(model)).url


def losses(tmp_path, teacher):
    trainer = build(
        tmp_path, model=llama(0), teacher=teacher, data=ragged(), k=K, check_signal=False
    )
    trainer.train()
    return step_losses(trainer)


@pytest.mark.slow
def test_behind_a_server_as_in_process(tmp_path, serve, caplog):
    here = losses(tmp_path, larger())
    with caplog.at_level(logging.WARNING):
        there = losses(tmp_path, ServedTeacher(serve(larger())))
    # The k ids that a server answers hold fewer of the common ones: more of them in the tail.
    assert there == pytest.approx(here, rel=0.05)
    assert f"the {VOCAB} tokens of the student's head are assumed" in caplog.text


@pytest.mark.slow
def test_from_a_cache_of_a_server(tmp_path, serve):
    served = ServedTeacher(serve(larger()))
    cache = TeacherCache.build(served, ragged(), tmp_path / "cache", k=K)
    assert cache.vocab_size is None
    assert losses(tmp_path, cache) == pytest.approx(losses(tmp_path, served), rel=0.02)


def honest(model, folder):
    return Honest(model)


def cached(model, folder):
    return TeacherCache.build(model, ragged(), folder, k=K)


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("make", [honest, cached])
def test_a_teacher_that_says_its_size_is_cut(tmp_path, make):
    expected = losses(tmp_path, larger())
    teacher = make(larger(), tmp_path / "cache")
    assert losses(tmp_path, teacher) == pytest.approx(expected, rel=0.05)


def test_a_teacher_of_ones_own_that_says_nothing_is_refused_by_its_first_id(tmp_path):
    with pytest.raises(ValueError, match=rf"ids in 0\.\.{VOCAB - 1}.*set vocab_size"):
        losses(tmp_path, Silent(larger()))


def test_ids_of_another_vocabulary_altogether(tmp_path, serve):
    """Not padding: whole positions have no common id."""
    model = larger(padding=1.0)
    with torch.no_grad():
        model.lm_head.weight[:VOCAB].mul_(0.001)
        model.lm_head.weight[VOCAB:].mul_(50.0)
    trainer = build(tmp_path, model=llama(0), teacher=ServedTeacher(serve(model)), k=2)
    with pytest.raises(ValueError, match=r"no id with a probability|another vocabulary"):
        trainer.train()


def test_cutting_a_payload_is_exact():
    logits = torch.randn(6, MORE, dtype=torch.float64)
    whole = logits.log_softmax(-1)
    best = whole.topk(MORE)
    cut = TopK(best.indices, best.values, torch.full((6,), -60.0)).within(VOCAB)
    true = logits[:, :VOCAB].log_softmax(-1)
    used = cut.ids >= 0
    assert (used.sum(-1) == VOCAB).all()
    expected = true.gather(-1, cut.ids.clamp(min=0))
    torch.testing.assert_close(cut.logprobs[used], expected[used], rtol=1e-5, atol=1e-5)
