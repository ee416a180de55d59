"""The time that the host costs: our Triton losses and scores, with and without a CUDA graph.

A replayed graph launches the same kernels without Python, so the difference to the plain call is
what the host adds. `note` has the time until the call returns to Python, while the GPU still works.
A profile of the kernels of each op at SHAPE goes to stderr. Everything needs a GPU.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

from .ops import OPS
from .registry import Case, Contender, Missing, attempt, run
from .rows import Row
from .rows import table as table
from .run import fill_prediction, take_turns
from .shapes import Shape, entry

CALLS = {"topk_loss": "triton fused", "scoring": "triton"}  # op: contender
SIZES = (("llama-3.1-8b", 8192), ("qwen3-0.6b", 2048), ("llama-3.1-8b", 512))
SHAPE = entry("topk_loss", *SIZES[0], 64).shape
TURNS = 7


def rows(shape: Shape = SHAPE) -> list[Row]:
    """Measure at SIZES; at any other `shape` than SHAPE only there, for a test run."""
    shapes = [entry("topk_loss", head, n, 64).shape for head, n in SIZES]
    chosen = shapes if shape == SHAPE else [shape]
    return [row for at in chosen for op in CALLS for row in _measure(op, at)]


def _measure(op: str, shape: Shape) -> list[Row]:
    names = (CALLS[op], f"{CALLS[op]}, replayed")
    plain, replayed = (Row.at(shape, op, name, OPS[op].mode) for name in names)
    call, reason = attempt(lambda: _call(op, shape))
    plain.set_reason(reason)
    replay, reason = (None, reason) if call is None else attempt(lambda: _replay(call))
    replayed.set_reason(reason)
    works = {
        row.impl: work for row, work in ((plain, call), (replayed, replay)) if work is not None
    }
    take_turns([plain, replayed], works, TURNS)
    if call is not None:
        contender, case = _case(op, shape)
        fill_prediction(plain, case, contender, partial(print, file=sys.stderr))
        plain.note = f"host {_host_ms(call):.3f} ms"
        if shape == SHAPE:
            print(_profile(call), file=sys.stderr, flush=True)
    return [plain, replayed]


def _case(op: str, shape: Shape) -> tuple[Contender, Case]:
    contender = next(c for c in OPS[op].contenders if c.impl == CALLS[op])
    return contender, Case(op, OPS[op], shape, torch.bfloat16)


def _call(op: str, shape: Shape) -> Callable[[], object]:
    """The contender on its data, after one call that compiles its kernels."""
    if not torch.cuda.is_available():
        raise Missing("the time of the host needs a CUDA device")
    data = OPS[op].make(shape, torch.bfloat16)
    contender, case = _case(op, shape)

    def call() -> object:
        return run(contender, case, data)

    call()
    return call


def _replay(call: Callable[[], object]) -> Callable[[], None]:
    """The call as a CUDA graph; its warm-up is on a side stream, as capture requires."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _host_ms(call: Callable[[], object]) -> float:
    times = []
    for _ in range(TURNS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e3)
    torch.cuda.synchronize()
    return statistics.median(times)


def _profile(call: Callable[[], object]) -> str:
    with torch.profiler.profile(activities=torch.profiler.supported_activities()) as profile:
        call()
        torch.cuda.synchronize()
    return profile.key_averages().table(sort_by="cuda_time_total", row_limit=25)
