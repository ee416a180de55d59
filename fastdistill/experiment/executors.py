"""Who does the runs: this process, several beside each other, or the workers of a Ray cluster.

Each says when one more is done, in whatever order; what was found lies in files.
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


class Work(Protocol):
    """Something that can be pickled, leaves its result in a folder, and is quick if it is there."""

    def run(self, folder: Path) -> None: ...

    def done(self, folder: Path) -> bool: ...


def workers(executor: str, processes: int | None) -> int:
    """Return how many runs go on beside each other; raises ValueError for none of them."""
    if executor not in EXECUTORS:
        raise ValueError(f"executor: expected {' or '.join(EXECUTORS)}, got {executor!r}")
    if processes is not None and processes < 1:
        raise ValueError(f"processes: expected 1 or more, got {processes}")
    return processes or os.cpu_count() or 1


def do(
    work: Sequence[Any],
    folder: Path,
    *,
    executor: str = "processes",
    processes: int = 1,
    what: str = "runs",
    only_report: bool = False,
) -> None:
    """Do all of it that is not done yet.

    Args:
        executor: "processes", or "ray": a cluster at RAY_ADDRESS or on this machine, whose workers
            see the same folder.
        processes: beside each other on this machine.
        only_report: do nothing, and raise where something is missing.

    Raises:
        ValueError: an unknown executor, or something is missing that is only to be reported.
        ImportError: ray is not installed.
        Whatever a run raised; what is done by then is kept.
    """
    runners: dict[str, Callable[..., Iterator[None]]] = {
        "processes": _processes if processes > 1 else _here,
        "ray": _ray,
    }
    if executor not in runners:
        raise ValueError(f"executor: expected {' or '.join(EXECUTORS)}, got {executor!r}")
    left = [one for one in _from_somewhere(work) if not one.done(folder)]
    if left and only_report:
        raise ValueError(
            f"only_report: expected all {what} in {folder}, found {len(left)} of {len(work)} "
            "missing. Run the experiment without it"
        )
    if not left:
        return
    bar = track(left, what)
    next(bar)
    for _ in runners[executor](left, folder, processes):
        next(bar, None)


def _from_somewhere(work: Sequence[Any]) -> list[Any]:
    """In another order in every process that starts: machines that share a folder meet late."""
    begin = os.getpid() % max(len(work), 1)
    return [*work[begin:], *work[:begin]]


def _one(one: Any, folder: Path) -> None:
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    if not one.done(folder):  # another machine may have been faster
        one.run(folder)


def _here(work: Sequence[Any], folder: Path, processes: int) -> Iterator[None]:
    for one in work:
        one.run(folder)
        yield


def _processes(work: Sequence[Any], folder: Path, processes: int) -> Iterator[None]:
    context = multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
    with context.Pool(min(processes, len(work))) as pool:
        yield from pool.imap_unordered(partial(_one, folder=folder), work)
        pool.close()
        pool.join()


def _ray(work: Sequence[Any], folder: Path, processes: int) -> Iterator[None]:
    try:
        import ray
    except ImportError:
        raise ImportError(
            "executor: expected ray for a cluster, which is not installed. "
            "pip install 'fastdistill[ray]'"
        ) from None
    begun = not ray.is_initialized()
    if begun:
        ray.init(log_to_driver=False, logging_level="ERROR")
    gpus = 1 if torch.cuda.is_available() else 0
    remote = ray.remote(num_cpus=1, num_gpus=gpus)(_one)
    try:
        waiting = [remote.remote(one, folder.absolute()) for one in work]
        while waiting:
            ready, waiting = ray.wait(waiting)
            for one in ready:
                ray.get(one)
                yield
    finally:
        if begun:
            ray.shutdown()
