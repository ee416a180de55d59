"""Checkpoints that are whole or not there, whenever the process was killed.

transformers writes a checkpoint's files one by one. Here its last file is `finished.json`, written
when all others are on disk, with their sizes and sha256: a folder without it was being written, or
being deleted, when the process ended. Older checkpoints are deleted only after that. The digests
cost one reading of what was just written, 1 to 2 GB/s and file on a CPU with SHA instructions, and
one more before a run resumes.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..files import sha256_of, sync, write_json
from ..runtime.json_text import JSONError, read_json
from ..runtime.printable import printable

logger = logging.getLogger(__name__)

FINISHED = "finished.json"
STATE = "trainer_state.json"
# The second one is there while transformers' enable_jit_checkpoint saves, and goes after that.
_NOT_HASHED = (FINISHED, "checkpoint-is-incomplete.txt")
_NAME = re.compile(r"checkpoint-[0-9]+")
_READ_FIRST = (STATE, "config.json", "generation_config.json", "adapter_config.json")


def begin(folder: Path) -> None:
    """What is written into this folder from now on is not a checkpoint yet."""
    (folder / FINISHED).unlink(missing_ok=True)


def finish(folder: Path) -> None:
    """Everything is written: wait until it is on disk, and say so."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in _NOT_HASHED]
    for path in files:
        sync(path)
    for path in {p.parent for p in files}:
        sync(path)
    names = [str(p.relative_to(folder)) for p in files]
    sizes = {name: p.stat().st_size for name, p in zip(names, files, strict=True)}
    with ThreadPoolExecutor() as pool:
        digests = dict(zip(names, pool.map(sha256_of, files), strict=True))
    write_json(folder / FINISHED, {"files": sizes, "sha256": digests})


def completeness_error(folder: Path) -> str | None:
    """Return None for a checkpoint whose files are all there, in their sizes; else the fault."""
    try:
        sizes = _finished(folder)["files"]
    except FileNotFoundError:
        return f"it has no {FINISHED}: writing it was interrupted, or something else wrote it"
    except ValueError:
        return f"its {FINISHED} is damaged"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{printable(name)} is missing"
        if path.stat().st_size != size:
            return f"{printable(name)} has {path.stat().st_size:,} bytes, not {size:,}"
    return None


def integrity_error(folder: Path) -> str | None:
    """Return None for a checkpoint whose files are what was written; else the fault.

    Reads every file. Checkpoints from before there were digests, and those of other trainers, are
    compared as far as they can be.
    """
    digests: dict[str, Any] = {}
    if (folder / FINISHED).exists():
        problem = completeness_error(folder)
        if problem is not None:
            return problem
        digests = _finished(folder).get("sha256", {})
    names = list(digests)
    with ThreadPoolExecutor() as pool:
        actual = pool.map(sha256_of, (folder / name for name in names))
        for name, digest in zip(names, actual, strict=True):
            if digest != digests[name]:
                return f"{printable(name)} is damaged: its sha256 is not the one in {FINISHED}"
    for name in _READ_FIRST:
        if name == STATE or (folder / name).exists():
            try:
                content = read_json(folder / name, dict)
            except FileNotFoundError:
                return f"{name} is missing"
            except (JSONError, OSError) as error:
                return f"{name} is damaged: {printable(error)}"
            if name == STATE and not isinstance(content.get("global_step"), int):
                return f"{name} is damaged: it has no global_step"
    return None


def missing_state(folder: Path, *, has_loss_scaler: bool = False) -> str | None:
    """Return what a checkpoint lacks to go on as if nothing had happened, or None.

    Args:
        scaled: the run has a loss scaler, whose state belongs to it too.
    """
    names = [p.name for p in folder.iterdir()]
    deepspeed = "latest" in names
    required = {"the random state": "rng_state"}
    if not deepspeed:
        required |= {"the optimizer's state": "optimizer", "the schedule's state": "scheduler"}
        if has_loss_scaler:
            required["the loss scaler's state"] = "scaler"
    missing = [what for what, prefix in required.items() if not _has_prefix(names, prefix)]
    return ", ".join(missing) or None


def _has_prefix(names: list[str], prefix: str) -> bool:
    # FSDP writes pytorch_model_fsdp_0 and optimizer_0; XLA puts the rank before the name.
    return any(n.startswith(prefix) or (n.startswith("rank") and prefix in n) for n in names)


def read_state(folder: Path) -> dict[str, Any]:
    """Return the trainer's state in a checkpoint: global_step, max_steps, and more."""
    state: dict[str, Any] = read_json(folder / STATE, dict)
    return state


def last_finished(output_dir: str | Path) -> Path | None:
    """The checkpoint of the most steps that is whole; those that are not stay where they are."""
    whole = (p for p in reversed(checkpoints(output_dir)) if completeness_error(p) is None)
    return next(whole, None)


def to_resume_from(
    checkpoint: str | Path | bool | None,
    output_dir: str | Path,
    find_fault: Callable[[Path], str | None] | None = None,
) -> str | None:
    """The folder that `train(resume_from_checkpoint=given)` means.

    True is the last usable checkpoint and raises where there is none; "auto" begins anew there.
    Checkpoints that are passed over are named in a warning.

    Args:
        fault_of: returns why a checkpoint cannot be used, or None; None compares sizes.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged.
    """
    if checkpoint is None or checkpoint is False:
        return None
    find_fault = find_fault or completeness_error
    if checkpoint is True or checkpoint == "auto":
        problems: dict[str, str] = {}
        for folder in reversed(checkpoints(output_dir)):
            problem = find_fault(folder)
            if problem is None:
                _warn(problems, f"the run goes on from {folder.name}")
                return str(folder)
            problems[folder.name] = problem
        if checkpoint is True:
            first = next(iter(problems.items()), None)
            raise ValueError(
                f"resume_from_checkpoint: expected a finished checkpoint in {str(output_dir)!r}, "
                f"got {'none' if first is None else f'{first[0]}, but {first[1]}'}. 'auto' begins "
                "anew where there is none"
            )
        _warn(problems, "the run begins anew")
        return None
    folder = Path(checkpoint)
    checked = (folder / FINISHED).exists() or find_fault is not completeness_error
    problem = find_fault(folder) if checked else None
    if problem is not None:
        raise ValueError(
            f"resume_from_checkpoint: expected a whole checkpoint, but {problem}: {checkpoint}"
        )
    return str(checkpoint)


def _warn(problems: dict[str, str], then: str) -> None:
    for name, problem in problems.items():
        logger.warning("%s is not used: %s; %s.", name, problem, then)


def _finished(folder: Path) -> dict[str, Any]:
    """Return the content of finished.json; raises ValueError if it is not what `finish` writes."""
    record: dict[str, Any] = read_json(folder / FINISHED, dict)
    files, digests = record.get("files"), record.get("sha256", {})
    if not isinstance(files, dict) or not isinstance(digests, dict):
        raise ValueError(f"{FINISHED}: expected the names of files")
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in (*files, *digests)):
        raise ValueError(f"{FINISHED}: expected names inside the folder")
    return record


def checkpoints(output_dir: str | Path) -> list[Path]:
    """checkpoint-N folders by rising N."""
    folders = Path(output_dir).glob("checkpoint-*")
    numbered = [p for p in folders if p.is_dir() and _NAME.fullmatch(p.name)]
    return sorted(numbered, key=lambda p: int(p.name.partition("-")[2]))


def keep_last(output_dir: str | Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `limit`, never the best one nor the one written last.

    Age is the time at which a checkpoint was written: a folder can hold an earlier run's, of more
    steps than this run has yet.
    """
    if limit is None or limit <= 0:
        return
    by_age = sorted(checkpoints(output_dir), key=_written)
    protected = {p for p in by_age if best is not None and p.resolve() == Path(best).resolve()}
    others = [p for p in by_age if p not in protected]
    for folder in others[: max(0, len(others) - max(limit - len(protected), 1))]:
        begin(folder)  # half deleted, it must not look whole
        if folder.is_symlink():
            folder.unlink()
        else:
            shutil.rmtree(folder)


def _written(folder: Path) -> tuple[int, int]:
    """When a checkpoint was finished, and its steps, for those of the same moment."""
    mark = folder / FINISHED
    time = (mark if mark.exists() else folder).stat().st_mtime_ns
    return time, int(folder.name.partition("-")[2])
