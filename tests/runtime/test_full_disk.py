"""A full disk is called one, whatever the library that wrote says."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from fastdistill.runtime.atomic_files import naming_full_disk, write_atomically

WORDS = r"No space left on device; make room, then start again: '.*file'"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        RuntimeError("basic_ios::clear: iostream error"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    ],
    ids=str,
)
def test_every_librarys_words(tmp_path, monkeypatch, error):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    with pytest.raises(OSError, match=WORDS) as raised, naming_full_disk(tmp_path / "new" / "file"):
        raise error
    assert raised.value.errno == errno.ENOSPC
    assert raised.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied"),
        OSError(errno.ENOSPC, "No space left on device", "its own path"),
        RuntimeError("basic_ios::clear: iostream error"),
        ValueError("os error 28"),
    ],
    ids=str,
)
def test_other_errors_stay(tmp_path, error):
    with pytest.raises(type(error)) as raised, naming_full_disk(tmp_path):
        raise error
    assert raised.value is error


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full of Linux")
def test_an_atomic_file_names_its_path(tmp_path, monkeypatch):
    full = open("/dev/full", "wb", buffering=0)  # noqa: SIM115 (the writer closes it)
    monkeypatch.setattr("os.fdopen", lambda handle, mode: full)
    with pytest.raises(OSError, match=WORDS):
        write_atomically(tmp_path / "file", "text")
    assert list(tmp_path.iterdir()) == []
