"""Reads a run's log from its output folder, without PyTorch.

metrics.jsonl: append-only, one JSON object per line: {"run", "time", "step", …metrics}, or with
"event": train_begin, first_batch, samples, histograms, nonfinite, train_end. run.json: models,
settings, versions and machine of the last start. A resumed run logs the steps after its checkpoint
a second time; readers use the later line. If the file was deleted, the metrics of earlier steps are
written again from the trainer's state; their "time" is that of writing.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ...runtime.json_shape import has_shape
from ...runtime.json_text import JSONError, parse_json

NAME = "metrics.jsonl"
SETTINGS = "run.json"

_MOST_STEPS = 1 << 53
_COUNTED = {"edges": [float], "counts": {str: [int]}}


def _is_counted(line: dict[str, Any]) -> bool:
    """Whether histograms have increasing edges above 0 and a count for each of their bins."""
    edges = line["edges"]
    rises = all(0 < a < b for a, b in pairwise(edges))
    counts = line["counts"].values()
    return (
        len(edges) > 1
        and rises
        and all(len(c) == len(edges) + 1 and min(c) >= 0 and sum(c) > 0 for c in counts)
    )


_LINE = {"run": str, "time": float, "step": lambda n: type(n) is int and 0 <= n < _MOST_STEPS}
_NATS = (float, None)
_EVENTS: dict[str, Any] = {
    "train_begin": {
        "max_steps?": int,
        "changed?": {str: lambda pair: isinstance(pair, list) and len(pair) == 2},
    },
    "first_batch": {
        "k": int,
        "tokens": int,
        "kl": _NATS,
        "kl_shuffled": _NATS,
        **_COUNTED,
        **dict.fromkeys(("teacher_mass", "teacher_mass_p5", "overlap"), float),
        "signal": {"nll": _NATS, "nll_shuffled": _NATS},
    },
    "samples": {"samples": [{"prompt": str, "completion": str}]},
    "histograms": {"of": str, **_COUNTED},
    "nonfinite": {"of": str},
}
_SETTINGS: dict[str, Any] = {
    "student": {
        "name": (str, None),
        "class": str,
        "parameters": (int, None),
        "trainable": (int, None),
    },
    "teacher": (str, None),
    "config": {"k": (int, None), "temperature": float, "divergence": str},
    "changed": [str],
    "processes": int,
    "machine": {"gpus": [str], "machine": str, "cpu_capability": str, "threads": int},
    "versions": {str: (str, None)},
}


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The last run in a folder, joined with the runs that it resumed.

    lines: metrics and events in the order of writing. settings: content of run.json; None if it is
    missing or damaged. damaged: number of lines that the trainer does not write, such as truncated
    ones.
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
    for text in (folder / NAME).read_text(encoding="utf-8", errors="replace").split("\n"):
        if not text.strip():
            continue
        line = _object(text)
        if line is None or not _is_written_by_the_trainer(line):
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
    content = _object(settings)
    if content is not None and not (
        has_shape(content, _SETTINGS) and set(content["changed"]) <= content["config"].keys()
    ):
        content = None
    return RunRecord(lines=lines, settings=content, damaged=damaged)


def _is_written_by_the_trainer(line: dict[str, Any]) -> bool:
    if "event" not in line:
        return has_shape(line, _LINE)
    event = line["event"]
    shape = _EVENTS.get(event, {}) if isinstance(event, str) else None
    is_sound = shape is not None and has_shape(line, _LINE | shape)
    return is_sound and ("counts" not in line or event not in _EVENTS or _is_counted(line))


def _object(text: str) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = parse_json(text, NAME, dict)
    except JSONError:
        return None
    return content
