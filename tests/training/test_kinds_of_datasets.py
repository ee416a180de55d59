"""A trainer takes lists, datasets and streams of examples; anything else is refused by name."""

from __future__ import annotations

import datasets
import pandas
import pytest

from helpers.training import build, llama

IDS = {"input_ids": [4, 5, 6, 7]}
ROWS = datasets.Dataset.from_list([IDS] * 4)


@pytest.mark.parametrize(
    "made",
    [
        lambda: (row for row in [IDS] * 4),
        lambda: iter([IDS] * 4),
        lambda: {"input_ids": [[4, 5, 6]] * 4},
        lambda: datasets.DatasetDict({"train": ROWS}),
        lambda: pandas.DataFrame({"input_ids": [[4, 5, 6]] * 4}),
        lambda: "train.jsonl",
        lambda: 5,
        lambda: {IDS["input_ids"][0]},
    ],
)
def test_what_is_no_dataset_is_refused_by_name(tmp_path, made):
    words = rf"train_dataset: expected a dataset or a list of .*, got {type(made()).__name__}\."
    with pytest.raises(TypeError, match=words):
        build(tmp_path, trainer={"train_dataset": made()})
    other = made() if isinstance(made(), (str, int)) else {"a": made()}
    name = r"eval_dataset\['a'\]" if isinstance(other, dict) else "eval_dataset"
    with pytest.raises(TypeError, match=rf"{name}: expected a dataset or a list of examples"):
        build(tmp_path, data=[IDS] * 4, eval_dataset=other)


@pytest.mark.parametrize("made", [[], (), ROWS.select([])])
def test_a_dataset_without_examples_is_refused_by_name(tmp_path, made):
    with pytest.raises(ValueError, match="train_dataset: expected an example, got none"):
        build(tmp_path, trainer={"train_dataset": made})
    with pytest.raises(ValueError, match="eval_dataset: expected an example, got none"):
        build(tmp_path, data=[IDS] * 4, eval_dataset=made)


@pytest.mark.fast_cases(3)
@pytest.mark.parametrize(
    "made",
    [
        [IDS] * 4,
        (IDS,) * 4,
        ROWS,
        ROWS.with_format("torch"),
        ROWS.to_iterable_dataset(),
        datasets.IterableDataset.from_generator(lambda: iter([IDS] * 4)),
    ],
)
def test_lists_datasets_and_streams_train(tmp_path, made):
    trainer = build(tmp_path, model=llama(0), data=made, max_steps=2)
    assert trainer.train().global_step == 2
