"""The faults. Each kind is a function that yields its cases; servers.py has those of servers."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastdistill.losses.types import TopK

from .attempt import Action, Fault
from .tasks import HOOKS, TASKS

Repair = Callable[[], object]


@contextlib.contextmanager
def plain(folder: Path) -> Iterator[Repair]:
    folder.mkdir()
    yield lambda: None


@dataclass(frozen=True, kw_only=True)
class Case:
    """A fault in a run of a task.

    Attributes:
        error: regular expression for the error of a first run that fails.
        fault: called in the process before the task. action: called with its id while it runs.
        place: makes the folder, and gives what repairs it before the second run.
        must_stop: the first run may not end as if nothing happened.
        loses: the fault itself destroys finished parts.
    """

    kind: str
    task: str
    name: str
    error: str
    fault: Fault | None = None
    action: Action | None = None
    place: Callable[[Path], Any] = plain
    must_stop: bool = False
    loses: bool = False


def at_file_access(n: int, act: Callable[[Path], object]) -> Fault:
    """Return a fault that acts before the n-th access to a file below the folder."""

    def fault(folder: Path) -> None:
        left, root = [n], str(folder)

        def hook(event: str, args: tuple[Any, ...]) -> None:
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
                path = args[0]
                if isinstance(path, (str, bytes)) and os.fsdecode(path).startswith(root):
                    left[0] -= 1
                    if left[0] == 0:
                        act(folder)

        sys.addaudithook(hook)

    return fault


# ----------------------------------------------------------------------------------------- killed

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def _send(pid: int, number: int, moment: float = 0.0) -> None:
    time.sleep(moment)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def kills(seconds: dict[str, float], rng: random.Random, count: int) -> Iterator[Case]:
    """A signal at a random moment of a task's usual duration, or before an access to a file."""
    for task, number, _ in itertools.product(TASKS, SIGNALS, range(count)):
        moment = rng.uniform(0, seconds[task])
        yield Case(
            kind="killed at a random moment",
            task=task,
            name=f"{number.name} after {moment:.2f} s",
            error="SystemExit: 143|KeyboardInterrupt",
            action=partial(_send, number=number, moment=moment),
        )
    for task, _ in itertools.product(TASKS, range(count)):
        yield kill_at(task, rng.randrange(1, 60))


def kill_at(task: str, n: int) -> Case:
    return Case(
        kind="killed at an access to a file",
        task=task,
        name=f"SIGKILL at access {n}",
        error="SIGKILL",
        fault=at_file_access(n, lambda _: os.kill(os.getpid(), signal.SIGKILL)),
    )


# ------------------------------------------------------------------------------------------- disk


def _mount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


def _remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


@contextlib.contextmanager
def small_disk(folder: Path, size: int = 0) -> Iterator[Repair]:
    """A tmpfs of so many bytes, which grows for the second run. Needs root."""
    folder.mkdir()
    _mount(folder, f"size={size}")
    try:
        yield partial(_remount, folder, "size=64m")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def read_only_mount(folder: Path) -> Iterator[Repair]:
    folder.mkdir()
    _mount(folder, "size=64m,ro")
    try:
        yield partial(_remount, folder, "rw")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def immutable(folder: Path) -> Iterator[Repair]:
    folder.mkdir()
    subprocess.run(["chattr", "+i", str(folder)], check=True)
    repair = partial(subprocess.run, ["chattr", "-i", str(folder)], check=True)
    try:
        yield repair
    finally:
        repair()


def full_disks(sizes: dict[str, int], rng: random.Random, count: int) -> Iterator[Case]:
    for task, _ in itertools.product(TASKS, range(count)):
        size = int(sizes[task] * rng.uniform(0.05, 1.0))
        yield Case(
            kind="disk full",
            task=task,
            name=f"{size:,} bytes",
            error="No space left|free space",
            place=partial(small_disk, size=size),
        )


def _nobody(folder: Path) -> None:
    os.setgid(65534)
    os.setuid(65534)


def read_only(rng: random.Random, count: int) -> Iterator[Case]:
    words = "Read-only|Permission denied|not permitted|not writable"
    common: dict[str, Any] = {"kind": "read-only", "error": words}
    for task in TASKS:
        yield Case(task=task, name="mount", place=read_only_mount, must_stop=True, **common)
        yield Case(task=task, name="chattr +i", place=immutable, must_stop=True, **common)
        yield Case(task=task, name="another user", fault=_nobody, must_stop=True, **common)
        for _ in range(count):
            n = rng.randrange(2, 40)
            fault = at_file_access(n, _nobody)
            yield Case(task=task, name=f"another user from access {n}", fault=fault, **common)


# ---------------------------------------------------------------------------------- two processes


def two_processes(seconds: dict[str, float], rng: random.Random, count: int) -> Iterator[Case]:
    """A second process with the same task in the same folder, started a moment later."""
    for task, _ in itertools.product(TASKS, range(count)):
        moment = rng.uniform(0, seconds[task] / 2)

        def second(folder: Path, task: str = task, moment: float = moment) -> None:
            if os.fork() == 0:
                signal.alarm(60)
                with contextlib.suppress(BaseException):
                    time.sleep(moment)
                    TASKS[task].run(folder)
                os._exit(0)

        yield Case(
            kind="two processes",
            task=task,
            name=f"the second after {moment:.2f} s",
            error="another process|new or empty folder",
            fault=second,
        )


# ---------------------------------------------------------------------------------- wrong numbers

TENSORS = ("embed_tokens", "q_proj", "down_proj", "norm", "lm_head")
VALUES = (math.nan, math.inf, -math.inf)


@torch.no_grad()
def _spoil(model: Any, tensor: str, value: float) -> Any:
    parameter = next(p for n, p in model.named_parameters() if tensor in n)
    parameter.view(-1)[0] = value
    return model


def _hook(name: str, spoil: Callable[[Any], Any], folder: Path) -> None:
    HOOKS[name] = spoil


def wrong_weights() -> Iterator[Case]:
    words = "NaN|infinit|finite"
    for tensor, value in itertools.product(TENSORS, VALUES):
        spoil = partial(_spoil, tensor=tensor, value=value)
        name = f"{tensor} has {value}"
        for task in ("train", "quantize", "organisms"):
            if task == "quantize" and tensor in ("embed_tokens", "norm", "lm_head"):
                continue  # are not quantized
            fault, kind = partial(_hook, "student", spoil), "weights of the student"
            yield Case(kind=kind, task=task, name=name, error=words, fault=fault, must_stop=True)
        for task in ("train", "cache"):
            # The embedding of an id that no row has changes no answer.
            fault, kind = (
                partial(_hook, "teacher", partial(_of_teacher, spoil=spoil)),
                "weights of the teacher",
            )
            harmful = tensor != "embed_tokens"
            yield Case(kind=kind, task=task, name=name, error=words, fault=fault, must_stop=harmful)


def _of_teacher(teacher: Any, spoil: Callable[[Any], Any]) -> Any:
    spoil(teacher.model)
    return teacher


LIES: dict[str, Callable[[Any], Any]] = {
    "NaN": lambda a: a._replace(logprobs=a.logprobs * math.nan),
    "+inf": lambda a: a._replace(logprobs=a.logprobs + math.inf),
    "positive": lambda a: a._replace(logprobs=a.logprobs.abs() + 1),
    "all -inf, tail -inf": lambda a: a._replace(
        logprobs=torch.full_like(a.logprobs, -math.inf),
        log_tail=torch.full_like(a.log_tail, -math.inf),
    ),
    "tail 0 beside full mass": lambda a: a._replace(
        logprobs=a.logprobs.log_softmax(-1),
        log_tail=torch.zeros_like(a.log_tail),
    ),
    "one id in every slot": lambda a: a._replace(ids=a.ids[..., :1].expand_as(a.ids).clone()),
    "a tail of NaN": lambda a: a._replace(log_tail=a.log_tail * math.nan),
    "negative ids": lambda a: a._replace(ids=-2 - a.ids),
    "ids beyond the vocabulary": lambda a: a._replace(ids=a.ids + 1_000_000),
    "too few positions": lambda a: TopK(
        a.ids[..., :-1, :], a.logprobs[..., :-1, :], a.log_tail[..., :-1], a.temperature
    ),
    "more slots than k": lambda a: a._replace(
        ids=torch.cat([a.ids, a.ids], -1), logprobs=torch.cat([a.logprobs, a.logprobs], -1)
    ),
    "None": lambda a: None,
    "logits": lambda a: a._replace(logprobs=a.logprobs * 10 + 50),
}


def _bad_from(call: int, lie: Callable[[Any], Any], teacher: Any) -> Any:
    """Return the teacher, which lies after so many of its calls."""
    left, inside = [call], [False]
    for name in ("topk", "topk_at"):  # the first calls the second

        def wrapped(*args: Any, honest: Any = getattr(teacher, name), **options: Any) -> Any:  # noqa: B008
            outermost, inside[0] = not inside[0], True
            try:
                answer = honest(*args, **options)
            finally:
                inside[0] = not outermost
            left[0] -= outermost
            if left[0] >= 0 or not outermost:
                return answer
            return [lie(a) for a in answer] if isinstance(answer, list) else lie(answer)

        setattr(teacher, name, wrapped)
    return teacher


def bad_teachers(rng: random.Random) -> Iterator[Case]:
    for task, (name, lie) in itertools.product(("train", "cache"), LIES.items()):
        for call in (1, rng.randrange(2, 8)):
            yield Case(
                kind="teacher that goes bad",
                task=task,
                name=f"{name}, after {call} batches",
                error="teacher: expected|expected",
                fault=partial(_hook, "teacher", partial(_bad_from, call, lie)),
                must_stop=True,
            )


# ----------------------------------------------------------------------------------------- memory

OUT_OF_MEMORY: dict[str, Callable[[], Exception]] = {
    "OutOfMemoryError": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
    "allocator of the CPU": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"
    ),
    "MemoryError": lambda: MemoryError(),
}


def _no_memory_at(call: int, error: Callable[[], Exception], folder: Path) -> None:
    """The n-th product of a linear layer, or conversion of its weights, gets no memory."""
    left = [call]

    def wrap(function: Any) -> Any:
        def called(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise error()
            return function(*args, **options)

        return called

    torch.nn.functional.linear = wrap(torch.nn.functional.linear)
    torch.Tensor.contiguous = wrap(torch.Tensor.contiguous)  # type: ignore[method-assign]


def _address_space(more: int, folder: Path) -> None:
    """Allow so many bytes beyond what the process has mapped."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def out_of_memory(rng: random.Random, count: int) -> Iterator[Case]:
    words = "[Mm]emory|alloc"
    for task in TASKS:
        for name, error in OUT_OF_MEMORY.items():
            call = rng.randrange(2, 200)
            yield Case(
                kind="out of memory",
                task=task,
                name=f"{name} at call {call}",
                error=words,
                fault=partial(_no_memory_at, call, error),
            )
        for _ in range(count):
            more = int(rng.uniform(0, 24)) << 20
            yield Case(
                kind="out of memory",
                task=task,
                name=f"RLIMIT_AS of {more >> 20} MiB more",
                error=f"{words}|start new thread|Cannot allocate",
                fault=partial(_address_space, more),
            )


# ---------------------------------------------------------------------------------- files in use


def _remove(pattern: str, folder: Path) -> None:
    for path in sorted(folder.glob(pattern), reverse=True):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _cut(pattern: str, folder: Path) -> None:
    for path in folder.glob(pattern):
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)


REMOVED = {
    "train": ("run", "run/checkpoint-*", "run/checkpoint-*/finished.json"),
    "train from a cache": ("cache", "cache/*.safetensors", "cache/manifest.json"),
    "cache": ("cache", "cache/*.safetensors", "cache/settings.json", "cache/.building-0"),
    "quantize": (".int8.*",),
    "experiment": ("runs", "runs/*.json", "sources"),
    "organisms": ("world-*", "world-*/base"),
}


def deleted_files(rng: random.Random, count: int) -> Iterator[Case]:
    for task, patterns in REMOVED.items():
        for pattern, _ in itertools.product(patterns, range(count)):
            n = rng.randrange(5, 60)
            yield Case(
                kind="files deleted in use",
                task=task,
                name=f"{pattern} at access {n}",
                error="expected|No such file|damaged|not found|missing|stopped before",
                fault=at_file_access(n, partial(_remove, pattern)),
                loses=True,
            )


# ----------------------------------------------------------------------------------------- clocks


def _jump(at: float, by: float, folder: Path) -> None:
    """Every clock of `time` jumps by so many seconds after the given number of seconds."""
    for name in ("time", "monotonic", "perf_counter"):
        clock, start = getattr(time, name), getattr(time, name)()
        setattr(time, name, lambda c=clock, s=start: c() + (by if c() - s > at else 0.0))


def _backwards(folder: Path) -> None:
    for name in ("time", "monotonic", "perf_counter"):
        clock, start = getattr(time, name), getattr(time, name)()
        setattr(time, name, lambda c=clock, s=start: 2 * s - c())


def _stopped(folder: Path) -> None:
    for name in ("time", "monotonic", "perf_counter"):
        setattr(time, name, partial(float, getattr(time, name)()))


def _older_files(folder: Path) -> None:
    """The file system's clock goes back: each new file is older than those before it."""
    seconds = itertools.count(2_000_000_000, -1000)
    fsync = os.fsync

    def older(handle: int) -> None:
        fsync(handle)
        with contextlib.suppress(OSError):
            os.utime(f"/proc/self/fd/{handle}", (0, next(seconds)))

    os.fsync = older  # type: ignore[assignment]


def clock_jumps(seconds: dict[str, float]) -> Iterator[Case]:
    for task in TASKS:
        faults: dict[str, Fault] = {
            "an hour on": partial(_jump, seconds[task] / 3, 3600.0),
            "30 years on": partial(_jump, seconds[task] / 3, 1e9),
            "30 years back": partial(_jump, seconds[task] / 3, -1e9),
            "backwards all the time": _backwards,
            "stopped": _stopped,
            "files ever older": _older_files,
        }
        for name, fault in faults.items():
            yield Case(kind="clock", task=task, name=name, error="no error", fault=fault)


# ------------------------------------------------------------------------------------------- ranks


def dead_ranks(rng: random.Random, count: int) -> Iterator[Case]:
    """One of two gloo processes is killed; the other must end, and both resume together."""
    for number in range(count):
        rank, moment = number % 2, rng.uniform(0.5, 4.0)
        yield Case(
            kind="a rank that dies",
            task="two ranks",
            name=f"rank {rank} after {moment:.2f} s",
            error="signal 9",
            fault=partial(_dies, rank, moment),
        )


def _dies(rank: int, moment: float, folder: Path) -> None:
    def begin(own: int) -> None:
        if own == rank:
            threading.Timer(moment, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()

    HOOKS["rank"] = begin
