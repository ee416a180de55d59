"""Progress bars on a terminal; a line per minute in a file or a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback

T = TypeVar("T")
S = TypeVar("S", bound="_BarContext")

_SECONDS = 60.0  # between lines, and before the first


def _say(text: str) -> None:
    """Print a line on stderr; a closed pipe or a full disk is ignored."""
    if sys.stderr is not None:  # otherwise print would use stdout
        with suppress(OSError):
            print(text, file=sys.stderr, flush=True)


class _Task:
    """A task of a bar; without a terminal, lines for work of more than a minute."""

    def __init__(self, bar: Progress, what: str, total: int, done: int = 0, **fields: Any) -> None:
        self._bar, self._what, self._total, self._first = bar, what, total, done
        self._task = bar.add_task(what, total=total, completed=done, **fields)
        self._began = self._last = time.monotonic()

    def at(self, done: int, size: str = "") -> None:
        self._bar.update(self._task, completed=done, size=size)
        now = time.monotonic()
        if not self._bar.disable or now - self._last < _SECONDS or done <= self._first:
            return
        self._last = now
        more = f", {size}" if size else ""
        left = (now - self._began) / (done - self._first) * (self._total - done)
        _say(f"{self._what}: {done:,} of {self._total:,}{more}, about {left / 60:,.0f} min left")


def _bar(*more: ProgressColumn) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *more,
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=sys.stderr is None or not sys.stderr.isatty(),
    )


def track(items: Sequence[T], what: str) -> Iterator[T]:
    """Yield the items with a progress bar on stderr that disappears at the end."""
    with _bar() as bar:
        task = _Task(bar, what, len(items))
        for done, item in enumerate(items, 1):
            yield item
            task.at(done)


class _BarContext:
    """A progress bar as a context manager."""

    _bar: Progress

    def __enter__(self: S) -> S:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


class RowProgress(_BarContext):
    """A bar over rows: rows done, size so far and in all, time left."""

    def __init__(self, what: str, *, total: int, done: int = 0, size: int = 0) -> None:
        """`done` rows with `size` bytes existed before."""
        self._bar = _bar(TextColumn("{task.fields[size]}"), TimeRemainingColumn())
        self._bytes, self._done, self._total = size, done, total
        self._task = _Task(self._bar, what, total, done, size="")

    def advance(self, rows: int, size: int = 0) -> None:
        self._bytes += size
        self._done += rows
        whole = self._bytes * self._total / max(self._done, 1)
        self._task.at(self._done, f"{self._bytes / 1e6:,.0f} of {whole / 1e6:,.0f} MB")


class PhaseProgress(_BarContext):
    """One bar per phase, on stderr."""

    def __init__(self) -> None:
        self._bar = _bar()

    def phase(self, what: str, *, total: int) -> list[TrainerCallback]:
        """Start a phase; the callback advances it with the trainer's steps."""
        return [_Advance(_Task(self._bar, what, total))]


class _Advance(TrainerCallback):
    def __init__(self, task: _Task) -> None:
        self._task = task

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._task.at(state.global_step)


class TrainingProgress(TrainerCallback):
    """A trainer's steps, last loss and time left; without a terminal, a line per log."""

    def __init__(self) -> None:
        self._bar = _bar(TextColumn("{task.fields[loss]}"), TimeRemainingColumn())
        self._task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and not self._bar.disable:
            steps = {"total": state.max_steps, "completed": state.global_step}
            self._task = self._bar.add_task("training", loss="", **steps)
            self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._task is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        figures = {k: v for k, v in (logs or {}).items() if k in ("loss", "eval_loss", "eval_kl")}
        if not state.is_world_process_zero or not figures:
            return
        line = "  ".join(
            f"{name} {value:.4f}" if value < 1e6 else f"{name} > 1e6"
            for name, value in figures.items()
        )
        if self._task is not None:
            self._bar.update(self._task, loss=line)
        elif self._bar.disable:
            _say(f"step {state.global_step:,} of {state.max_steps:,}  {line}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.stop()
