"""metrics.jsonl: everything a run logs, in its output folder, whatever `report_to` says.

One JSON object a line, only ever appended to: {"run", "time", "step", "epoch", …figures}. A run
that is resumed logs the steps behind its checkpoint a second time; readers take the later line.
"""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

NAME = "metrics.jsonl"


class RunLog(TrainerCallback):
    """Appends what the trainer logs."""

    def __init__(self) -> None:
        self._run = uuid.uuid4().hex[:12]

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._append(args, state, {"event": "train_begin"})

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._append(args, state, {"event": "train_end"})

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        self._append(args, state, dict(logs or {}))

    def _append(self, args: Any, state: Any, entry: dict[str, Any]) -> None:
        if not state.is_world_process_zero:
            return
        where = {"run": self._run, "time": round(time.time(), 3), "step": state.global_step}
        figures = {name: _plain(value) for name, value in (where | entry).items()}
        path = Path(args.output_dir) / NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(figures, ensure_ascii=False, allow_nan=False) + "\n"
        with path.open("a+b") as file:
            # What a killed process left half written stays a line of its own.
            if file.seek(0, os.SEEK_END) and _last_byte(file) != b"\n":
                file.write(b"\n")
            file.write(line.encode())


def read_metrics(output_dir: str | Path) -> list[dict[str, Any]]:
    """The figures of the last run in a folder, resumed ones joined: one entry per step and kind of
    line, in order of steps. Lines that were cut off are left out."""
    entries: list[dict[str, Any]] = []
    for line in (Path(output_dir) / NAME).read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry.get("event") == "train_begin":
            # A new run from step 0, or what an interrupted one had done beyond its checkpoint.
            run, step = entry["run"], entry["step"]
            entries = [e for e in entries if e["run"] == run or 0 < e["step"] <= step]
        if "event" not in entry:
            entries.append(entry)
    return entries


def _last_byte(file: Any) -> bytes:
    file.seek(-1, os.SEEK_END)
    last: bytes = file.read(1)
    return last


def _plain(value: Any) -> Any:
    """As JSON has it: numbers that are none become null."""
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
