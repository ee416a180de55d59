"""A Trainer that writes complete checkpoints, resumes from them, and detects finished runs."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import TrainOutput, has_length

from ..runtime import checks
from ..runtime.atomic_files import naming_full_disk, write_json
from ..runtime.json_text import read_json
from ..runtime.printable import printable
from .arguments import resolve_intervals
from .checkpoints import (
    checkpoints,
    completeness_error,
    integrity_error,
    keep_last,
    mark_complete,
    mark_incomplete,
    missing_state,
    read_state,
    to_resume_from,
)
from .checks.savable import has_loaded_generation_config, keep_generation_config_savable
from .finite import FiniteUpdates
from .interrupts import SavesOnInterrupt
from .logs.run_settings import OPTIMIZER_SETTINGS, changed_settings, result_settings
from .output_lock import locked_output
from .student import (
    check_adapter,
    check_keys,
    is_adapted,
    is_stored_otherwise,
    load_stored,
    without_adapters,
)
from .torch_defaults import plain_defaults

logger = logging.getLogger(__name__)
SETTINGS_FILE = "settings.json"  # in a checkpoint: the settings that determine the student
_TRAIN_ELSEWHERE = (
    "train in another output_dir, and pass the checkpoint as the model to continue from its weights"
)
_INTERVALS = ("logging_steps", "save_steps", "eval_steps")


class WholeCheckpoints(FiniteUpdates):
    """A Trainer that writes complete checkpoints and resumes only from complete ones."""

    teacher: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.already_done = False  # whether the last train() had no steps left
        self._without_state = False
        self._last_saved = 0  # step of the last checkpoint
        self._intervals: dict[str, Any] = {}
        # Settings that differ from the resumed checkpoint: {name: [now, before]}.
        self._changed: dict[str, list[Any]] = {}
        self._interrupts: SavesOnInterrupt | None = None
        self._weights_from = Path()  # last checkpoint whose weights were loaded
        self._loaded_generation_config = False
        self._locks = ExitStack()
        # The first callback, so that a finished run changes no log.
        self.callback_handler.callbacks.insert(0, _BeginRun(self))

    @plain_defaults()
    def train(
        self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train, and return transformers' TrainOutput.

        Args:
            resume_from_checkpoint: a folder; True for the last complete checkpoint of output_dir;
                "auto" for that checkpoint or, if there is none, a new run. None uses
                args.resume_from_checkpoint. A finished run is not trained further: its weights are
                loaded, and `already_done` is True.

        Raises:
            ValueError: there is no such checkpoint; it is damaged; it lacks the optimizer's state
                or weights of this student; settings that the checkpoint determines differ; or
                another process trains in output_dir.
            FloatingPointError: a loss, a gradient or a weight is NaN or infinite.
        """
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        self.already_done = False
        with ExitStack() as self._locks:
            return self._train_alone(resume_from_checkpoint, *args, **kwargs)

    def _train_alone(
        self, resume_from_checkpoint: str | Path | bool | None, *args: Any, **kwargs: Any
    ) -> Any:
        folder = self._choose_checkpoint(resume_from_checkpoint)
        self._without_state = folder is not None and missing_state(Path(folder)) is not None
        self._check_pass_of_stream(folder)
        self._compare_settings(folder)
        self.check_weights("before training")
        student = without_adapters(self.accelerator.unwrap_model(self.model))
        self._loaded_generation_config = has_loaded_generation_config(student)
        limit = self.args.save_total_limit
        interrupts = self._interrupts = SavesOnInterrupt(self)
        self.add_callback(interrupts)
        try:
            with self._intervals_from(folder), interrupts:
                output = super().train(folder, *args, **kwargs)
                if "train_loss" in output.metrics:  # without the updates that were skipped
                    output = output._replace(training_loss=output.metrics["train_loss"])
        except _AlreadyDone:
            output = self._output_of_done()
        finally:
            self.args.save_total_limit = limit
            self.remove_callback(interrupts)
            if getattr(self, "neftune_hook_handle", None) is not None:
                self.neftune_hook_handle.remove()  # also after an error
        self.check_weights("after training")
        if not self.state.global_step:
            raise ValueError("train_dataset: expected an example, got none: no step was trained")
        self.check_not_all_skipped()
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs:
            self.write_mean_loss(logs)
            if self.args.save_total_limit == 1:
                # The Trainer would delete the last checkpoint here if another one is the best.
                self.args.save_total_limit = None
        super().log(logs, start_time)

    def _choose_checkpoint(self, checkpoint: str | Path | bool | None) -> str | None:
        """Return the checkpoint to resume from; only one process reads and checks the files.

        That process locks the output folder, too."""
        outcome: list[str | None] = [None, None]
        if self.is_world_process_zero():
            try:
                self._locks.enter_context(locked_output(self.args.output_dir))
                outcome[0] = to_resume_from(checkpoint, self.args.output_dir, self._find_fault)
                if outcome[0] is None and checkpoint == "auto":
                    self._check_state_is_saved()
            except ValueError as error:
                outcome[1] = str(error)
        if self.args.world_size > 1:
            broadcast_object_list(outcome)
        folder, problem = outcome
        if problem is not None:
            raise ValueError(problem)
        return folder

    def _check_pass_of_stream(self, folder: str | None) -> None:
        """Raise ValueError if a checkpoint is of a later pass over a stream than the first.

        transformers counts steps from the first row of the first pass: it would read rows again
        that the run has trained on in this pass."""
        if folder is None or has_length(self.train_dataset) or self.args.ignore_data_skip:
            return
        state = read_state(Path(folder))
        if state.get("epoch", 0) > 1 and not self._is_done_at(state):
            checks.fail(
                "resume_from_checkpoint",
                "a checkpoint of the first pass over a stream, whose length is unknown",
                f"{Path(folder).name}, of pass {int(state['epoch']) + 1}",
                "give the run rows with a length (streaming=False), so that it can continue; or "
                "pass ignore_data_skip=True to read the stream again from its start",
            )

    def _compare_settings(self, folder: str | None) -> None:
        """Record the settings that differ from those of the checkpoint.

        Raises:
            ValueError: a setting differs that the optimizer's state would override.
        """
        self._changed = {}
        path = Path(folder or "") / SETTINGS_FILE
        if folder is None or not path.is_file():
            return
        self._changed = changed_settings(read_json(path, dict), self._result_settings())
        if self.optimizer is None:  # otherwise the caller passed an optimizer
            for name in OPTIMIZER_SETTINGS:
                if name in self._changed:
                    raise ValueError(
                        f"{name}: expected the value that {Path(folder).name} was trained with, "
                        f"{_change_text(self._changed[name])}; the optimizer's state keeps the "
                        f"old value; {_TRAIN_ELSEWHERE}"
                    )

    def _result_settings(self) -> dict[str, Any]:
        settings = result_settings(self.args, self.model, self.teacher)
        data = self.train_dataset
        return settings | {"examples": len(data) if has_length(data) else None}

    def _find_fault(self, folder: Path) -> str | None:
        error = integrity_error(folder)
        if error is None and not self._is_done_at(read_state(folder)):
            missing = missing_state(folder, has_loss_scaler=bool(self.args.fp16))
            error = None if missing is None else f"it lacks {missing} (save_only_model=True?)"
        return error

    def _check_state_is_saved(self) -> None:
        """Raise ValueError if a new run would ignore the weights of an earlier run."""
        for folder in reversed(checkpoints(self.args.output_dir)):
            missing = None if completeness_error(folder) else missing_state(folder)
            if missing is not None:
                checks.fail(
                    "resume_from_checkpoint",
                    "a checkpoint to resume from",
                    f"{folder.name}, which lacks {missing}",
                    "it was saved with save_only_model=True, or files were deleted. Train in "
                    "another output_dir, or start without resuming",
                )

    def _is_done_at(self, state: dict[str, Any]) -> bool:
        """Return whether a run with these arguments is finished at a checkpoint's state."""
        step = state["global_step"]
        if self.args.max_steps > 0:
            return bool(step >= self.args.max_steps)
        epochs = math.ceil(self.args.num_train_epochs)
        same_epochs = state.get("num_train_epochs") == epochs
        return same_epochs and bool(0 < state.get("max_steps", 0) <= step)

    @contextmanager
    def _intervals_from(self, folder: str | None) -> Iterator[None]:
        """Replace fractional intervals by a checkpoint's steps while it is read.

        Otherwise the Trainer would warn of a difference.
        """
        configured = {name: getattr(self.args, name) for name in _INTERVALS}
        if folder is not None:
            state = read_state(Path(folder))
            for name, share in configured.items():
                if share is not None and share < 1 and state.get(name):
                    setattr(self.args, name, state[name])
        self._intervals = configured
        try:
            yield
        finally:
            for name, value in configured.items():
                setattr(self.args, name, value)

    def begin_run(self, state: Any) -> None:
        """Check and complete the state of a run, once the number of steps is known."""
        self._last_saved = state.global_step
        changed_text = ", ".join(f"{n}: {_change_text(c)}" for n, c in self._changed.items())
        if state.global_step > state.max_steps:
            expected = f"a checkpoint of at most the run's {state.max_steps} steps"
            got = f"one of step {state.global_step}"
            checks.fail("resume_from_checkpoint", expected, got, _TRAIN_ELSEWHERE)
        if state.global_step and state.global_step == state.max_steps:
            if self._changed:
                expected = f"the settings of the run that finished at step {state.global_step}"
                got = f"other ones: {changed_text}"
                checks.fail("resume_from_checkpoint", expected, got, _TRAIN_ELSEWHERE)
            raise _AlreadyDone
        if self._changed:
            logger.warning(
                "The run resumes at step %d with settings that differ from the checkpoint: %s.",
                *(state.global_step, changed_text),
            )
        if self._without_state:
            expected = (
                f"a checkpoint with the optimizer's state for a run of {state.max_steps} steps"
            )
            got = f"one of step {state.global_step} without it"
            checks.fail("resume_from_checkpoint", expected, got)
        if self._loaded_generation_config:
            keep_generation_config_savable(
                without_adapters(self.accelerator.unwrap_model(self.model))
            )
        for name, value in self._intervals.items():
            setattr(self.args, name, value)
        resolve_intervals(self.args, state)

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        """Return whether to save with save_strategy="best"; True for an interrupted run too."""
        is_best = super()._determine_best_metric(*args, **kwargs)
        return bool(is_best or (self._interrupts is not None and self._interrupts.is_pending))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load = super()._load_from_checkpoint
        self._load_weights(resume_from_checkpoint, lambda: load(resume_from_checkpoint, model))

    def _load_best_model(self) -> None:
        self._load_weights(str(self.state.best_model_checkpoint), super()._load_best_model)

    def _load_weights(self, folder: str, load: Callable[[], None]) -> None:
        """Load all weights of a checkpoint; raise ValueError if one is missing."""
        self._weights_from = Path(folder)
        partitioned = self.is_fsdp_enabled or self.is_deepspeed_enabled
        with _loading(folder, "weights"):
            if not partitioned:
                check_adapter(self.model, self._weights_from)
            if partitioned or is_adapted(self.model) or not is_stored_otherwise(self.model):
                load()
            else:
                load_stored(self.model, self._weights_from)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raise ValueError, where transformers warns, if weights are missing or unexpected."""
        missing = set(load_result.missing_keys)
        state = self.model.state_dict(keep_vars=True)
        loaded = {id(tensor) for name, tensor in state.items() if name not in missing}
        untied = [name for name in missing if id(state.get(name)) not in loaded]
        if (untied or load_result.unexpected_keys) and isinstance(self.model, PreTrainedModel):
            load_stored(self.model, self._weights_from)  # weight names of an older transformers
        else:
            check_keys(untied, load_result.unexpected_keys)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _loading(checkpoint, "optimizer's state"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with _loading(checkpoint, "loss scaler's state"):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _loading(checkpoint, "random state"):
            super()._load_rng_state(checkpoint)

    def _output_of_done(self) -> TrainOutput:
        """Return the output of train() for a run that was finished already."""
        self.already_done, self.is_in_train = True, False
        logger.warning("The run is already done at step %d.", self.state.global_step)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        logged = [entry for entry in self.state.log_history if "loss" in entry]
        steps = [entry["step"] for entry in logged]
        spans = [b - a for a, b in zip([0, *steps], steps, strict=False)]
        total = sum(e["loss"] * span for e, span in zip(logged, spans, strict=True))
        mean = total / max(sum(spans), 1) if logged else math.nan
        return TrainOutput(self.state.global_step, mean, {})

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.check_weights(f"for a checkpoint at step {self.state.global_step}")
        run = Path(self._get_output_dir(trial))
        folder = run / f"checkpoint-{self.state.global_step}"
        with naming_full_disk(folder):
            self._write_checkpoint(model, trial, run, folder)
        self._last_saved = self.state.global_step

    def _write_checkpoint(self, model: nn.Module, trial: Any, run: Path, folder: Path) -> None:
        if self.args.should_save:
            mark_incomplete(folder)
        # Delete older checkpoints only after this one is complete.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            torch.save(self.args, folder / TRAINING_ARGS_NAME)  # with the configured limit
            write_json(folder / SETTINGS_FILE, self._result_settings())
            mark_complete(folder)
            best = self.state.best_model_checkpoint
            keep_last(run, limit, best, self.state.global_step)

    def keep_last_good(self) -> None:
        step = self.state.global_step
        if not step or str(self.args.save_strategy.value) == "no":
            return
        if self._last_saved != step:
            self._save_checkpoint(self.model, trial=None)
        logger.warning("The run stops; checkpoint-%d has the weights from before this step.", step)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not _internal_call:
            self.check_weights("to save")
        with naming_full_disk(Path(output_dir or self.args.output_dir)):
            super().save_model(output_dir, _internal_call)


def _change_text(change: list[Any]) -> str:
    now, before = change
    return f"got {now!r}, not {printable(repr(before))}"


@contextmanager
def _loading(folder: str | None, part: str) -> Iterator[None]:
    """Convert any error from loading a part of a checkpoint to a ValueError that names it."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"resume_from_checkpoint: expected the {part} of this student in {folder}, but: "
            f"{printable(error)}"
        ) from error


class _AlreadyDone(Exception):
    """Raised when a run resumes from the checkpoint of its last step."""


class _BeginRun(TrainerCallback):
    def __init__(self, trainer: WholeCheckpoints) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.begin_run(state)
