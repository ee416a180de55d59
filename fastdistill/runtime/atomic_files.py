"""Atomic writes: readers never see a partial file."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
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


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file; NaN is not JSON: pass None for unknown values."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, text + "\n")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file atomically: readers see the old file or the new one."""
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
