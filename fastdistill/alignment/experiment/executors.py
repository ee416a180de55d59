"""Executes runs in this process or in several; results are written to files."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from transformers.utils import logging as transformers_logging

from ...runtime.checks import integer
from ...runtime.progress import track


class Runnable(Protocol):
    """A picklable run that writes its result to a folder and reuses an existing result."""

    def run(self, folder: Path) -> None: ...

    def is_done(self, folder: Path) -> bool: ...


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

    def start(self, work: Sequence[Runnable], folder: Path) -> Iterator[None]:
        processes = self.processes or os.cpu_count() or 1
        return _in_process(work, folder) if processes == 1 else _processes(work, folder, processes)


SERIAL = Execution()


def run_all(
    work: Sequence[Runnable], folder: Path, execution: Execution = SERIAL, *, label: str = "runs"
) -> None:
    """Execute all runs that have no result yet; `label` names them in the progress bar and errors.

    Raises:
        ValueError: a missing result with only_report.
        Any exception of a run; results of finished runs are kept.
    """
    pending = [run for run in _rotate_by_pid(work) if not run.is_done(folder)]
    if pending and execution.only_report:
        raise ValueError(
            f"only_report: expected all {label} in {folder}, got {len(pending)} of {len(work)} "
            "missing. Run the experiment without only_report"
        )
    if not pending:
        return
    bar = track(pending, label)
    next(bar)
    for _ in execution.start(pending, folder):
        next(bar, None)


def _rotate_by_pid(work: Sequence[Runnable]) -> list[Runnable]:
    """Rotate the order by process id: machines that share a folder start at different runs."""
    offset = os.getpid() % max(len(work), 1)
    return [*work[offset:], *work[:offset]]


def _run_one(run: Runnable, folder: Path, threads: int = 1) -> None:
    torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()
    if not run.is_done(folder):  # another machine may have been faster
        run.run(folder)


def _in_process(work: Sequence[Runnable], folder: Path) -> Iterator[None]:
    for run in work:
        run.run(folder)
        yield


def _processes(work: Sequence[Runnable], folder: Path, processes: int) -> Iterator[None]:
    context = multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
    threads = max(1, torch.get_num_threads() // processes)
    with context.Pool(min(processes, len(work))) as pool:
        yield from pool.imap_unordered(partial(_run_one, folder=folder, threads=threads), work)
        pool.close()
        pool.join()
