"""What cannot be built, or not in this folder, is refused by name and changes nothing."""

from __future__ import annotations

import pytest
import torch
from answers import Answers, spread
from training import peaked, ragged

from fastdistill import CacheError, Teacher, TeacherCache, TopK

OPTIONS = {"k": 8, "temperatures": (1.0, 2.0), "shard_mb": 0.003}


def bytes_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


def build(folder, data=None, teacher=None, **options):
    teacher = Teacher(peaked()) if teacher is None else teacher
    return TeacherCache.build(teacher, data or ragged(40), folder, **(OPTIONS | options))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": 7}, "begun with k=8, and now asked for with k=7"),
        ({"temperatures": (1.0,)}, "temperatures=\\[1.0, 2.0\\]"),
        ({"positions": "targets"}, "positions='all'"),
        ({"max_length": 5}, "max_length=None"),
        ({"data": ragged(39)}, "rows=40"),
        ({"teacher": "other"}, "teacher="),
        ({"data": [*ragged(39), {"input_ids": [1, 2]}]}, "example 39 has other tokens"),
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
    with pytest.raises(CacheError, match="got probabilities that sum to 8"):
        build(tmp_path / "c", teacher=zeros, temperatures=(1.0,))
    assert not list((tmp_path / "c").glob("*.safetensors"))
    flat = Answers(lambda ids, k: TopK(ids[0], torch.zeros(k)))
    with pytest.raises(CacheError, match="expected answers of shape"):
        build(tmp_path / "d", teacher=flat, temperatures=(1.0,))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"k": 0}, ValueError, r"k: expected an integer in 1\.\.53"),
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
