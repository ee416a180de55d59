"""Atomic writes: readers never see a partial file."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def check_folder(name: str, path: Path) -> None:
    """Raise ValueError, naming the argument, if `path` is no folder and cannot become one."""
    expected = f"{name}: expected a folder, or a path where one can be made, got {str(path)!r}"
    existing = path.absolute()
    try:
        while not os.path.lexists(existing):
            existing = existing.parent
        os.lstat(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # name too long, a file in the path, a zero byte
        raise ValueError(f"{expected}: {error}") from None
    if not existing.is_dir():
        raise ValueError(f"{expected}; {str(existing)!r} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{expected}; {str(existing)!r} is not writable")


_FULL = (errno.ENOSPC, errno.EDQUOT)
_LEFT = 1 << 20  # bytes; with fewer, a library's error of writing means that the disk is full


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Raise OSError with the path and what to do if writing there fails since the disk is full.

    Libraries say it in their own words, or do not say it: torch reports an unexpected position in
    its file, and Python's files no path.
    """
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        text = str(error)
        named = number in _FULL or any(f"(os error {n})" in text for n in _FULL)
        if (named and getattr(error, "filename", None) is None) or _is_unnamed(error, path):
            message = f"{os.strerror(errno.ENOSPC)}; make room, then start again"
            raise OSError(errno.ENOSPC, message, str(path)) from error
        raise


def _is_unnamed(error: Exception, path: Path) -> bool:
    """Return whether torch failed to write a file to a disk without space."""
    existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    of_torch = isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("inline_container", "iostream error", "StreamWriter")
    )
    return of_torch and shutil.disk_usage(existing).free < _LEFT


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file; NaN is not JSON: pass None for unknown values."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, text + "\n")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file atomically: readers see the old file or the new one."""
    with naming_full_disk(path):
        _write(path, content)


def _write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private; give it the permissions of other new files.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(file: Path) -> str:
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
        return digest.hexdigest()
