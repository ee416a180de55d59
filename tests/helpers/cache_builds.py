"""Shared by test_cache_build and others."""

from __future__ import annotations

from typing import Any

from safetensors.torch import load

from fastdistill import Teacher, TeacherCache
from helpers.training import peaked, ragged

OPTIONS: dict[str, Any] = {"k": 8, "temperatures": (1.0, 2.0), "shard_mb": 0.003}


def bytes_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


def assert_same_bytes(folder, expected):
    """The files of a cache are byte for byte the expected ones; names what differs in a shard."""
    files = bytes_of(folder)
    assert sorted(files) == sorted(expected)
    for name in files:
        if name.endswith(".safetensors"):
            built, wanted = load(files[name]), load(expected[name])
            for key in wanted:
                assert built[key].equal(wanted[key]), f"{name} {key}: {built[key]}, {wanted[key]}"
    assert files == expected


def build(folder, data=None, teacher=None, **options):
    teacher = Teacher(peaked()) if teacher is None else teacher
    return TeacherCache.build(teacher, data or ragged(40), folder, **(OPTIONS | options))


class Passes(Teacher):
    """For the settings it is a plain Teacher."""

    def __init_subclass__(cls):
        cls.__module__, cls.__qualname__ = Teacher.__module__, Teacher.__qualname__


class Stops(Passes):
    """A teacher that fails at its n-th question."""

    def __init__(self, after, error=KeyboardInterrupt):
        super().__init__(peaked())
        self.left, self.error = after, error

    def topk_at(self, *args, **kwargs):
        if self.left == 0:
            raise self.error
        self.left -= 1
        return super().topk_at(*args, **kwargs)
