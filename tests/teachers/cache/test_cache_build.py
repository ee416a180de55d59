"""A build that is killed, cut short or started twice loses nothing and ends with the same bytes."""

from __future__ import annotations

import errno
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file

from fastdistill import CacheError, TeacherCache
from fastdistill.teachers.cache import build as building
from fastdistill.teachers.cache import shards
from helpers.cache_builds import Passes, Stops, assert_same_bytes, build, bytes_of
from helpers.processes import forkserver
from helpers.training import peaked


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "cache"
    build(folder)
    return bytes_of(folder)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_interrupted_build_goes_on(tmp_path, undisturbed, after):
    teacher = Stops(after)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "c", teacher=teacher)
    there = set(bytes_of(tmp_path / "c"))
    assert "manifest.json" not in there
    teacher.left = len(undisturbed) - after  # more than the missing shards would fail
    build(tmp_path / "c", teacher=teacher)
    assert there < set(undisturbed)
    assert_same_bytes(tmp_path / "c", undisturbed)


def test_a_finished_build_asks_nobody(tmp_path):
    build(tmp_path / "c", teacher=Stops(99))
    build(tmp_path / "c", teacher=Stops(0))


def _run(folder):
    torch.set_num_threads(1)
    (folder.parent / "started").touch()
    build(folder)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tmp_path, undisturbed):
    """kill -9, start again, twenty times, in folders new and half built; then the same bytes."""
    processes = forkserver()
    moments = random.Random(3)
    folder, kills, finished = tmp_path / "cache", 0, 0

    def attempt(after):
        (tmp_path / "started").unlink(missing_ok=True)
        process = processes.Process(target=_run, args=(folder,))
        process.start()
        while not (tmp_path / "started").exists():
            time.sleep(0.001)
        started = time.monotonic()
        process.join(after)
        seconds, killed = time.monotonic() - started, process.is_alive()
        process.kill()
        process.join()
        assert killed or process.exitcode == 0
        return killed, seconds

    _, whole = attempt(None)
    shutil.rmtree(folder)
    while kills < 20:
        killed, _ = attempt(moments.uniform(0, whole))
        kills += killed
        if not killed:
            assert_same_bytes(folder, undisturbed)
            shutil.rmtree(folder)
            finished += 1
    attempt(None)
    assert_same_bytes(folder, undisturbed)
    assert not list(folder.glob(".0*"))  # what was half written is gone
    assert TeacherCache(folder).verify().shards == len(undisturbed) // 2 - 1


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
    ids=repr,
)
def test_a_full_disk_is_said_before_and_costs_nothing_behind(
    tmp_path, monkeypatch, undisturbed, error
):
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(OSError, match=r"expected about .* GB of free space") as caught:
            build(tmp_path / "c")
        assert caught.value.errno == errno.ENOSPC
    written = []

    def full(tensors, file):
        written.append(file)
        if len(written) == 3:
            file.write_bytes(b"part of it")
            raise error
        save(tensors, file)

    save = save_file
    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(OSError, match=r"No space left on device: writing 00002\.safetensors"):
        build(tmp_path / "c")
    assert not list((tmp_path / "c").glob(".0*"))
    build(tmp_path / "c")
    assert_same_bytes(tmp_path / "c", undisturbed)
    assert len(written) == 3 + len(undisturbed) // 2 - 1 - 2


def test_a_place_that_cannot_be_written_to():
    with pytest.raises(OSError, match="/proc"):
        build(Path("/proc/fastdistill/cache"))


def test_a_truncated_manifest_or_note_is_made_again(tmp_path, undisturbed):
    build(tmp_path / "c")
    for name in ("manifest.json", "00001.json"):
        file = tmp_path / "c" / name
        file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(CacheError, match=r"manifest\.json: damaged"):
        TeacherCache(tmp_path / "c")
    calls = []

    class Counts(Passes):
        def topk_at(self, *args, **kwargs):
            calls.append(args)
            return super().topk_at(*args, **kwargs)

    build(tmp_path / "c", teacher=Counts(peaked()))
    assert len(calls) == 1
    assert_same_bytes(tmp_path / "c", undisturbed)


def test_a_shard_that_was_deleted_is_made_again(tmp_path, undisturbed):
    build(tmp_path / "c")
    (tmp_path / "c" / "00002.safetensors").unlink()
    build(tmp_path / "c")
    assert_same_bytes(tmp_path / "c", undisturbed)


def test_two_builders_in_one_folder(tmp_path, undisturbed):
    seen: list[Any] = []

    class Meanwhile(Passes):
        def topk_at(self, *args, **kwargs):
            if not seen:
                with pytest.raises(CacheError, match="another process is building") as caught:
                    build(tmp_path / "c")
                seen.append(caught)
            return super().topk_at(*args, **kwargs)

    build(tmp_path / "c", teacher=Meanwhile(peaked()))
    assert seen
    assert_same_bytes(tmp_path / "c", undisturbed)


def _rank(folder, rank, world):
    torch.set_num_threads(1)
    build(folder, rank=rank, world=world)


@pytest.mark.slow
def test_several_processes_make_the_same_cache(tmp_path, undisturbed):
    processes = forkserver()
    all_of_them = [
        processes.Process(target=_rank, args=(tmp_path / "c", rank, 3)) for rank in range(3)
    ]
    for process in all_of_them:
        process.start()
    for process in all_of_them:
        process.join()
    assert [p.exitcode for p in all_of_them] == [0, 0, 0]
    assert_same_bytes(tmp_path / "c", undisturbed)


def test_a_rank_that_stopped_is_named(tmp_path, monkeypatch, undisturbed):
    monkeypatch.setattr(building, "_START_TIMEOUT", 0.5)
    with pytest.raises(CacheError, match=r"rank 1 of 2 stopped before 00001\.safetensors"):
        build(tmp_path / "c", rank=0, world=2)
    build(tmp_path / "c", rank=1, world=2)
    assert_same_bytes(tmp_path / "c", undisturbed)


def test_a_shard_that_is_deleted_during_the_build_is_named_at_once(
    tmp_path, monkeypatch, undisturbed
):
    folder, write = tmp_path / "c", building._write

    def deleting(folder, settings, index, writer):
        write(folder, settings, index, writer)
        if index == 1:
            (folder / "00001.safetensors").unlink()

    monkeypatch.setattr(building, "_write", deleting)
    monkeypatch.setattr(time, "sleep", None)
    with pytest.raises(CacheError, match=r"expected 00001\.safetensors and its record"):
        build(folder)
    monkeypatch.undo()
    inode = (folder / "00000.safetensors").stat().st_ino
    build(folder)
    assert (folder / "00000.safetensors").stat().st_ino == inode
    assert_same_bytes(folder, undisturbed)
