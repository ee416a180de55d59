"""Opens the teacher, makes rows and caches in a folder, and measures what each step costs."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from .....runtime.atomic_files import write_json
from .....runtime.json_text import read_json
from .....runtime.progress import track
from .....teachers.cache import TeacherCache
from .....teachers.local import load_teacher
from .models import first_student, teacher_file
from .rows import make_rows
from .runs import BATCH, Arm, K, Setting, StudentRun, Watch, train

COST_STEPS = 4  # of which the first does not count
COST_ROWS = 16
PASSES = 2  # over the rows, of a student with top-k KL


def open_setting(folder: Path, *, steps: int) -> Setting:
    """Return the setting in a folder; answers and caches that exist there are read.

    There are as many rows to train on as `steps` steps read in PASSES passes.
    """
    n = math.ceil(steps * BATCH / PASSES)
    file = teacher_file()
    teacher = load_teacher(file, device="cpu")
    rows = make_rows(teacher, folder, n)
    held_out = [row for part in rows.held_out.values() for row in part]
    return Setting(
        file,
        teacher,
        rows,
        TeacherCache.build(teacher, rows.train, folder / f"cache-of-{n}", k=K),
        TeacherCache.build(teacher, held_out, folder / "held-out-cache", k=K),
        bf16=has_fast_bf16(),
    )


def has_fast_bf16() -> bool:
    """Whether this CPU has instructions for products in bfloat16."""
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


def measure_costs(
    setting: Setting, arms: Sequence[Arm], folder: Path, *, rounds: int
) -> dict[str, float]:
    """Return CPU seconds: of a step of each arm, and of caching the answers to all rows.

    The arms take turns in one process, and each cost is the median of its rounds, so that other
    work on the machine changes all of them alike. They are stored in costs.json, and read again.
    """
    path = folder / "costs.json"
    if path.is_file():
        costs: dict[str, float] = read_json(path, dict)
        return costs
    seconds: dict[str, list[float]] = {name: [] for name in (*(arm.name for arm in arms), "cache")}
    turns = [arm for _ in range(rounds) for arm in (*arms, None)]
    with tempfile.TemporaryDirectory(prefix="fastdistill-") as temporary:
        for turn, arm in enumerate(track(turns, "the cost of a step")):
            if arm is None:
                seconds["cache"].append(_cache_seconds(setting, Path(temporary, str(turn))))
                continue
            run = StudentRun(setting=setting, arm=arm, seed=0, steps=COST_STEPS)
            watch = Watch(setting, frozenset())
            train(first_student(setting.file), run, Path(temporary), watch)
            taken = watch.step_seconds[1:]
            seconds[arm.name].append(sum(taken) / len(taken))
    costs = {name: median(values) for name, values in seconds.items()}
    write_json(path, costs)
    return costs


def _cache_seconds(setting: Setting, folder: Path) -> float:
    """Return the CPU seconds of caching all rows, from a sample of them."""
    rows = setting.rows.train
    some = rows[:: max(1, len(rows) // COST_ROWS)][:COST_ROWS]
    start = time.process_time()
    TeacherCache.build(setting.teacher, some, folder, k=K)
    return (time.process_time() - start) * len(rows) / len(some)


def steps_at_equal_time(steps: int, costs: dict[str, float], of: str, like: str) -> int:
    """Return how many steps of one arm cost as much as `steps` of another and the cache."""
    return math.floor((steps * costs[like] + costs["cache"]) / costs[of])
