"""Executes runs in this process or in several; results are written to files.

Processes that share a folder, also on several machines, work in the same order: each starts the
first run that no other has started, so that the results of an unfinished study are those of its
first runs.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from filelock import FileLock, Timeout
from transformers.utils import logging as transformers_logging

from ...runtime.checks import integer
from ...runtime.progress import track


class Runnable(Protocol):
    """A picklable run that writes its result to a folder and reuses an existing result."""

    def run(self, folder: Path) -> None: ...

    def is_done(self, folder: Path) -> bool: ...

    def path(self, folder: Path) -> Path: ...


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How runs are executed.

    Args:
        processes: parallel runs on this machine; None: one per core.
        only_report: run nothing; `run_all` raises if a result is missing.

    Raises:
        ValueError: fewer than one process.
    """

    processes: int | None = 1
    only_report: bool = False

    def __post_init__(self) -> None:
        integer("processes", self.processes, 1, optional=True)

    def start(self, work: Sequence[Runnable], folder: Path, waits: bool) -> Iterator[bool]:
        """Yield whether each run is done; one of another process only after it if `waits`."""
        processes = self.processes or os.cpu_count() or 1
        if processes == 1:
            return (_run_once(run, folder, waits) for run in work)
        return _processes(work, folder, processes, waits)


SERIAL = Execution()


def run_all(
    work: Sequence[Runnable], folder: Path, execution: Execution = SERIAL, *, label: str = "runs"
) -> None:
    """Execute all runs that have no result yet; `label` names them in the progress bar and errors.

    Raises:
        ValueError: a missing result with only_report.
        Any exception of a run; results of finished runs are kept.
    """
    pending = [run for run in work if not run.is_done(folder)]
    if pending and execution.only_report:
        raise ValueError(
            f"only_report: expected all {label} in {folder}, got {len(pending)} of {len(work)} "
            "missing. Run the experiment without only_report"
        )
    if not pending:
        return
    bar = track(pending, label)
    next(bar)
    for waits in (False, True):
        left = [run for run in pending if not run.is_done(folder)]
        for is_done in execution.start(left, folder, waits) if left else ():
            if is_done:
                next(bar, None)


def _run_once(run: Runnable, folder: Path, waits: bool) -> bool:
    """Execute a run unless another process does; return whether it is done."""
    path = run.path(folder)
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(NotImplementedError):  # a file system without locks
        try:
            lock.acquire(timeout=-1 if waits else 0)
        except Timeout:
            return False
    try:
        if not run.is_done(folder):
            run.run(folder)
        return True
    finally:
        with suppress(OSError):  # Windows removes the file on release
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _run_in_worker(run: Runnable, folder: Path, threads: int, waits: bool) -> bool:
    torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()
    return _run_once(run, folder, waits)


def _processes(
    work: Sequence[Runnable], folder: Path, processes: int, waits: bool
) -> Iterator[bool]:
    context = multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
    threads = max(1, torch.get_num_threads() // processes)
    run = partial(_run_in_worker, folder=folder, threads=threads, waits=waits)
    with context.Pool(min(processes, len(work))) as pool:
        yield from pool.imap_unordered(run, work)
        pool.close()
        pool.join()
