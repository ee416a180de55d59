"""Checkpoints that are whole or not there, whenever the process was killed.

transformers writes a checkpoint's files one by one. Here its last file is `finished.json`, written
when all others are on disk, with their sizes: a folder without it was being written, or being
deleted, when the process ended. Older checkpoints are deleted only after that.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from ..files import sync, write_json

FINISHED = "finished.json"


class WholeCheckpoints(Trainer):
    """A Trainer that resumes from whole checkpoints only, and always leaves one to resume from."""

    def train(
        self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As Trainer.train; True is the last finished checkpoint, "auto" too where there is one."""
        folder = to_resume_from(resume_from_checkpoint, self.args.output_dir)
        return super().train(folder, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(self._get_output_dir(trial))
        folder = run / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            begin(folder)
        # Older ones go when this one is whole, not before.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            torch.save(self.args, folder / TRAINING_ARGS_NAME)  # with the limit as it was given
            finish(folder)
            keep_last(run, limit, self.state.best_model_checkpoint)


def begin(folder: Path) -> None:
    """What is written into this folder from now on is not a checkpoint yet."""
    (folder / FINISHED).unlink(missing_ok=True)


def finish(folder: Path) -> None:
    """Everything is written: wait until it is on disk, and say so."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != FINISHED]
    for path in files:
        sync(path)
    for path in {p.parent for p in files}:
        sync(path)
    sizes = {str(p.relative_to(folder)): p.stat().st_size for p in files}
    write_json(folder / FINISHED, {"files": sizes})


def why_unfinished(folder: Path) -> str | None:
    """None for a checkpoint that is whole; else what is wrong with it."""
    try:
        sizes = json.loads((folder / FINISHED).read_text())["files"]
    except FileNotFoundError:
        return f"it has no {FINISHED}: writing it was interrupted, or something else wrote it"
    except (ValueError, KeyError):
        return f"its {FINISHED} is damaged"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes, not {size:,}"
    return None


def last_finished(output_dir: str | Path) -> Path | None:
    """The checkpoint of the most steps that is whole; those that are not stay where they are."""
    whole = (p for p in reversed(checkpoints(output_dir)) if why_unfinished(p) is None)
    return next(whole, None)


def to_resume_from(given: str | Path | bool | None, output_dir: str | Path) -> str | None:
    """The folder that `train(resume_from_checkpoint=given)` means.

    True is the last finished checkpoint and raises where there is none; "auto" begins anew there.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged.
    """
    if given is None or given is False:
        return None
    if given is True or given == "auto":
        found = last_finished(output_dir)
        if found is None and given is True:
            all_ = checkpoints(output_dir)
            got = f"{all_[-1].name}, but {why_unfinished(all_[-1])}" if all_ else "none"
            raise ValueError(
                f"resume_from_checkpoint: expected a finished checkpoint in {str(output_dir)!r}, "
                f"got {got}. 'auto' begins anew where there is none"
            )
        return None if found is None else str(found)
    why = why_unfinished(Path(given))
    if why is not None and (Path(given) / FINISHED).exists():
        raise ValueError(f"resume_from_checkpoint: expected a whole checkpoint, but {why}: {given}")
    return str(given)


def checkpoints(output_dir: str | Path) -> list[Path]:
    """checkpoint-N folders by rising N."""
    found = Path(output_dir).glob("checkpoint-*")
    numbered = [p for p in found if p.is_dir() and p.name.partition("-")[2].isdigit()]
    return sorted(numbered, key=lambda p: int(p.name.partition("-")[2]))


def keep_last(output_dir: str | Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `limit`, never the best one nor the last."""
    if limit is None or limit <= 0:
        return
    found = checkpoints(output_dir)
    spared = {p for p in found if best is not None and p.resolve() == Path(best).resolve()}
    others = [p for p in found if p not in spared]
    for folder in others[: max(0, len(others) - max(limit - len(spared), 1))]:
        begin(folder)  # half deleted, it must not look whole
        shutil.rmtree(folder)
