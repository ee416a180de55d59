"""The same rows are read from every kind of file, from saved folders and from the hub."""

from __future__ import annotations

import csv
import json

import datasets
import pytest
import torch

from fastdistill.hf.open_dataset import open_dataset
from helpers.example_texts import tokenizer
from helpers.training import build, weights

ROWS = [
    {"prompt": "a cat ", "completion": 'is "it"', "id": "007"},
    {"prompt": "a dog,\na ", "completion": "null", "id": "NA"},
    {"prompt": "it ", "completion": "is a cat", "id": "3"},
]
NAMES = ("jsonl", "ndjson", "lines", "json", "parquet", "csv", "saved", "split", "hub", "config")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The names of ROWS by kind; the hub is a stand-in."""
    folder = tmp_path_factory.mktemp("data")
    table = datasets.Dataset.from_list(ROWS)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        read = datasets.load_dataset

        def load_dataset(path, name=None, split=None, **options):
            if path in ("csv", "parquet"):
                return read(path, split=split, **options)
            if (path, name) not in (("owner/name", None), ("owner/name", "small")):
                raise FileNotFoundError(f"no dataset {path} {name}")
            splits = datasets.DatasetDict({"train": table, "test": table.select([0])})
            return splits if split is None else splits[split.partition("[")[0]]

        patch.setattr(datasets, "load_dataset", load_dataset)
        for name in ("rows.jsonl", "rows.ndjson", "lines.json"):
            (folder / name).write_text(lines)
        (folder / "rows.json").write_text(json.dumps(ROWS, indent=2))
        table.to_parquet(folder / "rows.parquet")
        with (folder / "rows.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ROWS[0])
            writer.writeheader()
            writer.writerows(ROWS)
        table.save_to_disk(folder / "saved")
        datasets.DatasetDict({"train": table, "test": table}).save_to_disk(folder / "splits")
        yield {
            **{kind: folder / f"rows.{kind}" for kind in ("jsonl", "ndjson", "json", "parquet")},
            "csv": folder / "rows.csv",
            "lines": folder / "lines.json",
            "saved": folder / "saved",
            "split": f"{folder / 'splits'}:test",
            "hub": "owner/name:train[:3]",
            "config": "owner/name:small:train",
        }


def test_the_same_rows_through_every_door(sources):
    for name in NAMES:
        rows = open_dataset(sources[name])
        assert len(rows) == 3, name
        assert [rows[i] for i in range(3)] == ROWS, name


def test_the_same_rows_give_the_same_weights(sources, tmp_path):
    names = ("jsonl", "json", "parquet", "csv", "saved", "hub")
    datasets_read = [open_dataset(sources[name]) for name in names]
    datasets_read.append(datasets.load_from_disk(sources["saved"]).to_iterable_dataset())
    trained = []
    for rows in datasets_read:
        trainer = build(
            tmp_path,
            data=rows,
            processing_class=tokenizer(),
            teacher=None,
            ce_weight=1.0,
            per_device_train_batch_size=3,
        )
        trainer.train()
        trained.append(weights(trainer))
    for other in trained[1:]:
        assert torch.allclose(trained[0], other, atol=1e-6)


def refusal(file):
    """Why a file is refused; its name if it is read."""
    try:
        rows = open_dataset(file)
        assert all(isinstance(rows[i], dict) for i in range(len(rows)))
    except ValueError as error:
        return str(error)
    return file.name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of datasets, after its own error
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["parquet", "csv", "json", "jsonl"])
def test_a_damaged_file_is_read_or_refused_by_its_name(sources, tmp_path, kind):
    data = sources[kind].read_bytes()
    for at in range(0, len(data), max(1, len(data) // 12)):
        for part in (b"", bytes([data[at] ^ 0x81]) + data[at + 1 :]):
            file = tmp_path / f"{at}-{len(part)}.{kind}"
            file.write_bytes(data[:at] + part)
            assert file.name in refusal(file)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("none.parquet", "expected a .jsonl, .json, .parquet or .csv file, a folder .* got '"),
        ("text.txt", "expected a .jsonl"),
        ("", "expected a .jsonl"),
        ("bad.parquet", r"expected a .jsonl.*bad\.parquet': Parquet file size is 5 bytes"),
        ("splits", r"expected a split of train, test, got .*; pass .*splits:train"),
        ("splits:validation", "expected a split of train, test"),
        ("saved:train", "saved alone, which has no splits"),
        ("number.json", "expected JSON objects in .*, got int as 2"),
        ("row.json", r"text: expected a text, got int 5 \(row 2 of .*row\.json\)"),
        ("empty.csv", r"expected a .jsonl.*empty\.csv'"),
        ("empty.json", "expected an example, got none"),
        ("other.csv", r"expected dicts with .*got \['words'\] \(row 1 of .*other\.csv\)"),
    ],
)
def test_what_cannot_be_read_is_named(sources, source, words):
    folder = sources["jsonl"].parent
    (folder / "bad.parquet").write_text("hello")
    (folder / "number.json").write_text('[{"text": "a"}, 5]')
    (folder / "row.json").write_text('[{"text": "a"}, {"text": 5}]')
    (folder / "empty.csv").write_text("text\n")
    (folder / "empty.json").write_text("[]")
    (folder / "other.csv").write_text("words\nhello\n")
    with pytest.raises(ValueError, match=f"eval_data: .*{words}"):
        open_dataset(folder / source, "eval_data")


def test_names_on_the_hub_need_a_split(sources):
    with pytest.raises(ValueError, match=r"a split of train, test, .*; pass owner/name:train"):
        open_dataset("owner/name")
    with pytest.raises(ValueError, match="got 'owner/other:train': no dataset owner/other None"):
        open_dataset("owner/other:train")


def test_columns_of_images_are_refused_before_they_are_decoded(tmp_path):
    features = {"text": datasets.Value("string"), "shots": datasets.List(datasets.Image())}
    rows = {"text": ["a"], "shots": [[{"bytes": b"none", "path": None}]]}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    table.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"data: expected columns of texts .* column 'shots'; im"):
        open_dataset(tmp_path / "saved")
