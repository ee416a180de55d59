"""Runs cases and says for each what came of it."""

from __future__ import annotations

import contextlib
import importlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from . import cases
from .attempt import attempt
from .cases import Case, plain
from .servers import served, servers
from .tasks import OTHERS, TASKS, Task

ALL = TASKS | OTHERS


class Outcome(NamedTuple):
    """What came of a case: "unharmed", "stopped and resumed", or why it failed."""

    case: Case
    first: str  # how the first run ended, and its error
    failure: str | None
    trace: str

    @property
    def text(self) -> str:
        if self.failure is not None:
            return f"FAILED: {self.failure}"
        return "unharmed" if self.first == "done" else "stopped, then resumed"


class Undisturbed(NamedTuple):
    result: dict[str, Any]
    seconds: float
    bytes: int


def import_as_in(run: Callable[[Path], None], folder: Path) -> None:
    """Run a task in a forked process, and import here what it imported, so that others need not."""
    with tempfile.NamedTemporaryFile() as file:

        def report(folder: Path) -> None:
            run(folder)
            Path(file.name).write_text("\n".join(sys.modules))

        attempt(report, folder)
        for name in Path(file.name).read_text().split():
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def undisturbed(name: str, folder: Path) -> Undisturbed:
    """Run a task without a fault."""
    task = ALL[name]
    where = served(folder, lambda client, honest: None, range(0)) if name == "served" else None
    with where or plain(folder):
        start = time.monotonic()
        ending = attempt(task.run, folder)
        if ending.how != "done":
            raise RuntimeError(f"{name}: {ending.how} {ending.trace}")
        seconds = time.monotonic() - start
        size = int(subprocess.check_output(["du", "-sB1", str(folder)]).split()[0])
        return Undisturbed(task.result(folder), seconds, size)


def judge(case: Case, folder: Path, expected: dict[str, Any]) -> Outcome:
    """Run a case in a new folder, twice, and compare with the undisturbed result."""
    task = ALL[case.task]
    with case.place(folder) as repair:
        ending = attempt(task.run, folder, case.fault, case.action)
        repair()
        first = f"{ending.how} {ending.error}".strip()
        failure = _first_failure(case, ending.how, ending.error)
        if failure is None:
            failure = _second_failure(case, task, folder, expected)
        return Outcome(case, first, failure, ending.trace)


def _first_failure(case: Case, how: str, error: str) -> str | None:
    if how == "done":
        return "ended as if nothing had happened" if case.must_stop else None
    if how == "hang" or (how.startswith("signal") and not case.kind.startswith("killed")):
        return how
    if how == "error" and not re.search(case.error, error):
        return f"unclear error: {error[:300]}"
    return None


def _second_failure(case: Case, task: Task, folder: Path, expected: dict[str, Any]) -> str | None:
    finished = task.finished(folder)
    ending = attempt(task.run, folder)
    if ending.how != "done":
        return f"the second run: {ending.how} {ending.error[:300]} {ending.trace[-600:]}"
    after = task.finished(folder)
    again = [part for part, mark in finished.items() if after.get(part, "gone") != mark]
    if again and not case.loses:
        return f"made again: {', '.join(map(str, again))[:200]}"
    result = task.result(folder)
    differing = [name for name in {**expected, **result} if expected.get(name) != result.get(name)]
    return f"differs in {', '.join(sorted(differing))[:200]}" if differing else None


def campaign(
    seed: int, count: int, folder: Path, *, kinds: str = "", tasks: str = "", say: Any = print
) -> list[Outcome]:
    """Run the cases whose kind and task match regular expressions; `count`: random ones of each."""
    names = [name for name in ALL if re.search(tasks, name)]
    for name in names:
        if name in TASKS:
            with plain(folder / f"first {name}"):
                import_as_in(ALL[name].run, folder / f"first {name}")
    usual = {name: undisturbed(name, folder / f"undisturbed {name}") for name in names}
    seconds = {name: usual[name].seconds if name in usual else 1.0 for name in ALL}
    sizes = {name: usual[name].bytes if name in usual else 1 << 20 for name in ALL}
    outcomes = []
    for number, case in enumerate(_all_cases(random.Random(seed), count, seconds, sizes)):
        if case.task not in usual or not re.search(kinds, case.kind):
            continue
        own = folder / str(number)
        outcome = judge(case, own, usual[case.task].result)
        outcomes.append(outcome)
        shutil.rmtree(own, ignore_errors=True)
        say(f"{case.kind} | {case.task} | {case.name} | {outcome.first[:160]!r} | {outcome.text}")
        if outcome.failure is not None:
            say(outcome.trace[-1500:])
    return outcomes


def _all_cases(
    rng: random.Random, count: int, seconds: dict[str, float], sizes: dict[str, int]
) -> Iterator[Case]:
    yield from cases.kills(seconds, rng, count)
    yield from cases.full_disks(sizes, rng, 2 * count)
    yield from cases.read_only(rng, count)
    yield from cases.two_processes(seconds, rng, count)
    yield from cases.wrong_weights()
    yield from cases.bad_teachers(rng)
    yield from cases.out_of_memory(rng, count)
    yield from cases.deleted_files(rng, count)
    yield from cases.clock_jumps(seconds)
    yield from cases.dead_ranks(rng, 2 * count)
    yield from servers()


def table(outcomes: Iterable[Outcome]) -> str:
    """Return the table fault × number × outcome as Markdown."""
    rows: dict[str, dict[str, int]] = {}
    for outcome in outcomes:
        counts = rows.setdefault(outcome.case.kind, {})
        text = outcome.text.partition(":")[0]
        counts[text] = counts.get(text, 0) + 1
    columns = ("unharmed", "stopped, then resumed", "FAILED")
    titles = ("fault", "number", *columns[:2], "failed")
    lines = [f"| {' | '.join(titles)} |", f"|---{'|--:' * 4}|"]
    for kind, counts in rows.items():
        numbers = [counts.get(name, 0) for name in columns]
        lines.append(f"| {kind} | {sum(numbers)} | {' | '.join(map(str, numbers))} |")
    return "\n".join(lines)
