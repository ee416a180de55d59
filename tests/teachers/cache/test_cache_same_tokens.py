"""Examples with the same tokens and other targets are answered at the targets of all of them."""

from __future__ import annotations

import pytest
import torch

from fastdistill import Teacher, TeacherCache
from helpers.training import VOCAB, build, peaked, train

IDS = torch.randint(3, VOCAB, (20,), generator=torch.Generator().manual_seed(0))


def only(first, last):
    labels = torch.full_like(IDS, -100)
    labels[first:last] = IDS[first:last]
    return {"input_ids": IDS, "labels": labels}


@pytest.mark.parametrize("shard_mb", [0.0005, 256])
@pytest.mark.parametrize(
    "targets", [((5, 10), (12, 20)), ((5, 20), (8, 10), (2, 6)), ((7, 8),) * 5]
)
def test_targets_of_all_are_answered(tmp_path, targets, shard_mb):
    rows = [only(*span) for span in targets]
    cache = TeacherCache.build(
        Teacher(peaked()), rows, tmp_path / "c", k=8, positions="targets", shard_mb=shard_mb
    )
    wanted = torch.zeros(20, dtype=torch.bool)
    for first, last in targets:
        wanted[first - 1 : last - 1] = True
    assert torch.equal(cache.answered(IDS), wanted)
    expected = Teacher(peaked()).topk(IDS[None], k=8)
    for _ in range(2):
        answers = cache.topk(IDS[None], k=8)
        assert torch.equal((answers.ids[0] >= 0).all(-1), wanted)
        at = answers.ids[0, wanted].long().argsort(-1)
        theirs = expected.ids[0, wanted].sort(-1)
        assert torch.equal(answers.ids[0, wanted].long().gather(-1, at), theirs.values)
        logprobs = expected.logprobs[0, wanted].gather(-1, theirs.indices)
        assert (answers.logprobs[0, wanted].gather(-1, at) - logprobs).abs().max() < 1e-2


def test_turn_by_turn_training_reads_them(tmp_path):
    rows = [only(5, 10), only(12, 20)] * 6
    cache = TeacherCache.build(Teacher(peaked()), rows, tmp_path / "c", k=8, positions="targets")
    options = {"data": rows, "k": 8, "check_signal": False}
    divergence = train(tmp_path, teacher=cache, **options).state.log_history[0]["divergence"]
    exact = train(tmp_path, teacher=peaked(), **options).state.log_history[0]["divergence"]
    assert divergence == pytest.approx(exact, rel=1e-3)


def test_targets_that_none_of_them_has_are_refused_before_the_first_step(tmp_path):
    rows = [only(5, 10), only(12, 20)]
    cache = TeacherCache.build(Teacher(peaked()), rows, tmp_path / "c", k=8, positions="targets")
    words = r"without answers in example 2 of train_dataset \(the first is token 10\)"
    with pytest.raises(ValueError, match=words):
        build(tmp_path, teacher=cache, data=[*rows, only(5, 20)], k=8)
    build(tmp_path, teacher=cache, data=[*rows, only(6, 9)], k=8)
