"""Progress bars on a terminal; a line per minute in a file or a pipe, or without rich."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")
S = TypeVar("S", bound="BarContext")

_SECONDS = 60.0  # between lines, and before the first


def say_on_stderr(text: str) -> None:
    """Print a line on stderr; a closed pipe or a full disk is ignored."""
    if sys.stderr is not None:  # otherwise print would use stdout
        with suppress(OSError):
            print(text, file=sys.stderr, flush=True)


class Task:
    """A task of a bar; without a terminal, lines for work of more than a minute."""

    def __init__(
        self, bar: Progress | None, what: str, total: int, done: int = 0, **fields: Any
    ) -> None:
        self._bar, self._what, self._total, self._first = bar, what, total, done
        self._task = (
            None if bar is None else bar.add_task(what, total=total, completed=done, **fields)
        )
        self._began = self._last = time.monotonic()

    def rename(self, what: str) -> None:
        self._what = what
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=what)

    def at(self, done: int, size: str = "") -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, size=size)
            return
        now = time.monotonic()
        if now - self._last < _SECONDS or done <= self._first:
            return
        self._last = now
        more = f", {size}" if size else ""
        left = (now - self._began) / (done - self._first) * (self._total - done)
        say_on_stderr(
            f"{self._what}: {done:,} of {self._total:,}{more}, about {left / 60:,.0f} min left"
        )


def make_bar(field: str | None = None) -> Progress | None:
    """Return a bar on stderr; None without a terminal or without rich.

    With `field`, tasks show the field of that name and the time left.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        return None
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        return None
    columns: list[progress.ProgressColumn] = [
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
    ]
    if field is not None:
        columns += [
            progress.TextColumn(f"{{task.fields[{field}]}}"),
            progress.TimeRemainingColumn(),
        ]
    columns.append(progress.TimeElapsedColumn())
    return progress.Progress(*columns, console=Console(stderr=True))


def track(items: Sequence[T], what: str, label: Callable[[T], str] | None = None) -> Iterator[T]:
    """Yield the items with a progress bar on stderr; `label` names the current one."""
    bar = make_bar()
    with bar or nullcontext():
        task = Task(bar, what, len(items))
        for done, item in enumerate(items, 1):
            if label is not None:
                task.rename(f"{what} {label(item)}")
            yield item
            task.at(done)


class BarContext:
    """A progress bar as a context manager."""

    _bar: Progress | None

    def __enter__(self: S) -> S:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


class RowProgress(BarContext):
    """A bar over rows: rows done, size so far and in all, time left."""

    def __init__(self, what: str, *, total: int, done: int = 0, size: int = 0) -> None:
        """`done` rows with `size` bytes existed before."""
        self._bar = make_bar("size")
        self._bytes, self._done, self._total = size, done, total
        self._task = Task(self._bar, what, total, done, size="")

    def advance(self, rows: int, size: int = 0) -> None:
        self._bytes += size
        self._done += rows
        whole = self._bytes * self._total / max(self._done, 1)
        self._task.at(self._done, f"{self._bytes / 1e6:,.0f} of {whole / 1e6:,.0f} MB")
