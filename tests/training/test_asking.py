"""The trainer asks a teacher for its targets alone, and says what is wrong with the answers."""

from __future__ import annotations

import pytest
import torch

from fastdistill.hf.lm_head import head_of
from fastdistill.losses.linear_head import topk_at
from fastdistill.losses.types import TopK
from fastdistill.teachers.local import Teacher
from fastdistill.teachers.protocols import DenseTeacher
from fastdistill.training.loss import TeacherHidden
from fastdistill.training.teacher_answers import get_answers
from helpers.present import present
from helpers.teacher_scene import IDS
from helpers.training import VOCAB, build, llama, peaked, train, weights

MASK = torch.ones_like(IDS)
LABELS = IDS.clone()
LABELS[:, :4] = -100
LABELS[1] = -100
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}


def test_the_head_answers_where_it_is_asked():
    teacher = Teacher(llama(7, scale=20.0))
    where = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    mask = MASK.clone()
    mask[2, 6:] = 0
    everywhere = teacher.topk(IDS, mask, k=5)
    some = teacher.topk(IDS, mask, k=5, where=where)
    answered = where & mask.bool()
    assert torch.equal(some.ids[answered], everywhere.ids[answered])
    torch.testing.assert_close(some.logprobs[answered], everywhere.logprobs[answered])
    assert (some.ids[~answered] == -1).all()
    assert (present(some.log_tail)[~answered] == 0).all()
    with pytest.raises(ValueError, match=r"where: expected shape \[3, 11\] as input_ids"):
        teacher.topk(IDS, k=5, where=where[:, 1:])


def test_the_head_of_a_teacher_here_runs_on_the_targets_alone(tmp_path, monkeypatch):
    from fastdistill.teachers import local as module

    seen = []

    def counted(x, *args, **options):
        seen.append(len(x))
        return topk_at(x, *args, **options)

    monkeypatch.setattr(module, "topk_at", counted)
    targets, answers = get_answers(Teacher(peaked()), BATCH, build(tmp_path).args, check=False)
    assert sum(seen) == len(targets.labels) == 14
    assert isinstance(answers, TopK)
    assert answers.ids.shape == (14, 8)


def test_a_subclass_with_answers_of_its_own_is_asked_as_any_object(tmp_path):
    class Own(Teacher):
        def topk(
            self, input_ids, attention_mask=None, *, k, temperature=1.0, where=None, images=None
        ):
            assert where is None
            return super().topk(input_ids, attention_mask, k=k, temperature=temperature)

    own = train(tmp_path, teacher=Own(peaked()), check_signal=False)
    assert torch.equal(weights(own), weights(train(tmp_path)))


def test_dense_answers_are_hidden_states_and_the_head(tmp_path):
    teacher = Teacher(peaked())
    assert isinstance(teacher, DenseTeacher)
    targets, answers = get_answers(teacher, BATCH, build(tmp_path, k=None).args, check=False)
    assert isinstance(answers, TeacherHidden)
    with torch.no_grad():
        logits = teacher.model(input_ids=IDS).logits
    torch.testing.assert_close(
        head_of(teacher.model).logits(answers.hidden), targets.gather(logits)
    )


def test_answers_of_another_shape_are_refused(tmp_path):
    class Short:
        def topk(self, input_ids, attention_mask=None, *, k, temperature=1.0):
            ids = input_ids[:, 1:, None] % VOCAB
            return TopK(ids, torch.full(ids.shape, -1.0))

    with pytest.raises(ValueError, match=r"teacher: expected answers of shape \[12, 21, …\]"):
        train(tmp_path, teacher=Short(), k=1)


def test_a_batch_without_targets_asks_nobody(tmp_path):
    class Silent:
        vocab_size = VOCAB

        def topk(self, *args, **kwargs):
            raise AssertionError("asked")

    empty = BATCH | {"labels": torch.full_like(LABELS, -100)}
    _, answers = get_answers(Silent(), empty, build(tmp_path).args, check=True)
    assert isinstance(answers, TopK)
    assert answers.ids.shape == (0, 8)
    _, dense = get_answers(Teacher(peaked()), empty, build(tmp_path, k=None).args, check=False)
    assert isinstance(dense, TeacherHidden)
    assert dense.hidden.shape == (0, 48)


def test_a_batch_without_labels_is_refused(tmp_path):
    with pytest.raises(ValueError, match="inputs: expected labels in every batch"):
        get_answers(None, {"input_ids": IDS}, build(tmp_path).args, check=False)


def test_what_cannot_answer_is_refused(tmp_path):
    class OnlyTopK:
        def topk(self, input_ids, attention_mask=None, *, k, temperature=1.0): ...

    with pytest.raises(TypeError, match=r"expected a model, or an object with hidden.* k=None"):
        build(tmp_path, teacher=OnlyTopK(), k=None)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    peaked().save_pretrained(tmp_path / "teacher")
    path = tmp_path / "teacher" / "model.safetensors"
    tensors = load_file(path)
    del tensors["lm_head.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing \(first: lm_head.weight\)"):
        build(tmp_path, teacher=str(tmp_path / "teacher"))
