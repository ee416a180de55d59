"""Padding without a mask is refused where it would be read or learned."""

from __future__ import annotations

import pytest

from fastdistill.hf.collator import DistillCollator
from fastdistill.hf.encoder import Encoder
from helpers.example_texts import tokenizer
from helpers.training import build

OWN = tokenizer(pad_token="think")  # a padding token of its own: id 15
PAD = OWN.pad_token_id
SHARED = tokenizer(pad_token="<end>")  # id 0, the end of text too
NO_TARGETS = [-100, -100, -100, -100]


@pytest.mark.parametrize(
    "example",
    [
        {"input_ids": [8, 0, PAD, PAD]},
        {"input_ids": [8, 0, PAD, PAD], "labels": [8, 0, PAD, PAD]},
        {"input_ids": [8, 0, PAD, PAD], "labels": NO_TARGETS},  # a prompt that ends in padding
        {"input_ids": [PAD, PAD, 8, 9]},
        {"input_ids": [PAD, PAD, 8, 9], "labels": [-100, -100, 8, 9]},
        {"input_ids": [PAD, PAD, PAD, PAD]},
        {"input_ids": [8, 9, PAD, PAD], "completion_mask": [0, 1, 1, 1]},
    ],
)
def test_a_padding_token_of_its_own(example):
    with pytest.raises(ValueError, match=r"input_ids: expected attention_mask .*\(example 3\)"):
        Encoder(tokenizer=OWN)(example, 3)
    mask = [int(i != PAD) for i in example["input_ids"]]
    if any(mask):
        row = Encoder(tokenizer=OWN)(example | {"attention_mask": mask})
        assert PAD not in row.targets
    ones = [1] * len(mask)
    assert Encoder(tokenizer=OWN)(example | {"attention_mask": ones}).attention_mask.all()


@pytest.mark.parametrize(
    ("example", "is_padded"),
    [
        ({"input_ids": [8, 9, 0]}, False),
        ({"input_ids": [0, 8, 9, 0]}, False),  # it begins texts as well
        ({"input_ids": [8, 9, 0, 0]}, True),
        ({"input_ids": [0, 0, 8, 9]}, True),
        ({"input_ids": [8, 9, 0, 0], "labels": [8, 9, 0, -100]}, False),
        ({"input_ids": [8, 9, 0, 0], "labels": NO_TARGETS}, True),
    ],
)
def test_a_padding_token_that_is_the_end_of_text_too(example, is_padded):
    if not is_padded:
        assert Encoder(tokenizer=SHARED)(example).attention_mask.all()
        return
    with pytest.raises(ValueError, match="input_ids: expected attention_mask"):
        Encoder(tokenizer=SHARED)(example)


@pytest.mark.parametrize("ids", [[8, 9, 0, PAD], [PAD, 8, 9, 0]])
def test_a_single_padding_token_may_be_text(ids):
    assert Encoder(tokenizer=OWN)({"input_ids": ids}).attention_mask.all()


def test_padding_in_labels_alone_is_no_target_where_a_mask_says_so():
    example = {"input_ids": [8, 0, PAD, PAD], "labels": [8, 0, PAD, PAD]}
    collator = DistillCollator(pad_id=PAD, encoder=Encoder(tokenizer=OWN))
    batch = collator([example | {"attention_mask": [1, 1, 0, 0]}])
    assert batch["labels"].tolist() == [[-100, 0, -100, -100]]


def test_a_trainer_refuses_it_before_training(tmp_path):
    rows = [{"input_ids": [8, 9, 0, PAD, PAD]}] * 4
    with pytest.raises(ValueError, match=r"times the padding token \(id 15\) at the end .*mple 0"):
        build(tmp_path, data=rows, processing_class=OWN)
    trainer = build(tmp_path, data=rows, processing_class=OWN, check_data=False)
    with pytest.raises(ValueError, match="times the padding token"):
        trainer.data_collator(rows)
