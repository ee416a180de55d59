"""Runs a task once, in a forked process with at most one fault."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

LONGEST = 120.0  # seconds; a process that runs longer hangs


class Ending(NamedTuple):
    """How a process ended: "done", "error", "signal N" or "hang", and its error."""

    how: str
    error: str = ""
    trace: str = ""


Fault = Callable[[Path], object]  # called in the process with its folder, before the task
Action = Callable[[int], object]  # called with the process id, while it runs


def attempt(
    run: Callable[[Path], None],
    folder: Path,
    fault: Fault | None = None,
    action: Action | None = None,
) -> Ending:
    """Run a task in a child process. `torch` must not have started threads in this one."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _child(run, folder, fault, write)
    os.close(write)
    if action is not None:
        threading.Thread(target=action, args=(pid,), daemon=True).start()
    status = _wait(pid)
    with os.fdopen(read, encoding="utf-8") as pipe:
        text = pipe.read()
    if status is None:
        return Ending("hang")
    if os.WIFSIGNALED(status):
        return Ending(f"signal {os.WTERMSIG(status)}")
    error, _, trace = text.partition("\0")
    return Ending("error" if os.WEXITSTATUS(status) else "done", error, trace)


def _wait(pid: int) -> int | None:
    end = time.monotonic() + LONGEST
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _child(run: Callable[[Path], None], folder: Path, fault: Fault | None, write: int) -> None:
    """Run the task, write its error to the pipe, and end without cleaning up as the parent."""
    code, error, trace = 0, "", ""
    with contextlib.suppress(BaseException):
        for stream in (1, 2):  # native code writes to them, too
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        faulthandler.disable()
        logging.disable()
        torch.set_num_threads(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            if fault is not None:
                fault(folder)
            run(folder)
        except BaseException as failure:
            code, error = 1, f"{type(failure).__name__}: {failure}"
            trace = "".join(traceback.format_exception(failure))
        data = f"{error}\0{trace}".encode(errors="replace")
        while data:
            data = data[os.write(write, data) :]
    os._exit(code)


@contextlib.contextmanager
def background(run: Callable[[], None]) -> Iterator[int]:
    """A forked process beside the campaign, such as a server; gives its id."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            logging.disable()
            torch.set_num_threads(1)
            run()
        os._exit(0)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
