"""Datasets that would train smoothly towards nothing are refused before the first step."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.utils.data import IterableDataset

from fastdistill.hf.encoder import Encoder
from fastdistill.training.checks.dataset import check_examples
from helpers.example_texts import STOCK, TALK, tokenizer
from helpers.training import build

END, CAT, DOG, IT = 0, 8, 9, 10
PADDED = tokenizer(pad_token="<end>")


def check(dataset, tokens=None, prompts_only=False):
    encoder = Encoder(tokenizer=tokens)
    check_examples("train_dataset", dataset, encoder, prompts_only=prompts_only)


def rows(n=20, length=12):
    g = torch.Generator().manual_seed(0)
    return [torch.randint(1, 16, (length,), generator=g) for _ in range(n)]


@pytest.mark.parametrize(
    ("example", "why"),
    [
        ({"input_ids": [4, 5, 6], "labels": [-100] * 3}, "all labels are −100"),
        ({"input_ids": [4, 5, 6], "assistant_masks": [0, 0, 0]}, "without {% generation %} gives"),
        ({"input_ids": [4, 5, 6], "completion_mask": [0, 0, 0]}, "completion masks are all zero"),
        ({"prompt": "a cat"}, "examples with prompts alone need lmbda=1"),
        ({"input_ids": [4]}, "one token long"),
    ],
)
def test_data_without_a_target_is_refused(example, why):
    with pytest.raises(ValueError, match=r"train_dataset: expected target tokens, got none") as e:
        check([example] * 9, tokenizer(STOCK))
    assert why in str(e.value)
    check([*[example] * 8, {"input_ids": [4, 5]}], tokenizer(STOCK))
    check([example] * 9, tokenizer(STOCK), prompts_only=True)


@pytest.mark.parametrize(
    ("example", "name"),
    [
        ({"prompt": "a cat", "completion": None}, "completion"),
        ({"input_ids": [4, 5], "labels": None}, "labels"),
        ({"input_ids": [4, 5], "completion_mask": None}, "completion_mask"),
    ],
)
def test_null_columns_of_targets_are_refused_by_name(example, name):
    words = f"train_dataset: expected values in the column '{name}', got None in all 9 examples"
    with pytest.raises(ValueError, match=words):
        check([*[example] * 9, {"text": "a cat", name: None}], tokenizer(STOCK))
    check([example] * 9, tokenizer(STOCK), prompts_only=True)
    full = {"prompt": "a cat", "completion": "it is"}
    ids = {"input_ids": [4, 5], "labels": [4, 5], "completion_mask": [1, 1]}
    check([*[example] * 9, full, ids], tokenizer(STOCK))


BOT = {"messages": [{**TALK[0]}, {"role": "bot", "content": "it"}]}


@pytest.mark.parametrize(
    ("example", "why"),
    [
        (BOT, "no example has a message with the role 'assistant': the roles are"),
        ({"input_ids": [4, 5, 6], "labels": [-100] * 3}, "all labels are −100"),
        ({"prompt": "a cat"}, "examples with prompts alone need lmbda=1"),
    ],
    ids=["role", "labels", "prompt"],
)
def test_rows_without_a_target_among_others_are_counted(example, why, caplog):
    good = {"input_ids": [4, 5, 6]}
    with caplog.at_level(logging.WARNING, logger="fastdistill"):
        check([good] * 5, tokenizer(STOCK))
        check([good, example], tokenizer(STOCK), prompts_only=True)
    assert not caplog.records
    with caplog.at_level(logging.WARNING, logger="fastdistill"):
        check([good, good, example, good, example], tokenizer(STOCK))
    (text,) = [record.getMessage() for record in caplog.records]
    assert "train_dataset: 2 of 5 examples checked have no target token" in text
    assert f"(the first: example 2): {why}" in text


def test_a_row_that_loses_its_targets_by_max_length_is_named_once(caplog):
    encoder = Encoder(max_length=3)
    cut = {"input_ids": [4, 5, 6, 7], "labels": [-100, -100, -100, 7]}
    with caplog.at_level(logging.WARNING, logger="fastdistill"):
        check_examples("data", [{"input_ids": [4, 5]}, cut], encoder, prompts_only=False)
    (text,) = [record.getMessage() for record in caplog.records]
    assert "1 lose all their targets" in text


@pytest.mark.parametrize(("lacking", "seen"), [({1, 150}, 200), ({0, 1}, 64), (set(), None)])
def test_all_rows_are_counted_where_all_are_read(tmp_path, caplog, lacking, seen):
    """Once: by the few that are looked at, or else by all."""
    ids = [4, 5, 6]
    data = [{"input_ids": ids, "labels": [-100] * 3 if i in lacking else ids} for i in range(200)]
    with caplog.at_level(logging.WARNING, logger="fastdistill"):
        build(tmp_path, data=data)
    texts = [r.getMessage() for r in caplog.records if "no target token" in r.getMessage()]
    assert len(texts) == (seen is not None)
    if seen is not None:
        assert f"of {seen} examples checked" in texts[0]
        assert f"(the first: example {min(lacking)})" in texts[0]


@pytest.mark.parametrize("shift", [1, -1])
def test_labels_that_are_shifted_already_are_refused(shift):
    data = [{"input_ids": ids, "labels": ids.roll(-shift)} for ids in rows()]
    side = "next" if shift == 1 else "previous"
    with pytest.raises(
        ValueError, match=rf"the {side} token in .* of them; the labels are shifted already"
    ):
        check(data)


def test_unshifted_labels_pass_however_they_repeat():
    check([{"input_ids": ids, "labels": ids} for ids in rows()])
    check([{"input_ids": [5] * 12, "labels": [5] * 12}] * 9)
    masked = [{"input_ids": i, "labels": torch.where(i % 3 == 0, i, -100)} for i in rows()]
    check(masked)


def test_an_end_token_lost_with_the_padding_is_refused():
    lost = {"input_ids": [CAT, DOG, IT, END, END], "labels": [CAT, DOG, IT, -100, -100]}
    with pytest.raises(ValueError, match=r"expected the end token \(id 0\) among the labels"):
        check([lost] * 5, PADDED)
    row = {**lost, "labels": [CAT, DOG, IT, END, -100]}
    check([row, *[lost] * 4], PADDED)
    check([lost] * 5, tokenizer())  # nothing says that the end token pads


def test_padding_and_other_peoples_ends_are_no_lost_ends():
    padding = {
        "input_ids": [CAT, DOG, IT, END, END],
        "labels": [CAT, DOG, IT, -100, -100],
        "attention_mask": [1, 1, 1, 0, 0],
    }
    check([padding] * 5, PADDED)
    prompt = {"input_ids": [CAT, END, DOG, IT], "labels": [-100, -100, DOG, IT]}
    check([prompt] * 5, PADDED)


def test_only_a_few_examples_are_looked_at_and_streams_are_left_alone():
    class Counting(list):
        seen = 0

        def __getitem__(self, at):
            Counting.seen += 1
            return super().__getitem__(at)

    check(Counting([{"input_ids": [4, 5, 6]}] * 10_000))
    assert Counting.seen == 64

    class Stream(IterableDataset):
        def __iter__(self):
            raise AssertionError("read")

    check(Stream())
    check(None)
    check([])


def test_conversations_of_a_stock_template_have_targets():
    check([{"messages": TALK}] * 3, tokenizer(STOCK))
