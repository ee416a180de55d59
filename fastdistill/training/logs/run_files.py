"""Reads a run's log from its output folder, without PyTorch.

metrics.jsonl: append-only, one JSON object per line: {"run", "time", "step", …metrics}, or with
"event": train_begin, first_batch, samples, histograms, nonfinite, train_end. run.json: models,
settings, versions and machine of the last start. A resumed run logs the steps after its checkpoint
a second time; readers use the later line.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.json_text import JSONError, parse_json

NAME = "metrics.jsonl"
SETTINGS = "run.json"


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The last run in a folder, joined with the runs that it resumed.

    lines: metrics and events in the order of writing. settings: content of run.json; None if it is
    missing or damaged. damaged: number of truncated lines.
    """

    lines: list[dict[str, Any]]
    settings: dict[str, Any] | None
    damaged: int

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line.get("event") == kind]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Metrics in order of steps, without events."""
        return [line for line in self.lines if "event" not in line]


def read_run(output_dir: str | Path) -> RunRecord:
    """Return the record of the last run in a folder.

    Raises:
        FileNotFoundError: the folder has no metrics.jsonl.
    """
    folder = Path(output_dir)
    lines: list[dict[str, Any]] = []
    started: set[str] = set()
    damaged = 0
    for text in (folder / NAME).read_text(encoding="utf-8", errors="replace").splitlines():
        if not text.strip():
            continue
        line = _object(text)
        if line is None or not {"run", "step", "time"} <= line.keys():
            damaged += 1
            continue
        if line.get("event") == "train_begin":
            run, step = line["run"], line["step"]
            # A new run replaces all lines; a resumed run replaces those after its checkpoint. An
            # evaluation that a run logged before its train_begin belongs to that run.
            own_run = set() if run in started else {run}
            lines = [e for e in lines if e["run"] in own_run or (step and e["step"] <= step)]
            started.add(run)
        lines.append(line)
    path = folder / SETTINGS
    settings = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return RunRecord(lines=lines, settings=_object(settings), damaged=damaged)


def _object(text: str) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = parse_json(text, NAME, dict)
    except JSONError:
        return None
    return content
