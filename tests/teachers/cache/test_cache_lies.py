"""A cache whose author wrote its hashes anew: each field and each answer is checked."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from fastdistill import CacheError, Teacher, TeacherCache
from helpers.present import present
from helpers.training import VOCAB, peaked, ragged

ROWS = ragged(6)


@pytest.fixture(scope="module", params=["all", "targets"])
def cache(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "cache"
    return TeacherCache.build(
        Teacher(peaked()), ROWS, folder, k=8, temperatures=(1.0, 2.0), positions=request.param
    )


@pytest.fixture
def copied(cache, tmp_path):
    return shutil.copytree(cache.path, tmp_path / "copy")


def rewrite(folder, shard):
    """Make the manifest true of a shard's new bytes."""
    manifest = json.loads((folder / "manifest.json").read_text())
    new = {"sha256": hashlib.sha256(shard.read_bytes()).hexdigest(), "bytes": shard.stat().st_size}
    manifest["shards"][0] |= new
    (folder / "manifest.json").write_text(json.dumps(manifest))


def ask(cache, temperature=1.0):
    for row in ROWS:
        cache.topk(row["input_ids"][None], k=4, temperature=temperature)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ids", 65535),
        ("ids", VOCAB),
        ("ids", 7),
        ("blocks", 255),
        ("logprobs", 5),
        ("logprobs", np.nan),
        ("logprobs", -1.0),
        ("log_tail", 50),
        ("log_tail", 0.0),
        ("log_tail", np.nan),
        ("shift", 1e30),
        ("shift", -np.inf),
        ("shift", 1.0),
        ("starts", 10**12),
        ("starts", -1),
    ],
)
def test_answers_that_lie(copied, field, value):
    shard = copied / "00000.safetensors"
    tensors = {n: t.copy() for n, t in load_file(shard).items()}
    tensors[field][...] = value
    save_file(tensors, shard)
    rewrite(copied, shard)
    cache = TeacherCache(copied)
    words = r"00000\.safetensors: damaged \(.*(ids|blocks|logprobs|log_tail|starts): expected"
    with pytest.raises(CacheError, match=words):
        ask(cache)
    with pytest.raises(CacheError, match=words):
        TeacherCache(copied).verify()


def test_one_temperature_of_several_that_lies(copied):
    shard = copied / "00000.safetensors"
    tensors = {n: t.copy() for n, t in load_file(shard).items()}
    tensors["shift"][-1, 1] += 1
    save_file(tensors, shard)
    rewrite(copied, shard)
    cache = TeacherCache(copied)
    ask(cache)
    with pytest.raises(CacheError, match=r"row 5, position \d+: .*expected"):
        ask(cache, 2.0)
    with pytest.raises(CacheError, match=r"answer \d+: .*expected"):
        cache.verify()


@pytest.mark.parametrize("value", [-1, 10**6, 0])
def test_places_that_lie(copied, cache, value):
    if cache.manifest.settings.positions == "all":
        pytest.skip("all tokens are answered: no places are stored")
    shard = copied / "00000.safetensors"
    tensors = {n: t.copy() for n, t in load_file(shard).items()}
    tensors["places"][...] = value
    save_file(tensors, shard)
    rewrite(copied, shard)
    with pytest.raises(CacheError, match="places of row 0: expected increasing numbers in 0"):
        ask(TeacherCache(copied))
    with pytest.raises(CacheError, match="places: expected increasing"):
        TeacherCache(copied).verify()


def test_rows_with_fewer_answers_than_tokens(copied, cache):
    if cache.manifest.settings.positions != "all":
        pytest.skip("a row may have fewer")
    shard = copied / "00000.safetensors"
    tensors = {n: t.copy() for n, t in load_file(shard).items()}
    tensors["starts"][1:-1] -= 1
    save_file(tensors, shard)
    rewrite(copied, shard)
    with pytest.raises(CacheError, match=r"row 0: expected 4 answers, got 3"):
        ask(TeacherCache(copied))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("k", 10**12),
        ("k", 40),
        ("k", True),
        ("k", 2.5),
        ("temperatures", [0.0, 1.0]),
        ("temperatures", [-1.0]),
        ("temperatures", [float("nan"), 1.0]),
        ("temperatures", [1.0, 1.0]),
        ("temperatures", ["hot"]),
        ("temperatures", [[1.0]]),
        ("temperatures", 1.0),
        ("vocab_size", 10**12),
        ("vocab_size", 0),
        ("rows", 10**15),
        ("rows_per_shard", 0),
        ("targets", ["topk"]),
        ("positions", {}),
        ("max_length", "long"),
        ("completion_only", 1),
        ("teacher", "me"),
        ("teacher", {}),
        ("seed", "x"),
        ("library", []),
        ("tokenizer_sha256", 7),
        ("version", [1]),
    ],
)
def test_a_manifest_that_lies(copied, field, value):
    file = copied / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    words = "version 1" if field == "version" else f"{field}|k=40|shards"
    with pytest.raises(CacheError, match=rf"manifest\.json: .*({words})"):
        TeacherCache(copied)


@pytest.mark.parametrize(
    "entry",
    [
        {"rows": -5},
        {"tokens": -1},
        {"tokens": 10**12},
        {"bytes": 10},
        {"file": "../../x.safetensors"},
        {"sha256": None},
        {"more": 1},
    ],
)
def test_what_is_said_of_a_shard(copied, entry):
    file = copied / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["shards"][0] |= entry
    file.write_text(json.dumps(manifest))
    with pytest.raises(CacheError, match=r"manifest\.json: damaged"):
        TeacherCache(copied)
    manifest["shards"] = [[1]]
    file.write_text(json.dumps(manifest))
    with pytest.raises(CacheError, match=r"manifest\.json: damaged"):
        TeacherCache(copied)


@pytest.mark.parametrize("field", ["first_row", "last_row"])
def test_a_row_of_the_manifest_that_the_shard_does_not_have(copied, field):
    file = copied / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["shards"][0][field] = "00" * 16
    file.write_text(json.dumps(manifest))
    words = rf"00000\.safetensors: damaged \(keys: expected 0+, the {field} of manifest\.json"
    with pytest.raises(CacheError, match=words):
        ask(TeacherCache(copied))
    with pytest.raises(CacheError, match=words):
        TeacherCache(copied).verify()


def test_a_tensor_of_a_shard_that_would_not_be_used(copied):
    shard = copied / "00000.safetensors"
    save_file(load_file(shard) | {"bias": np.ones(3, np.float32)}, shard)
    rewrite(copied, shard)
    with pytest.raises(CacheError, match=r"00000\.safetensors: damaged \('bias' is no tensor of"):
        ask(TeacherCache(copied))


def header(**changes):
    def changed(header_of_shard):
        return header_of_shard | {
            name: header_of_shard["keys"] | entry for name, entry in changes.items()
        }

    return changed


@pytest.mark.parametrize(
    "change",
    [
        lambda entries: [1, 2],
        lambda entries: {"keys": 1},
        lambda entries: {},
        header(keys={"dtype": ["U8"]}),
        header(keys={"dtype": "F128"}),
        header(keys={"shape": [-1, 16]}),
        header(keys={"shape": "6"}),
        header(keys={"shape": [10**30]}),
        header(keys={"data_offsets": [0]}),
        header(keys={"data_offsets": [5, 1]}),
        header(keys={"data_offsets": [0, 10**30]}),
        header(keys={"data_offsets": None}),
    ],
)
def test_a_shard_whose_header_lies(copied, change):
    shard = copied / "00000.safetensors"
    data = shard.read_bytes()
    size = int.from_bytes(data[:8], "little")
    text = json.dumps(change(json.loads(data[8 : 8 + size]))).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :] + bytes(2000))
    rewrite(copied, shard)
    with pytest.raises(CacheError, match=r"00000\.safetensors: damaged"):
        ask(TeacherCache(copied))


@pytest.mark.parametrize("start", [b"\xff" * 8, (10**6).to_bytes(8, "little") + b"[" * 10**6, b""])
def test_a_shard_that_is_no_safetensors(copied, start):
    shard = copied / "00000.safetensors"
    shard.write_bytes(start + bytes(20_000) if start else b"")
    rewrite(copied, shard)
    with pytest.raises(CacheError, match="damaged"):
        ask(TeacherCache(copied))


@pytest.mark.parametrize("text", ["[" * 100_000, "\udcff", "{", "1", '{"version": NaN}'])
def test_texts_that_are_no_manifest(copied, text):
    (copied / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CacheError, match=r"manifest\.json"):
        TeacherCache(copied)
    for name in (".verified.json", "00000.json", "settings.json"):
        (copied / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CacheError, match=r"(manifest|settings)\.json"):
        TeacherCache.build(Teacher(peaked()), ROWS, copied, k=8)


def test_a_true_cache_gives_what_it_gave(cache):
    verified = cache.verify()
    assert verified.tokens == cache.manifest.tokens
    teacher = Teacher(peaked())
    for row in ROWS:
        expected = teacher.topk(row["input_ids"][None], k=4, temperature=2.0)
        answers = cache.topk(row["input_ids"][None], k=4, temperature=2.0)
        at = cache.answered(row["input_ids"])
        assert at.any()
        same = answers.ids[0, at].sort(-1).values == expected.ids[0, at].sort(-1).values
        assert same.float().mean() > 0.99  # fp16 may swap two that are equal
        assert torch.allclose(
            present(answers.log_tail)[0, at], present(expected.log_tail)[0, at], atol=1e-2
        )
