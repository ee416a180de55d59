"""Opens the dataset that a user names: a file, a folder saved by datasets, or a hub name.

x.jsonl, .ndjson, .json      JSON lines, or a .json file with one list of objects
x.parquet, x.csv             read by datasets; every cell of a .csv file is a text
folder[:SPLIT]               as Dataset.save_to_disk or DatasetDict.save_to_disk writes it
owner/name[:CONFIG][:SPLIT]  on the hub; SPLIT may be a slice, as train[:1000]
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..runtime.checks import fail
from ..runtime.json_text import parse_json
from ..runtime.optional import require
from ..runtime.printable import printable
from .encoder import check_example
from .jsonl import SUFFIXES, JsonLines, Line
from .source import HUB_NAME

_KINDS = (
    "a .jsonl, .json, .parquet or .csv file, a folder saved by datasets (save_to_disk), or a "
    "dataset on the hub with its split (owner/name:train)"
)
_COLON = re.compile(r":(?![^\[]*\])")  # outside a slice, as in train[:10]
_TABLES = (".parquet", ".csv")
_MARKS = ("state.json", "dataset_dict.json")  # of a folder saved by datasets


def open_dataset(
    source: str | Path, name: str = "data", check: Callable[[Any], Any] = check_example
) -> Any:
    """Return the rows that a file, a folder or a hub name refers to, with length and index.

    Args:
        source: see above. name: the argument that errors name. check: called with every row;
            raises ValueError or TypeError to reject it.

    Raises:
        ValueError: nothing is there, it cannot be read, it has several splits and none is named,
        or a row, named by its number, is rejected: by default, if it is no example (columns.py).
        ImportError: the package datasets is needed and not installed.
    """
    path = Path(source).expanduser()
    if path.suffix in SUFFIXES and not _is_json_list(path):
        return JsonLines(path, name, check)
    if path.suffix in SUFFIXES:
        rows = _json_list(path, name)
    else:
        rows = _load(str(source), name)
        _check_no_media(rows, name, source)
    if not len(rows):
        fail(name, "an example", f"none in {printable(source)}")
    for number, row in enumerate(rows, 1):
        try:
            check(row)
        except (ValueError, TypeError) as error:
            place = f"row {number} of {printable(source)}"
            raise type(error)(f"{name}: {error} ({place})") from None
    return rows


def _is_json_list(path: Path) -> bool:
    if path.suffix != ".json" or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4096).lstrip().startswith(b"[")


def _json_list(path: Path, name: str) -> list[Line]:
    rows = []
    place = f"{name}: {printable(path)}"
    for number, row in enumerate(parse_json(path.read_bytes(), place, list, unique=True), 1):
        if not isinstance(row, dict):
            fail(name, f"JSON objects in {printable(path)}", f"{type(row).__name__} as {number}")
        rows.append(Line(row))
        rows[-1].source = f"row {number} of {printable(path)}"
    return rows


def _load(source: str, name: str) -> Any:
    """Return a datasets.Dataset of a Parquet or CSV file, a saved folder or a hub name."""
    base, *parts = _COLON.split(source)
    file, folder = Path(source).expanduser(), Path(base).expanduser()
    is_file = file.suffix in _TABLES and file.is_file()
    is_saved = len(parts) < 2 and any((folder / mark).is_file() for mark in _MARKS)
    is_path = folder.exists() or folder.suffix in _TABLES
    is_on_hub = len(parts) < 3 and HUB_NAME.fullmatch(base) and not is_path
    if not (is_file or is_saved or is_on_hub):
        fail(name, _KINDS, printable(repr(source)))
    datasets = require("datasets", name, "'fastdistill[data]'")
    split = parts[-1] if parts else None
    try:
        if is_file:
            return _file(file)
        if is_saved:
            rows = datasets.load_from_disk(str(folder))
        else:
            config = parts[0] if len(parts) == 2 else None
            rows = datasets.load_dataset(base, config, split=split)
    except Exception as error:  # the readers of many formats raise many kinds
        fail(name, _KINDS, f"{printable(repr(source))}: {printable(error, 300)}")
    if not isinstance(rows, dict):
        if is_saved and split is not None:
            fail(name, f"{printable(base)} alone, which has no splits", printable(repr(source)))
        return rows
    if split is None and len(rows) == 1:
        split = next(iter(rows))
    if split not in rows:
        hint = f"pass {printable(base)}:{next(iter(rows))}"
        fail(name, f"a split of {', '.join(rows)}", printable(repr(source)), hint)
    return rows[split]


def _check_no_media(rows: Any, name: str, source: str | Path) -> None:
    """Raise ValueError for a column of images, audio or video, before it is decoded."""
    from datasets.features.features import require_decoding

    for column, feature in rows.features.items():
        if require_decoding(feature):
            fail(
                name,
                f"columns of texts and ids in {printable(source)}",
                f"{printable(repr(feature), 40)} in the column {printable(repr(column))}",
                "images, audio and video are not read; remove the column",
            )


def _file(path: Path) -> Any:
    import datasets

    options: dict[str, Any] = {}
    if path.suffix == ".csv":  # nothing is guessed: a text may be 007, null or NA
        with path.open(newline="", encoding="utf-8-sig") as file:
            header = next(csv.reader(file), [])
        texts = datasets.Features({column: datasets.Value("string") for column in header})
        options = {"features": texts, "keep_default_na": False}
    kind = path.suffix.removeprefix(".")
    return datasets.load_dataset(kind, data_files=str(path), split="train", **options)
