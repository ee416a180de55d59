"""Progress for people: bars on a terminal, silence everywhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from types import TracebackType
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
S = TypeVar("S", bound="_Shown")


def _bar(*more: ProgressColumn) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *more,
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )


def track(items: Sequence[T], what: str) -> Iterator[T]:
    """The items, one after the other, with a bar on stderr that is gone when they are through."""
    with _bar() as bar:
        task = bar.add_task(what, total=len(items))
        for item in items:
            yield item
            bar.advance(task)


class _Shown:
    """A bar that is there within a `with`."""

    _bar: Progress

    def __enter__(self: S) -> S:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()


class Work(_Shown):
    """A bar over so many rows: those done, their size and the whole's, and the time left."""

    def __init__(self, what: str, *, total: int, done: int = 0, size: int = 0) -> None:
        """`done` of the rows were there before, with `size` bytes."""
        self._bar = _bar(TextColumn("{task.fields[size]}"), TimeRemainingColumn())
        self._bytes = size
        self._task = self._bar.add_task(what, total=total, completed=done, size="")

    def advance(self, rows: int, size: int = 0) -> None:
        self._bytes += size
        task = self._bar.tasks[self._task]
        whole = self._bytes * (task.total or 0) / max(task.completed + rows, 1)
        self._bar.update(
            self._task, advance=rows, size=f"{self._bytes / 1e6:,.0f} of {whole / 1e6:,.0f} MB"
        )


class Steps(_Shown):
    """One bar per phase, on stderr; disabled when stderr is not a terminal."""

    def __init__(self) -> None:
        self._bar = _bar()
        self._task: Any = None

    def phase(self, what: str, *, total: int) -> list[TrainerCallback]:
        """Begin a phase; the callback advances it with the trainer's steps."""
        self._task = self._bar.add_task(what, total=total)
        return [_Advance(self._bar, self._task)]


class _Advance(TrainerCallback):
    def __init__(self, bar: Progress, task: Any) -> None:
        self._bar, self._task = bar, task

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update(self._task, completed=state.global_step)


class Training(TrainerCallback):
    """A trainer's steps with the last loss and the time left; off a terminal, a line per log."""

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
        said = "  ".join(
            f"{name} {value:.4f}" if value < 1e6 else f"{name} > 1e6"
            for name, value in figures.items()
        )
        if self._task is not None:
            self._bar.update(self._task, loss=said)
        elif self._bar.disable:
            print(f"step {state.global_step:,} of {state.max_steps:,}  {said}", file=sys.stderr)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.stop()
