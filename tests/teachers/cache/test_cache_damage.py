"""Damage to a cache is found and named, whether or not the disk says that anything changed."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from fastdistill import CacheError, Teacher, TeacherCache
from fastdistill.teachers.cache import verification
from helpers.training import peaked, ragged


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "cache"
    options: dict[str, Any] = {"k": 8, "temperatures": (1.0, 2.0), "shard_mb": 0.004}
    return TeacherCache.build(Teacher(peaked()), ragged(40), folder, **options)


@pytest.fixture
def copied(cache, tmp_path):
    return shutil.copytree(cache.path, tmp_path / "copy")


def test_a_flipped_bit_is_found(copied):
    TeacherCache(copied)
    file = copied / "00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    with pytest.raises(CacheError, match=r"00002\.safetensors is damaged"):
        TeacherCache(copied)
    cache = TeacherCache(copied, check=False)
    with pytest.raises(CacheError, match=r"00002\.safetensors is damaged"):
        cache.verify()


def test_bits_that_flip_without_a_trace_are_found_by_verify(cache, monkeypatch):
    """A disk does not change a file's time when it loses a bit."""
    cache = TeacherCache(cache.path)
    assert cache.verify() == (
        len(cache.manifest.shards),
        cache.manifest.tokens,
        cache.manifest.bytes,
    )
    reads = []

    def wrong_digest(file):
        reads.append(file)
        return "0"

    monkeypatch.setattr(verification, "sha256_of", wrong_digest)
    TeacherCache(cache.path)
    assert not reads  # nothing has changed since it was compared
    with pytest.raises(CacheError, match="is damaged"):
        cache.verify()
    assert len(reads) == len(cache.manifest.shards)


def test_missing_and_cut_shards_are_named(copied):
    (copied / "00001.safetensors").unlink()
    with (copied / "00000.safetensors").open("r+b") as file:
        file.truncate(100)
    words = r"00000\.safetensors has 100 bytes, not [\d,]+; 00001\.safetensors is missing"
    with pytest.raises(CacheError, match=words):
        TeacherCache(copied, check=False)


@pytest.mark.parametrize("name", ["manifest.json", "00001.safetensors", ".verified.json"])
def test_a_file_that_links_out_of_the_cache_is_refused(copied, tmp_path, name):
    (copied / name).rename(tmp_path / name)
    (copied / name).symlink_to(tmp_path / name)
    with pytest.raises(CacheError, match=r"expected a file of this folder, got a link to"):
        TeacherCache(copied)


def test_a_build_does_not_write_through_a_link(copied, tmp_path):
    (tmp_path / "mine").write_text("text")
    (copied / ".building-0").symlink_to(tmp_path / "mine")
    options: dict[str, Any] = {"k": 8, "temperatures": (1.0, 2.0), "shard_mb": 0.004}
    with pytest.raises(CacheError, match="got a link to"):
        TeacherCache.build(Teacher(peaked()), ragged(40), copied, **options)
    assert (tmp_path / "mine").read_text() == "text"


def test_a_cache_in_the_cache_of_the_hub_is_read(copied, tmp_path):
    """snapshots/<revision>/file is a link into blobs."""
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "1", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in copied.iterdir():
        shutil.copy(file, blobs)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert TeacherCache(snapshot).verify().shards == len(list(copied.glob("*.safetensors")))


def test_a_header_that_says_something_else(copied):
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["k"] = 7
    (copied / "manifest.json").write_text(json.dumps(manifest))
    cache = TeacherCache(copied)
    with pytest.raises(CacheError, match=r"00000\.safetensors: damaged \('ids' is not"):
        cache.topk(ragged(40)[0]["input_ids"][None], k=7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[: len(text) // 2], "damaged"),
        (lambda text: "[]", "expected a JSON object"),
        (lambda text: text.replace('"version": 1', '"version": 2'), "expected version 1"),
        (lambda text: text.replace('"targets": "topk"', '"targets": "best"'), "not those of a"),
        (
            lambda text: text.replace('"tokens": ', '"tokens": "', 1).replace(",", '",', 1),
            "damaged",
        ),
    ],
)
def test_a_damaged_manifest(copied, change, words):
    file = copied / "manifest.json"
    file.write_text(change(file.read_text()))
    with pytest.raises(CacheError, match=words):
        TeacherCache(copied)


def test_no_cache_and_one_that_is_not_whole(copied, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected the folder of a teacher cache"):
        TeacherCache(tmp_path)
    (copied / "manifest.json").unlink()
    with pytest.raises(CacheError, match="whose build has not ended"):
        TeacherCache(copied)


def test_a_folder_that_cannot_be_written_to_is_compared_every_time(cache, monkeypatch):
    def refused(*_):
        raise PermissionError

    monkeypatch.setattr(verification, "write_json", refused)
    (cache.path / ".verified.json").unlink(missing_ok=True)
    TeacherCache(cache.path)
