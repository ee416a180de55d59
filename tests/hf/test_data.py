"""Padding is known by length, the first token is never a target, and mistakes are named."""

from __future__ import annotations

import pytest
import torch

from fastdistill.hf.collator import DistillCollator

EOS = 2


def test_an_end_token_that_doubles_as_padding_stays_a_target():
    batch = DistillCollator(pad_id=EOS)([{"input_ids": [5, 6, EOS]}, {"input_ids": [7, EOS]}])
    assert batch["input_ids"].tolist() == [[5, 6, EOS], [7, EOS, EOS]]
    assert batch["labels"].tolist() == [[-100, 6, EOS], [-100, EOS, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_given_labels_and_masks_are_kept():
    example = {
        "input_ids": torch.tensor([5, 6, 7, 0]),
        "labels": [-100, -100, 7, 8],
        "attention_mask": [1, 1, 1, 0],
        "text": "not a column of the model",
    }
    batch = DistillCollator()([example])
    assert sorted(batch) == ["attention_mask", "input_ids", "labels"]
    assert batch["labels"].tolist() == [[-100, -100, 7, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0]]
    assert example["labels"] == [-100, -100, 7, 8]


def test_the_first_token_is_no_target_and_the_example_is_untouched():
    ids = torch.tensor([5, 6, 7])
    batch = DistillCollator()([{"input_ids": ids, "labels": ids}])
    assert batch["labels"].tolist() == [[-100, 6, 7]]
    assert ids.tolist() == [5, 6, 7]


def test_length_is_rounded_up():
    batch = DistillCollator(pad_to_multiple_of=8)([{"input_ids": list(range(9))}])
    assert batch["input_ids"].shape == (1, 16)
    assert batch["labels"][0, 9:].eq(-100).all()


@pytest.mark.parametrize(
    ("example", "words"),
    [
        ({"words": "hello"}, r"train_dataset: expected dicts .* got \['words'\]"),
        ({"text": "hello"}, r"processing_class: expected the tokenizer, to read \['text'\]"),
        ("hello", r"train_dataset: expected dicts .* got str"),
        ({"input_ids": []}, r"input_ids: expected a non-empty one-dimensional"),
        ({"input_ids": [[1, 2]]}, r"input_ids: expected a non-empty one-dimensional"),
        ({"input_ids": [1, 2], "labels": [1]}, r"labels: expected 2 values, .* got 1"),
        ({"input_ids": [1, 2], "attention_mask": [1, 1, 1]}, r"attention_mask: expected 2 values"),
    ],
)
def test_what_is_wrong_is_named(example, words):
    with pytest.raises(ValueError, match=words):
        DistillCollator()([example])


def test_floating_point_ids_are_refused():
    with pytest.raises(TypeError, match=r"input_ids: expected integers, got torch.float32"):
        DistillCollator()([{"input_ids": [1.0, 2.0]}])
