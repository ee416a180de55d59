"""What cannot be built, or not in this folder, is refused by name and changes nothing."""

from __future__ import annotations

import contextlib
import ctypes
import os
import tempfile
from pathlib import Path

import pytest
import torch

from fastdistill import CacheError, Teacher, TeacherCache, TopK
from helpers.answers import Answers, spread
from helpers.cache_builds import OPTIONS, build, bytes_of
from helpers.training import peaked, ragged


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": 7}, "begun with k=8, got k=7"),
        ({"temperatures": (1.0,)}, "temperatures=\\[1.0, 2.0\\]"),
        ({"positions": "targets"}, "positions='all'"),
        ({"max_length": 5}, "max_length=None"),
        ({"data": ragged(39)}, "rows=40"),
        ({"teacher": "other"}, "teacher="),
        ({"data": [*ragged(39), {"input_ids": [1, 2]}]}, "the tokens of example 39 differ"),
    ],
)
def test_another_build_in_the_same_folder(tmp_path, change, words):
    build(tmp_path / "c")
    before = bytes_of(tmp_path / "c")
    if change.get("teacher") == "other":
        change = {"teacher": Teacher(peaked(8))}
    with pytest.raises(CacheError, match=words):
        build(tmp_path / "c", **change)
    assert bytes_of(tmp_path / "c") == before


def test_a_folder_with_something_else_in_it(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CacheError, match="expected an empty folder or a cache"):
        build(tmp_path)


def test_answers_of_no_language_model_are_refused(tmp_path):
    zeros = Answers(lambda ids, k: TopK(spread(ids, k), torch.zeros(*ids.shape, k)))
    with pytest.raises(CacheError, match="probabilities that sum to 1 at most, got 8"):
        build(tmp_path / "c", teacher=zeros, temperatures=(1.0,))
    assert not list((tmp_path / "c").glob("*.safetensors"))
    flat = Answers(lambda ids, k: TopK(ids[0], torch.zeros(k)))
    with pytest.raises(CacheError, match="expected answers of shape"):
        build(tmp_path / "d", teacher=flat, temperatures=(1.0,))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"k": 0}, ValueError, "k: expected 1 to 53, got 0"),
        ({"k": 54}, ValueError, "k: expected"),
        ({"temperatures": 1.0}, ValueError, "temperatures: expected a list"),
        ({"temperatures": ()}, ValueError, "temperatures: expected a list"),
        ({"temperatures": (1.0, -1.0)}, ValueError, "temperatures: expected a finite"),
        ({"temperatures": (1.0, 1.0)}, ValueError, "temperatures: expected different"),
        ({"targets": "best"}, ValueError, "targets: expected one of 'topk', 'sampled'"),
        ({"targets": "sampled"}, ValueError, "temperatures: expected one with"),
        ({"positions": "some"}, ValueError, "positions: expected one of"),
        ({"shard_mb": 0}, ValueError, "shard_mb: expected"),
        ({"rank": 2, "world": 2}, ValueError, "rank, world: expected"),
        ({"data": iter(ragged(3))}, TypeError, "dataset: expected a list or Dataset with a length"),
        ({"data": {"input_ids": [[4, 5]]}}, TypeError, "dataset: expected a list or Dataset with"),
        ({"data": {"train": ragged(3)}}, TypeError, "dataset: .* got dict. Pass one split"),
        ({"data": {}}, ValueError, "dataset: expected at least one"),
        ({"teacher": object()}, TypeError, "teacher: expected a model, a path"),
    ],
)
def test_refusals(tmp_path, change, error, words):
    data = change.pop("data", None)
    with pytest.raises(error, match=words):
        TeacherCache.build(
            change.pop("teacher", None) or Teacher(peaked()),
            ragged(4) if data is None else data,
            tmp_path / "c",
            **(OPTIONS | change),
        )
    assert not (tmp_path / "c").exists()


def test_a_folder_without_permission():
    """Also where the tests run as root, who would write everywhere."""
    with tempfile.TemporaryDirectory() as shared:  # pytest's folders are closed to others
        closed, control = (Path(shared) / name for name in ("closed", "control"))
        Path(shared).chmod(0o755)
        closed.mkdir(mode=0o555)
        control.mkdir()
        control.chmod(0o777)
        with as_nobody(), pytest.raises(PermissionError) as caught:
            build(closed)
        assert "path: expected a folder that can be written to, got" in str(caught.value)
        assert list(closed.iterdir()) == []
        with as_nobody():
            (control / "file").touch()


@contextlib.contextmanager
def as_nobody():
    """This thread opens files as a user without rights; no change for one who has none."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None)
    libc.setfsuid(65534)
    try:
        yield
    finally:
        libc.setfsuid(0)
