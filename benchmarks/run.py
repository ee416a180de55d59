"""Measuring: contenders in turns, time and memory, rows written after every case.

Contenders take turns (A B C A B C …) in one process, so that drifts in the speed of the machine do
not change their ratios. Short ones run several times per turn, until a slot of time is full.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from .gpus import GPUS
from .memory import peak_mb
from .predict import predict
from .registry import (
    Case,
    Contender,
    DeviceLost,
    GateError,
    Outputs,
    allowed,
    attempt,
    gate,
    run,
)
from .roofline import Rates
from .rows import Row

SLOT_MS = 100.0
MOST_RUNS_PER_TURN = 20


class WallClock:
    name = "wall clock"

    def time(self, work: Callable[[], object]) -> float:
        started = time.perf_counter()
        work()
        return (time.perf_counter() - started) * 1e3

    def runs_per_turn(self, work: Callable[[], object]) -> int:
        return runs_that_fit(min(self.time(work) for _ in range(2)))


def runs_that_fit(ms: float) -> int:
    return min(max(int(SLOT_MS / max(ms, 1e-3)), 1), MOST_RUNS_PER_TURN)


class CudaClock:
    """Time one run with events, after writing a buffer larger than L2."""

    name = "CUDA events, L2 flushed before every run"

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties().L2_cache_size
        self.flush = torch.empty(max(4 * cache, 256 << 20), dtype=torch.uint8, device="cuda")

    def time(self, work: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def runs_per_turn(self, work: Callable[[], object]) -> int:
        self.time(work)
        return runs_that_fit(self.time(work))


def clock() -> WallClock | CudaClock:
    return CudaClock() if torch.cuda.is_available() else WallClock()


class First(NamedTuple):
    """Results of the first run at full size. It is not timed, as recording memory takes time."""

    peak_mb: float
    output_mb: float
    norms: dict[str, float]


def first_run(work: Callable[[], Outputs]) -> First:
    results: list[Outputs] = []
    peak = peak_mb(lambda: results.append(work()))
    outputs = results.pop()
    size = sum(t.nbytes for t in outputs.values()) / 1e6
    norms = {
        name: torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)).item()
        for name, t in outputs.items()
        if t.is_floating_point()
    }
    return First(peak, size, norms)


def agree(case: Case, firsts: dict[str, First]) -> None:
    """Compare exact contenders at full size: the gate's shape cannot show index overflow.

    Norms only: a second copy of dW would count as memory.
    """
    exact = [c.impl for c in case.op.contenders if c.exact and c.impl in firsts]
    for impl in exact:
        for name, norm in firsts[impl].norms.items():
            expected = firsts[exact[0]].norms[name]
            if not abs(norm - expected) <= 2 * allowed(name, case.dtype) * abs(expected):
                raise GateError(
                    f"{case}: the norm of {name} is {norm:.6g} with {impl} and {expected:.6g} with "
                    f"{exact[0]}; nothing of this case is reported"
                )


def measure(
    case: Case,
    repeats: int,
    rates: Rates,
    timer: WallClock | CudaClock,
    say: Callable[[str], None],
) -> list[Row]:
    """Run the gate, measure memory, time contenders in turns; return a row for each."""
    errors, failures = gate(case)
    data, reason = attempt(lambda: case.op.make(case.shape, case.dtype))
    if reason is not None:
        failures.update(dict.fromkeys(errors, f"its inputs could not be made: {reason}"))
    firsts: dict[str, First] = {}
    works: dict[str, Callable[[], Outputs]] = {}
    runs: dict[str, int] = {}
    times: dict[str, list[float]] = {}

    def until_it_fails(impl: str, work: Callable[[], Any]) -> Any:
        result, reason = attempt(work)
        if reason is not None:
            failures[impl] = reason
            works.pop(impl, None)
        return result

    for contender in case.op.contenders:
        impl = contender.impl
        if impl in failures:
            continue
        work: Callable[[], Any] = partial(run, contender, case, data)
        works[impl] = work
        if contender.compiles or contender.prepares or torch.cuda.is_available():
            # Compiling and preparing allocate memory that is not the call's.
            until_it_fails(impl, work)
        first = None if impl in failures else until_it_fails(impl, partial(first_run, work))
        if first is not None:
            firsts[impl] = first
            count = until_it_fails(impl, partial(timer.runs_per_turn, work))
            runs[impl], times[impl] = count or 0, []
    agree(case, firsts)
    for turn in range(repeats):
        for impl, work in list(works.items()):
            for _ in range(runs[impl]):
                ms = until_it_fails(impl, partial(timer.time, work))
                if ms is None:
                    break
                times[impl].append(ms)
        say(f"  {case} turn {turn + 1} of {repeats}")
    rows = []
    for contender in case.op.contenders:
        row = Row.at(case.shape, case.name, contender.impl, case.op.mode, str(case.dtype)[6:])
        rows.append(row)
        row.set_reason(failures.get(contender.impl))
        if row.missing:
            continue
        first = firsts[contender.impl]
        row.peak_mb, row.output_mb = first.peak_mb, first.output_mb
        row.grad_error, row.timer = errors[contender.impl], timer.name
        fill_times(row, times[contender.impl])
        fill_roofline(row, case, contender, rates)
        fill_prediction(row, case, contender, say)
    return rows


def fill_times(row: Row, ms: list[float]) -> None:
    row.ms_median, row.ms_min, row.runs = statistics.median(ms), min(ms), len(ms)
    quantiles = statistics.quantiles(ms, n=5, method="inclusive") if len(ms) > 1 else ms * 4
    row.ms_p20, row.ms_p80 = quantiles[0], quantiles[3]


def take_turns(rows: list[Row], works: dict[str, Callable[[], object]], turns: int) -> None:
    """Time the work of each row in turns, `turns` times; rows without work are unchanged."""
    timer = clock()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(turns):
        for name, work in works.items():
            times[name].append(timer.time(work))
    for row in rows:
        if row.impl in works:
            fill_times(row, times[row.impl])
            row.timer = timer.name


def fill_roofline(row: Row, case: Case, contender: Contender, rates: Rates) -> None:
    assert row.ms_median is not None
    s = case.shape
    passes = case.op.passes if contender.passes is None else contender.passes
    moved = case.op.bytes(s, case.dtype.itemsize)
    gemm = rates.of(contender.rate, case.dtype)
    if gemm is not None:
        row.floor_ms = max(passes * s.N * s.V * s.H / gemm, moved / rates.copy) * 1e3
        row.roofline_share = row.floor_ms / row.ms_median
        row.gemm_tflops = gemm / 1e12
    row.copy_gb_s = rates.copy / 1e9


def fill_prediction(row: Row, case: Case, contender: Contender, say: Callable[[str], None]) -> None:
    """The predicted time, if this GPU and the contender have a model."""
    gpu = GPUS.get(row.machine)
    if gpu is None:
        return
    prediction, reason = attempt(partial(predict, contender, case, gpu))
    if reason is not None:
        say(f"  {case} {contender.impl}: no prediction: {reason}")
    elif prediction is not None:
        row.predicted_ms = prediction.predicted_ms
        row.predicted_host_ms = prediction.host_ms


class Measured(NamedTuple):
    """rows; refused: errors of the gate; not_run: cases skipped for time or a lost GPU."""

    rows: list[Row]
    refused: list[str]
    not_run: list[str]


def measure_all(
    cases: list[Case],
    repeats: int,
    *,
    deadline: float,
    say: Callable[[str], None],
    save: Callable[[list[Row]], None],
    rates: Rates,
    timer: WallClock | CudaClock,
    now: Callable[[], float] = time.monotonic,
) -> Measured:
    """Measure the cases in order until `deadline`; `save` gets all rows after each case."""
    measured = Measured([], [], [])
    device_lost = False
    for case in cases:
        if device_lost or now() >= deadline:
            measured.not_run.append(str(case))
            continue
        try:
            measured.rows.extend(measure(case, repeats, rates, timer, say))
        except GateError as error:
            measured.refused.append(str(error))
            say(f"  refused: {error}")
        except Exception as error:  # of the reference or the inputs: continue with the other cases
            device_lost = isinstance(error, DeviceLost)
            measured.refused.append(f"{case}: {type(error).__name__}: {error}")
            say(f"  {measured.refused[-1]}")
        save(measured.rows)
        gc.collect()  # memory held by frames of a failed contender would count in the next case
        if case.compiled and not device_lost:
            torch.compiler.reset()  # the next shape starts without compiled code
    return measured
