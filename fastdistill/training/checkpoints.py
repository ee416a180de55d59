"""Atomic checkpoints: a checkpoint is complete or ignored, even if the process is killed.

transformers writes a checkpoint's files one by one. Here the last file is `finished.json`, with the
sizes and sha256 digests of all others, written after they are on disk. A folder without it was
being written or deleted when the process ended. Older checkpoints are deleted only after that. The
digests need one more read of each file (1 to 2 GB/s on a CPU with SHA instructions), and another
before a run resumes.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..runtime import checks
from ..runtime.atomic_files import sha256_of, sync, write_json
from ..runtime.json_shape import has_shape
from ..runtime.json_text import JSONError, read_json
from ..runtime.printable import printable

logger = logging.getLogger(__name__)

FINISHED = "finished.json"
STATE = "trainer_state.json"
# transformers' enable_jit_checkpoint creates the second file while it saves, and deletes it after.
_NOT_HASHED = (FINISHED, "checkpoint-is-incomplete.txt")
_NAME = re.compile(r"checkpoint-[0-9]+")
_READ_FIRST = (STATE, "config.json", "generation_config.json", "adapter_config.json")


def mark_incomplete(folder: Path) -> None:
    """Mark a folder as an incomplete checkpoint."""
    (folder / FINISHED).unlink(missing_ok=True)


def mark_complete(folder: Path) -> None:
    """Flush all files of a checkpoint to disk, then mark it as complete."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in _NOT_HASHED]
    for path in files:
        sync(path)
    for path in {p.parent for p in files}:
        sync(path)
    sizes = {str(p.relative_to(folder)): p.stat().st_size for p in files}
    with ThreadPoolExecutor() as pool:
        digests = dict(zip(sizes, pool.map(sha256_of, files), strict=True))
    write_json(folder / FINISHED, {"files": sizes, "sha256": digests})


def completeness_error(folder: Path) -> str | None:
    """Return what a checkpoint lacks, by file names and sizes; None if it is complete."""
    try:
        sizes = _finished(folder)["files"]
    except FileNotFoundError:
        return f"it has no {FINISHED}: writing it was interrupted, or something else wrote it"
    except ValueError:
        return f"its {FINISHED} is damaged"
    stored = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    for name, size in sizes.items():
        if name not in stored:
            return f"{printable(name)} is missing"
        if stored[name].stat().st_size != size:
            return f"{printable(name)} has {stored[name].stat().st_size:,} bytes, not {size:,}"
    return None


def integrity_error(folder: Path) -> str | None:
    """Return how a checkpoint is damaged, by its digests; None if it is intact.

    Reads every file. Checkpoints without digests, such as those of other trainers, are checked as
    far as possible.
    """
    digests: dict[str, Any] = {}
    if (folder / FINISHED).exists():
        problem = completeness_error(folder)
        if problem is not None:
            return problem
        digests = _finished(folder).get("sha256", {})
    with ThreadPoolExecutor() as pool:
        actual = pool.map(sha256_of, (folder / name for name in digests))
        for name, digest in zip(digests, actual, strict=True):
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
            if name == STATE and not has_shape(content, {"global_step": int, "max_steps?": int}):
                return f"{name} is damaged: it has no global_step"
    return None


def missing_state(folder: Path, *, has_loss_scaler: bool = False) -> str | None:
    """Return the training state that a checkpoint lacks for an exact resume, or None.

    Args:
        has_loss_scaler: the run has a loss scaler, whose state is needed too.
    """
    names = [p.name for p in folder.iterdir()]
    required = {"the random state": "rng_state"}
    if "latest" not in names:  # as written by DeepSpeed
        required |= {"the optimizer's state": "optimizer", "the schedule's state": "scheduler"}
        if has_loss_scaler:
            required["the loss scaler's state"] = "scaler"
    # FSDP writes pytorch_model_fsdp_0 and optimizer_0; XLA puts the rank before the name.
    missing = [
        name
        for name, prefix in required.items()
        if not any(n.startswith(prefix) or (n.startswith("rank") and prefix in n) for n in names)
    ]
    return ", ".join(missing) or None


def read_state(folder: Path) -> dict[str, Any]:
    """Return the trainer's state in a checkpoint, such as global_step and max_steps."""
    state: dict[str, Any] = read_json(folder / STATE, dict)
    return state


def last_finished(output_dir: str | Path) -> Path | None:
    """Return the complete checkpoint with the most steps, or None. Deletes nothing."""
    whole = (p for p in reversed(checkpoints(output_dir)) if completeness_error(p) is None)
    return next(whole, None)


def check_named_checkpoint(checkpoint: str | Path | bool | None) -> None:
    """Raise ValueError for a folder to resume from that is no whole checkpoint, by its sizes."""
    if not isinstance(checkpoint, (str, Path)) or checkpoint in ("", "auto"):
        return
    folder = Path(checkpoint)
    if not (folder / STATE).is_file():
        got = f"{str(checkpoint)!r}, which has no {STATE}"
        checks.fail("resume_from_checkpoint", "the folder of a checkpoint", got)
    _check_whole(folder)


def to_resume_from(
    checkpoint: str | Path | bool | None,
    output_dir: str | Path,
    find_fault: Callable[[Path], str | None] = lambda folder: None,
) -> str | None:
    """Return the folder that `train(resume_from_checkpoint=checkpoint)` resumes from, or None.

    True selects the last usable checkpoint and raises if there is none; "auto" starts a new run
    instead. A warning names the checkpoints that are skipped.

    Args:
        find_fault: returns why a checkpoint of the right sizes cannot be used, or None.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged.
    """
    if checkpoint is None or checkpoint is False:
        return None
    if checkpoint is True or checkpoint == "auto":
        problems: dict[str, str] = {}
        usable = None
        for folder in reversed(checkpoints(output_dir)):
            problem = completeness_error(folder) or find_fault(folder)
            if problem is None:
                usable = folder
                break
            problems[folder.name] = problem
        if usable is None and checkpoint is True:
            got = next((f"{name}, but {problem}" for name, problem in problems.items()), "none")
            hint = "'auto' starts a new run if there is none"
            expected = f"a finished checkpoint in {str(output_dir)!r}"
            checks.fail("resume_from_checkpoint", expected, got, hint)
        then = "a new run starts" if usable is None else f"the run resumes from {usable.name}"
        for name, problem in problems.items():
            logger.warning("%s is not used: %s; %s.", name, problem, then)
        return None if usable is None else str(usable)
    folder = Path(checkpoint)
    _check_whole(folder, find_fault(folder))
    return str(checkpoint)


def _check_whole(folder: Path, problem: str | None = None) -> None:
    """Raise ValueError for a problem, or if files have other sizes than in finished.json."""
    if (folder / FINISHED).exists():
        problem = completeness_error(folder) or problem
    if problem is not None:
        got = f"{folder}: {problem}"
        checks.fail("resume_from_checkpoint", "a whole checkpoint", got)


def _finished(folder: Path) -> dict[str, Any]:
    """Return the content of finished.json; raise ValueError if `mark_complete` did not write it."""
    record: dict[str, Any] = read_json(folder / FINISHED, dict)
    is_sound = has_shape(record, {"files": {str: int}, "sha256?": {str: str}})
    names = [Path(name) for name in record["files"]] if is_sound else []
    inside = not any(name.is_absolute() or ".." in name.parts for name in names)
    if not (is_sound and inside) or not record.get("sha256", {}).keys() <= record["files"].keys():
        raise ValueError(f"{FINISHED}: expected the sizes of files, and their digests")
    return record


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the checkpoint-N folders in ascending order of N."""
    folders = Path(output_dir).glob("checkpoint-*")
    numbered = [p for p in folders if p.is_dir() and _NAME.fullmatch(p.name)]
    return sorted(numbered, key=_step)


def keep_last(output_dir: str | Path, limit: int | None, best: str | None, step: int) -> None:
    """Delete the oldest checkpoints beyond `limit`, but never the best and the one of `step`.

    The checkpoint of `step` was written last. Those with more steps are of an earlier run, so they
    are the oldest. The times of files say less: a clock may be set back during a run.
    """
    if limit is None or limit <= 0:
        return
    by_age = sorted(checkpoints(output_dir), key=lambda p: (_step(p) <= step, _step(p)))
    protected = {p for p in by_age if best is not None and p.resolve() == Path(best).resolve()}
    others = [p for p in by_age if p not in protected]
    for folder in others[: max(0, len(others) - max(limit - len(protected), 1))]:
        mark_incomplete(folder)  # a partly deleted checkpoint must not look complete
        if folder.is_symlink():
            folder.unlink()
        else:
            shutil.rmtree(folder)


def _step(folder: Path) -> int:
    return int(folder.name.partition("-")[2])
