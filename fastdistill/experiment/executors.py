"""Run executors: in-process, multiprocessing and Ray.

An executor yields once per finished run, in any order; results are written to files.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers.utils import logging as transformers_logging

from ..progress import track

EXECUTORS = ("processes", "ray")


class Runnable(Protocol):
    """A picklable run that writes its result to a folder and reuses an existing result."""

    def run(self, folder: Path) -> None: ...

    def is_done(self, folder: Path) -> bool: ...


def workers(executor: str, processes: int | None) -> int:
    """Return the number of parallel runs; raises ValueError for an invalid argument."""
    if executor not in EXECUTORS:
        raise ValueError(f"executor: expected {' or '.join(EXECUTORS)}, got {executor!r}")
    if processes is not None and processes < 1:
        raise ValueError(f"processes: expected 1 or more, got {processes}")
    return processes or os.cpu_count() or 1


def run_all(
    work: Sequence[Any],
    folder: Path,
    *,
    executor: str = "processes",
    processes: int = 1,
    label: str = "runs",
    only_report: bool = False,
) -> None:
    """Execute all runs that have no result yet.

    Args:
        executor: "processes", or "ray": a cluster at RAY_ADDRESS or on this machine, whose workers
            share the folder.
        processes: parallel runs on this machine.
        label: of the progress bar and of errors.
        only_report: run nothing, and raise if a result is missing.

    Raises:
        ValueError: an unknown executor, or a missing result with only_report.
        ImportError: ray is not installed.
        Any exception of a run; results of finished runs are kept.
    """
    runners: dict[str, Callable[..., Iterator[None]]] = {
        "processes": _processes if processes > 1 else _in_process,
        "ray": _ray,
    }
    if executor not in runners:
        raise ValueError(f"executor: expected {' or '.join(EXECUTORS)}, got {executor!r}")
    pending = [run for run in _rotate_by_pid(work) if not run.is_done(folder)]
    if pending and only_report:
        raise ValueError(
            f"only_report: expected all {label} in {folder}, got {len(pending)} of {len(work)} "
            "missing. Run the experiment without only_report"
        )
    if not pending:
        return
    bar = track(pending, label)
    next(bar)
    for _ in runners[executor](pending, folder, processes):
        next(bar, None)


def _rotate_by_pid(work: Sequence[Any]) -> list[Any]:
    """Rotate the order by process id: machines that share a folder start at different runs."""
    offset = os.getpid() % max(len(work), 1)
    return [*work[offset:], *work[:offset]]


def _run_one(run: Any, folder: Path) -> None:
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    if not run.is_done(folder):  # another machine may have been faster
        run.run(folder)


def _in_process(work: Sequence[Any], folder: Path, processes: int) -> Iterator[None]:
    for run in work:
        run.run(folder)
        yield


def _processes(work: Sequence[Any], folder: Path, processes: int) -> Iterator[None]:
    context = multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
    with context.Pool(min(processes, len(work))) as pool:
        yield from pool.imap_unordered(partial(_run_one, folder=folder), work)
        pool.close()
        pool.join()


def _ray(work: Sequence[Any], folder: Path, processes: int) -> Iterator[None]:
    try:
        import ray
    except ImportError:
        raise ImportError(
            "executor: expected the package ray, which is not installed. "
            "pip install 'fastdistill[ray]'"
        ) from None
    owns_cluster = not ray.is_initialized()
    if owns_cluster:
        ray.init(log_to_driver=False, logging_level="ERROR")
    gpus = 1 if torch.cuda.is_available() else 0
    remote = ray.remote(num_cpus=1, num_gpus=gpus)(_run_one)
    try:
        pending = [remote.remote(run, folder.absolute()) for run in work]
        while pending:
            ready, pending = ray.wait(pending)
            for result in ready:
                ray.get(result)
                yield
    finally:
        if owns_cluster:
            ray.shutdown()
