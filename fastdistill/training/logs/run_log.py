"""Writes metrics.jsonl and run.json to the output folder, independently of `report_to`."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import sys
import time
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ...runtime.atomic_files import naming_full_disk, write_json
from ...runtime.printable import printable
from ..histograms import EDGES, sum_histograms
from .first_batch import Panel
from .run_files import NAME, SETTINGS
from .run_settings import settings_of

logger = logging.getLogger(__name__)


class RunLog(TrainerCallback):
    """Appends the trainer's logs to metrics.jsonl.

    teacher: the trainer's teacher. changed: {name: [now, before]}, the settings that differ from
    those of the checkpoint that the run resumes from.
    """

    def __init__(self) -> None:
        self.teacher: Any = None
        self.changed: dict[str, list[Any]] = {}
        self._run = uuid.uuid4().hex[:12]
        self._counts: dict[str, list[int]] = {}
        self._samples: list[dict[str, str]] = []

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        if state.is_world_process_zero:
            settings = {"run": self._run} | settings_of(args, model, self.teacher)
            write_json(Path(args.output_dir) / SETTINGS, settings)
        begin = {"event": "train_begin", "max_steps": state.max_steps}
        self._append(args, state, begin | ({"changed": self.changed} if self.changed else {}))

    def first_batch(self, args: Any, state: Any, panel: Panel) -> None:
        self._append(args, state, {"event": "first_batch", "edges": EDGES} | asdict(panel))

    def nonfinite(self, args: Any, state: Any, error: FloatingPointError) -> None:
        """Log that the run stopped, and which quantity was NaN or infinite."""
        quantity = str(error).partition(":")[0]
        if quantity == "nonfinite":  # the setting that skipped them
            quantity = "all updates"
        self._append(args, state, {"event": "nonfinite", "of": quantity})

    @property
    def needs_samples(self) -> bool:
        """Whether no samples were stored since the last log."""
        return not self._samples

    def set_samples(self, samples: list[dict[str, str]]) -> None:
        """Store samples of the student until the loss of their steps is logged."""
        self._samples = samples

    def set_histograms(self, rows: Any) -> None:
        """Store the histograms of an evaluation until its metrics are logged."""
        self._counts = {} if rows is None else sum_histograms(rows)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, Any], **_: Any
    ) -> None:
        name = next((n[: -len("_nll")] for n in metrics if n.endswith("_nll")), None)
        if self._counts and name is not None:
            entry = {"event": "histograms", "of": name, "edges": EDGES, "counts": self._counts}
            self._append(args, state, entry)
        self._counts = {}

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._append(args, state, {"event": "train_end"})

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        known = state.log_history[:-1]  # the last ones are these
        self._append(args, state, dict(logs or {}) | _peak_memory(args), known)
        if self._samples and "loss" in (logs or {}):
            self._append(args, state, {"event": "samples", "samples": self._samples})
            self._samples = []

    def _append(
        self, args: Any, state: Any, entry: dict[str, Any], known: list[Any] | None = None
    ) -> None:
        """Append a line, in a new file after the metrics known before it (None: all logged ones).

        A new file although metrics are known means that the file was deleted, or that the run
        resumes from another folder.
        """
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir) / NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = [entry]
        if not path.exists() and (earlier := state.log_history if known is None else known):
            logger.warning(
                "%s: expected the log of the steps before, got no file: their metrics are written "
                "again, without their events",
                printable(path),
            )
            entries = [*earlier, entry]
        where = {"run": self._run, "time": round(time.time(), 3), "step": state.global_step}
        lines = [{name: _to_json(v) for name, v in (where | each).items()} for each in entries]
        texts = [json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines]
        with naming_full_disk(path), path.open("a+b") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a killed process left the line incomplete
                    file.write(b"\n")
            file.write("".join(texts).encode())


def _peak_memory(args: Any) -> dict[str, float]:
    """Return the peak memory of this process so far.

    On a GPU, PyTorch's counter, which needs no synchronization; on a CPU, resident memory.
    """
    if args.device.type == "cuda":
        name, peak = "peak_gpu_memory_gib", torch.cuda.max_memory_allocated(args.device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        name = "peak_process_memory_gib"
    return {name: round(peak / 2**30, 3)}


def _to_json(value: Any) -> Any:
    """Convert a value to JSON types; NaN and infinity become None."""
    if isinstance(value, dict):
        return {name: _to_json(v) for name, v in value.items()}
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
