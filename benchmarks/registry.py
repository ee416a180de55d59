"""Cases, a correctness gate before any timing, and rows that say where their numbers come from.

A case names what is computed and on which shape; its contenders compute it in different ways. They
are timed in turns (A B C A B C …) in one process, so that a ratio between them survives a machine
whose speed drifts; peak memory is what a call adds to torch's allocator.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastdistill.backend import describe, package_versions

RESULTS = Path(__file__).parent / "results"
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    N: int
    H: int
    V: int
    K: int


@dataclass(frozen=True)
class Contender:
    """`run(shape's data)` computes the case once; None means not available on this machine."""

    impl: str
    run: Callable[[Any], Gradients | None] | None
    exact: bool = True  # held to the case's budget; a peer that rounds logits is shown, not gated


@dataclass(frozen=True)
class Case:
    op: str
    mode: str  # "forward" | "backward" | "both"
    shape: Shape
    dtype: torch.dtype
    make: Callable[[Shape, torch.dtype], Any]
    truth: Callable[[Any], Gradients]
    contenders: tuple[Contender, ...]
    gate_shape: Shape
    reset: Callable[[Any], None]  # before every run, and not timed
    budget: float = 3e-3


@dataclass
class Row:
    op: str
    impl: str
    mode: str
    N: int
    H: int
    V: int
    K: int
    dtype: str
    missing: bool = False
    ms_median: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    peak_mb: float | None = None
    grad_error: float | None = None
    roofline_share: float | None = None
    machine: str = field(default_factory=lambda: machine())
    versions: dict[str, str | None] = field(default_factory=package_versions)
    commit: str = field(default_factory=lambda: commit())
    command: str = field(default_factory=lambda: command())


class GateError(RuntimeError):
    """A contender's gradients are wrong; no figure of the case is reported."""


def machine() -> str:
    """The kind of machine, without its name."""
    here = describe()
    if here["cuda"]:
        return str(here["cuda"][0]["name"])
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return f"{model}, {here['threads']} threads, {here['cpu_capability']}"


def commit() -> str:
    """The commit measured, marked when the working tree differs from it."""

    def git(*args: str) -> str:
        found = subprocess.run(
            ["git", *args], cwd=RESULTS.parent, capture_output=True, text=True, check=False
        )
        return found.stdout.strip()

    dirty = git("status", "--porcelain", "--untracked-files=no")
    return (git("rev-parse", "HEAD") or "unknown") + (" with changes" if dirty else "")


def command() -> str:
    return shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])


def relative(found: Tensor, truth: Tensor) -> float:
    truth = truth.detach().double()
    error = (found.detach().double() - truth).norm() / truth.norm().clamp(min=1e-300)
    return error.item()


def gradient_error(found: Gradients, truth: Gradients) -> float:
    """The worst relative error ‖g − g₆₄‖ / ‖g₆₄‖ over the gradients."""
    return max(relative(found[name], truth[name]) for name in truth)


def gate(case: Case) -> dict[str, float]:
    """Gradient error of each contender on the gate's shape; raises if an exact one is wrong."""
    data = case.make(case.gate_shape, case.dtype)
    truth = case.truth(data)
    errors = {}
    for contender in case.contenders:
        case.reset(data)
        found = None if contender.run is None else contender.run(data)
        if found is None:
            continue
        errors[contender.impl] = error = gradient_error(found, truth)
        if contender.exact and not error <= case.budget:
            raise GateError(
                f"{case.op} {contender.impl} {case.dtype}: gradient error {error:.3g} against fp64 "
                f"exceeds {case.budget:.3g}; nothing of this case is reported"
            )
    return errors


def peak_mb(run: Callable[[], object]) -> float:
    """MB that `run` adds to what torch has allocated, at its peak.

    On CPU from the allocator's own events: the resident set would also count what the C library
    kept from before, or miss what it takes from there.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(held, default=0) / 1e6


def measure(case: Case, repeats: int, say: Callable[[str], None] = print) -> list[Row]:
    """Gate, then time every contender in turns."""
    errors = gate(case)
    data = case.make(case.shape, case.dtype)
    running = [c for c in case.contenders if c.impl in errors]
    times: dict[str, list[float]] = {c.impl: [] for c in running}
    # The memory pass warms up, and is not timed: recording allocations takes time of its own.
    peaks = {c.impl: peak_mb(functools.partial(c.run, data)) for c in running if c.run}
    for turn in range(repeats):
        for contender in running:
            assert contender.run is not None
            case.reset(data)
            started = time.perf_counter()
            contender.run(data)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[contender.impl].append((time.perf_counter() - started) * 1e3)
        say(f"  {case.op} {str(case.dtype)[6:]} turn {turn + 1} of {repeats}")
    rows = []
    for contender in case.contenders:
        row = Row(
            case.op, contender.impl, case.mode, **asdict(case.shape), dtype=str(case.dtype)[6:]
        )
        rows.append(row)
        if contender.impl not in errors:
            row.missing = True
            continue
        ms = times[contender.impl]
        row.ms_median = statistics.median(ms)
        quantiles = statistics.quantiles(ms, n=5, method="inclusive") if len(ms) > 1 else ms * 4
        row.ms_p20, row.ms_p80 = quantiles[0], quantiles[3]
        row.peak_mb = peaks[contender.impl]
        row.grad_error = errors[contender.impl]
    return rows


def write(rows: list[Row], path: Path) -> None:
    """JSON, through a temporary name: an interrupted run leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    with draft.open("w") as file:
        json.dump([asdict(r) for r in rows], file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def table(rows: list[Row]) -> str:
    """Plain text; time and memory also as a ratio to the first row of the same shape and dtype."""
    form = "{:12} {:16} {:9} {:>9} {:>7} {:>7} {:>6} {:>7}"
    lines = [form.format("op", "impl", "dtype", "ms", "ratio", "MB", "ratio", "error")]
    first: dict[tuple[Any, ...], Row] = {}
    for r in rows:
        base = first.setdefault((r.dtype, r.N, r.V), r)
        if r.missing or r.ms_median is None or base.ms_median is None:
            lines.append(f"{r.op:12} {r.impl:16} {r.dtype:9} missing on this machine")
            continue
        time, ratio = f"{r.ms_median:.1f}", f"{r.ms_median / base.ms_median:.3f}"
        memory = "—" if r.peak_mb is None else f"{r.peak_mb:.0f}"
        share = f"{r.peak_mb / base.peak_mb:.2f}" if r.peak_mb and base.peak_mb else "—"
        error = f"{r.grad_error:.2%}"
        lines.append(form.format(r.op, r.impl, r.dtype, time, ratio, memory, share, error))
    return "\n".join(lines)
