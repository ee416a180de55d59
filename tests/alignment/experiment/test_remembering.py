"""A teacher that remembers answers as it did, and is asked once per window."""

from __future__ import annotations

import pytest
import torch

from fastdistill.alignment.experiment.demo.memo_teacher import MemoizedTeacher
from fastdistill.losses.types import TopK
from fastdistill.teachers.local import Teacher
from helpers.present import present
from helpers.teacher_scene import IDS
from helpers.training import llama


class Counting(Teacher):
    windows = 0

    def topk(self, input_ids, attention_mask=None, *, k, temperature=1.0, where=None) -> TopK:
        assert where is None
        self.windows += len(input_ids)
        return super().topk(input_ids, attention_mask, k=k, temperature=temperature)


def test_remembering_asks_once_per_window():
    teacher = Counting(llama(7, scale=20.0))
    remembering = MemoizedTeacher(teacher)
    first = remembering.topk(IDS, k=4)
    again = remembering.topk(IDS.flip(0), torch.ones_like(IDS), k=4)
    assert teacher.windows == 3
    plain = Teacher(teacher.model).topk(IDS, k=4)
    for answers, expected in ((first, plain), (again, [present(t).flip(0) for t in plain[:3]])):
        assert torch.equal(answers.ids, expected[0].long())
        torch.testing.assert_close(answers.logprobs, expected[1])
        torch.testing.assert_close(answers.log_tail, expected[2])
    remembering.topk(IDS, k=5)
    assert teacher.windows == 6
    with pytest.raises(ValueError, match="windows without padding"):
        remembering.topk(IDS, torch.zeros_like(IDS), k=4)
