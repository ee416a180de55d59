"""DistillKit's Parquet becomes a cache of ours; tests/golden/distillkit.json is what it wrote.

The golden file holds, for three settings of its compression, the bytes of five positions and what
DistillKit itself reads from them (arcee-ai/DistillKit, compression/ of 2026-11).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from fastdistill import CacheError, TeacherCache
from fastdistill.teachers.cache.distillkit_parquet import CONFIG, Compression, ParquetRows, files_of
from helpers.present import present

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

GOLDEN = json.loads(
    (Path(__file__).resolve().parents[2] / "golden" / "distillkit.json").read_text()
)
COLUMNS = ("bytepacked_indices", "compressed_logprobs")
IDS = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7], [9, 2, 3, 4, 5]]  # the last has no answer, or has


def hexed(case, name):
    return np.stack([np.frombuffer(bytes.fromhex(row), np.uint8) for row in case[name]])


def written(folder, case, ids=IDS):
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(yaml.safe_dump(case["config"]))
    columns = {"input_ids": pa.array(ids, pa.list_(pa.uint64()))}
    for name in COLUMNS:
        rows = [[list(bytes.fromhex(row)) for row in case[name]]] * len(ids)
        columns[name] = pa.array(rows, pa.list_(pa.list_(pa.uint8())))
    pq.write_table(pa.table(columns), folder / "data_0.parquet", row_group_size=2)
    return folder


@pytest.mark.parametrize("name", GOLDEN)
def test_bytes_are_read_as_distillkit_reads_them(tmp_path, name):
    case = GOLDEN[name]
    compression = Compression.read(written(tmp_path / "in", case) / CONFIG)
    assert compression.ids(hexed(case, COLUMNS[0])).tolist() == case["ids"]
    decoded = compression.logprobs(hexed(case, COLUMNS[1]))
    # Its own arithmetic is in the types of the file, float16 at worst.
    assert np.abs(decoded - np.array(case["logprobs"])).max() < 1e-3


@pytest.mark.parametrize("name", GOLDEN)
def test_a_cache_of_it(tmp_path, name):
    case = GOLDEN[name]
    cache = TeacherCache.from_parquet(written(tmp_path / "in", case), tmp_path / "out")
    k = case["config"]["k"]
    assert cache.vocab_size == case["config"]["d"]
    assert cache.manifest.settings.rows == 3
    for row in IDS:
        answers = cache.topk(torch.tensor([row]), k=k)
        ids = torch.tensor(case["ids"])[: len(row)].sort(-1)
        assert torch.equal(answers.ids[0, :5].long(), ids.values)
        expected = torch.tensor(case["logprobs"]).gather(-1, ids.indices)
        assert (answers.logprobs[0, :5] - expected).abs().max() < 1e-2
        assert answers.ids[0, 5:].eq(-1).all()
        total = answers.logprobs.exp().sum(-1) + present(answers.log_tail).exp()
        assert torch.allclose(total, torch.ones_like(total), atol=1e-5)


def raw(folder, ids, tokens, values, name="data_0.parquet"):
    lists = {"token_ids": (tokens, pa.uint32()), "top_values": (values, pa.float32())}
    columns = {n: pa.array(v, pa.list_(pa.list_(kind))) for n, (v, kind) in lists.items()}
    table = pa.table({"input_ids": pa.array(ids, pa.list_(pa.int64())), **columns})
    pq.write_table(table, folder / name)


def test_plain_top_k_in_several_files(tmp_path):
    for i in range(11):  # data_10 comes behind data_9, not behind data_1
        raw(
            tmp_path,
            [[i, 2]],
            [[[5, 6], [7, 8]]],
            [[[-1.0, -2.0], [-0.5, -np.inf]]],
            f"data_{i}.parquet",
        )
    rows = ParquetRows(files_of(tmp_path))
    assert [rows[i]["input_ids"][0] for i in range(len(rows))] == list(range(11))
    cache = TeacherCache.from_parquet(tmp_path, tmp_path / "out", vocab_size=99)
    answers = cache.topk(torch.tensor([[3, 2]]), k=2)
    assert answers.ids.tolist() == [[[5, 6], [7, -1]]]
    assert answers.logprobs[0, 1, 0].item() == pytest.approx(-0.5, abs=1e-3)


def test_mass_that_compression_added_is_taken_back(tmp_path):
    raw(tmp_path, [[1, 2]], [[[5, 6]]], [[[-0.6, -0.7]]])
    answers = TeacherCache.from_parquet(tmp_path, tmp_path / "out").topk(
        torch.tensor([[1, 2]]), k=2
    )
    assert answers.logprobs[0, 0].exp().sum() <= 1
    raw(tmp_path, [[1, 2]], [[[5, 6]]], [[[0.6, 0.7]]])
    with pytest.raises(CacheError, match=r"row 0: expected log-probabilities, got a mass of 3\."):
        TeacherCache.from_parquet(tmp_path, tmp_path / "again")


def test_what_is_not_distillkits(tmp_path):
    with pytest.raises(ValueError, match="parquet: expected a Parquet file, or a folder"):
        files_of(tmp_path)
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(CacheError, match=r"a\.parquet: expected the columns input_ids and either"):
        ParquetRows(files_of(tmp_path))
    case = GOLDEN["deltas"]
    folder = written(tmp_path / "in", case)
    (folder / CONFIG).write_text(yaml.safe_dump(case["config"] | {"d": 4096}))
    with pytest.raises(CacheError, match=r"bytepacked_indices: expected 24 bytes per position"):
        ParquetRows(files_of(folder))
    (folder / CONFIG).write_text(yaml.safe_dump(case["config"] | {"exact_dtype": "int8"}))
    with pytest.raises(CacheError, match=r"compression_config\.yaml: expected DistillKit's"):
        ParquetRows(files_of(folder))
    (folder / CONFIG).write_text(yaml.safe_dump(case["config"] | {"exact_k": 16}))
    with pytest.raises(CacheError, match="compressed_logprobs: expected more bytes"):
        ParquetRows(files_of(folder))
    (folder / CONFIG).unlink()
    with pytest.raises(CacheError, match=r"expected compression_config\.yaml in its folder"):
        ParquetRows(files_of(folder))


@pytest.mark.parametrize("flipped", range(0, 240, 3))
def test_damage_is_an_error_of_the_cache(tmp_path, flipped):
    """pyarrow has errors of many classes, and some hold control characters."""
    raw(tmp_path, [[1, 2]], [[[5, 6]]], [[[-0.6, -0.7]]])
    file = tmp_path / "data_0.parquet"
    data = bytearray(file.read_bytes())
    at = len(data) - 9 - flipped  # from the end: the footer comes last, and is most of the file
    data[at] ^= 0x55
    file.write_bytes(data)
    words = ""
    try:
        ParquetRows(files_of(tmp_path)).answer(0)
    except CacheError as error:
        words = str(error)
    assert words.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    "columns",
    [
        {"input_ids": [1], "token_ids": [[[5, 6]]], "top_values": [[[-0.6, -0.7]]]},
        {"input_ids": [[1]], "token_ids": ["x"], "top_values": [[[-0.6, -0.7]]]},
        {"input_ids": [[1]], "token_ids": [[[5, 6]]], "top_values": [{"a": 1}]},
        {"input_ids": [b"x"], "token_ids": [[[5, 6]]], "top_values": [[]]},
    ],
)
def test_columns_of_another_type_are_an_error_of_the_cache(tmp_path, columns):
    pq.write_table(pa.table(columns), tmp_path / "data_0.parquet")
    with pytest.raises(CacheError, match=r"expected "):
        assert ParquetRows(files_of(tmp_path))[0]


def test_a_row_whose_answers_do_not_fit(tmp_path):
    folder = written(tmp_path / "in", GOLDEN["exact"], [[1, 2, 3]])
    with pytest.raises(CacheError, match="row 0: expected 2 or 3 answers to its 3 tokens, got 5"):
        TeacherCache.from_parquet(folder, tmp_path / "out")


def _changes(*changes: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    return changes


BASE = {"d": 99, "k": 3, "exact_k": 1}
BIN = {"scale_dtype": "float16", "element_bits": 4, "num_elements": 2}


@pytest.mark.parametrize(
    "text",
    [
        "d: [1",
        "[" * 3000,
        "- 1",
        "",
        "d: &a [1, 2]\nk: *b",
        "\x00",
        "a" * 100_000,
        *(
            yaml.safe_dump(BASE | change)
            for change in _changes(
                {"d": 0},
                {"d": True},
                {"d": 10**12},
                {"d": "many"},
                {"k": 0},
                {"k": 10**12},
                {"k": 100},
                {"exact_k": -1},
                {"exact_k": 4},
                {"exact_dtype": ["float32"]},
                {"term_dtype": None},
                {"delta_encoding": "no"},
                {"polynomial_terms": 3},
                {"polynomial_terms": [-1]},
                {"polynomial_terms": [10**9]},
                {"polynomial_terms": ["cos"]},
                {"polynomial_terms": [1] * 1000},
                {"residual_bins": [1]},
                {"residual_bins": [{}]},
                {"residual_bins": [BIN | {"element_bits": 0}]},
                {"residual_bins": [BIN | {"element_bits": 10**9}]},
                {"residual_bins": [BIN | {"num_elements": 10**12}]},
                {"residual_bins": [BIN | {"num_elements": -1}]},
                {"residual_bins": [BIN | {"scale_dtype": "int8"}]},
                {"more": 1},
            )
        ),
    ],
)
def test_settings_that_are_none(tmp_path, text):
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(CacheError, match=r"compression_config\.yaml: expected DistillKit's sett"):
        Compression.read(tmp_path / CONFIG)


def test_more_residuals_than_there_are_slots(tmp_path):
    (tmp_path / CONFIG).write_text(yaml.safe_dump(BASE | {"residual_bins": [BIN, BIN]}))
    with pytest.raises(CacheError, match=r"residual_bins in .* expected 2 elements at most"):
        Compression.read(tmp_path / CONFIG).logprobs(np.zeros((4, 64), np.uint8))


@pytest.mark.parametrize(
    ("ids", "tokens", "values", "words"),
    [
        ([[1, None]], [[[5, 6]]], [[[-1.0, -2.0]]], "row 0: input_ids: expected numbers, got a nu"),
        ([[1, 2]], [[[5, None]]], [[[-1.0, -2.0]]], "row 0: token_ids: expected numbers, got a nu"),
        ([[1, 2]], [[[5, 6], [7]]], [[[-1.0, -2.0], [-3.0]]], "expected lists of one length"),
        ([[1, 2]], [[[5, 6]]], [[[-1.0, -2.0, -3.0]]], "row 0: expected ids and logprobs of one"),
        ([[1, 2]], [[[5, 5]]], [[[-1.0, -2.0]]], "expected 2 different ids, got 5 more than once"),
        ([[1, 2]], [[[5, 99]]], [[[-1.0, -2.0]]], r"ids in 0\.\.98, .*got 99"),
        ([[1, 2]], [[[5, 6]]], [[[-1.0, np.nan]]], "expected log-probabilities, got a mass of nan"),
    ],
)
def test_rows_that_are_none(tmp_path, ids, tokens, values, words):
    raw(tmp_path, ids, tokens, values)
    with pytest.raises(CacheError, match=words):
        TeacherCache.from_parquet(tmp_path, tmp_path / "out", vocab_size=99)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32()])
def test_values_that_were_rounded_to_16_bits(tmp_path, kind):
    exact = (torch.randn(64, generator=torch.Generator().manual_seed(2)) * 2).log_softmax(-1)
    values = exact.half().numpy() if kind == pa.float16() else exact.bfloat16().float().numpy()
    columns = {
        "token_ids": pa.array([[list(range(64))]], pa.list_(pa.list_(pa.uint32()))),
        "top_values": pa.array([[list(values)]], pa.list_(pa.list_(kind))),
    }
    pq.write_table(pa.table({"input_ids": [[1, 2]], **columns}), tmp_path / "a.parquet")
    cache = TeacherCache.from_parquet(tmp_path, tmp_path / "out", vocab_size=64)
    logprobs = cache.topk(torch.tensor([[1, 2]]), k=64).logprobs[0, 0]
    assert (logprobs.exp() - exact.exp()).abs().max() < 2e-3
    cache.verify()
