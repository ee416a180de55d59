"""A row that is longer than student or teacher reads is refused by its number before anything runs,
on every route."""

from __future__ import annotations

import pytest
import torch

from fastdistill import TeacherCache
from fastdistill.hf.collator import DistillCollator
from fastdistill.hf.encoder import Encoder
from fastdistill.hf.positions import RowLimit, check_row_lengths
from fastdistill.teachers.fidelity import measure
from fastdistill.teachers.local import Teacher, load_teacher
from helpers.position_models import build as of_family
from helpers.training import build


def rows(n=12, long=7, length=41):
    g = torch.Generator().manual_seed(0)
    lengths = [length if i == long else 6 for i in range(n)]
    return [{"input_ids": torch.randint(3, 64, (m,), generator=g).tolist()} for m in lengths]


def wide(family):
    """The same family with room for the row."""
    more = {"gpt2": {"n_positions": 99}, "gptj": {"n_positions": 99}}
    return of_family(family, torch.float32, **more.get(family, {"max_position_embeddings": 99}))


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "gptj"])
def test_a_row_longer_than_the_student_reads(tmp_path, family):
    student = of_family(family, torch.float32)
    with pytest.raises(ValueError, match=r"train_dataset: .* 40 tokens.*the student .* 41 .*row 7"):
        build(tmp_path, model=student, teacher=wide(family), data=rows())
    with pytest.raises(ValueError, match=r"eval_dataset: .* 40 tokens.* 41 tokens in row 3"):
        build(
            tmp_path,
            model=student,
            teacher=None,
            ce_weight=1.0,
            data=rows(long=None),
            eval_dataset=rows(long=3),
        )


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_a_row_longer_than_the_teacher_reads(tmp_path, family):
    with pytest.raises(ValueError, match=r"train_dataset: .* 40 tokens.*the teacher .* 41 .*row 7"):
        build(tmp_path, model=wide(family), teacher=of_family(family, torch.float32), data=rows())


def test_rows_within_the_limit_train(tmp_path):
    trainer = build(
        tmp_path,
        model=of_family("gpt2", torch.float32),
        teacher=of_family("gpt2", torch.float32),
        data=rows(),
        max_length=40,
    )
    assert trainer.train().global_step == 2


def test_padding_counts_nothing(tmp_path):
    """A tokenizer padded to 60: 6 tokens fit where the model has 40 positions."""
    data = [
        {
            "input_ids": [0] * 54 + row["input_ids"],
            "attention_mask": [0] * 54 + [1] * len(row["input_ids"]),
        }
        for row in rows(long=None)
    ]
    models = {name: of_family("gpt2", torch.float32) for name in ("model", "teacher")}
    assert build(tmp_path, **models, data=data).train().global_step == 2


def test_a_sampled_completion_counts(tmp_path):
    data = [{"input_ids": r["input_ids"], "labels": [-100] * 6} for r in rows(long=None)]
    models = {name: of_family("gpt2", torch.float32) for name in ("model", "teacher")}
    with pytest.raises(
        ValueError, match=r"max_new_tokens: .*at most 34 .* 6 tokens \(train_dataset, example 0\)"
    ):
        build(tmp_path, **models, data=data, lmbda=1.0, max_new_tokens=35)


def test_rows_that_share_a_batch_must_not_change_each_other(tmp_path):
    """Phi's longrope and dynamic scaling choose frequencies by the longest row of a batch."""
    rope = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 10000.0}
    student = of_family("llama", torch.float32, rope_parameters=rope)
    plain = {"model": student, "teacher": None, "ce_weight": 1.0, "data": rows()}
    with pytest.raises(ValueError, match=r"40 tokens.*longest row of a batch.* 41 tokens in row 7"):
        build(tmp_path, **plain)
    alone = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    assert build(tmp_path, **plain, **alone).train().global_step == 2


def test_a_teacher_refuses_before_it_runs():
    teacher = Teacher(of_family("gpt2", torch.float32))
    ids = torch.tensor([[3] * 41, [3] * 41])
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    for ask in (lambda: teacher.topk(ids, mask, k=2), lambda: teacher.hidden(ids, mask)):
        with pytest.raises(ValueError, match=r"input_ids: .* 40 tokens.* 41 tokens in row 1"):
            ask()


def test_a_cache_is_not_begun(tmp_path):
    with pytest.raises(ValueError, match=r"dataset: .* 40 tokens.*the teacher .* 41 .*row 7"):
        TeacherCache.build(of_family("opt", torch.float32), rows(), tmp_path / "cache", k=4)
    assert not (tmp_path / "cache").exists()


def test_fidelity_refuses(tmp_path):
    of_family("gpt2", torch.float32).save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path, quant="int8", device="cpu")
    with pytest.raises(ValueError, match=r"40 tokens.* 41 tokens in row 7"):
        measure(teacher, rows())


def test_a_stream_is_checked_batch_by_batch():
    collate = DistillCollator(limits=(RowLimit(tokens=40, reader="the student"),))
    collate(rows(long=None))
    with pytest.raises(ValueError, match=r"input_ids: .* 40 tokens.* 41 tokens in row 2"):
        collate(rows()[5:])


def test_nothing_is_read_where_nothing_can_be_too_long():
    class Unread(list):
        def __getitem__(self, index):
            raise AssertionError("read")

    limits = [None, RowLimit(tokens=40, reader="the student")]
    check_row_lengths("train_dataset", Unread([{}]), Encoder(max_length=40), limits)
    check_row_lengths("train_dataset", Unread([{}]), Encoder(), [None])
