"""Peak memory of a call, from torch's allocator."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile


def peak_mb(run: Callable[[], object]) -> float:
    """MB that `run` adds to what torch has allocated, at its peak.

    On CPU it is computed from the events of the allocator: the resident set also depends on memory
    that the C library holds from before.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(held, default=0) / 1e6


def held_mb(*models: nn.Module) -> float:
    """MB of parameters and buffers, each once."""
    tensors = (t for m in models for t in (*m.parameters(), *m.buffers()))
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values()) / 1e6


def release() -> None:
    """Free what is no longer referenced, also on the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
