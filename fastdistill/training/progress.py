"""Progress of transformers' trainers: bars on a terminal, lines in a file or a pipe."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ..runtime.progress import BarContext, Task, make_bar, say_on_stderr
from .logs.metrics import format_short


class PhaseProgress(BarContext):
    """One bar per phase, on stderr."""

    def __init__(self) -> None:
        self._bar = make_bar()

    def phase(self, what: str, *, total: int) -> list[TrainerCallback]:
        """Start a phase; the callback advances it with the trainer's steps."""
        return [_Advance(Task(self._bar, what, total))]


class _Advance(TrainerCallback):
    def __init__(self, task: Task) -> None:
        self._task = task

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._task.at(state.global_step)


class TrainingProgress(TrainerCallback):
    """A trainer's steps, last loss and time left; without a terminal, a line per log."""

    def __init__(self) -> None:
        self._bar = make_bar("loss")
        self._task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self._bar is not None:
            steps = {"total": state.max_steps, "completed": state.global_step}
            self._task = self._bar.add_task("training", loss="", **steps)
            self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        figures = {k: v for k, v in (logs or {}).items() if k in ("loss", "eval_loss", "eval_kl")}
        if not state.is_world_process_zero or not figures:
            return
        line = "  ".join(f"{name} {format_short(value)}" for name, value in figures.items())
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, loss=line)
        elif self._bar is None:
            say_on_stderr(f"step {state.global_step:,} of {state.max_steps:,}  {line}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
