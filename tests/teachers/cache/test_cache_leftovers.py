"""A refused build leaves nothing behind, and a finished one no lock."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastdistill import CacheError, Teacher, TeacherCache, TopK
from helpers.answers import Answers, spread
from helpers.cache_builds import Stops, build, bytes_of
from helpers.training import peaked, ragged


def refusing(error):
    def answer(ids, k):
        raise error

    return Answers(answer)


def zeros(ids, k):
    return TopK(spread(ids, k), torch.zeros(*ids.shape, k))


REFUSALS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "temperatures": (lambda: refusing(ValueError("temperature: expected 1")), {}),
    "row length": (lambda: refusing(RuntimeError("a row too long")), {}),
    "no server": (lambda: refusing(ConnectionError("nobody there")), {}),
    "values": (lambda: Answers(zeros), {"temperatures": (1.0,)}),
    "shapes": (lambda: Answers(lambda ids, k: TopK(ids[0], torch.zeros(k))), {}),
    "rank": (lambda: Teacher(peaked()), {"rank": 0, "world": 0}),
    "vocabulary": (lambda: Teacher(peaked()), {"k": 10**6}),
}


@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("there", ["", "out", "out/in/c"])
def test_a_refusal_leaves_nothing_and_the_remedy_works(tmp_path, refusal, there):
    teacher, options = REFUSALS[refusal]
    (tmp_path / there).mkdir(parents=True, exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    folder = tmp_path / "out" / "in" / "c"
    with pytest.raises((ValueError, RuntimeError, ConnectionError)):
        build(folder, ragged(4), teacher(), **options)
    assert sorted(tmp_path.rglob("*")) == before
    cache = build(folder, ragged(4), k=6, temperatures=(1.0,))
    assert not list(folder.glob(".building*"))
    assert cache.verify().shards


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(OSError, match="free space"):
        build(tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_files_of_somebody_else_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="sum to 1 at most, got 8"):
        build(tmp_path, ragged(4), Answers(zeros), temperatures=(1.0,))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_what_is_finished_stays_when_a_later_shard_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no more"):
        build(tmp_path / "c", teacher=Stops(2, ValueError("no more")))
    there = bytes_of(tmp_path / "c")
    assert {"settings.json", "00000.json", "00000.safetensors"} <= set(there)
    assert not list((tmp_path / "c").glob(".building*"))
    with pytest.raises(CacheError, match="begun with k=8, got k=7"):
        build(tmp_path / "c", k=7)
    assert bytes_of(tmp_path / "c") == there
    build(tmp_path / "c").verify()


def test_an_interrupt_before_the_first_shard_ties_nobody(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "c", teacher=Stops(0))
    assert (tmp_path / "c" / "settings.json").is_file()
    assert build(tmp_path / "c", k=7).manifest.settings.k == 7


def test_locks_that_killed_ranks_left_go_with_the_last_shard(tmp_path):
    (tmp_path / "c").mkdir()
    for rank in (0, 3):
        (tmp_path / "c" / f".building-{rank}").touch()
    build(tmp_path / "c")
    assert not list((tmp_path / "c").glob(".building*"))
    assert TeacherCache(tmp_path / "c").verify().shards
