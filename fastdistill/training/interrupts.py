"""On Ctrl-C or SIGTERM, saves a checkpoint at the end of the step and then stops."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType
from typing import Any

from transformers import TrainerCallback

logger = logging.getLogger(__name__)

_DEFAULT = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class SavesOnInterrupt(TrainerCallback):
    """Context manager: the first signal requests a checkpoint, the second ends the process.

    Leaves signal handlers that the user installed unchanged. Does nothing with several processes:
    they would stop at different steps and wait for each other.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._signal: int | None = None
        self._saved = -1  # last step that is in a checkpoint, or that ran before this run
        self._before: dict[signal.Signals, Any] = {}

    @property
    def is_pending(self) -> bool:
        """Whether a signal arrived and its step has not ended yet."""
        return self._signal is not None

    def __enter__(self) -> SavesOnInterrupt:
        args = self._trainer.args
        in_main = threading.current_thread() is threading.main_thread()
        if args.save_on_interrupt and in_main and args.world_size == 1:
            for number, default in _DEFAULT.items():
                if signal.getsignal(number) is default:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        step = self._trainer.state.global_step
        saves = str(getattr(self._trainer.args.save_strategy, "value", "")) != "no"
        if self._signal is not None or not saves or step in (0, self._saved):
            self._end(number, self._saved == step and step > 0)
        self._signal = number
        text = b"\nSaving a checkpoint after this step. Repeat the signal to stop immediately.\n"
        os.write(2, text)

    def _end(self, number: int, is_saved: bool) -> None:
        step = self._trainer.state.global_step
        message = f"Stopped in step {step + 1}; there is no checkpoint, so the progress is lost."
        if is_saved:
            message = f"Stopped at step {step}; checkpoint-{step} is complete."
        elif self._saved > 0:
            message = (
                f"Stopped in step {step + 1}; checkpoint-{self._saved} is the last checkpoint."
            )
        if number == signal.SIGTERM:
            logger.warning(message)
            raise SystemExit(128 + number)
        raise KeyboardInterrupt(message)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._saved = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._signal is not None:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._saved = state.global_step
        if self._signal is not None:
            self._end(self._signal, True)
