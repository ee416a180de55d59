"""Lets one run at a time train in an output folder.

Two runs in one folder would overwrite each other's checkpoints, and mix their logs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..runtime.checks import fail
from ..runtime.printable import printable

LOCK = ".training"
_SECONDS = 10.0  # data loading processes of a killed run hold the lock until they notice


@contextmanager
def locked_output(folder: str | Path) -> Iterator[None]:
    """Hold the lock of an output folder; raise ValueError if another run holds it.

    Raises ValueError for a folder that cannot be written to, too.
    """
    path, got = Path(folder) / LOCK, repr(printable(folder))
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=_SECONDS)
    except Timeout:
        expected = "a folder that no other process trains in"
        fail("output_dir", expected, got, "wait for the other run, or train in another folder")
    except OSError as error:
        fail("output_dir", "a folder that can be written to", f"{got} ({printable(error)})")
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes the file on release
            path.unlink(missing_ok=True)
        lock.release()
